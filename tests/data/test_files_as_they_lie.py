"""Image files as people's disks and buckets hold them, and rows as people name them."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qure_core import storage
from qure_core.base.config import DataSettings
from qure_core.data.cirr import read_cirr
from qure_core.data.fashioniq import read_fashioniq
from qure_core.data.jsonl import read_jsonl
from qure_core.data.layout import ImageFolder, Names, safe_relative
from qure_core.data.sources import Dataset


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"jpg": "JPEG", "tif": "TIFF"}.get(path.suffix[1:].lower())
    Image.new("RGB", (4, 4)).save(path, kind)


def fashioniq(root: Path, names: list[str]) -> Any:
    for folder, file, value in (
        ("image_splits", "split.x.train.json", names),
        (
            "captions",
            "cap.x.train.json",
            [{"candidate": names[0], "target": names[1], "captions": ["a", "b"]}],
        ),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / file).write_text(json.dumps(value))
    return read_fashioniq(str(root), "train")


def jsonl(root: Path, names: list[str]) -> Any:
    root.mkdir(exist_ok=True)
    row = {"reference": names[0], "text": "a", "target": names[1]}
    (root / "triplets.jsonl").write_text(json.dumps(row | {"relevant": names[1:]}))
    return read_jsonl(str(root), "train")


@pytest.mark.parametrize("layout", [fashioniq, jsonl])
@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["a.PNG", "b.JpEg", "c.webp"], ["a", "b", "c"]),
        (["a.gif", "b.bmp", "c.tif"], ["a.gif", "b.BMP", "c.tiff"]),
        (["a.tiff", "b.jpg", "c.png"], ["a.png", "b.png", "c.jpg"]),
        (["a.b.png", "v1.0.jpg", "x.jpg.png"], ["a.b", "v1.0", "x.jpg"]),
        (["a.b.png", "v1.0.jpg", "x.jpg.png"], ["a.b.png", "v1.0.jpg", "x.jpg.png"]),
    ],
)
def test_every_suffix_is_taken_and_may_be_written(
    tmp_path: Path, layout: Callable[..., Any], files: list[str], named: list[str]
) -> None:
    for file in files:
        picture(tmp_path / "images" / file)
    split, problems = layout(tmp_path, named)
    assert not problems
    assert sorted(uri.rsplit("/", 1)[-1] for uri in split.images.values()) == sorted(files)
    (triplet,) = split.triplets
    assert {triplet.reference_id, triplet.target_id} <= set(split.images)
    assert set(split.images) == {file.rsplit(".", 1)[0] for file in files}


@pytest.mark.parametrize("layout", [fashioniq, jsonl])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_accents_are_the_same_composed_or_apart(
    tmp_path: Path, layout: Callable[..., Any], written: Any, stored: Any
) -> None:
    names = ["caf\u00e9", "\u30d7\u30ea\u30f3", "plain"]
    for name in names:
        picture(tmp_path / f"images/{unicodedata.normalize(stored, name)}.png")
    split, problems = layout(tmp_path, [unicodedata.normalize(written, name) for name in names])
    assert not problems
    assert sorted(split.images) == sorted(names)


@pytest.mark.parametrize("layout", [fashioniq, jsonl])
def test_two_files_of_one_name_are_a_clash(tmp_path: Path, layout: Callable[..., Any]) -> None:
    for file in ("a.png", "a.jpg", "b.png", "c.png", "unused.png", "unused.gif"):
        picture(tmp_path / "images" / file)
    _, problems = layout(tmp_path, ["a", "b"])
    found = [str(problem) for problem in problems]
    assert found[0].endswith("a.jpg and a.png have one name, 'a'; keep one of them")
    # What no row of FashionIQ's names is nobody's business; JSON lines mine among all.
    assert len(found) == (1 if layout is fashioniq else 2)


def test_what_systems_leave_beside_images_is_passed_over(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for name in (".DS_Store", "._a.png", "Thumbs.db", "notes.txt", "__MACOSX/b.png", ".x/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0")
    folder = ImageFolder(str(tmp_path))
    assert folder.sorted() == ["a"]
    assert not folder.problems


def test_pipes_are_no_files_and_broken_links_are_missing_ones(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "linked.png").symlink_to(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    assert ImageFolder(str(tmp_path)).sorted() == ["a", "broken"]


def test_names_that_are_no_text_are_problems(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb"):
        pass
    folder = ImageFolder(str(tmp_path))
    assert folder.sorted() == ["a"]
    (problem,) = folder.problems
    assert str(problem).encode().endswith(b"the name is no UTF-8; rename the file")


def test_links_to_folders(tmp_path: Path) -> None:
    """Followed inside the data root; loops and what leaves it are said, and nothing hangs."""
    root, images = tmp_path / "data", tmp_path / "data/images"
    picture(images / "a.png")
    picture(root / "more/b.png")
    picture(tmp_path / "outside/c.png")
    picture(tmp_path / "data-not/d.png")  # its path begins like the root's
    (images / "linked").symlink_to(root / "more")
    (images / "up").symlink_to(images)
    (root / "more/round").symlink_to(images)
    (images / "away").symlink_to(tmp_path / "outside")
    (images / "near").symlink_to(tmp_path / "data-not")
    (images / ".hidden").symlink_to(tmp_path / "outside")
    (images / "file.png").symlink_to(tmp_path / "outside/c.png")  # a file is what it leads to
    (images / "broken").symlink_to(tmp_path / "nowhere")
    folder = ImageFolder(str(images), str(root))
    assert folder.sorted() == ["a", "file", "linked/b"]
    said = {problem.where: problem.message for problem in folder.problems}
    assert set(said) == {"up", "linked/round", "away", "near"}
    assert said["up"].startswith("is a link to a folder that it lies in")
    assert f"is a link that leaves the data ({tmp_path}/outside)" in said["away"]
    # The images' folder itself may lie elsewhere.
    (tmp_path / "other").mkdir()
    (tmp_path / "other/images").symlink_to(images)
    assert "linked/b" not in ImageFolder(f"{tmp_path}/other/images", f"{tmp_path}/other")
    assert "a" in ImageFolder(f"{tmp_path}/other/images", f"{tmp_path}/other")


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        (".\\dev\\a.png", "dev/a.png"),
        ("dev\\..\\..\\a.png", None),
        ("C:\\a.png", None),
        ("\\\\host\\a.png", None),
        ("./dev/a.png", "dev/a.png"),
        ("dev/a\0.png", None),
        ("\0", None),
        ("\ud800/a.png", None),
    ],
)
def test_backslashes_in_paths(path: str, clean: str | None) -> None:
    assert safe_relative(path) == clean


def cirr_rows() -> list[dict[str, Any]]:
    row = {"pairid": 1, "reference": "a", "target_hard": "b", "caption": "x"}
    row |= {"img_set": {"members": ["a", "b", "c"]}, "target_soft": {"b": 1.0, "c": 1.0, "d": 0.5}}
    return [row]


def cirr(root: Path, rows: list[dict[str, Any]], start: str = "./dev/") -> Any:
    for name in "abcd":
        picture(root / f"dev/{name}.png")
    for name, value in (
        ("captions/cap.rc2.val.json", rows),
        ("image_splits/split.rc2.val.json", {name: f"{start}{name}.png" for name in "abcd"}),
    ):
        (root / "cirr" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "cirr" / name).write_text(json.dumps(value))
    return read_cirr(str(root), "val")


def test_cirr_as_windows_writes_it_with_its_soft_targets(tmp_path: Path) -> None:
    split, problems = cirr(tmp_path, cirr_rows(), ".\\dev\\")
    assert not problems
    assert len(split.images) == 4
    assert split.triplets[0].positive_ids == ("c",)
    (problem,) = cirr(tmp_path, [*cirr_rows(), *cirr_rows()])[1]
    assert "cap.rc2.val.json [1]: pairid 1 is also that of row 0" in str(problem)


def test_a_missing_name_always_has_a_nearest(tmp_path: Path) -> None:
    many = Names({f"product-{number:06d}" for number in range(50_000)}, "here")
    for _ in range(30):
        assert many.nearest("product-04321") == "; the nearest name there is 'product-004321'" or (
            "product-0432" in many.nearest("product-04321")
        )
    assert "nearest" in many.nearest("entirely different")
    assert Names((), "in x").nearest("a") == "; there are no images in x"
    for name in "ab":
        picture(tmp_path / f"images/{name}1.png")
    (problem, *_) = fashioniq(tmp_path, ["a1", "b2"])[1]
    assert "image 'b2' is missing in" in str(problem)
    assert "the nearest name there is 'b1'" in str(problem)


def test_a_folder_is_listed_once_for_all_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "own"
    for name in "abc":
        picture(root / f"images/{name}.png")
    rows = [{"reference": "a", "text": "x", "target": "b", "split": s} for s in ("train", "val")]
    (root / "triplets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    listed, read = [], []
    find, text = storage.find_files, storage.read_bytes
    monkeypatch.setattr(storage, "find_files", lambda *a: listed.append(a) or find(*a))
    monkeypatch.setattr(storage, "read_bytes", lambda *a: read.append(a) or text(*a))
    dataset = Dataset(DataSettings(format="jsonl", root=str(root)))
    assert dataset.has("val")
    assert len(dataset.load("train").images) == len(dataset.load("val").images) == 3
    assert len(listed) == len(read) == 1
