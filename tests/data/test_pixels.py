"""`data.pixels`: upright against what a viewer would show, released against what is stored."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

from qure_core.base.config import DataSettings
from qure_core.base.errors import InputError
from qure_core.data.images import decode, decode_stored, preprocess_to_bytes
from qure_core.data.pixels import changes, told, upright
from qure_core.data.validate import check_images
from qure_core.features.identity import FeatureKey

PICTURE = np.random.default_rng(3).integers(0, 256, (40, 30, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def shown(data: bytes, pixels: Any = "upright") -> np.ndarray:
    return np.asarray(decode(data, "x", 10**6, pixels).convert("RGB"))


# How each orientation's stored values come from the upright picture (TIFF 6.0, tag 274).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_orientation_arrives_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = np.ascontiguousarray(STORED[orientation](PICTURE))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(stored), kind, exif=exif, **options)
    assert (shown(data) == PICTURE).all()
    # Of a TIFF, Pillow itself gives no other values, so nor did the released program.
    turned = kind != "TIFF" and orientation > 1
    assert (shown(data, "released") == (stored if turned else PICTURE)).all()
    assert changes(decode_stored(data, "x", 10**6)) == (("orientation",) if turned else ())


def test_what_is_upright_stays_so() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = decode(encoded(Image.fromarray(PICTURE), exif=exif), "x", 10**6, "upright")
    assert image.size == (40, 30)
    assert upright(image.resize((80, 60))).size == (80, 60)
    assert (np.asarray(upright(image)) == np.asarray(image)).all()
    assert not changes(image)


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize(("kind", "order"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_a_ramp_of_16_bits_keeps_its_256_levels(kind: str, order: str) -> None:
    mode = "I;16" if order == "<u2" else "I;16B"
    image = Image.frombytes(mode, (256, 256), RAMP.astype(order).tobytes())
    pixels = shown(encoded(image, kind))
    expected = np.rint(RAMP / 257).astype(np.uint8)
    assert (pixels == expected[..., None]).all()
    assert len(np.unique(pixels)) == 256


@pytest.mark.parametrize(("white", "top"), [(1.0, 1.0), (255.0, 255.0), (1.0, 0.5)])
def test_floating_point_values_are_scaled(white: float, top: float) -> None:
    values = np.linspace(0, top, 1024, dtype=np.float32).reshape(32, 32)
    pixels = shown(encoded(Image.fromarray(values), "TIFF"))
    assert (pixels[..., 0] == np.rint(values.astype(float) * (255 / white))).all()
    assert shown(encoded(Image.fromarray(values), "TIFF"), "released").max() <= top


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 300.0])
def test_values_of_no_known_scale_are_refused_by_name(bad: float) -> None:
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 2] = bad
    data = encoded(Image.fromarray(values), "TIFF")
    with pytest.raises(InputError, match=r"x\.tif: its floating-point values, from .* to .*, are"):
        decode(data, "x.tif", 10**6, "upright")
    decode(data, "x.tif", 10**6, "released")
    low = encoded(Image.fromarray(np.full((4, 4), 200, np.int32)), "TIFF")
    with pytest.raises(InputError, match=r"x\.tif: its 32-bit integer values reach no further"):
        decode(low, "x.tif", 10**6, "upright")
    deep = encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF")
    with pytest.raises(InputError, match=r"x\.tif: its integer values, from 70000 to 70000"):
        decode(deep, "x.tif", 10**6, "upright")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize("side", [224, 225])
def test_transparency_lies_on_white_whatever_is_resized(mode: str, side: int) -> None:
    """The left half is transparent, over black; the right is opaque red, or a grey of 76."""
    values = np.zeros((side, side, 4), np.uint8)
    values[:, side // 2 :] = (255, 0, 0, 255)
    image = Image.fromarray(values).convert("RGB" if mode == "RGB" else "RGBA")
    options: dict[str, Any] = {}
    if mode == "RGB":
        options["transparency"] = (0, 0, 0)
    elif mode == "P":
        image = image.convert("RGB").quantize(4)
        options["transparency"] = image.getpixel((0, 0))
    else:
        image = image.convert(mode)
    data = encoded(image, **options)
    pixels = preprocess_to_bytes(decode(data, "x", 10**6, "upright"), 224).transpose(1, 2, 0)
    assert (pixels[:, :110] == 255).all()
    assert (pixels[:, 114:] == ((76, 76, 76) if mode == "LA" else (255, 0, 0))).all()
    assert changes(decode_stored(data, "x", 10**6)) == ("transparency",)


def test_a_wide_cmyk_picture_is_padded_black() -> None:
    wide = Image.new("CMYK", (120, 30), (0, 0, 0, 0))
    data = encoded(wide, "JPEG", quality=95)
    pixels = preprocess_to_bytes(decode(data, "x", 10**6, "upright"), 64)
    assert pixels[:, :2].max() == 0  # above and below the picture
    assert pixels[:, 30:34].min() > 250
    released = preprocess_to_bytes(decode(data, "x", 10**6, "released"), 64)
    assert released[:, :2].min() == 255


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["RGB", "L", "1"]), st.integers(1, 90), st.integers(1, 90))
def test_plain_pictures_are_the_same_either_way(mode: str, width: int, height: int) -> None:
    noise = np.random.default_rng(width * 100 + height).integers(0, 256, (height, width, 3))
    image = Image.fromarray(noise.astype(np.uint8)).convert(mode)
    assert not changes(image)
    if mode == "1":  # a bitmap is resized in grey, not to black and white
        assert upright(image).mode == "RGB"
        return
    stored, seen = (preprocess_to_bytes(i, 32) for i in (image, upright(image)))
    assert (stored == seen).all()


def test_text_of_megabytes_beside_the_pixels_is_passed_over() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("drawing", "x" * 2_000_000, zip=True)
    info.add_itxt("XML:com.adobe.xmp", "y" * 2_000_000)
    data = encoded(Image.fromarray(PICTURE), pnginfo=info)
    assert (shown(data) == PICTURE).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "BMP"])
def test_the_first_frame_is_taken(kind: str) -> None:
    first, second = (Image.new("RGB", (9, 7), colour) for colour in ("red", "blue"))
    several = {} if kind == "BMP" else {"save_all": True, "append_images": [second]}
    if kind == "WEBP":
        several["lossless"] = True
    assert (shown(encoded(first, kind, **several)) == (255, 0, 0)).all()


def test_validate_counts_what_each_setting_does(tmp_path: Path, local_ray: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    plain = Image.fromarray(PICTURE)
    plain.save(tmp_path / "plain.png")
    plain.save(tmp_path / "turned.png", exif=exif)
    plain.convert("RGBA").save(tmp_path / "alpha.png", exif=exif)
    Image.fromarray(RAMP).save(tmp_path / "deep.png")
    plain.convert("CMYK").save(tmp_path / "print.jpg")
    uris = sorted(map(str, tmp_path.iterdir()))
    problems, digests, counts = check_images(uris, 10**6, "upright")
    assert not problems
    assert set(digests) == set(uris)
    assert counts == {"orientation": 2, "transparency": 1, "depth": 1, "colours": 1}
    assert told(counts, "upright")[0] == (
        "2 image(s) lie on a side, by their EXIF orientation: turned upright"
    )
    assert (
        "taken as stored; with data.pixels upright they would be turned"
        in told(counts, "released")[0]
    )
    assert told(Counter(), "upright") == []


def test_features_of_one_setting_are_not_those_of_the_other() -> None:
    one, other = (FeatureKey.of("weights", 32, p, "fp16") for p in ("upright", "released"))
    assert one.uri("stores") != other.uri("stores")
    assert "pixels" not in other.facts()  # stores of before are known by what they were
    assert DataSettings().pixels == "upright"


FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]


@settings(max_examples=300, deadline=None)
@example("TIFF", "RGB", [(72, 2)], 0)  # Pillow's own TypeError
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(["RGB", "L", "RGBA", "P", "CMYK", "I;16", "1", "F", "I"]),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=12),
    st.integers(0, 3000),
)
def test_damaged_files_of_every_format_are_images_or_refused_by_name(
    kind: str, mode: str, flips: list[tuple[int, int]], cut: int
) -> None:
    image = Image.fromarray(PICTURE).convert("L" if mode in ("I;16", "F", "I") else mode)
    image = image.convert(mode) if image.mode != mode else image
    try:
        data = bytearray(encoded(image, kind))
    except (OSError, ValueError):  # this format has no such values
        return
    for place, value in flips:
        data[place % len(data)] = value
    data = data[: len(data) - cut % len(data)]
    for pixels in ("upright", "released"):
        said = ""
        try:
            taken = decode(bytes(data), "some/file", 10**6, pixels)  # type: ignore[arg-type]
            assert preprocess_to_bytes(taken, 16).shape == (3, 16, 16)
        except InputError as error:
            said = str(error)
        assert not said or said.startswith("some/file: ")
        assert "object at 0x" not in said
