"""The benchmarks' protocols as pure functions over rankings. Ranks count from 0, the best.

FashionIQ is in `metrics`. Here are CIRR (val recalls, test1 submissions), CIRCO (mAP, recall, test
submissions) and HP-FashionIQ (preference ratio).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qure_core.base.errors import InputError
from qure_core.evaluation.metrics import recall_at
from qure_core.storage import compact_json

CIRR_RECALLS = (1, 5, 10, 50)
CIRR_SUBSET_RECALLS = (1, 2, 3)
CIRCO_CUTS = (5, 10, 25, 50)
MAX_SUBMISSION_BYTES = 5 * 1024 * 1024  # the CIRR server's limit per file


def cirr_summary(ranks: Sequence[int], subset_ranks: Sequence[int]) -> dict[str, float]:
    """CIRR val: R@k without the reference, R_s@k within the image set, (R@5 + R_s@1) / 2."""
    table = {f"R@{k}": recall_at(ranks, k) for k in CIRR_RECALLS}
    table |= {f"R_s@{k}": recall_at(subset_ranks, k) for k in CIRR_SUBSET_RECALLS}
    table["mean(R@5, R_s@1)"] = (table["R@5"] + table["R_s@1"]) / 2
    return table


def cirr_submission(metric: str, ranked: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A test-server file: ``metric`` "recall" (50 names) or "recall_subset" (3 names) per pair."""
    length = {"recall": 50, "recall_subset": 3}[metric]
    rows = {pair: list(names[:length]) for pair, names in ranked.items()}
    return {"version": "rc2", "metric": metric, **rows}


def check_cirr_submission(
    value: Mapping[str, Any],
    pair_ids: Sequence[str],
    gallery: Sequence[str],
    references: Mapping[str, str],
) -> None:
    """Raise `InputError` unless a submission keeps the server's rules.

    Every pair once, the metric's number of distinct names of the gallery, never the reference,
    and at most 5 MB.
    """
    faults = []
    metric = value.get("metric")
    if value.get("version") != "rc2" or metric not in ("recall", "recall_subset"):
        faults.append(f"version {value.get('version')!r}, metric {metric!r}")
    length = 50 if metric == "recall" else 3
    rows = {key: names for key, names in value.items() if key not in ("version", "metric")}
    if missing := sorted(set(pair_ids) - set(rows)):
        faults.append(f"{len(missing)} pairs are missing, first {missing[0]}")
    if extra := sorted(set(rows) - set(pair_ids)):
        faults.append(f"{len(extra)} unknown pairs, first {extra[0]}")
    known = set(gallery)
    for pair, names in rows.items():
        if len(names) != length or len(set(names)) != length:
            faults.append(f"pair {pair}: {len(set(names))} distinct names of {length}")
        elif not set(names) <= known:
            faults.append(f"pair {pair}: {sorted(set(names) - known)[0]} is not in the gallery")
        elif references.get(pair) in names:
            faults.append(f"pair {pair}: holds its own reference")
    size = len(compact_json(value))
    if size > MAX_SUBMISSION_BYTES:
        faults.append(f"{size:,} bytes exceed the server's {MAX_SUBMISSION_BYTES:,}")
    if faults:
        raise InputError("CIRR submission: " + "; ".join(faults[:10]))


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


def circo_submission(predictions: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """The CIRCO test server's file: query id -> 50 image ids, as integers."""
    return {query: [int(name) for name in names[:50]] for query, names in predictions.items()}


def check_circo_submission(
    value: Mapping[str, Sequence[int]], query_ids: Sequence[str], gallery: Sequence[str]
) -> None:
    """Raise `InputError` unless every query has 50 distinct integer ids of the gallery."""
    faults = []
    if set(value) != set(query_ids):
        faults.append(f"{len(value)} queries where {len(query_ids)} are needed")
    known = {int(name) for name in gallery}
    for query, names in value.items():
        if len(names) != 50 or len(set(names)) != 50:
            faults.append(f"query {query}: {len(set(names))} distinct ids of 50")
        elif not all(type(name) is int for name in names):
            faults.append(f"query {query}: ids must be integers")
        elif not set(names) <= known:
            faults.append(f"query {query}: {min(set(names) - known)} is not in the gallery")
    if faults:
        raise InputError("CIRCO submission: " + "; ".join(faults[:10]))


_SPELLED_OUT = {"dotmark": ".", "questionmark": "?", "andmark": " & "}


@dataclass(frozen=True)
class JudgedPair:
    """Two sets of five images retrieved for one query, and which one a participant preferred."""

    participant: str
    reference_id: str
    text: str
    set1: tuple[str, ...]
    set2: tuple[str, ...]
    preferred: int


def _image_name(path: str) -> str:
    """The image id of a stored path such as ``/-/image_data/shirt/B000.jpg``."""
    return path.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def parse_hp_fashioniq(value: Any, file: str) -> list[JudgedPair]:
    """The judged pairs of ``hpfiq.json`` in file order, with its spelled-out marks put back."""
    pairs = []
    for participant, question_sets in value.items():
        for name, questions in question_sets.items():
            try:
                rows = zip(
                    questions["ref_img_paths"],
                    questions["sentences"],
                    questions["retrieved_set1"],
                    questions["retrieved_set2"],
                    questions["preferred set"],
                    strict=True,
                )
                for reference, text, set1, set2, preferred in rows:
                    for word, mark in _SPELLED_OUT.items():
                        text = text.replace(word, mark)
                    choice = int(preferred)
                    if choice not in (1, 2):
                        raise ValueError(f"preferred set is {preferred!r}")
                    pairs.append(
                        JudgedPair(
                            participant,
                            _image_name(reference),
                            text,
                            tuple(map(_image_name, set1["img_path"])),
                            tuple(map(_image_name, set2["img_path"])),
                            choice,
                        )
                    )
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{file} [{participant}.{name}]: malformed ({error})") from None
    return pairs


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
