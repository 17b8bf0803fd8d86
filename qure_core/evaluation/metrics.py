"""The benchmarks' metrics as pure functions over rankings. Ranks count from 0, the best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qure_core.base.errors import InputError

CIRR_RECALLS = (1, 5, 10, 50)
CIRR_SUBSET_RECALLS = (1, 2, 3)
CIRCO_CUTS = (5, 10, 25, 50)


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


def cirr_summary(ranks: Sequence[int], subset_ranks: Sequence[int]) -> dict[str, float]:
    """CIRR val: R@k without the reference, R_s@k within the image set, (R@5 + R_s@1) / 2."""
    table = {f"R@{k}": recall_at(ranks, k) for k in CIRR_RECALLS}
    table |= {f"R_s@{k}": recall_at(subset_ranks, k) for k in CIRR_SUBSET_RECALLS}
    table["mean(R@5, R_s@1)"] = (table["R@5"] + table["R_s@1"]) / 2
    return table


def average_precision(predictions: Sequence[str], relevant: Sequence[str], k: int) -> float:
    """CIRCO's AP@k: precision at each hit among the first ``k``, over min(k, relevant images)."""
    wanted = set(relevant)
    hits, total = 0, 0.0
    for place, image_id in enumerate(predictions[:k], start=1):
        if image_id in wanted:
            hits += 1
            total += hits / place
    return total / min(k, len(wanted))


def circo_summary(
    predictions: Mapping[str, Sequence[str]],
    relevant: Mapping[str, Sequence[str]],
    targets: Mapping[str, str],
) -> dict[str, float]:
    """CIRCO val: mAP@k over all ground truths and recall@k of the target, in percent."""
    for query, names in predictions.items():
        if len(set(names)) != len(names):
            raise InputError(f"CIRCO: query {query} has duplicate predictions")
    table = {
        f"mAP@{k}": 100
        * float(np.mean([average_precision(predictions[q], relevant[q], k) for q in relevant]))
        for k in CIRCO_CUTS
    }
    table |= {
        f"R@{k}": 100 * float(np.mean([targets[q] in predictions[q][:k] for q in targets]))
        for k in CIRCO_CUTS
    }
    return table


def preference_summary(
    score1_N: np.ndarray,
    score2_N: np.ndarray,
    preferred_N: np.ndarray,
    participants_N: Sequence[str],
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """HP-FashionIQ's preference ratio, as defined and symmetric, with a confidence interval.

    ``score1_N`` and ``score2_N`` are mean relevances of the two sets of each judged pair.
    "ratio": among pairs whose first set scores higher, the share in which people preferred it
    (0 if there is none). "symmetric": agreement over all pairs that are not tied. The 95%
    intervals resample whole participants, whose judgements are not independent.
    """
    first_N, second_N = score1_N > score2_N, score2_N > score1_N
    agrees_N = np.where(first_N, preferred_N == 1, preferred_N == 2)
    people, code_N = np.unique(np.asarray(participants_N), return_inverse=True)

    def per_person(mask_N: np.ndarray) -> np.ndarray:
        return np.bincount(code_N, weights=mask_N, minlength=len(people))

    draws = np.random.default_rng(seed).integers(len(people), size=(resamples, len(people)))

    def estimate(counted_N: np.ndarray) -> dict[str, Any]:
        hits, counts = per_person(counted_N & agrees_N), per_person(counted_N)
        total = counts.sum()
        resampled = counts[draws].sum(axis=1)
        kept = resampled > 0
        shares = hits[draws].sum(axis=1)[kept] / resampled[kept]
        interval = np.quantile(shares, [0.025, 0.975]).tolist() if kept.any() else [0.0, 0.0]
        return {
            "value": float(hits.sum() / total) if total else 0.0,
            "interval_95": interval,
            "pairs": int(total),
        }

    return {
        "ratio": estimate(first_N),
        "symmetric": estimate(first_N | second_N),
        "ties": int((~(first_N | second_N)).sum()),
        "pairs": len(preferred_N),
        "participants": len(people),
    }
