"""Image decoding and BLIP-2's preprocessing, with PIL's own resampling.

The released program builds this from torchvision's PIL transforms: pad to a 1.25 aspect ratio with
black, bicubic resize of the short side, centre crop, convert to RGB, scale to [0, 1], normalise.
"""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from qure_core import storage
from qure_core.base.config import Pixels
from qure_core.base.errors import InputError
from qure_core.data import packed
from qure_core.data.pixels import upright

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TARGET_RATIO = 1.25
# Of what Pillow reads, the kinds that hold pixels: some others start programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
BYTES_PER_PIXEL = 8
"""A file larger than this for each allowed pixel (16 bits in four channels) is no image."""

# The bound is `decode`'s own, from a setting; Pillow's would answer first, without naming it.
Image.MAX_IMAGE_PIXELS = None
# Editors write megabytes of text (XMP, drawings) beside the pixels, which Pillow refuses.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 * 2**20


def decode(data: bytes, uri: str, max_pixels: int, pixels: Pixels) -> Image.Image:
    """Decode a whole image, or raise `InputError` naming ``uri``.

    ``max_pixels`` bounds width x height before any pixel is decoded, and four times it what a
    very long image is padded to. ``pixels``: "upright" gives RGB as people see it
    (`data.pixels.upright`), "released" what is stored.
    """
    return taken(decode_stored(data, uri, max_pixels), uri, pixels)


def taken(image: Image.Image, uri: str, pixels: Pixels) -> Image.Image:
    """A decoded ``image`` as ``pixels`` has it; `InputError` naming ``uri`` if that cannot be."""
    if pixels == "released":
        return image
    try:
        return upright(image)
    except InputError as error:
        raise InputError(f"{uri}: {error}, or set data.pixels to released") from None


def decode_stored(data: bytes, uri: str, max_pixels: int) -> Image.Image:
    """`decode`, with the values as they are stored, whatever kind of image it is."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        padded = max(width, height) ** 2 / TARGET_RATIO
        if width * height > max_pixels or padded > 4 * max_pixels:
            raise InputError(
                f"{uri}: {width} x {height} pixels (before or after padding) exceed "
                f"data.max_image_pixels={max_pixels}; shrink the image, or raise the limit"
            )
        image.load()
    except InputError:
        raise
    except Exception as error:  # decoders that meet nonsense raise what they happen upon
        raise InputError(
            f"{uri}: cannot be decoded as an image ({_reason(data, error)}); replace it, or remove "
            "its triplets"
        ) from None
    return image


def _reason(data: bytes, error: Exception) -> str:
    """Why bytes are no image, in words about the file."""
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        if data.lstrip()[:1] == b"<":
            return "it is a web page or another text in angle brackets"
        return f"its first bytes are those of none of {', '.join(FORMATS)}"
    return re.sub(r"\s*<_io\.BytesIO[^>]*>", "", str(error)) or type(error).__name__


def load_image(uri: str, max_pixels: int, pixels: Pixels) -> Image.Image:
    """Read and `decode` the image at ``uri``; `InputError` if it is missing or damaged."""
    return decode(read_image_bytes(uri, max_pixels), uri, max_pixels, pixels)


def read_stored(uri: str, limit: int | None = None) -> bytes:
    """The bytes of an image, or its first ``limit``: of a file of its own or in a shard."""
    if packed.shard_of(uri) is not None:
        return packed.read(uri, limit)
    return storage.read_bytes(uri, limit)


def read_image_bytes(uri: str, max_pixels: int) -> bytes:
    """The bytes of an image file; `InputError` if it is missing, or far larger than its pixels
    could be."""
    limit = BYTES_PER_PIXEL * max_pixels
    try:
        data = read_stored(uri, limit + 1)
    except FileNotFoundError:
        raise InputError(f"{uri}: image file is missing") from None
    if len(data) > limit:
        raise InputError(
            f"{uri}: more than {limit:,} bytes, {BYTES_PER_PIXEL} for each pixel of "
            f"data.max_image_pixels={max_pixels}; replace the file, or raise the limit"
        )
    return data


def _padding(width: int, height: int, ratio: float) -> tuple[int, int]:
    """What an image gets on either side, and above and below."""
    if max(width, height) / min(width, height) < ratio:
        return 0, 0
    side = max(width, height) / ratio
    return max(int((side - width) / 2), 0), max(int((side - height) / 2), 0)


def target_pad(image: Image.Image, ratio: float = TARGET_RATIO) -> Image.Image:
    """Pad with zeros towards aspect ``ratio``; unchanged if max/min is already below it."""
    width, height = image.size
    across, down = _padding(width, height, ratio)
    if across == down == 0:
        return image
    palette = image.getpalette() if image.mode == "P" else None
    padded = Image.new(image.mode, (width + 2 * across, height + 2 * down), 0)
    if palette is not None:
        padded.putpalette(palette)
    padded.paste(image, (across, down))
    return padded


def preprocess_to_bytes(image: Image.Image, size: int) -> np.ndarray:
    """Pad, resize the short side to ``size``, centre-crop and convert to RGB: uint8 [3, S, S]."""
    image = target_pad(image)
    width, height = image.size
    short, long = sorted((width, height))
    resized_long = int(size * long / short)
    wanted = (size, resized_long) if width <= height else (resized_long, size)
    if image.size != wanted:
        image = image.resize(wanted, Image.Resampling.BICUBIC)
    left = round((image.width - size) / 2.0)
    top = round((image.height - size) / 2.0)
    image = image.crop((left, top, left + size, top + size)).convert("RGB")
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def seen_box(width: int, height: int) -> tuple[float, float, float, float]:
    """Where the square that `preprocess_to_bytes` leaves lies on an image: left, top, width and
    height as shares of the image's own. What was padded is outside of it."""
    across, down = _padding(width, height, TARGET_RATIO)
    side = min(width + 2 * across, height + 2 * down)
    left, top = (width - side) / 2, (height - side) / 2
    return left / width, top / height, side / width, side / height


def normalise(pixels_BCHW: np.ndarray) -> np.ndarray:
    """uint8 [B, 3, S, S] to float32 with CLIP's mean and standard deviation, B x 3 x S x S."""
    mean = np.asarray(CLIP_MEAN, np.float32)[:, None, None]
    std = np.asarray(CLIP_STD, np.float32)[:, None, None]
    result: np.ndarray = (pixels_BCHW.astype(np.float32) / np.float32(255) - mean) / std
    return result
