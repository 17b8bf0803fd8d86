"""Differences between two models on the same queries, and how sure they are. Pure.

Shapes: S seeds, Q queries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_DRAWS = 2000
_SEED = 20_240_901  # of the resampling alone: the same figures give the same interval


@dataclass(frozen=True)
class Difference:
    """Of a figure in percent, the other model's less the baseline's.

    by_seed: of each seed. low, high: where 95 of 100 means lie when the queries are drawn again;
    None where single queries' results are not known.
    """

    by_seed: tuple[float, ...]
    low: float | None
    high: float | None

    @property
    def mean(self) -> float:
        return float(np.mean(self.by_seed))

    @property
    def verdict(self) -> str:
        """ "ahead" or "behind" if the interval and every seed say so; else, and where there is no
        interval, "within noise"."""
        if self.low is None or self.high is None:
            return "within noise"
        bounds = (*self.by_seed, self.low, self.high)
        if min(bounds) > 0:
            return "ahead"
        return "behind" if max(bounds) < 0 else "within noise"


def paired_difference(
    by_seed: Sequence[float],
    other_SQ: np.ndarray | None = None,
    baseline_SQ: np.ndarray | None = None,
    category_Q: Sequence[str] = (),
) -> Difference:
    """The difference of two models that were trained with the same seeds.

    ``other_SQ`` and ``baseline_SQ`` are single queries' results, 1 or 0; the figure is the mean
    over categories of the mean over a category's queries, in percent. Queries are drawn again
    within their category, the same for both models and all seeds.
    """
    if other_SQ is None or baseline_SQ is None:
        return Difference(tuple(by_seed), None, None)
    gain_Q = (other_SQ.astype(float) - baseline_SQ).mean(axis=0)
    rng = np.random.default_rng(_SEED)
    names = np.asarray(category_Q)
    means = np.zeros(_DRAWS)
    categories = np.unique(names)
    for category in categories:
        own = gain_Q[names == category]
        times = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=_DRAWS)
        means += times @ own / len(own) / len(categories)
    low, high = np.quantile(100 * means, [0.025, 0.975])
    return Difference(tuple(by_seed), float(low), float(high))


Ranks = Mapping[str, tuple[str, int | None]]
"""Of each query its category and its target's rank, 0 the best, None without a target."""


def figure_difference(
    metric: str, by_seed: Sequence[float], other: Sequence[Ranks], baseline: Sequence[Ranks]
) -> Difference:
    """`paired_difference` of a figure by its name, of the ranks under each seed: with an interval
    where it is a recall, "R@k", and every query has a target."""
    queries = sorted(baseline[0])
    found = re.fullmatch(r"R@(\d+)", metric)
    ranks = [[[own[query][1] for query in queries] for own in some] for some in (other, baseline)]
    if not found or any(rank is None for some in ranks for row in some for rank in row):
        return paired_difference(by_seed)
    other_SQ, baseline_SQ = (np.asarray(some) < int(found[1]) for some in ranks)
    return paired_difference(
        by_seed, other_SQ, baseline_SQ, [baseline[0][query][0] for query in queries]
    )


def reached_at(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """Where (samples or seconds, figure) first reach ``level``, by straight lines between them;
    None if they never do."""
    for number, (place, value) in enumerate(points):
        if value >= level:
            if number == 0:
                return place
            before, was = points[number - 1]
            return before + (place - before) * (level - was) / (value - was)
    return None


def samples_to_reach(points: Sequence[tuple[float, float]], level: float) -> int | None:
    """`reached_at`, in whole samples."""
    reached = reached_at(points, level)
    return None if reached is None else round(reached)
