"""Data that means harm: names that leave the data root, bombs, and pickles that run code."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qure_core import storage
from qure_core.base.config import DataSettings
from qure_core.base.errors import InputError
from qure_core.data.images import load_image
from qure_core.data.sources import read_source
from qure_core.model.checkpoint_files import CHECKPOINT_KIND, OPTIMIZER_FILE
from qure_core.model.checkpoints import load_optimizer

OUTSIDE = ["../../secret", "{root}/../secret", "/etc/passwd", "images/../../secret"]
OUTSIDE += ["s3://bucket/secret", "..", "", "http://127.0.0.1/x", "a/../../secret"]


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def fashioniq(root: Path, name: str) -> None:
    row = {"candidate": name, "target": "good", "captions": ["a", "b"]}
    good = {"candidate": "good", "target": "other", "captions": ["a", "b"]}
    write(root / "captions/cap.dress.train.json", [good, row])
    write(root / "image_splits/split.dress.train.json", ["good", "other", name])


def cirr(root: Path, name: str) -> None:
    row = {"pairid": 1, "reference": "bad", "target_hard": "good", "caption": "a"}
    row |= {"target_soft": {"good": 1.0}, "img_set": {"members": ["bad", "good"]}}
    write(root / "cirr/captions/cap.rc2.train.json", [row])
    write(
        root / "cirr/image_splits/split.rc2.train.json",
        {"bad": name, "good": "./images/good.png"},
    )


def jsonl(root: Path, name: str) -> None:
    rows = [{"reference": "good", "text": "a", "target": "other"}]
    rows.append({"reference": name, "text": "a", "target": "good", "relevant": [name]})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "triplets.jsonl").write_text(text)


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("make", [fashioniq, cirr, jsonl])
def test_names_cannot_leave_the_data_root(tmp_path: Path, make: Any, outside: str) -> None:
    root = tmp_path / "a/data"
    for name in ("good", "other"):
        save_image(root / f"images/{name}.png")
    save_image(tmp_path / "secret.png")
    save_image(tmp_path / "a/secret.png")
    make(root, outside.format(root=root))
    try:
        split, problems = read_source(DataSettings(format=make.__name__, root=str(root)), "train")
    except InputError:
        return
    assert problems
    inside = f"{os.path.realpath(root)}/"
    for uri in split.images.values():
        assert os.path.realpath(uri).startswith(inside), uri


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is so large, with next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png_of(10_000, 10_000), "10000 x 10000 pixels .* exceed data.max_image_pixels"),
        # Few pixels, but padded to a square they would be very many.
        (png_of(900_000, 1), "900000 x 1 pixels .* exceed data.max_image_pixels"),
        (png_of(100, 100) + b"\0" * 9_000_000, "more than 8,000,000 bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded as an image"),
    ],
)
def test_bombs_are_refused_by_their_limits(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_image(str(file), 1_000_000, "released")
    assert str(file) in str(caught.value)


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["QURE_TEST_ATTACK"],)


def test_a_checkpoint_from_outside_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    monkeypatch.setenv("QURE_TEST_ATTACK", str(made))
    file = io.BytesIO()
    torch.save({"optimizer": Attack()}, file)
    uri = str(tmp_path / "train-0001")
    with storage.committed_directory(uri, CHECKPOINT_KIND) as (directory, _):
        (directory / OPTIMIZER_FILE).write_bytes(file.getvalue())
    with pytest.raises(InputError, match=r"optimizer\.pt: holds more than tensors"):
        load_optimizer(uri)
    assert not made.exists()
    pickle.loads(pickle.dumps(Attack()))  # noqa: S301  (the attack itself works)
    assert made.exists()
