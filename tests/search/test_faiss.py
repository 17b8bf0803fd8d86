"""FAISS finds what exact search finds, to the recall it states, and its scores are the model's."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import clustered_vectors, make_split, write_embeddings
from synthetic_index import write_index, write_segment

from qure_core import storage
from qure_core.base.config import SearchSettings, Settings
from qure_core.base.errors import InputError
from qure_core.runtime.in_process import stages_in_process
from qure_core.search import Index
from qure_core.search.approximate_build import chosen_vectors, factory_for, make_faiss
from qure_core.search.build import MADE_WITH, without_images
from qure_core.search.compact import compacted
from qure_core.search.questions import Questions
from qure_core.search.version import Version
from qure_core.storage import files

IMAGES, TOKENS, WIDTH = 6000, 8, 32
SEARCH = SearchSettings(kind="faiss", factory="IVF64,SQ8")
QUERY_QD = torch.from_numpy(clustered_vectors((40, WIDTH), 5, torch.float32))


@pytest.fixture(autouse=True)
def here() -> Iterator[None]:
    with stages_in_process(Settings(cluster={"in_process": True, "gpus": "none"}).cluster):
        yield


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri = tmp_path_factory.mktemp("faiss") / "index"
    with stages_in_process(Settings(cluster={"in_process": True, "gpus": "none"}).cluster):
        write_index(str(uri), IMAGES, TOKENS, WIDTH, SEARCH)
    return uri


def recall(index: Index, top: int, **options: Any) -> float:
    """The share of exact answers that are found; every score found is checked to the bit."""
    near = index.search(QUERY_QD, top, **options)
    exact = index.search(QUERY_QD, len(index), exact=True, **options)
    shares = []
    for places, scores, all_places, all_scores in zip(
        near.place_QK, near.score_QK, exact.place_QK, exact.score_QK, strict=True
    ):
        score_of = dict(zip(all_places.tolist(), all_scores.tolist(), strict=True))
        assert [score_of[place] for place in places.tolist()] == scores.tolist()
        assert len(set(places.tolist())) == len(places)
        order = [(-score, place) for place, score in zip(places, scores, strict=True)]
        assert order == sorted(order)
        shares.append(np.isin(all_places[:top], places).mean())
    return float(np.mean(shares))


def test_the_recall_is_what_the_manifest_says(index: Path) -> None:
    opened = Index.open(str(index))
    made = opened.manifest["faiss"]
    assert min(made["recall"].values()) >= 0.97
    assert made["nprobe"] < made["lists"] == 64
    assert recall(opened, 10) >= 0.97
    assert recall(opened, 50) >= 0.97


def test_what_may_not_be_found_is_not(index: Path) -> None:
    opened = Index.open(str(index))
    for share in (2, 40):  # few are all scored, many are asked of FAISS
        allowed = np.arange(IMAGES) % share == 0
        excluded = opened.search(QUERY_QD, 3, allowed=allowed, exact=True).place_QK.tolist()
        found = opened.search(QUERY_QD, 20, excluded, allowed)
        assert (found.place_QK % share == 0).all()
        for own, out in zip(found.place_QK, excluded, strict=True):
            assert not np.isin(own, out).any()
        assert recall(opened, 20, excluded=excluded, allowed=allowed) >= 0.97


def test_where_lists_hold_too_few_all_are_scored(index: Path) -> None:
    opened = Index.open(str(index))
    opened.manifest["faiss"] |= {"nprobe": 1, "depth": 1}
    exact = opened.search(QUERY_QD[:3], 5500, exact=True)
    found = opened.search(QUERY_QD[:3], 5500)
    np.testing.assert_array_equal(found.place_QK, exact.place_QK)


def test_shares_of_an_index_make_up_the_whole(index: Path) -> None:
    opened = Index.open(str(index))
    whole = opened.best(QUERY_QD, 10, None, None, opened.effort)
    keys = [
        Index.version(str(index), opened.manifest, share=(i, 3)).best(
            QUERY_QD, 10, None, None, opened.effort
        )
        for i in range(3)
    ]
    merged = torch.cat(keys, dim=1).sort(dim=1).values[:, :10]
    assert torch.equal(merged, whole)


def test_parts_are_no_matter(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts, trained alike, find what one does, and hold the same numbers."""
    monkeypatch.setattr("qure_core.search.version.PART_ROWS", 1700)
    write_index(str(tmp_path / "parts"), IMAGES, TOKENS, WIDTH, SEARCH)
    one, many = Index.open(str(index)), Index.open(str(tmp_path / "parts"))
    assert len(many.parts) == 4
    assert recall(many, 10) >= 0.97
    exact = [found.search(QUERY_QD, 10, exact=True) for found in (one, many)]
    np.testing.assert_array_equal(exact[0].place_QK, exact[1].place_QK)
    np.testing.assert_array_equal(exact[0].score_QK, exact[1].score_QK)


def test_the_same_images_give_the_same_files(tmp_path: Path, index: Path) -> None:
    write_index(str(tmp_path / "again"), IMAGES, TOKENS, WIDTH, SEARCH)
    files = [
        {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*.faiss")}
        for root in (index, tmp_path / "again")
    ]
    assert len(files[0]) == 2
    assert files[0] == files[1]


def test_added_and_removed(tmp_path: Path) -> None:
    uri = str(tmp_path / "grown")
    write_index(uri, 3000, TOKENS, WIDTH, SEARCH)
    before = storage.read_manifest(uri, None)
    rows = Index.open(uri).images.to_pylist()
    more = [f"j{n:08d}" for n in range(500)]
    rows += write_segment(uri, "segment-1111111111111111", more, TOKENS, WIDTH, 9)
    facts = dict.fromkeys(MADE_WITH, "")
    version = Version(uri, facts, {row["image_id"]: row for row in rows}, 500)
    questions = Questions(QUERY_QD, np.full(len(QUERY_QD), -1))
    made, files = make_faiss(
        version.opened(version.description()), questions, SEARCH, before["faiss"], 1
    )
    asked = "questions-2222222222222222"
    write_embeddings(
        f"{uri}/{asked}",
        make_split(40, 40),
        tokens=TOKENS,
        width=WIDTH,
        shard=40,
        draw=clustered_vectors,
    )
    description = version.description() | {"faiss": made, "questions": asked}
    version.commit(description, 0.0, files)
    assert made["trained"] == before["faiss"]["trained"]  # the lists serve on
    grown = Index.open(uri)
    assert len(grown) == 3500
    assert recall(grown, 10) >= 0.97
    gone = [grown.ids[place] for place in grown.search(QUERY_QD, 2).place_QK.flatten()]
    without_images(uri, sorted(set(gone)))
    left = Index.open(uri)
    assert recall(left, 10) >= 0.97
    assert not {left.ids[place] for place in left.search(QUERY_QD, 10).place_QK.flatten()} & set(
        gone
    )
    exact = left.search(QUERY_QD, 50, exact=True)
    assert compacted(uri)[0] == 2
    merged = Index.open(uri)
    assert list(merged.manifest["faiss"]["parts"]) == merged.manifest["segments"]
    assert len(merged.segments) == 1
    assert recall(merged, 10) >= 0.97
    found = merged.search(QUERY_QD, 50, exact=True)
    np.testing.assert_array_equal(found.place_QK, exact.place_QK)
    np.testing.assert_array_equal(found.score_QK, exact.score_QK)


def failing_writes(monkeypatch: pytest.MonkeyPatch, good: int) -> None:
    """Let so many writes succeed and refuse all others, as a full disk does."""
    counts = 0
    write = files.write_bytes

    def refusing(uri: str, data: bytes) -> None:
        nonlocal counts
        counts += 1
        if counts > good:
            raise OSError(errno.ENOSPC, "No space left on device", uri)
        write(uri, data)

    for module in [m for name, m in sys.modules.items() if name.startswith("qure_core")]:
        if getattr(module, "write_bytes", None) is write:
            monkeypatch.setattr(module, "write_bytes", refusing)


def test_a_disk_that_fills_at_any_write_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of an index whose lists are made nor of one that is compacted: the same call goes on
    and ends with the same files, and until then the version before answers."""
    small = SearchSettings(kind="faiss", factory="IVF8,SQ8")
    write_index(str(tmp_path / "whole"), 300, TOKENS, WIDTH, small, 20)
    expected = sorted(file.name for file in (tmp_path / "whole").rglob("*.faiss"))
    uri = str(tmp_path / "again")
    write_index(uri, 300, TOKENS, WIDTH, SearchSettings(kind="exact"))
    tries = 0
    while True:
        with monkeypatch.context() as patch:
            failing_writes(patch, tries)
            try:
                write_index(uri, 300, TOKENS, WIDTH, small, 20)
                break
            except OSError:
                tries += 1
        before = Index.open(uri)
        assert "faiss" not in before.manifest
        assert len(before.search(QUERY_QD, 5).place_QK) == len(QUERY_QD)
    assert tries >= 3
    assert sorted(file.name for file in Path(uri).rglob("*.faiss")) == expected
    for name in expected:
        ((one,), (other,)) = ([*Path(root).rglob(name)] for root in (tmp_path / "whole", uri))
        assert one.read_bytes() == other.read_bytes()


def test_compacting_that_is_cut_short_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "index")
    write_index(uri, 200, TOKENS, WIDTH, SearchSettings(kind="exact"))
    rows = Index.open(uri).images.to_pylist()
    for number in (1, 2):
        ids = [f"{'ah'[number - 1]}{n:08d}" for n in range(60)]  # before and after all others
        rows += write_segment(uri, f"segment-{number:016d}", ids, TOKENS, WIDTH, number)
    version = Version(uri, dict.fromkeys(MADE_WITH, ""), {r["image_id"]: r for r in rows}, 120)
    version.commit(version.description(), 0.0)
    expected = Index.open(uri).search(QUERY_QD, 320)
    tries = 0
    while True:
        with monkeypatch.context() as patch:
            failing_writes(patch, tries)
            try:
                compacted(uri)
                break
            except OSError:
                tries += 1
        found = Index.open(uri).search(QUERY_QD, 320)
        np.testing.assert_array_equal(found.score_QK, expected.score_QK)
    assert tries >= 3
    opened = Index.open(uri)
    assert (len(opened.segments), len(opened)) == (1, 320)
    assert [*Path(uri).glob("segment-*")] == [Path(uri) / opened.manifest["segments"][0]]
    found = opened.search(QUERY_QD, 320)
    np.testing.assert_array_equal(found.place_QK, expected.place_QK)
    np.testing.assert_array_equal(found.score_QK, expected.score_QK)
    assert compacted(uri) == (0, 0)


def test_vectors_are_chosen_by_how_often_they_win() -> None:
    wins = np.asarray([5, 0, 900, 95, 0])
    assert chosen_vectors(wins, None) == [0, 2, 3]
    assert chosen_vectors(wins, 1) == [2]
    assert chosen_vectors(np.asarray([1, 99_999]), None) == [1]
    assert chosen_vectors(np.zeros(3, int), None) == [0, 1, 2]


def test_vectors_that_never_win_are_left_to_the_scores(tmp_path: Path) -> None:
    search = SEARCH.model_copy(update={"tokens": 5})
    write_index(str(tmp_path / "few"), 3000, TOKENS, WIDTH, search)
    opened = Index.open(str(tmp_path / "few"))
    assert len(opened.manifest["faiss"]["positions"]) == 5
    recall(opened, 10)  # scores are of all vectors


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Flat", "has no inverted file; give one with IVF"),
        ("IVF64,What", "FAISS takes no 'IVF64,What'"),
        ("IVF65536,Flat", "has 65,536 lists, but there are only 1,600 vectors"),
    ],
)
def test_a_factory_that_does_not_serve_is_named(tmp_path: Path, factory: str, message: str) -> None:
    search = SearchSettings(kind="faiss", factory=factory)
    with pytest.raises(InputError, match=message):
        write_index(str(tmp_path / "none"), 200, TOKENS, WIDTH, search)
    assert not storage.is_committed(str(tmp_path / "none"))


@pytest.mark.parametrize("factory", ["IVF64,PQ16", "OPQ16_32,IVF64,PQ16", "IVF64_HNSW32,SQ4"])
def test_other_factories(tmp_path: Path, factory: str) -> None:
    search = SearchSettings(kind="faiss", factory=factory, recall=0.9)
    write_index(str(tmp_path / "other"), 3000, TOKENS, WIDTH, search)
    opened = Index.open(str(tmp_path / "other"))
    assert recall(opened, 10, allowed=np.arange(3000) != 7) >= 0.85


def test_lists_grow_with_the_root_of_the_vectors() -> None:
    assert factory_for(3_200_000) == "IVF4096,SQ4"
    assert factory_for(32_000_000) == "IVF16384_HNSW32,SQ4"
