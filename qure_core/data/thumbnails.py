"""Small copies of images, for people to look at."""

from __future__ import annotations

import io

from PIL import Image


def thumbnail_bytes(image: Image.Image, side: int) -> bytes:
    """A JPEG of ``image`` within ``side`` pixels each way, on white where it is transparent."""
    rgba = image.convert("RGBA")
    rgba.thumbnail((side, side))
    flat = Image.new("RGB", rgba.size, "white")
    flat.paste(rgba, mask=rgba.getchannel("A"))
    buffer = io.BytesIO()
    flat.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
