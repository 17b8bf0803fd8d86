"""FashionIQ recalls against the released program's golden values and brute force."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st

from qure_core.evaluation.metrics import fashioniq_summary, found_in_top, r_precision, recall_at
from qure_core.ranking.order import rank_row

GOLDEN = json.loads((GOLDENS / "metrics.json").read_text())
ARRAYS = np.load(GOLDENS / "metrics.npz")


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1), st.integers(1, 60))
def test_recall_by_counting(ranks: list[int], k: int) -> None:
    assert recall_at(ranks, k) == pytest.approx(100 * sum(r < k for r in ranks) / len(ranks))


def test_relevance_metrics_by_hand() -> None:
    # Relevant images at ranks 0, 2 and 11 of a gallery: three relevant.
    assert r_precision([0, 2, 11], 3) == pytest.approx(2 / 3)
    assert found_in_top([0, 2, 11], 3, 10) == pytest.approx(2 / 3)
    # Twelve relevant images all in front: ten are all that fit into the top 10.
    assert found_in_top(range(12), 12, 10) == 1
    assert r_precision(range(12), 12) == 1


def test_summary_averages_categories_not_queries() -> None:
    table = fashioniq_summary({"a": [0], "b": [20, 60, 60, 60]})
    assert table["a"] == {"R@10": 100, "R@50": 100, "mean": 100}
    assert table["b"] == {"R@10": 0, "R@50": 25, "mean": 12.5}
    assert table["average"] == {"R@10": 50, "R@50": 62.5, "mean": 56.25}


def golden_ranks(case: str, kind: str) -> dict[str, np.ndarray]:
    return {
        name: ARRAYS[f"fiq__{case}__fashionIQ_{name}__{kind}_rank"]
        for name in ("dress", "shirt", "toptee")
    }


@pytest.mark.parametrize("case", ["plain", "ties_rounded", "all_equal"])
def test_recalls_are_the_released_programs(case: str) -> None:
    ours = fashioniq_summary(golden_ranks(case, "official"))
    golden = GOLDEN["fashioniq"][case]["eval_utils_eval_fiq"]
    for category in ("dress", "shirt", "toptee"):
        for k in (10, 50):
            expected = golden[f"fashionIQ_{category}_recall@{k}"]
            assert ours[category][f"R@{k}"] == pytest.approx(expected, abs=1e-5)
    assert ours["average"]["R@10"] == pytest.approx(golden["average_recall_at10"], abs=1e-5)
    assert ours["average"]["R@50"] == pytest.approx(golden["average_recall_at50"], abs=1e-5)
    assert ours["average"]["mean"] == pytest.approx(golden["average_recall"], abs=1e-5)


@pytest.mark.parametrize("case", ["plain", "ties_rounded", "all_equal"])
def test_our_order_of_equal_scores_is_within_the_possible(case: str) -> None:
    best, worst = golden_ranks(case, "best"), golden_ranks(case, "worst")
    for name in best:
        scores = ARRAYS[f"fiq__{case}__fashionIQ_{name}__scores"]
        target = ARRAYS[f"fiq__{case}__fashionIQ_{name}__target_col"]
        ranks = np.asarray(
            [
                rank_row(torch.from_numpy(row)).rank_M[column]
                for row, column in zip(scores, target, strict=True)
            ]
        )
        assert (best[name] <= ranks).all()
        assert (ranks <= worst[name]).all()
