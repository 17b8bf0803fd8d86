"""What people and programs talk to: the routes of the service.

K answers of a question, D embedding width.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from fastapi import FastAPI, File, Form, HTTPException, Query, Request, Response, UploadFile
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel

from qure_core.base.errors import input_error
from qure_core.search.index import Found, Index
from qure_core.search.likely import LOOKED_AT, likely_matches
from qure_core.serve.guard import Guard
from qure_core.serve.options import Options, Version
from qure_core.serve.pages import SIDES, begun_app, image_path, make_thumbnail, serve_page
from qure_core.serve.replicas import Asked, Encoded, Wanted

MOST = 1000  # answers that can be asked for, page by page
_SHOWN_VALUES = 200  # of a metadata column, that the page offers
_TEXT = 2000  # characters


class Backend(Protocol):
    """The replicas, as the ingress calls them."""

    async def embed(self, asked: Asked) -> Encoded: ...

    async def search(
        self, version: Version, query: np.ndarray, wanted: Wanted
    ) -> tuple[np.ndarray, float]: ...

    async def tokens(
        self, version: Version, query: np.ndarray, places: Sequence[int]
    ) -> list[int]: ...

    async def attention(self, version: Version, uri: str, token: int) -> dict[str, Any] | str: ...

    async def ready(self, version: Version) -> None: ...


class Result(BaseModel):
    """An image that was found; ``rank`` counts from 1, ``image`` is where its picture is."""

    rank: int
    id: str
    score: float
    category: str | None
    metadata: dict[str, str]
    image: str
    token: int | None = None


class Times(BaseModel):
    """Milliseconds: of encoding the question, of searching, and of all."""

    encode: float
    search: float
    total: float


class Answers(BaseModel):
    """``likely`` is how many of the best answers stand above the steepest drop of their scores;
    ``images`` how many the index has."""

    version: str
    images: int
    likely: int
    results: list[Result]
    times_ms: Times


class _Now:
    """The version that is answered from, and what the ingress itself needs of it."""

    def __init__(self, version: Version, index: Index) -> None:
        self.version, self.index, self.manifest = version, index, version.manifest
        index.holds("")  # what looks ids up is made now, not by the first question


class Service:
    """The routes' state: the version in use, which a look at the index now and then renews."""

    def __init__(self, options: Options, backend: Backend) -> None:
        self.options, self.backend = options, backend
        self.now: _Now | None = None
        registry = self.registry = CollectorRegistry()
        self.asked = Counter(
            "qure_questions", "Questions answered, by status", ["status"], registry=registry
        )
        buckets = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
        self.took = Histogram(
            "qure_seconds",
            "Seconds of a question, by part",
            ["part"],
            registry=registry,
            buckets=buckets,
        )
        self.images = Gauge("qure_images", "Images of the index", registry=registry)
        self.changes = Counter("qure_versions", "Versions taken up", registry=registry)

    async def watch(self) -> None:
        """Take up the newest version, now and whenever there is another one."""
        while True:
            try:
                await self._renew()
            except Exception as error:  # said, and tried again: the version in use goes on
                problem = str(input_error(error) or error)
                print(f"[serve] no newer version: {problem}", flush=True)
            await asyncio.sleep(self.options.poll)

    async def _renew(self) -> None:
        version = await asyncio.to_thread(Version.newest, self.options.index)
        if self.now is not None and self.now.version == version:
            return
        index = await asyncio.to_thread(
            Index.version, self.options.index, version.manifest, self.options.cache
        )
        now = await asyncio.to_thread(_Now, version, index)
        await self.backend.ready(version)
        self.now = now
        self.images.set(len(index))
        self.changes.inc()
        print(f"[serve] version {version.name}: {len(index):,} images", flush=True)

    def current(self) -> _Now:
        if self.now is None:
            raise HTTPException(503, "the index is being opened", {"Retry-After": "1"})
        return self.now

    async def picture(self, image_id: str, side: int) -> tuple[bytes, str]:
        """An indexed image's thumbnail and its name for caches."""
        now = self.current()
        row = _row(now.index, image_id)
        tag = f'"{row["sha256"][:16]}-{side}"'
        pixels, limit = now.manifest["pixels"], now.manifest["max_image_pixels"]
        return await make_thumbnail(row["uri"], row["sha256"], side, pixels, limit), tag


def _place(index: Index, image_id: str) -> int:
    if not index.holds(image_id):
        raise HTTPException(404, f"the index has no image {image_id[:200]!r}")
    return index.places([image_id])[0]


def _row(index: Index, image_id: str) -> dict[str, Any]:
    return index.row(_place(index, image_id))


def _checked(
    index: Index, category: str | None, where: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """Filters, of which those that the index does not know are refused."""
    pairs = []
    for text in where:
        column, equals, value = text.partition("=")
        if not equals:
            raise HTTPException(422, f"where: {text[:200]!r} is not column=value")
        pairs.append((column, value))
    if category is not None and category not in index.categories:
        raise HTTPException(404, f"the index has no category {category[:200]!r}")
    for column, value in pairs:
        if column not in index.metadata or value not in index.values[column]:
            raise HTTPException(404, f"no image has {column[:200]!r} {value[:200]!r}")
    return tuple(pairs)


@dataclass(frozen=True)
class Served:
    """The service's application, and the state behind its routes."""

    app: Guard
    service: Service


def make_app(options: Options, backend: Backend) -> Served:
    """The service's application."""
    service = Service(options, backend)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watcher = asyncio.create_task(service.watch())
        yield
        watcher.cancel()

    app = begun_app(
        options,
        "service",
        title="Composed image retrieval",
        description="An image and a few words: the images of a corpus that fit best.",
        lifespan=lifespan,
    )
    guard = Guard(app, options)

    @app.get("/readyz", include_in_schema=False)
    async def readyz(response: Response) -> dict[str, Any]:
        response.status_code = 503 if service.now is None else 200
        return {
            "ready": service.now is not None,
            "version": service.now and service.now.version.name,
        }

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/index")
    async def index() -> dict[str, Any]:
        """What is searched: how many images, and what they can be filtered by."""
        now = service.current()
        found = now.index
        return {
            "version": now.version.name,
            "images": len(found),
            "categories": found.categories,
            "metadata": {name: own[:_SHOWN_VALUES] for name, own in found.values.items()},
            "search": "faiss" if now.manifest.get("faiss") else "exact",
            "recall": (now.manifest.get("faiss") or {}).get("recall"),
        }

    @app.get("/v1/images")
    async def images(
        count: Annotated[int, Query(ge=1, le=200)] = 24,
        seed: Annotated[int, Query(ge=0)] = 0,
        category: str | None = None,
    ) -> list[dict[str, Any]]:
        """Some images of the corpus, drawn by ``seed``, to begin from."""
        found = service.current().index
        _checked(found, category, ())
        allowed = found.allowed(category)
        places = range(len(found)) if allowed is None else np.flatnonzero(allowed).tolist()
        drawn = random.Random(seed).sample(places, min(count, len(places)))
        return [{"id": found.ids[place], "image": image_path(found.ids[place])} for place in drawn]

    @app.get("/v1/images/{image_id:path}", response_class=Response)
    async def image(
        image_id: str,
        request: Request,
        side: Annotated[int, Query(ge=SIDES[0], le=SIDES[1])] = 256,
    ) -> Response:
        """A picture of the index, no larger than ``side`` pixels."""
        made, tag = await service.picture(image_id, side)
        headers = {"etag": tag, "cache-control": "private, max-age=3600"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(made, media_type="image/jpeg", headers=headers)

    @app.get("/v1/attention/{image_id:path}")
    async def attention(
        image_id: str, token: Annotated[int, Query(ge=0, le=4096)]
    ) -> dict[str, Any]:
        """Where an image's vector looked at its picture: the cross-attention of the last layer, as
        shares of its largest value, and the box of the picture that the grid covers. It is no proof
        of why an image was found."""
        now = service.current()
        uri = _row(now.index, image_id)["uri"]
        found = await backend.attention(now.version, uri, token)
        if isinstance(found, str):
            raise HTTPException(404, found)
        return found

    @app.post("/v1/search")
    async def search(
        image: Annotated[UploadFile | None, File(description="reference image")] = None,
        image_id: Annotated[
            str | None, Form(max_length=1000, description="or the id of an image of the index")
        ] = None,
        text: Annotated[
            str, Form(max_length=_TEXT, description="what is to be different, or wanted")
        ] = "",
        top: Annotated[int, Form(ge=1, le=MOST)] = 20,
        offset: Annotated[int, Form(ge=0, le=MOST)] = 0,
        category: Annotated[str | None, Form(max_length=1000)] = None,
        where: Annotated[list[str], Form(description="column=value")] = [],  # noqa: B006
        exclude: Annotated[list[str], Form(description="ids that are not to be found")] = [],  # noqa: B006
        explain: Annotated[bool, Form(description="say which vector of each image won")] = False,
        exact: Annotated[bool, Form(description="score every image")] = False,
    ) -> Answers:
        """The ``top`` images, after the first ``offset``, that fit a reference image changed as the
        text says, or one of both alone."""
        started = time.perf_counter()
        now = service.current()
        found = now.index
        if offset + top > MOST:
            raise HTTPException(422, f"offset and top: no more than {MOST} answers are given")
        upload = await image.read() if image is not None and image.filename else None
        if upload is not None and image_id is not None:
            raise HTTPException(422, "give image or image_id, not both")
        if upload is None and not image_id and not text.strip():
            raise HTTPException(422, "give an image, a text, or both")
        pairs = _checked(found, category or None, where)
        places = [_place(found, name) for name in exclude]
        uri = None
        if image_id:
            row = _row(found, image_id)
            uri = row["uri"]
            places += found.same_content(row["sha256"])
        if upload is not None:
            places += found.same_content(hashlib.sha256(upload).hexdigest())
        encoded = await backend.embed(Asked(now.version, text.strip(), upload, uri))
        if encoded.query is None:
            service.asked.labels("refused").inc()
            raise HTTPException(422, encoded.problem)
        wanted = Wanted(max(offset + top, LOOKED_AT), tuple(places), category or None, pairs, exact)
        keys, seconds = await backend.search(now.version, encoded.query, wanted)
        best = Found.of_keys(torch.from_numpy(keys)[None])
        there = best.place_QK[0] >= 0
        own, scores = best.place_QK[0][there], best.score_QK[0][there]
        shown = slice(offset, offset + top)
        tokens: list[int | None] = [None] * len(own[shown])
        if explain and len(own[shown]):
            tokens = list(await backend.tokens(now.version, encoded.query, own[shown].tolist()))
        total = time.perf_counter() - started
        for part, value in (("encode", encoded.seconds), ("search", seconds), ("total", total)):
            service.took.labels(part).observe(value)
        service.asked.labels("answered").inc()
        rows = [found.row(place) for place in own[shown].tolist()]
        return Answers(
            version=now.version.name,
            images=len(found),
            likely=likely_matches(scores),
            results=[
                Result(
                    rank=rank,
                    id=row["image_id"],
                    score=float(score),
                    category=row["category"],
                    metadata=dict(row["metadata"]),
                    image=image_path(row["image_id"]),
                    token=token,
                )
                for rank, (row, score, token) in enumerate(
                    zip(rows, scores[shown], tokens, strict=True), offset + 1
                )
            ],
            times_ms=Times(
                encode=1000 * encoded.seconds, search=1000 * seconds, total=1000 * total
            ),
        )

    serve_page(app, "index.html", "page.js", "page.css")
    return Served(guard, service)
