"""The processes behind the ingress: those that encode questions, and those that search.

Shapes: D embedding width, K answers.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from ray import serve

from qure_core.base.errors import InputError
from qure_core.data.images import decode_stored, load_image, seen_box
from qure_core.embeddings.encoder import Encoder
from qure_core.runtime.resources import granted_device
from qure_core.search.index import Index, checkpoint_of
from qure_core.serve.options import Options, Version

T = TypeVar("T")
_KEPT = 2  # versions: the one that is asked, and the one before or after
_BATCH, _WAIT = 16, 0.0  # questions encoded together: those that wait; none waits for others


class Opened(Generic[T]):
    """What has been opened of the last few versions, by name; the longest unused is closed."""

    def __init__(self, make: Callable[[Version], T], name: Callable[[Version], str]) -> None:
        self._make, self._name = make, name
        self._made: OrderedDict[str, T] = OrderedDict()

    def __call__(self, version: Version) -> T:
        name = self._name(version)
        if name not in self._made:
            self._made[name] = self._make(version)
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(name)
        return self._made[name]


@dataclass(frozen=True)
class Asked:
    """A question to encode: the bytes of an upload, or the URI of an image of the index, with a
    text; without either, a text alone."""

    version: Version
    text: str
    upload: bytes | None = None
    uri: str | None = None


@dataclass(frozen=True)
class Encoded:
    """A question's embedding [1, D], or in words why there is none; seconds that it took."""

    query: np.ndarray | None
    problem: str | None
    seconds: float


class Encoders:
    """Replica: encodes questions, several at a time where several wait."""

    def __init__(self, options: Options, threads: int) -> None:
        self.options = options
        torch.set_num_threads(threads)
        self._opened = Opened(self._open, lambda version: version.manifest["checkpoint_digest"])
        self._decoders = ThreadPoolExecutor(4)

    def _open(self, version: Version) -> Encoder:
        manifest = version.manifest
        options = self.options
        return Encoder.load(
            checkpoint_of(options.index, manifest, options.checkpoint),
            granted_device(),
            precision=manifest["vision_precision"],
            max_pixels=manifest["max_image_pixels"],
        )

    @serve.batch(max_batch_size=_BATCH, batch_wait_timeout_s=_WAIT)
    async def embed(self, asked: list[Asked]) -> list[Encoded]:
        """Embeddings of questions; what is wrong with one is no matter for the others."""
        return await asyncio.to_thread(self._embed, asked)

    def _embed(self, asked: list[Asked]) -> list[Encoded]:
        started = perf_counter()
        images = list(self._decoders.map(self._image, asked))
        query: list[np.ndarray | None] = [None] * len(asked)
        problem = [image if isinstance(image, str) else None for image in images]
        for pictures in (False, True):
            for version in {one.version for one in asked}:
                rows = [
                    row
                    for row, one in enumerate(asked)
                    if one.version == version
                    and problem[row] is None
                    and (images[row] is not None) == pictures
                ]
                if rows:
                    encoder, texts = self._opened(version), [asked[row].text for row in rows]
                    given = [images[row] for row in rows] if pictures else None
                    made = encoder.encode_queries(given, texts, show_progress=False)  # type: ignore[arg-type]
                    for row, query_D in zip(rows, made.numpy(), strict=True):
                        query[row] = query_D[None]
        seconds = perf_counter() - started
        return [Encoded(q, p, seconds) for q, p in zip(query, problem, strict=True)]

    def _image(self, asked: Asked) -> Image.Image | str | None:
        """A question's decoded image, or in words, which name no file, why it is none."""
        manifest = asked.version.manifest
        limit = manifest["max_image_pixels"]
        try:
            if asked.upload is not None:
                return decode_stored(asked.upload, "the image", limit)
            if asked.uri is not None:
                return load_image(asked.uri, limit, manifest["pixels"])
        except InputError as error:
            if asked.upload is not None:
                return str(error).split(";")[0]
            print(f"[serve] {error}", flush=True)
            return "the picture of this id cannot be read where the index found it"
        return None

    async def attention(self, version: Version, uri: str, token: int) -> dict[str, Any] | str:
        """Where an image's vector looked: a grid of shares of the largest, and the box of the
        picture that it covers; in words if it cannot be told."""

        def look() -> dict[str, Any] | str:
            manifest = version.manifest
            try:
                image = load_image(uri, manifest["max_image_pixels"], manifest["pixels"])
            except InputError as error:
                print(f"[serve] {error}", flush=True)
                return "the picture cannot be read"
            try:
                grid = self._opened(version).attention_grids(image)
            except InputError as error:
                return str(error)  # of the model: the image is in memory, and has no path
            own = grid[min(token, len(grid) - 1)]
            return {
                "grid": (own / own.max().clamp_min(1e-12)).tolist(),
                "share": float(own.sum()),
                "box": seen_box(*image.size),
            }

        return await asyncio.to_thread(look)

    async def ready(self, version: Version) -> bool:
        """Open what a version needs."""
        await asyncio.to_thread(self._opened, version)
        return True


@dataclass(frozen=True)
class Wanted:
    """What is sought: places that a query is not to find, and what those it may find are."""

    top: int
    excluded: tuple[int, ...] = ()
    category: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    exact: bool = False


class Shares:
    """Replica: searches every nth part of an index, memory-mapped."""

    def __init__(self, options: Options, share: tuple[int, int], threads: int) -> None:
        self.options, self.share = options, share
        torch.set_num_threads(threads)
        self._opened = Opened(self._open, lambda version: version.name)

    def _open(self, version: Version) -> Index:
        options = self.options
        index = Index.version(options.index, version.manifest, options.cache, self.share)
        assert index.parts is not None  # mapped now: an older version's files may go later
        return index

    async def search(
        self, version: Version, query: np.ndarray, wanted: Wanted
    ) -> tuple[np.ndarray, float]:
        """Ascending keys [K] of the best images of this share, and the seconds that it took."""
        return await asyncio.to_thread(self._search, version, query, wanted)

    def _search(
        self, version: Version, query: np.ndarray, wanted: Wanted
    ) -> tuple[np.ndarray, float]:
        index = self._opened(version)
        started = perf_counter()
        allowed = index.allowed(wanted.category, wanted.where)
        effort = None if wanted.exact else index.effort
        query_QD = torch.from_numpy(query.copy())
        keys = index.best(query_QD, wanted.top, [list(wanted.excluded)], allowed, effort)
        return keys[0].numpy(), perf_counter() - started

    async def tokens(self, version: Version, query: np.ndarray, places: Sequence[int]) -> list[int]:
        """Which vector of each image wins for a query."""

        def find() -> list[int]:
            index = self._opened(version)
            own = np.asarray(places, np.int64)[None]
            return index.winning_tokens(torch.from_numpy(query.copy()), own)[0].tolist()

        return await asyncio.to_thread(find)

    async def ready(self, version: Version) -> bool:
        """Open what a version needs."""
        await asyncio.to_thread(self._opened, version)
        return True
