"""Paired differences and samples to reach a level, against plain computations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qure_core.evaluation.paired import (
    Difference,
    figure_difference,
    paired_difference,
    samples_to_reach,
)


def test_the_interval_is_that_of_queries_drawn_again() -> None:
    rng = np.random.default_rng(0)
    categories = ["a"] * 60 + ["b"] * 140
    base = rng.random((2, 200)) < 0.5
    other = base | (rng.random((2, 200)) < 0.2)
    found = paired_difference([1.0, 2.0], other, base, categories)
    # Drawn again the slow way, by another generator.
    again = np.random.default_rng(7)
    means = []
    for _ in range(3000):
        drawn = [again.integers(0, 60, 60), 60 + again.integers(0, 140, 140)]
        gains = [100 * (other[:, own].mean() - base[:, own].mean()) for own in drawn]
        means.append(np.mean(gains))
    low, high = np.quantile(means, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.6)
    assert found.mean == 1.5


@pytest.mark.parametrize(
    ("by_seed", "low", "high", "verdict"),
    [
        ((2.0, 1.0), 0.5, 3.0, "ahead"),
        ((2.0, 1.0), -0.5, 3.0, "within noise"),
        ((2.0, -1.0), 0.1, 3.0, "within noise"),
        ((-2.0, -1.0), -3.0, -0.1, "behind"),
        ((2.0,), None, None, "within noise"),
        ((2.0, 1.0), None, None, "within noise"),
        ((2.0,), 0.1, 4.0, "ahead"),
        ((0.0, 0.0), 0.0, 0.0, "within noise"),
    ],
)
def test_a_verdict_needs_the_interval_and_every_seed(
    by_seed: tuple[float, ...], low: float | None, high: float | None, verdict: str
) -> None:
    assert Difference(by_seed, low, high).verdict == verdict


def test_a_model_is_not_told_apart_from_itself() -> None:
    hits = np.random.default_rng(0).random((3, 50)) < 0.4
    same = paired_difference([0.0] * 3, hits, hits, ["all"] * 50)
    assert (same.low, same.high, same.verdict) == (0.0, 0.0, "within noise")


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=6), st.floats(0, 100))
def test_samples_to_reach_a_level(values: list[float], level: float) -> None:
    points = [(100 * number, value) for number, value in enumerate(values)]
    found = samples_to_reach(points, level)
    if max(values) < level:
        assert found is None
        return
    assert found is not None
    first = next(i for i, value in enumerate(values) if value >= level)
    assert 100 * max(first - 1, 0) <= found <= 100 * first
    between = np.interp(found, [s for s, _ in points], values)
    steepest = max((abs(b - a) for a, b in itertools.pairwise(values)), default=0)
    assert first == 0 or abs(between - level) <= steepest / 100 + 1e-6


def test_a_recalls_interval_is_of_its_hits() -> None:
    rng = np.random.default_rng(2)
    ranks = [
        [{f"q{n}": ("ab"[n % 2], int(rng.integers(20))) for n in range(40)} for _ in range(2)]
        for _ in range(2)
    ]
    names = sorted(ranks[0][0])
    hits = [np.array([[own[q][1] < 10 for q in names] for own in some]) for some in ranks]
    expected = paired_difference([1.0, 2.0], *hits, [ranks[0][0][q][0] for q in names])
    assert figure_difference("R@10", [1.0, 2.0], *ranks) == expected
    assert expected.low is not None
    assert figure_difference("R-precision", [1.0, 2.0], *ranks).low is None
    ranks[0][1]["q3"] = ("b", None)
    assert figure_difference("R@10", [1.0, 2.0], *ranks).low is None
