"""Text clean-up and preprocessing against the released program's numbers, and odd images."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from baseline_goldens import FOLDER
from conftest import GOLDENS
from PIL import Image

from qure_core.base.errors import InputError
from qure_core.data.images import load_image, normalise, preprocess_to_bytes
from qure_core.data.text import circo_prompt, clean_text, join_fashioniq, random_fashioniq

TEXTS = json.loads((GOLDENS / "text.json").read_text())


@pytest.mark.parametrize("row", TEXTS["fashioniq"])
def test_fashioniq_texts(row: dict[str, str]) -> None:
    assert join_fashioniq(row["captions"]) == row["joined"]
    assert clean_text(row["joined"]) == row["processed"]


@pytest.mark.parametrize("row", TEXTS["cirr_and_circo"])
def test_cirr_and_circo_texts(row: dict[str, str]) -> None:
    assert clean_text(row["caption"]) == row["processed"]
    assert circo_prompt(row["caption"]) == row["circo_prompt"]
    assert clean_text(row["circo_prompt"]) == row["circo_processed"]


def test_preprocessing_is_bit_equal_to_the_released_program() -> None:
    golden = np.load(GOLDENS / "preprocess.npz")
    levels = values = 0.0
    for k, codes in enumerate(golden["out_codes"]):
        if f"png_{k:02d}" in golden.files:
            image = Image.open(io.BytesIO(golden[f"png_{k:02d}"].tobytes()))
        else:
            raw = golden[f"raw_{k:02d}"]
            image = Image.frombytes("CMYK", (raw.shape[1], raw.shape[0]), raw.tobytes())
        pixels = preprocess_to_bytes(image, 224)
        expected = np.stack([golden["out_lut"][c][codes[c]] for c in range(3)])
        levels = max(levels, float(np.abs(pixels.astype(int) - codes).max()))
        values = max(values, float(np.abs(normalise(pixels[None])[0] - expected).max()))
    print(f"preprocess: largest difference {levels:g} levels, {values:g} after normalisation")
    assert levels == values == 0


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1), (300, 200), (63, 65)])
def test_every_mode_and_shape_gives_model_input(mode: str, size: tuple[int, int]) -> None:
    pixels = preprocess_to_bytes(Image.new(mode, size), 32)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == np.uint8


def test_damaged_and_missing_images_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    with pytest.raises(InputError, match=r"a\.png: image file is missing"):
        load_image(str(file), 10**6, "released")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(InputError, match=r"a\.png: cannot be decoded as an image"):
        load_image(str(file), 10**6, "released")
    file.write_text("not an image")
    with pytest.raises(InputError, match=r"a\.png: cannot be decoded"):
        load_image(str(file), 10**6, "released")


def test_huge_images_are_refused_before_decoding(tmp_path: Path) -> None:
    file = tmp_path / "big.png"
    Image.new("1", (3000, 3000)).save(file)
    with pytest.raises(InputError, match=r"3000 x 3000 pixels .* exceed data.max_image_pixels"):
        load_image(str(file), 10**6, "released")


def test_fashioniq_captions_are_drawn_as_in_the_program() -> None:
    known = json.loads((FOLDER / "clip4cir_fashioniq_captions.json").read_text())
    rows = zip(known["pairs"], known["uniform_draws"], known["training_captions"], strict=True)
    for captions, draw, expected in rows:
        assert random_fashioniq(captions, draw) == expected
