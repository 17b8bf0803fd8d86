"""Rows of a mined set, as either engine finds them, and their table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from qure_core.data.schema import Triplet
from qure_core.mining.engines.keys import key_columns, key_scores
from qure_core.mining.engines.ranked import Ranked, RankedEnds
from qure_core.mining.rules import Selection
from qure_core.mining.sampling import lowest, priorities

_CURVE_POINTS = 48  # evenly spaced ranks of a kept curve, and as many that start densely
_CURVE_AROUND = 6  # ranks kept on either side of the target and of both drops


@dataclass(frozen=True)
class MinedRow:
    """What is mined for one query.

    status, details: what the rule says of it. size: images in the set. negative_keys: sorted keys
    of those that are listed, all or a sample; negative_weights: of a rule that is a distribution,
    theirs. left_alone_keys: those of images that may fit, where the rule looks for such, the
    likeliest first. vetoed: images that a second model kept out. curve: (ranks, scores) of a few
    points of the ranking, always those around the target and the rule's marks.
    """

    target_score: float
    target_rank: int
    status: str
    details: Mapping[str, Any]
    size: int
    negative_keys: np.ndarray
    curve: tuple[np.ndarray, np.ndarray]
    negative_weights: np.ndarray | None = None
    left_alone_keys: np.ndarray | None = None
    vetoed: int | None = None


Curve = Callable[[int, Sequence[int]], tuple[np.ndarray, np.ndarray]]
"""Gives a query's kept points, (ranks, scores), always those around the marks."""


@lru_cache(maxsize=64)
def _spread(length: int) -> np.ndarray:
    even = np.linspace(0, length - 1, _CURVE_POINTS)
    return np.unique(np.concatenate([even, np.geomspace(1, length, _CURVE_POINTS) - 1]).astype(int))


def curve_ranks(length: int, marks: Sequence[int]) -> np.ndarray:
    """Ranks worth keeping of a ranking of ``length`` images: spread out, and all near ``marks``."""
    around = np.add.outer(marks, np.arange(-_CURVE_AROUND, _CURVE_AROUND + 2)).ravel()
    inside = around[(around >= 0) & (around < length)]
    ranks = np.concatenate([_spread(length), inside, [length]])
    ranks.sort()
    return ranks[np.flatnonzero(ranks[1:] != ranks[:-1])]


def sample_places(
    keys: np.ndarray, query_word: torch.Tensor, image_words: torch.Tensor | None, wanted: int | None
) -> np.ndarray | slice:
    """Places of the ``wanted`` of ``keys`` that have the lowest priority for this query, or all."""
    if wanted is None or len(keys) <= wanted:
        return slice(None)
    assert image_words is not None
    columns = key_columns(torch.from_numpy(keys))
    return lowest(priorities(query_word, image_words[columns]), wanted).numpy()


def sample_keys(
    keys: np.ndarray, query_word: torch.Tensor, image_words: torch.Tensor | None, wanted: int | None
) -> np.ndarray:
    """``keys``, or the `sample_places` of them."""
    sample: np.ndarray = keys[sample_places(keys, query_word, image_words, wanted)]
    return sample


def whole_curve(ranked: Ranked) -> Curve:
    """Of rankings that are sorted in whole, the points that are kept."""

    def curve(query: int, marks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        ranks = curve_ranks(int(ranked.length_Q[query]), marks)
        return ranks, key_scores(ranked.keys(query, torch.from_numpy(ranks))).numpy()

    return curve


def rows_of(
    ranked: Ranked | RankedEnds,
    selection: Selection,
    statuses: Sequence[str],
    query_words: torch.Tensor,
    image_words: torch.Tensor | None,
    max_negatives: int | None,
    curve: Curve,
) -> list[MinedRow]:
    """The rows of queries by what a rule selected; ``curve`` gives their kept points."""
    rows = []
    numbers = [values.tolist() for values in (ranked.target_rank_Q, selection.status_Q)]
    for q, (target, status) in enumerate(zip(*numbers, strict=True)):
        keys = ranked.keys(q, selection.ranks(q)).numpy()
        left_alone = None
        if selection.left_alone is not None:
            left_alone = ranked.keys(q, torch.from_numpy(selection.left_alone[q])).numpy()
        weights = selection.weights[q] if selection.weights else None
        if weights is None:
            kept = sample_places(keys, query_words[q], image_words, max_negatives)
        else:
            kept = np.sort(np.argsort(-weights, kind="stable")[:max_negatives])
            weights = weights[kept]
        rows.append(
            MinedRow(
                target_score=float(key_scores(ranked.keys(q, slice(target, target + 1)))),
                target_rank=target,
                status=statuses[status],
                details=selection.details[q],
                size=len(keys),
                negative_keys=keys[kept].copy(),
                curve=curve(q, [target, *selection.marks[q]]),
                negative_weights=weights,
                left_alone_keys=left_alone,
                vetoed=None if ranked.vetoed_Q is None else int(ranked.vetoed_Q[q]),
            )
        )
    return rows


def _named(
    keys_of: Sequence[np.ndarray | None], corpus: Sequence[str]
) -> tuple[torch.Tensor, pa.LargeListArray]:
    """All keys, and lists of the images that they are of, None where there are no keys."""
    none = np.empty(0, np.int64)
    given = [none if keys is None else keys for keys in keys_of]
    keys = torch.from_numpy(np.concatenate(given))
    used, codes = np.unique(key_columns(keys).numpy(), return_inverse=True)
    names = pa.DictionaryArray.from_arrays(
        pa.array(codes, pa.int32()), pa.array([corpus[column] for column in used], pa.string())
    )
    offsets = pa.array(np.cumsum([0, *map(len, given)]), pa.int64())
    missing = pa.array([own is None for own in keys_of])
    return keys, pa.LargeListArray.from_arrays(offsets, names, mask=missing)


def to_table(
    triplets: Sequence[Triplet], corpus: Sequence[str], rows: Sequence[MinedRow], schema: pa.Schema
) -> pa.Table:
    """The rows in the ``schema`` of a mined set; ``corpus`` names the keys' columns."""
    keys, negative_ids = _named([row.negative_keys for row in rows], corpus)
    offsets = negative_ids.offsets
    named = {name for triplet in triplets for name in triplet.positive_ids}
    positives = named.intersection(corpus) if named else named
    curve_offsets = pa.array(np.cumsum([0, *(len(row.curve[0]) for row in rows)]), pa.int32())
    curve_values = [np.concatenate([row.curve[part] for row in rows]) for part in (0, 1)]
    columns = {
        "query_id": [t.query_id for t in triplets],
        "category": [t.category for t in triplets],
        "target_id": [t.target_id for t in triplets],
        "target_score": pa.array([row.target_score for row in rows], pa.float32()),
        "target_rank": [row.target_rank for row in rows],
        "num_negatives": [row.size for row in rows],
        "negative_ids": negative_ids,
        "negative_scores": pa.LargeListArray.from_arrays(
            offsets, pa.array(key_scores(keys).numpy(), pa.float32())
        ),
        "negative_weights": pa.array(
            [row.negative_weights for row in rows], pa.large_list(pa.float32())
        ),
        "left_alone_ids": _named([row.left_alone_keys for row in rows], corpus)[1],
        "vetoed": [row.vetoed for row in rows],
        "known_positives": [len(positives.intersection(t.positive_ids)) for t in triplets],
        "status": [row.status for row in rows],
        "details": [dict(row.details) for row in rows],
        "curve_ranks": pa.ListArray.from_arrays(curve_offsets, pa.array(curve_values[0])),
        "curve_scores": pa.ListArray.from_arrays(curve_offsets, pa.array(curve_values[1])),
    }
    return pa.table(columns, schema=schema)
