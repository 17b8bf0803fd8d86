"""One folder with everything that people's data have: `validate` lists all of it, at once."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Runner
from PIL import ExifTags, Image, PngImagePlugin


def draw(file: Path, seed: int, mode: str = "RGB", **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, **options)


def make(root: Path) -> None:
    images = root / "images"
    for seed, name in enumerate(
        ("a.PNG", "b.jpeg", "c.webp", "d.gif", "e.bmp", "f.tif", "g.h.tiff")
    ):
        draw(images / name, seed)
    draw(images / f"{unicodedata.normalize('NFD', 'café')}.png", 20)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    draw(images / "turned.jpg", 21, exif=exif)
    draw(images / "clear.png", 22, "RGBA")
    draw(images / "print.jpg", 23, "CMYK")
    Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256)).save(images / "deep.png")
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * 2_000_000)
    draw(images / "wordy.png", 24, pnginfo=text)
    shutil.copy(images / "a.PNG", images / "twin.png")
    # What is wrong.
    draw(images / "clash.png", 25)
    draw(images / "clash.jpg", 26)
    (images / "empty.png").write_bytes(b"")
    (images / "page.jpg").write_text("<html>404</html>")
    draw(images / "cut.png", 27)
    (images / "cut.png").write_bytes((images / "cut.png").read_bytes()[:60])
    wild = np.full((4, 4), 1e6, np.float32)
    Image.fromarray(wild).save(images / "wild.tif")
    (images / ".DS_Store").write_bytes(b"\0")
    (images / "._a.png").write_bytes(b"\0")
    (root.parent / "outside").mkdir()
    draw(root.parent / "outside/o.png", 28)
    (images / "away").symlink_to(root.parent / "outside")
    (images / "round").symlink_to(images)


def row(**more: Any) -> dict[str, Any]:
    return {"reference": "a", "text": "in red", "target": "b"} | more


ROWS = [
    row(reference="b.jpeg", target="c"),
    row(reference="café", target="g.h"),
    row(),
    row(),
    row(target="a"),
    row(text=" "),
    row(target="c", query_id="q"),
    row(target="c", query_id="q"),
    row(category=None),
    row(query_id=None),
    row(target="coffee"),
    row(reference="../secret"),
    row(split="val", target="twin"),
    {"reference": "c", "text": "asked", "split": "test"},
    row(split="Train"),
    row(colour="red"),
]


@pytest.mark.usefixtures("standing_cluster")
@pytest.mark.parametrize("pixels", ["upright", "released"])
def test_validate_lists_all_of_it(pixels: str, tmp_path: Path, run_pipeline: Runner) -> None:
    root = tmp_path / "data"
    make(root)
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    (root / "triplets.jsonl").write_text("\ufeff" + "\n".join([*lines, "{broken"]), "utf-8")
    options = ["--data.format=jsonl", f"--data.root={root}", f"--data.pixels={pixels}"]
    result = run_pipeline("prepare", "validate", *options)
    assert result.returncode == 65, result.stdout + result.stderr
    said = result.stdout
    problems = {
        "clash.jpg and clash.png have one name, 'clash'",
        "[away]: is a link that leaves the data",
        "[round]: is a link to a folder that it lies in",
        "empty.png: cannot be decoded as an image (the file is empty)",
        "page.jpg: cannot be decoded as an image (it is a web page",
        "cut.png: cannot be decoded as an image",
        "[line 8]: query_id 'q' is also that of line 7",
        "[line 9]: 'category' is a NoneType: None",
        "[line 10]: 'query_id' is a NoneType: None",
        "[line 11]: target image 'coffee' is missing",
        "[line 12]: reference image '../secret' is missing",
        "[line 17]: not valid JSON",
    }
    if pixels == "upright":
        problems.add("wild.tif: its floating-point values, from 1e+06 to 1e+06")
    for part in problems:
        assert said.count(part) == 1, (part, said)
    assert f"{len(problems)} problem(s) in {root}" in said
    how = "" if pixels == "upright" else "taken as stored; with data.pixels upright they would be "
    for part in (
        "'Train' (1 rows), 'test' (1 rows)",
        "keys that are not read: 'colour' (1 rows)",
        "1 row(s) of 'train' have their target as reference",
        "1 row(s) of 'train' have an empty text",
        "row(s) of 'train' repeat another one exactly",
        "queries of 'train' (6 rows) have two or more targets",
        f"1 image(s) lie on a side, by their EXIF orientation: {how}turned upright",
        f"have 16 bits or floating-point values: {how}scaled to 8 bits",
        f"1 image(s) are transparent: {how}laid on white",
        f"have other colours than RGB or grey (CMYK, a palette, ...): {how}converted",
        "2 images are 1 picture(s) under several names; the commonest has 2 ('a', 'twin')",
    ):
        assert part in said, (part, said)
    assert "Traceback" not in said + result.stderr
    assert "nearest name there is" in said
