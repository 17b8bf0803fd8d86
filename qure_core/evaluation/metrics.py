"""Retrieval metrics over ranks, as pure functions. Ranks count from 0, the best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def recall_at(ranks: Sequence[int] | np.ndarray, k: int) -> float:
    """Share of queries whose target is among the first ``k``, in percent."""
    return float(np.mean(np.asarray(ranks) < k) * 100)


def r_precision(ranks: Iterable[int], relevant: int) -> float:
    """Share of the first R images that are relevant, R being how many are relevant; 0 to 1.

    ``ranks`` are the relevant images' ranks, or those of them that are known to be first.
    """
    return sum(rank < relevant for rank in ranks) / relevant


def found_in_top(ranks: Iterable[int], relevant: int, k: int) -> float:
    """Share of the relevant images among the first ``k``, of those that could be; 0 to 1."""
    return sum(rank < k for rank in ranks) / min(relevant, k)


def fashioniq_summary(
    ranks: Mapping[str, Sequence[int] | np.ndarray],
) -> dict[str, dict[str, float]]:
    """FashionIQ's protocol: R@10, R@50 and their mean per category, and the categories' average."""
    table: dict[str, dict[str, float]] = {}
    for category, values in sorted(ranks.items()):
        r10, r50 = recall_at(values, 10), recall_at(values, 50)
        table[category] = {"R@10": r10, "R@50": r50, "mean": (r10 + r50) / 2}
    table["average"] = {
        name: float(np.mean([row[name] for row in table.values()]))
        for name in ("R@10", "R@50", "mean")
    }
    return table
