"""Rows as people write them: taken, or each fault one problem with its file, row and key."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from qure_core.base.config import DataSettings
from qure_core.base.errors import InputError
from qure_core.data import load_split
from qure_core.data.circo import read_circo
from qure_core.data.cirr import read_cirr
from qure_core.data.fashioniq import read_fashioniq
from qure_core.data.jsonl import read_jsonl
from qure_core.data.positives import (
    rows_said,
    twins_said,
    with_known_positives,
    without_known_positives,
)
from qure_core.data.schema import Split, Triplet, read_split, write_split
from qure_core.data.text import join_fashioniq


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for name in ("a", "b", "c", "hats/h", "hats/i"):
        file = tmp_path / f"images/{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    return tmp_path


def row(**more: Any) -> dict[str, Any]:
    return {"reference": "a", "text": "in red", "target": "b"} | more


def read(root: Path, text: str, split: str = "train") -> tuple[Split, list[str]]:
    (root / "triplets.jsonl").write_text(text, encoding="utf-8")
    found, problems = read_jsonl(str(root), split)
    return found, [str(problem).removeprefix(f"{root}/triplets.jsonl") for problem in problems]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_json_list_is_taken(own: Path, indent: int | None, mark: str) -> None:
    split, problems = read(own, mark + json.dumps([row(), row(target="c")], indent=indent))
    assert not problems
    assert [t.query_id for t in split.triplets] == ["train.000000", "train.000001"]
    _, problems = read(own, json.dumps([row(), row(target=3), "x"]))
    assert problems == [
        " [row 1]: 'target' is a int: 3",
        " [row 2]: is a str, where a mapping is needed",
    ]


@pytest.mark.parametrize(
    "text", ["[" + json.dumps(row()), "reference,text,target\na,b,c\nb,c,d\n", "[" * 5000]
)
def test_what_is_no_json_is_one_problem(own: Path, text: str) -> None:
    found = read(own, text)[1]
    assert len(found) == 2
    assert "no usable row of split 'train'" in found[1]


def test_null_and_double_keys_are_problems_of_their_rows(own: Path) -> None:
    rows = [
        row(),
        row(category=None),
        row(query_id=None),
        row(query_id=7),
        row(query_id="7"),
        row(split=None),
    ]
    assert read(own, "\n".join(map(json.dumps, rows)))[1] == [
        " [line 2]: 'category' is a NoneType: None",
        " [line 3]: 'query_id' is a NoneType: None",
        " [line 6]: 'split' is a NoneType: None",
        " [line 5]: query_id '7' is also that of line 4; give each its own",
    ]


def test_halves_of_characters_are_no_text(own: Path) -> None:
    """JSON can escape what no file can hold."""
    rows = [row(), row(text="\ud83d red"), row(target="\udc00"), row(relevant=["\ud800"])]
    found = read(own, "\n".join(map(json.dumps, rows)))[1]
    assert found[0].startswith(" [line 2]: 'text' holds half of a character")
    assert found[1].startswith(" [line 3]: 'target' holds half of a character")
    assert "[line 4]: relevant is not a list of image names" in found[2]


def test_a_category_without_images_is_a_problem_if_others_have_some(own: Path) -> None:
    hats = row(reference="hats/h", target="hats/i", category="hats")
    found = read(own, "\n".join(map(json.dumps, [hats, row(category="shoes")])))[1]
    assert len(found) == 1
    assert "[line 2]: category 'shoes' has no images: there is no" in found[0]
    split, found = read(own, "\n".join(map(json.dumps, [row(category="x"), row(category="y")])))
    assert not found
    (note,) = (note for note in split.notes if "ranked against" in note)
    assert "every category are ranked against all 5 images" in note


def test_a_row_that_is_only_asked_needs_no_target(own: Path) -> None:
    asked = {"reference": "c", "text": "longer", "split": "test"}
    text = "\n".join(map(json.dumps, [row(), asked]))
    assert not read(own, text)[1]
    split, problems = read(own, text, "test")
    assert not problems
    assert split.triplets[0].target_id is None
    for split_name in ("train", "val"):
        found = read(own, json.dumps(asked | {"split": split_name}))[1]
        assert found[0] == " [line 1]: key 'target' is missing"


def test_blank_captions_leave_no_dangling_and() -> None:
    assert join_fashioniq(["is red.", "Bigger "], "tidy") == "Is red and Bigger"
    for blank in ("", " ", ".", " ?"):
        assert join_fashioniq(["is red", blank], "tidy") == "Is red"
        assert join_fashioniq([blank, "is red"], "tidy") == "Is red"
        assert join_fashioniq(["is red", blank], "released") == "Is red and "
    assert join_fashioniq(["", ""], "tidy") == ""


def _dangles(triplet: Triplet) -> bool:
    return triplet.text.startswith(" and ") or triplet.text.endswith(" and ")


def test_the_real_annotations_and_what_is_odd_in_them(annotations: Path) -> None:
    """FashionIQ and CIRR as published: blank captions, several targets, soft targets."""
    blank = {"train": {"dress": 1, "toptee": 12}, "val": {"shirt": 1, "toptee": 2}}
    for split_name in ("train", "val"):
        split, problems = read_fashioniq(f"{annotations}/fashioniq", split_name, texts="tidy")
        assert {p.message.split("'")[0] for p in problems} == {"image "}  # there are no images
        assert [note for note in split.notes if "blank" in note] == [
            f"cap.{category}.{split_name}.json: {count} row(s) with a blank caption; the other is "
            "the whole text"
            for category, count in blank[split_name].items()
        ]
        assert not any(map(_dangles, split.triplets))
        released, _ = read_fashioniq(f"{annotations}/fashioniq", split_name, texts="released")
        dangling = Counter(t.category for t in released.triplets if _dangles(t))
        assert dangling == blank[split_name]
        if split_name == "train":
            (several,) = (n for n in rows_said(released.triplets, "train") if "two or more" in n)
            assert several == "89 queries of 'train' (189 rows) have two or more targets"
            known = with_known_positives(released, {})
            assert sum(bool(t.positive_ids) for t in known.triplets) == 189
    cirr, _ = read_cirr(f"{annotations}/cirr", "val")
    assert sum(len(t.positive_ids) for t in cirr.triplets) == 77


def test_known_positives_are_labels_twins_and_other_targets(tmp_path: Path) -> None:
    def query(number: int, target: str | None, reference: str = "r", **more: Any) -> Triplet:
        return Triplet(f"q{number}", reference, "x", target, "all", **more)

    triplets = (
        query(0, "a"),
        query(1, "b"),
        query(2, "a", "s"),
        query(3, "c", "t", positive_ids=("d",)),
        query(4, None, "u"),
        query(5, "e", "v", relevant_ids=("e", "a")),  # to measure, not to train
    )
    names = [*"abcdefghrstuv"]
    digest_of = {name: name for name in names} | {"g": "a", "h": "d"}
    split = Split("train", triplets, {name: name for name in names}, {"all": tuple(names)})
    known = with_known_positives(split, digest_of)
    assert [t.positive_ids for t in known.triplets] == [
        ("b", "g"),
        ("a", "g"),
        ("g",),
        ("d", "h"),
        (),
        (),
    ]
    assert with_known_positives(known, digest_of) == known
    assert without_known_positives(known) == without_known_positives(split)
    write_split(str(tmp_path / "kept"), known)
    assert read_split(str(tmp_path / "kept")) == known
    # Rounds and embeddings are known by a digest of this.
    assert repr(known.triplets[0]) == repr(split.triplets[0])
    (note,) = twins_said(digest_of)
    assert "4 images are 2 picture(s) under several names; the commonest has 2 ('a', 'g')" in note
    assert twins_said({"a": "1", "b": "2"}) == []


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=True),
        st.sampled_from(
            ["a", "b", "a.png", "../x", "train", "val", "", " ", "hats", "\0", "\ud800"]
        ),
        st.text(max_size=5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = ["reference", "target", "text", "split", "category", "query_id", "relevant", "candidate"]
KEYS += ["captions", "pairid", "target_hard", "target_soft", "caption", "img_set", "id", "members"]
KEYS += ["reference_img_id", "relative_caption", "target_img_id", "gt_img_ids"]
ROWS = st.lists(st.one_of(VALUES, st.dictionaries(st.sampled_from(KEYS), VALUES)), max_size=5)
FULL = {"reference": "a", "text": "x", "target": "b", "candidate": "a", "captions": ["x", "y"]}
FULL |= {"pairid": 1, "caption": "x", "target_hard": "b", "img_set": {"members": ["a"]}}
FULL |= {"id": 1, "reference_img_id": 1, "relative_caption": "x", "target_img_id": 2}
FULL |= {"gt_img_ids": [2]}


@settings(max_examples=300, deadline=None)
@example(rows=[], near=[{}], whole={}, cut=0, layout="circo", split="train")  # no images at all
@example(rows=[], near=[], whole="\0", cut=0, layout="cirr", split="train")
@example(rows=[], near=[], whole="\ud800/a", cut=0, layout="cirr", split="train")
@given(
    rows=ROWS,
    near=st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2), max_size=3),
    whole=VALUES,
    cut=st.integers(0, 40),
    layout=st.sampled_from(["jsonl", "list", "fashioniq", "cirr", "circo"]),
    split=st.sampled_from(["train", "val"]),
)
def test_no_row_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    near: list[dict[str, Any]],
    whole: Any,
    cut: int,
    layout: str,
    split: str,
) -> None:
    root = tmp_path_factory.mktemp("own")
    (root / "images").mkdir()
    for name in "ab":
        (root / f"images/{name}.png").write_bytes(b"")
    every = [*rows, *(FULL | part for part in near)]
    files: dict[str, Any] = {
        f"captions/cap.x.{split}.json": every,
        f"image_splits/split.x.{split}.json": ["a", "b", *rows],
        f"relevance/rel.x.{split}.json": rows,
        f"cirr/captions/cap.rc2.{split}.json": every,
        f"cirr/image_splits/split.rc2.{split}.json": {"a": "./images/a.png", "b": whole},
        f"annotations/{split}.json": every,
        "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json": {
            "images": [{"id": 1}, {"id": 2}, *rows] if cut else whole
        },
    }
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(value)
        (root / name).write_text(text if cut % 5 else text[: len(text) - cut])
    lines = [json.dumps(value) for value in every]
    text = json.dumps(every) if layout == "list" else "\n".join(lines)
    (root / "triplets.jsonl").write_text(text[cut:] if cut % 3 == 0 else text)
    read_of: dict[str, Any] = {
        "fashioniq": read_fashioniq,
        "cirr": read_cirr,
        "circo": read_circo,
    }
    try:
        found, problems = read_of.get(layout, read_jsonl)(str(root), split)
    except InputError:
        return
    for problem in problems:
        assert problem.file.startswith(str(root))
        assert problem.message
    if not problems:
        known = {name for ids in found.galleries.values() for name in ids}
        for triplet in found.triplets:
            assert triplet.reference_id in found.images
            assert triplet.target_id is None or triplet.target_id in known
            assert triplet.text.encode() is not None
        write_split(str(root / "kept"), found)
        assert read_split(str(root / "kept")).triplets == found.triplets


def test_the_same_text_is_loaded_from_any_of_both(own: Path) -> None:
    (own / "triplets.jsonl").write_text(json.dumps([row()]))
    data = DataSettings(format="jsonl", root=str(own))
    assert load_split(data, "train").triplets[0].text == "in red"
