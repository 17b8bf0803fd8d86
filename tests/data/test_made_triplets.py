"""Triplets made from attributes: by their definition, seeded, in FashionIQ's layout."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, Runner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qure_core.base.config import DataSettings
from qure_core.base.errors import InputError
from qure_core.data.attributes import Catalogue, read_catalogue
from qure_core.data.made_triplets import MadeSplit, make_split, make_triplets, split_images
from qure_core.data.sources import Dataset
from qure_core.data.templates import Templates, read_templates

TEMPLATES = Templates.model_validate(
    {
        "attributes": {
            name: {"first": [f"is {name} {{new}}", "{new} not {old}"], "second": ["now {new}"]}
            for name in ("kind", "colour", "size")
        },
        "descriptions": ["a {size} {colour} {kind}"],
    }
)


def catalogue_of(values: list[tuple[str, ...]]) -> Catalogue:
    names = {f"i{number:03d}": own for number, own in enumerate(values)}
    return Catalogue(("kind", "colour", "size"), names, {}, Counter())


def check(made: MadeSplit, catalogue: Catalogue, changes: set[int]) -> None:
    values = catalogue.values_of
    assert len({(t.reference, t.target, t.captions) for t in made.triplets}) == len(made.triplets)
    for triplet, relevant in zip(made.triplets, made.relevant, strict=True):
        old, new = values[triplet.reference], values[triplet.target]
        changed = [n for n, o, v in zip(catalogue.attributes, old, new, strict=True) if o != v]
        assert tuple(changed) == triplet.changed
        assert len(changed) in changes
        assert {triplet.reference, triplet.target} <= set(made.images)
        # Every image of what is asked for answers, and nothing else.
        assert list(relevant) == [n for n in made.images if values[n] == new]
        for name, o, v in zip(catalogue.attributes, old, new, strict=True):
            if name in changed:
                assert all(v in caption for caption in triplet.captions)
                first = triplet.captions[0]
                assert f"is {name} {v}" in first or f"{v} not {o}" in first


VALUES = st.tuples(st.sampled_from("ABC"), st.sampled_from("xyz"), st.sampled_from("12"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(VALUES, min_size=2, max_size=30),
    st.sets(st.integers(1, 3), min_size=1),
    st.integers(1, 40),
    st.integers(0, 5),
)
def test_every_triplet_is_what_it_says(
    values: list[tuple[str, ...]], changes: set[int], wanted: int, seed: int
) -> None:
    catalogue = catalogue_of(values)
    templates = TEMPLATES.model_copy(update={"changes": sorted(changes)})
    images = list(catalogue.values_of)
    made = make_split(catalogue, templates, "all", "train", images, wanted, seed)
    check(made, catalogue, changes)
    assert len(made.triplets) <= wanted
    assert make_split(catalogue, templates, "all", "train", images[::-1], wanted, seed) == made
    possible = {
        (a, b)
        for a in images
        for b in images
        if sum(o != v for o, v in zip(catalogue.values_of[a], catalogue.values_of[b], strict=True))
        in changes
    }
    assert bool(made.triplets) == bool(possible)
    assert {(t.reference, t.target) for t in made.triplets} <= possible


@pytest.mark.parametrize("by", ["image", "combination"])
def test_what_is_held_out(by: Any) -> None:
    values = [(a, b, c) for a in "ABCD" for b in "xyz" for c in "12"] * 5
    catalogue = catalogue_of(values)
    splits = split_images(catalogue, by, 0.25, 3)
    assert sorted(splits["train"] + splits["val"]) == sorted(catalogue.values_of)
    assert len(splits["val"]) == 30
    of = {name: {catalogue.values_of[i] for i in ids} for name, ids in splits.items()}
    assert bool(of["train"] & of["val"]) == (by == "image")
    assert split_images(catalogue, by, 0.25, 3) == splits
    assert split_images(catalogue, by, 0.25, 4) != splits


ROWS = {
    "image_id": ["007", "a.jpg", "b", "c", "caf\u0065\u0301"],
    "kind": ["hat", "hat", "bag", None, "bag"],
    "colour": ["red", "blue", "blue", "red", " "],
    "size": [1, 2, 1, 1, 1],
}


def write(folder: Path, kind: str) -> str:
    table = pa.table(ROWS)
    file = folder / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(table, file)
    elif kind == "csv":
        rows = [
            [value or "" if value != 0 else 0 for value in row.values()]
            for row in table.to_pylist()
        ]
        lines = [",".join(map(str, row)) for row in [list(ROWS), *rows]]
        file.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in table.to_pylist()]
        file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_every_kind_of_table_is_the_same_catalogue(kind: str, tmp_path: Path) -> None:
    found = read_catalogue(write(tmp_path, kind), ["kind", "size"], "colour")
    assert found.values_of == {"007": ("hat", "1"), "a.jpg": ("hat", "2"), "b": ("bag", "1")}
    assert found.category_of["a.jpg"] == "blue"
    assert found.incomplete == {"kind": 1, "colour": 1}


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("image_id,kind\na,b\na,c\n", "t.csv", r"\[row 1\]: image 'a' has a row before"),
        ("image_id,kind\n,b\n", "t.csv", r"\[row 0\]: has no image_id"),
        ("id,kind\na,b\n", "t.csv", "has no column 'image_id' .it has id, kind"),
        ("image_id,kind\na,b,c\n", "t.csv", "cannot be read as a table"),
        ('{"image_id": "a", "kind": ["b"]}', "t.jsonl", "not text or numbers, one value an image"),
        ("{", "t.jsonl", "cannot be read as a table"),
        ("x", "t.parquet", "cannot be read as a table"),
        ("x", "t.xlsx", r"is no \.parquet, \.csv or \.jsonl file"),
    ],
)
def test_tables_that_are_none_are_named(
    content: str, name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_catalogue(f"{tmp_path}/{name}", ["kind"], None)
    assert f"{tmp_path}/{name}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attributes: {kind: {first: [x], second: [is new]}}", "does not say {new}"),
        ("attributes: {kind: {first: ['{new}'], second: ['{other}']}}", "{other} is not one of"),
        ("attributes: {kind: {first: ['{new'], second: ['{new}']}}", "expected '}'"),
        ("attributes: {kind: {first: ['{new.x}'], second: ['{new}']}}", "{new.x} is not one of"),
        ("attributes: {}", "attributes: "),
        ("attributes: {kind: {first: ['{new}'], second: []}}", "kind.second"),
        ("attributes: {kind: {first: ['{new}'], second: ['{new}']}}", "changes: 2 of 1 attributes"),
        ("- a list", "valid dictionary"),
        ("{", "is not YAML"),
    ],
)
def test_templates_that_are_wrong_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_templates(f"{tmp_path}/t.yaml")
    assert message in str(caught.value)
    assert f"{tmp_path}/t.yaml" in str(caught.value)


def test_the_command_makes_a_dataset_that_is_read(tmp_path: Path, run_pipeline: Runner) -> None:
    """With images in a folder, suffixes in the table, a row too many, and another one's file."""
    lines = ["image_id,kind,colour,shop"]
    for number in range(60):
        kind, colour = ["hat", "bag", "shoe"][number % 3], ["red", "blue"][number // 3 % 2]
        lines.append(f"{number:03d}.png,{kind},{colour},{'north' if number < 40 else 'south'}")
        (tmp_path / "images").mkdir(exist_ok=True)
        if number:
            Image.new("RGB", (8, 8), colour).save(tmp_path / f"images/{number:03d}.png")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    text = (ROOT / "configs/templates/clothes.yaml").read_text() + "category: shop\n"
    (tmp_path / "t.yaml").write_text(text)
    command = ["triplets", f"--attributes={tmp_path}/table.csv", f"--templates={tmp_path}/t.yaml"]
    command += [f"--data.images={tmp_path}/images", f"--output={tmp_path}/made"]
    command += ["--train=200", "--val=30"]
    result = run_pipeline("prepare", *command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "left out, no image there" in result.stdout
    manifest = json.loads((tmp_path / "made/manifest.json").read_text())
    before = (tmp_path / "made/captions/cap.north.train.json").read_bytes()
    report = manifest["report"]
    assert report["images"] == 59
    assert report["combinations"] == 6
    data = DataSettings(format="fashioniq", root=f"{tmp_path}/made", images=f"{tmp_path}/images")
    for name in ("train", "val"):
        split = Dataset(data).load(name)
        assert len(split.triplets) == report["splits"][name]["triplets"] > 0
        assert set(split.galleries) == {"north", "south"}
        assert all(t.target_id in t.relevant_ids for t in split.triplets)
        assert not any(t.positive_ids for t in split.triplets)  # to measure, not to train
    assert run_pipeline("prepare", *command).returncode == 0
    assert (tmp_path / "made/captions/cap.north.train.json").read_bytes() == before
    (tmp_path / "made/notes.txt").write_text("mine")
    result = run_pipeline("prepare", *command)
    assert result.returncode == 2
    assert "notes.txt" in result.stderr
    assert (tmp_path / "made/notes.txt").read_text() == "mine"


def test_attributes_that_never_differ_are_said(tmp_path: Path) -> None:
    rows = {"image_id": ["a", "b"], "kind": ["hat", "hat"], "colour": ["red"] * 2, "size": [1, 1]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="no two of 2 images differ in 1 or 2 of kind, colour"):
        make_triplets(
            f"{tmp_path}/made",
            f"{tmp_path}/t.parquet",
            TEMPLATES,
            images=None,
            index_dir="",
            wanted={"train": 5, "val": 0},
            by="image",
            val_fraction=0.0,
            seed=1,
        )
    assert not (tmp_path / "made").exists()
