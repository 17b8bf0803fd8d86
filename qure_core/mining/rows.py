"""Rows of a mined set, as either engine finds them, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from qure_core.data.schema import Triplet
from qure_core.mining.engines.keys import key_columns, key_scores
from qure_core.mining.engines.ranked import Ranked
from qure_core.mining.rules import Selection
from qure_core.mining.sampling import lowest, priorities

_CURVE_POINTS = 48  # evenly spaced ranks of a kept curve, and as many that start densely
_CURVE_AROUND = 6  # ranks kept on either side of the target and of both drops


@dataclass(frozen=True)
class MinedRow:
    """What is mined for one query.

    status, details: what the rule says of it. size: images in the set. negative_keys: sorted keys
    of those that are listed, all or a sample; negative_weights: of a rule that is a distribution,
    theirs. vetoed: images that a second model kept out. curve: (ranks, scores) of a few points of
    the ranking, always those around the target and the rule's marks.
    """

    target_score: float
    target_rank: int
    status: str
    details: Mapping[str, Any]
    size: int
    negative_keys: np.ndarray
    curve: tuple[np.ndarray, np.ndarray]
    negative_weights: np.ndarray | None = None
    vetoed: int | None = None


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


def rows_of(
    ranked: Ranked,
    selection: Selection,
    statuses: Sequence[str],
    query_words: torch.Tensor,
    image_words: torch.Tensor | None,
    max_negatives: int | None,
) -> list[MinedRow]:
    """The rows of queries whose rankings are sorted in whole, by what a rule selected."""
    keys_QM = ranked.keys_QM.cpu()
    rows = []
    numbers = [
        values.tolist() for values in (ranked.target_rank_Q, ranked.length_Q, selection.status_Q)
    ]
    for q, (target, length, status) in enumerate(zip(*numbers, strict=True)):
        ranks = curve_ranks(length, [target, *selection.marks[q]])
        places = torch.from_numpy(np.append(ranks, target))
        scores = key_scores(keys_QM[q, places]).numpy()
        keys = keys_QM[q, selection.ranks(q)].numpy()
        weights = selection.weights[q] if selection.weights else None
        if weights is None:
            kept = sample_places(keys, query_words[q], image_words, max_negatives)
        else:
            kept = np.sort(np.argsort(-weights, kind="stable")[:max_negatives])
            weights = weights[kept]
        rows.append(
            MinedRow(
                target_score=float(scores[-1]),
                target_rank=target,
                status=statuses[status],
                details=selection.details[q],
                size=len(keys),
                negative_keys=keys[kept].copy(),
                curve=(ranks, scores[:-1]),
                negative_weights=weights,
                vetoed=None if ranked.vetoed_Q is None else int(ranked.vetoed_Q[q]),
            )
        )
    return rows


def to_table(
    triplets: Sequence[Triplet], corpus: Sequence[str], rows: Sequence[MinedRow], schema: pa.Schema
) -> pa.Table:
    """The rows in the ``schema`` of a mined set; ``corpus`` names the keys' columns."""
    keys = torch.from_numpy(np.concatenate([row.negative_keys for row in rows]))
    used, codes = np.unique(key_columns(keys).numpy(), return_inverse=True)
    names = pa.DictionaryArray.from_arrays(
        pa.array(codes, pa.int32()), pa.array([corpus[column] for column in used], pa.string())
    )
    named = {name for triplet in triplets for name in triplet.positive_ids}
    positives = named.intersection(corpus) if named else named
    offsets = pa.array(np.cumsum([0, *(len(row.negative_keys) for row in rows)]), pa.int64())
    curve_offsets = pa.array(np.cumsum([0, *(len(row.curve[0]) for row in rows)]), pa.int32())
    curve_values = [np.concatenate([row.curve[part] for row in rows]) for part in (0, 1)]
    columns = {
        "query_id": [t.query_id for t in triplets],
        "category": [t.category for t in triplets],
        "target_id": [t.target_id for t in triplets],
        "target_score": pa.array([row.target_score for row in rows], pa.float32()),
        "target_rank": [row.target_rank for row in rows],
        "num_negatives": [row.size for row in rows],
        "negative_ids": pa.LargeListArray.from_arrays(offsets, names),
        "negative_scores": pa.LargeListArray.from_arrays(
            offsets, pa.array(key_scores(keys).numpy(), pa.float32())
        ),
        "negative_weights": pa.array(
            [row.negative_weights for row in rows], pa.large_list(pa.float32())
        ),
        "vetoed": [row.vetoed for row in rows],
        "known_positives": [len(positives.intersection(t.positive_ids)) for t in triplets],
        "status": [row.status for row in rows],
        "details": [dict(row.details) for row in rows],
        "curve_ranks": pa.ListArray.from_arrays(curve_offsets, pa.array(curve_values[0])),
        "curve_scores": pa.ListArray.from_arrays(curve_offsets, pa.array(curve_values[1])),
    }
    return pa.table(columns, schema=schema)
