"""What the search service and the study share: an application's beginnings, pictures, and pages."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from importlib import resources
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from qure_core.base.errors import InputError
from qure_core.data.images import load_image
from qure_core.data.thumbnails import thumbnail_bytes
from qure_core.serve.guard import COOKIE
from qure_core.serve.options import Options

SIDES = (64, 512)  # of a thumbnail, pixels


def begun_app(options: Options, what: str, **about: Any) -> FastAPI:
    """An application that is alive, takes the token as a cookie, and says no more of its faults
    than that there was one; ``what`` it is called before people."""
    app = FastAPI(
        version="1",
        docs_url=None,  # it would load its parts from elsewhere
        redoc_url=None,
        **about,
    )

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        print(f"[serve] {type(error).__name__}: {error}", flush=True)
        return JSONResponse({"detail": f"the {what} failed; its log says why"}, 500)

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.post("/v1/session", include_in_schema=False)
    async def session(response: Response) -> dict[str, str]:
        """Whoever sent the token keeps it as a cookie, with which pictures are asked for too."""
        if options.token is not None:
            response.set_cookie(COOKIE, options.token, httponly=True, samesite="strict")
        return {"status": "welcome"}

    return app


async def make_thumbnail(uri: str, sha256: str, side: int, pixels: Any, limit: int) -> bytes:
    """A picture within ``side`` pixels; 404 if it cannot be read."""
    try:
        return await asyncio.to_thread(_thumbnail, uri, sha256, side, pixels, limit)
    except (InputError, OSError) as error:
        print(f"[serve] {error}", flush=True)
        raise HTTPException(404, "the picture of this id cannot be read") from None


@lru_cache(maxsize=4096)
def _thumbnail(uri: str, sha256: str, side: int, pixels: Any, limit: int) -> bytes:
    return thumbnail_bytes(load_image(uri, limit, pixels), side)


def image_path(image_id: str) -> str:
    """The path of an image's picture."""
    return f"/v1/images/{quote(image_id, safe='/')}"


def serve_page(app: FastAPI, html: str, script: str, style: str) -> None:
    """Add a page of the package's, by the names of its files; styles that all share come first."""
    folder = resources.files("qure_core.serve") / "page"
    for path, names, kind in (
        ("/", [html], "text/html; charset=utf-8"),
        ("/page.js", [script], "text/javascript; charset=utf-8"),
        ("/page.css", ["common.css", style], "text/css; charset=utf-8"),
        ("/icon.svg", ["icon.svg"], "image/svg+xml"),
    ):
        content = b"".join((folder / name).read_bytes() for name in names)

        def serve_file(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

        app.get(path, include_in_schema=False)(serve_file)
