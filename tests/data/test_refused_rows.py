"""Inputs that used to be taken without a word: each is refused, or said, with its place."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qure_core.base.config import DataSettings
from qure_core.base.errors import InputError
from qure_core.data import load_split, mining_galleries
from qure_core.data.cirr import read_cirr
from qure_core.data.fashioniq import read_fashioniq
from qure_core.data.images import decode
from qure_core.data.jsonl import read_jsonl
from qure_core.data.layout import ImageFolder
from qure_core.data.sources import has_split, read_source
from qure_core.data.validate import validate_dataset


def jsonl(root: Path, rows: list[Any], images: str = "abcdef") -> Path:
    (root / "images").mkdir(parents=True, exist_ok=True)
    for name in images:
        Image.new("RGB", (8, 10)).save(root / f"images/{name}.png")
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (root / "triplets.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def row(reference: str = "a", target: str = "b", **more: Any) -> dict[str, Any]:
    return {"reference": reference, "text": "in red", "target": target, **more}


def faults(root: Path, split: str = "train") -> list[str]:
    return [str(problem) for problem in read_jsonl(str(root), split)[1]]


def test_splits_that_are_not_read_are_named_with_their_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(split=name) for name in ("train", "Train", "valid", "valid", "trian", "val")]
    root = jsonl(tmp_path, [row(), *rows])
    load_split(DataSettings(format="jsonl", root=str(root)), "train")
    text = capsys.readouterr().out
    assert "not read: 'Train' (1 rows), 'trian' (1 rows), 'valid' (2 rows)" in text
    jsonl(root, [row(), row(split=None), row(split=3)])
    assert [fault.split("]: ")[1] for fault in faults(root)] == [
        "'split' is a NoneType: None",
        "'split' is a int: 3",
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from("abcdef"), st.sampled_from("tvx")),
        min_size=1,
        max_size=8,
    )
)
def test_what_only_other_splits_name_is_not_mined(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, str, str]]
) -> None:
    names = {"t": "train", "v": "val", "x": "held-out"}
    drawn = [("a", "b", "t"), *drawn]
    root = jsonl(tmp_path_factory.mktemp("own"), [row(r, t, split=names[s]) for r, t, s in drawn])
    split, problems = read_jsonl(str(root), "train")
    assert not problems
    by_train = {name for r, t, s in drawn if s == "t" for name in (r, t)}
    by_others = {name for r, t, s in drawn if s != "t" for name in (r, t)}
    left_out = by_others - by_train
    corpus = mining_galleries(DataSettings(format="jsonl"), split)["all"]
    assert set(corpus) == set("abcdef") - left_out
    assert any(
        f"{len(left_out)} image(s) that only other splits name" in n for n in split.notes
    ) == (bool(left_out))
    if any(s == "v" for _, _, s in drawn):  # a model is still ranked against every image
        assert read_jsonl(str(root), "val")[0].galleries["all"] == tuple("abcdef")


@pytest.mark.parametrize(
    ("relevant", "message"),
    [
        (None, "relevant is not a list of image names: None"),
        (3, "relevant is not a list of image names: 3"),
        ("bcd", "relevant is not a list of image names: 'bcd'"),
        (["b", 4], "relevant is not a list of image names"),
        ([], "relevant is empty; name at least the target, or leave it out"),
        (["b", "zebra", "yak"], "relevant names 2 unknown image(s), first 'zebra'"),
    ],
)
def test_relevance_that_would_measure_nothing_is_a_problem(
    tmp_path: Path, relevant: Any, message: str
) -> None:
    (fault,) = faults(jsonl(tmp_path / "own", [row(relevant=relevant)]))
    assert f"triplets.jsonl [line 1]: {message}" in fault
    root = tmp_path / "fashion"
    for folder, name, value in (
        (
            "captions",
            "cap.dress.val.json",
            [{"candidate": "a", "target": "b", "captions": ["x", "y"]}],
        ),
        ("image_splits", "split.dress.val.json", list("abcd")),
        ("relevance", "rel.dress.val.json", [relevant]),
    ):
        (root / folder).mkdir(parents=True)
        (root / folder / name).write_text(json.dumps(value))
    jsonl(root, [])
    (problem,) = read_fashioniq(str(root), "val")[1]
    assert f"rel.dress.val.json [0]: {message}" in str(problem)


def test_keys_that_nothing_reads_are_said_and_misspelled_ones_refused(tmp_path: Path) -> None:
    root = jsonl(tmp_path, [row(splitt="val"), row(source="web"), row(source="shop", id=3)])
    assert [fault.split("]: ")[1] for fault in faults(root)] == [
        "key 'splitt' is not read; is 'split' meant?"
    ]
    (note,) = read_jsonl(str(root), "train")[0].notes
    assert "keys that are not read: 'id' (1 rows), 'source' (2 rows), 'splitt' (1 rows)" in note


def test_rows_that_ask_for_nothing_are_counted(tmp_path: Path) -> None:
    root = jsonl(tmp_path, [row(), row(), row(target="c"), row(target="a"), row() | {"text": " "}])
    data = DataSettings(format="jsonl", root=str(root))
    same, empty, again, several = read_source(data, "train")[0].notes
    assert "1 row(s) of 'train' have their target as reference" in same
    assert "1 row(s) of 'train' have an empty text" in empty
    assert "1 row(s) of 'train' repeat another one exactly" in again
    assert "1 queries of 'train' (4 rows) have two or more targets" in several


def test_the_target_is_relevant_without_being_named(tmp_path: Path) -> None:
    root = jsonl(tmp_path, [row(relevant=["c", "d"]), row(relevant=["c", "b"])])
    split, problems = read_jsonl(str(root), "train")
    assert not problems
    assert [t.relevant_ids for t in split.triplets] == [("b", "c", "d"), ("c", "b")]


def cirr(root: Path, split: str, caption: dict[str, Any]) -> None:
    """A CIRR split of one row and two images."""
    for name, value in (
        (f"captions/cap.rc2.{split}.json", [caption]),
        (f"image_splits/split.rc2.{split}.json", {name: f"./{split}/{name}.png" for name in "ab"}),
    ):
        (root / "cirr" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "cirr" / name).write_text(json.dumps(value))
    (root / split).mkdir()
    for name in "ab":
        Image.new("RGB", (4, 4)).save(root / f"{split}/{name}.png")


@pytest.mark.parametrize("members", [None, 7, "abc", ["a", 1]])
def test_cirr_members_that_are_no_list_are_a_problem(tmp_path: Path, members: Any) -> None:
    caption = {"pairid": 1, "reference": "a", "caption": "x", "target_hard": "b"}
    cirr(tmp_path, "val", caption | {"img_set": {"members": members}})
    (problem,) = read_cirr(str(tmp_path), "val")[1]
    assert "cap.rc2.val.json [0]: img_set.members is not a list of image names" in str(problem)


def test_a_split_without_targets_is_not_measured(tmp_path: Path) -> None:
    from qure_core.evaluation.protocols import Request
    from qure_core.evaluation.protocols.recalls import own_split

    caption = {"pairid": 1, "reference": "a", "caption": "x", "img_set": {"members": ["a", "b"]}}
    cirr(tmp_path, "test1", caption)
    data = DataSettings(format="cirr", root=str(tmp_path))
    with pytest.raises(InputError, match=r"'test1' split of .* has no targets to measure by"):
        own_split(Request(data, "test1"))
    with pytest.raises(InputError, match=r"has no 'val' split; name one that is there"):
        own_split(Request(data, "val"))


def test_relevance_outside_the_gallery_is_a_problem(tmp_path: Path) -> None:
    root = jsonl(tmp_path, [row(reference="x/a", target="x/b", category="x", relevant=["c"])])
    (root / "images/x").mkdir()
    for name in "ab":
        Image.new("RGB", (4, 4)).save(root / f"images/x/{name}.png")
    (fault,) = faults(root)
    assert "relevant 'c' is outside images/x/" in fault


def test_rows_end_at_line_feeds_alone_and_a_byte_order_mark_is_taken(tmp_path: Path) -> None:
    root = jsonl(tmp_path, [])
    text = json.dumps(row() | {"text": "one\u2028two\u0085three"}, ensure_ascii=False)
    (root / "triplets.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    split, problems = read_jsonl(str(root), "train")
    assert not problems
    assert split.triplets[0].text == "one\u2028two\u0085three"
    for file in root.glob("images/*.png"):
        file.rename(file.with_name(f"{file.stem}.jpg"))
    (root / "captions").mkdir()
    (root / "image_splits").mkdir()
    for name, value in (
        ("captions/cap.x.train.json", [{"candidate": "a", "target": "b", "captions": ["x", "y"]}]),
        ("image_splits/split.x.train.json", ["a", "b"]),
    ):
        (root / name).write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())
    assert not read_fashioniq(str(root), "train")[1]


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("images/a", "write 'a': names begin below it"),
        ("x/images/a.png", "write 'a'"),
        ("dress/b1", "the nearest name there is 'dress/b'"),
    ],
)
def test_a_missing_name_is_told_what_was_meant(tmp_path: Path, written: str, hint: str) -> None:
    (tmp_path / "images/dress").mkdir(parents=True)
    root = jsonl(tmp_path, [row(reference=written)])
    Image.new("RGB", (4, 4)).save(root / "images/dress/b.png")
    (fault,) = faults(root)
    assert f"reference image {written!r} is missing in" in fault
    assert hint in fault


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    root = jsonl(tmp_path, [row()])
    (root / "images/._a.png").write_bytes(b"\0\5\26\7")
    (root / "images/.DS_Store").write_bytes(b"")
    for folder in (".cache", "__MACOSX"):
        (root / "images" / folder).mkdir()
        (root / "images" / folder / "a.png").write_bytes(b"")
    assert ImageFolder(f"{root}/images").sorted() == list("abcdef")


def test_categories_limit_jsonl_and_mean_nothing_to_cirr(tmp_path: Path) -> None:
    root = jsonl(tmp_path, [row(category="x"), row(category="y"), row(category="y", split="val")])
    data = DataSettings(format="jsonl", root=str(root), categories=["x"])
    assert [t.category for t in load_split(data, "train").triplets] == ["x"]
    assert has_split(data.model_copy(update={"categories": ["y"]}), "val")
    assert not has_split(data, "val")
    with pytest.raises(InputError, match=r"data\.categories: .* has no rows of z \(found: x, y\)"):
        load_split(data.model_copy(update={"categories": ["z"]}), "train")
    for layout in ("cirr", "circo"):
        with pytest.raises(InputError, match="layout has no categories; leave it out"):
            read_source(data.model_copy(update={"format": layout}), "val")


def test_what_is_wrong_with_a_shared_file_is_said_once(tmp_path: Path, local_ray: str) -> None:
    root = jsonl(tmp_path, [row(), row(split="val"), "{broken"])
    data = DataSettings(format="jsonl", root=str(root))
    checked = validate_dataset(data, ["train", "val"])
    assert [problem.where for problem in checked.problems] == ["line 3"]
    # All of these pictures are one.
    assert any("6 images are 1 picture(s) under several names" in note for note in checked.notes)


def png(width: int, height: int) -> bytes:
    """A whole PNG of black pixels, which compress to next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(height))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", rows + packer.flush()), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"<html>404</html>", "it is a web page or another text"),
        (b"hello, world", "its first bytes are those of none of JPEG, PNG"),
        (png(30_000, 30_000), "30000 x 30000 pixels .* exceed data.max_image_pixels=50000000"),
    ],
)
def test_what_is_no_image_is_said_in_words_about_the_file(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        decode(data, "x.jpg", 50_000_000, "released")
    for noise in ("BytesIO", "bomb", "DOS"):
        assert noise not in str(caught.value)


def test_a_truncated_image_is_said_without_an_address() -> None:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(whole, "JPEG")
    with pytest.raises(InputError, match=r"x\.jpg: cannot be decoded .*truncated") as caught:
        decode(whole.getvalue()[:900], "x.jpg", 10**6, "released")
    assert "object at" not in str(caught.value)
