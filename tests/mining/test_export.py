"""Mined sets in the formats of other programs, read back by the library that those read with."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import Runner
from PIL import Image

from qure_core.base.errors import InputError
from qure_core.data.pack import pack_images
from qure_core.data.packed_index import image_source
from qure_core.data.schema import Split, read_split
from qure_core.job.layout import committed
from qure_core.mining import read_mined_set
from qure_core.mining.export import export_round


@pytest.fixture
def mined(finished_run: Path) -> tuple[str, Split]:
    uri = committed(str(finished_run), "rounds")[-1]["uri"]
    return uri, read_split(f"{finished_run}/data/train")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def stored(uri: str) -> np.ndarray:
    return pixels(Image.open(uri))


def test_json_lines(
    mined: tuple[str, Split], finished_run: Path, tmp_path: Path, run_pipeline: Runner
) -> None:
    uri, split = mined
    output = tmp_path / "out"
    command = ["export", uri, "--format=jsonl", f"--output={output}", "--negatives=3"]
    result = run_pipeline("mine", *command)
    assert result.returncode == 0, result.stderr
    assert f"exported {len(split.triplets):,} queries as jsonl: {output}" in result.stdout
    rows = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
    negatives = read_mined_set(uri).negatives()
    assert len(rows) == len(split.triplets)
    for row, triplet in zip(rows, split.triplets, strict=True):
        assert (row["query_id"], row["reference"]) == (triplet.query_id, triplet.reference_id)
        assert (row["text"], row["target"]) == (triplet.text, triplet.target_id)
        assert row["negatives"] == negatives[triplet.query_id][:3].tolist()
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert len(row["scores"]) == len(row["negatives"])
    assert run_pipeline("mine", *command).returncode == 0
    (output / "mine.txt").write_text("mine")
    assert run_pipeline("mine", *command).returncode == 2
    result = run_pipeline("mine", *command[:-1], "--negatives=0")
    assert "--negatives: 0 is less than 1" in result.stderr


def test_sentence_transformers(mined: tuple[str, Split], tmp_path: Path) -> None:
    uri, split = mined
    negatives = read_mined_set(uri).negatives()
    wanted = int(np.median([len(ids) for ids in negatives.values()]))
    counts = export_round(uri, split, f"{tmp_path}/out", "sentence-transformers", wanted)
    full = [t for t in split.triplets if len(negatives[t.query_id]) >= wanted]
    assert counts == {"queries": len(full), "short": len(split.triplets) - len(full)}
    assert counts["short"]
    table = datasets.load_dataset(
        "parquet", data_files=f"{tmp_path}/out/train.parquet", split="train", cache_dir=tmp_path
    )
    names = ["positive", *(f"negative_{n + 1}" for n in range(wanted))]
    assert table.column_names == ["anchor", *names]
    for number in (0, len(full) - 1):
        row, triplet = table[number], full[number]
        assert row["anchor"]["text"] == triplet.text
        assert (pixels(row["anchor"]["image"]) == stored(split.images[triplet.reference_id])).all()
        ids = [str(triplet.target_id), *negatives[triplet.query_id][:wanted]]
        for name, image in zip(names, ids, strict=True):
            assert (pixels(row[name]) == stored(split.images[image])).all()


def test_tevatron_with_packed_images(
    mined: tuple[str, Split], tmp_path: Path, local_ray: str
) -> None:
    uri, split = mined
    pack_images(f"{tmp_path}/packed", split.images, {}, 50, 10**6)
    images = image_source(f"{tmp_path}/packed", f"{tmp_path}/indexes", "data.images")
    packed = {name: str(images.find(name)) for name in split.images}
    moved = Split(split.name, split.triplets, packed, split.galleries)
    export_round(uri, moved, f"{tmp_path}/out", "tevatron", 4)
    queries, corpus = (
        datasets.load_dataset(
            "parquet", data_files=f"{tmp_path}/out/{n}.parquet", split="train", cache_dir=tmp_path
        )
        for n in ("queries", "corpus")
    )
    negatives = read_mined_set(uri).negatives()
    place = {name: number for number, name in enumerate(corpus["docid"])}
    assert len(queries) == len(split.triplets)
    for number in (0, len(queries) - 1):
        row, triplet = queries[number], split.triplets[number]
        assert row["query_text"] == triplet.text
        assert (pixels(row["query_image"]) == stored(split.images[triplet.reference_id])).all()
        assert row["positive_document_ids"] == [triplet.target_id]
        assert row["negative_document_ids"] == negatives[triplet.query_id][:4].tolist()
        for name in [*row["positive_document_ids"], *row["negative_document_ids"]]:
            assert (pixels(corpus[place[name]]["image"]) == stored(split.images[name])).all()


def test_another_split_is_refused(mined: tuple[str, Split], tmp_path: Path) -> None:
    uri, split = mined
    other = Split(split.name, split.triplets[1:], split.images, split.galleries)
    with pytest.raises(InputError, match=r"1 of its .* queries are not of the split given"):
        export_round(uri, other, f"{tmp_path}/out", "jsonl", 3)
    with pytest.raises(InputError, match="--negatives: no query has 9,999 hard negatives"):
        export_round(uri, split, f"{tmp_path}/out", "sentence-transformers", 9999)
    assert not (tmp_path / "out").exists()
