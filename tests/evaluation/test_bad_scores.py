"""Scores that are no numbers are ranked by nobody."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.data.schema import Triplet
from qure_core.embeddings.shards import EMBEDDINGS_KIND, shard_files
from qure_core.embeddings.stage import write_shard
from qure_core.evaluation.stage import _rank_block
from qure_core.model.relevance import refuse_bad_scores
from qure_core.ranking.blocks import QueryBlock


def embeddings(folder: Path, bad: float) -> str:
    """Four images of two tokens, one of which is ``bad``, and two queries."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 2, 8)).astype(np.float32)
    images[2, 1, 3] = bad
    uri, names = str(folder / "embeddings"), shard_files(0)
    write_shard(uri, names[0], list("abcd"), images)
    write_shard(uri, names[1], ["q1", "q2"], rng.normal(size=(2, 8)).astype(np.float32))
    facts = {"tokens": 2, "width": 8, "shards": 1, "first_ids": ["a"]}
    storage.write_manifest(uri, EMBEDDINGS_KIND, facts, list(names))
    return uri


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_ranking_refuses_them(tmp_path: Path, bad: float) -> None:
    triplets = tuple(Triplet(query, "a", "x", "b", "all") for query in ("q1", "q2"))
    block = QueryBlock(0, "all", triplets, tuple("abcd"))
    output = str(tmp_path / "rankings")
    _rank_block(block, embeddings(tmp_path / "good", 0.5), output, 3, False)
    with pytest.raises(InputError, match=r"scores of queries \[.*\] are not finite"):
        _rank_block(block, embeddings(tmp_path / "bad", bad), f"{output}-bad", 3, False)
    assert not Path(f"{output}-bad").exists()


def test_large_scores_are_no_fault() -> None:
    refuse_bad_scores(torch.tensor([[1e38, -1e38]]))
    with pytest.raises(InputError, match=r"queries \[1\]"):
        refuse_bad_scores(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]))
