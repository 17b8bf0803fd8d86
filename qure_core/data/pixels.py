"""Pixels as people see them: an image of any kind as plain RGB, before anything is done to it.

The released program takes an image's values as they are stored. So a photo that was held sideways
stays sideways, 16 bits become one or two grey levels, and what is transparent gets whatever colour
the resizing makes of it. `upright` settles all of that once, first; an image of 8-bit RGB or grey
values without an orientation passes through unchanged.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from PIL import ExifTags, Image

from qure_core.base.errors import InputError

BACKGROUND = "white"
"""What transparent images are laid on."""

_SCALES = {"I": 65535, "F": 1.0}  # what is white in a deep image, unless its values say otherwise
_PLAIN = ("RGB", "L", "1")

CHANGES = {
    "orientation": "lie on a side, by their EXIF orientation",
    "depth": "have 16 bits or floating-point values",
    "transparency": "are transparent",
    "colours": "have other colours than RGB or grey (CMYK, a palette, ...)",
}
"""Why `upright` may change an image, in words that follow a count of images."""
_DONE = {
    "orientation": "turned upright",
    "depth": "scaled to 8 bits",
    "transparency": f"laid on {BACKGROUND}",
    "colours": "converted before padding and resizing",
}


def changes(image: Image.Image) -> tuple[str, ...]:
    """Which of `CHANGES` `upright` would make of an opened image."""
    found = [] if _turn(image) is None else ["orientation"]
    if _is_deep(image):
        found.append("depth")
    elif image.has_transparency_data:
        found.append("transparency")
    elif image.mode not in _PLAIN:
        found.append("colours")
    return tuple(found)


def upright(image: Image.Image) -> Image.Image:
    """``image`` as RGB, as a viewer shows it; of several frames or pages, the first.

    EXIF orientation applied; 16-bit and floating-point values scaled to 8 bits; transparency laid
    on `BACKGROUND`; CMYK, palettes and the like converted. Raises `InputError`, without a name, if
    deep values have no scale that can be known.
    """
    if (turn := _turn(image)) is not None:
        image = image.transpose(turn)
        for name in _METADATA:  # or it would be turned again
            image.info.pop(name, None)
    if _is_deep(image):
        return _scaled(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image if image.mode == "RGB" else image.convert("RGB")


_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "adjust_exif")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright by its EXIF orientation; none if it has none that can be read,
    as viewers take it."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of damaged metadata, beside pixels that are whole
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _scaled(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits as 8-bit ones."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    white = _SCALES[image.mode[0]]
    if image.mode == "F" and high > 1:
        white = 255.0
    if image.mode == "I" and high <= 255:
        raise InputError(
            "its 32-bit integer values reach no further than 255, so whether they are of 8 or of "
            "16 bits cannot be known; save it with 8 or 16 bits"
        )
    if not (low >= 0 and high <= white):  # so also where a value is not a number
        raise InputError(
            f"its {'floating-point' if image.mode == 'F' else 'integer'} values, from {low:g} to "
            f"{high:g}, are not a picture's (0 to {_SCALES[image.mode[0]]:g}"
            f"{', or to 255' if image.mode == 'F' else ''}); save it with 8 or 16 bits"
        )
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def told(counts: Counter[str], pixels: str) -> list[str]:
    """What ``counts`` images by change come to under a ``data.pixels`` setting, in lines."""
    lines = []
    for name, why in CHANGES.items():
        how = _DONE[name]
        if pixels == "released":
            how = f"taken as stored; with data.pixels upright they would be {how}"
        if counts[name]:
            lines.append(f"{counts[name]:,} image(s) {why}: {how}")
    return lines
