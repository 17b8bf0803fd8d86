"""A mergeable summary of each query's ranking below its target.

Per query the summary keeps, over a grid of buckets between the target's score and about the lowest,
each bucket's count, first and last key; the keys nearest to the target and the farthest; the number
of images above the target; where the rule looks at the top, the best keys of all; and, where sets
are sampled, the keys whose priority is low. Summaries of different images merge by sum, minimum,
maximum and union, so that any sharding and any order of merging give the same one. Nothing here is
of size queries x images.

Shapes: Q queries, C images of a chunk, B buckets, R keys kept at either end.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qure_core.mining.engines.keys import (
    LAST_KEY,
    key_columns,
    key_scores,
    pack_key,
    pack_keys,
    sort_keys_,
)
from qure_core.mining.engines.ranked import LOOKED_AT
from qure_core.mining.sampling import priorities
from qure_core.model.relevance import refuse_bad_scores

BUCKETS = 1024
ENDS = 512
assert ENDS > LOOKED_AT, "a rule may look at so many, the target among them"
FIRST_KEY = torch.iinfo(torch.int64).min
_SLAB = 32  # rows sorted at a time, to bound the temporary copies


@dataclass(frozen=True)
class Anchors:
    """What must be known of each query before its scores stream by.

    target_key_Q: ranking key of the target. left_out_QE: columns left out, -1 for none.
    low_Q: about the lowest score, from a few images; only the fineness of the grid depends on it.
    word_Q: the queries' words for sampling; threshold: priorities below it are kept, 0 for none.
    top: how many of the best keys are kept, 0 unless the rule looks at them.
    """

    target_key_Q: Tensor
    left_out_QE: Tensor
    low_Q: Tensor
    word_Q: Tensor
    threshold: int
    top: int = 0

    @classmethod
    def of(
        cls,
        target_score_Q: Tensor,
        target_Q: Tensor,
        left_out_QE: Tensor,
        low_Q: Tensor,
        word_Q: Tensor,
        threshold: int,
        top: int = 0,
    ) -> Anchors:
        left_out_QE = left_out_QE.reshape(len(target_Q), -1)
        left_out_QE = left_out_QE.masked_fill(left_out_QE == target_Q[:, None], -1)
        target_key_Q = pack_key(target_score_Q, target_Q)
        return cls(target_key_Q, left_out_QE, low_Q, word_Q, threshold, top)

    def rows(self, rows: Tensor) -> Anchors:
        """The anchors of some queries."""
        return self._each(lambda column_Q: column_Q[rows])

    def to(self, device: torch.device) -> Anchors:
        return self._each(lambda column_Q: column_Q.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Anchors:
        return Anchors(
            change(self.target_key_Q),
            change(self.left_out_QE),
            change(self.low_Q),
            change(self.word_Q),
            self.threshold,
            self.top,
        )

    def edges(self) -> Tensor:
        """Bucket edges [Q, B + 1] as keys, evenly spaced in score from the target to ``low``."""
        target_score_Q = key_scores(self.target_key_Q)
        width_Q = ((target_score_Q - self.low_Q) / (BUCKETS - 1)).clamp(min=1e-7)
        step_B = torch.arange(1, BUCKETS, device=width_Q.device)
        inner = target_score_Q[:, None] - width_Q[:, None] * step_B
        edges_QE = torch.full((len(width_Q), BUCKETS + 1), LAST_KEY, device=width_Q.device)
        edges_QE[:, 0] = self.target_key_Q + 1
        edges_QE[:, 1:-1] = torch.maximum(
            pack_key(inner, torch.zeros_like(inner, dtype=torch.int64)), edges_QE[:, :1]
        )
        return edges_QE


def ranked_keys(scores_QC: Tensor, first_column: int, anchors: Anchors) -> Tensor:
    """Keys of a chunk, not sorted; the target and what is left out are `LAST_KEY`."""
    refuse_bad_scores(scores_QC)
    keys_QC = pack_keys(scores_QC, first_column)
    target_Q1 = key_columns(anchors.target_key_Q)[:, None]
    place_QE = torch.cat([target_Q1, anchors.left_out_QE], dim=1) - first_column
    here_QE = (place_QE >= 0) & (place_QE < scores_QC.shape[1])
    keys_QC[here_QE.nonzero()[:, 0], place_QE[here_QE]] = LAST_KEY
    return keys_QC


def bucketed(sorted_QC: Tensor, edges_QE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count, first and last key of each bucket [Q, B] of sorted keys, and the edges' places."""
    place_QE = torch.searchsorted(sorted_QC, edges_QE)
    count_QB = place_QE[:, 1:] - place_QE[:, :-1]
    last_place = sorted_QC.shape[1] - 1
    first_QB = sorted_QC.gather(1, place_QE[:, :-1].clamp(max=last_place))
    last_QB = sorted_QC.gather(1, (place_QE[:, 1:] - 1).clamp(min=0))
    empty_QB = count_QB == 0
    first_QB.masked_fill_(empty_QB, LAST_KEY)
    last_QB.masked_fill_(empty_QB, FIRST_KEY)
    return count_QB, first_QB, last_QB, place_QE


@dataclass
class Summary:
    """The summary of Q queries over the images seen so far.

    above_Q: images above the target. count_QB, first_QB, last_QB: the buckets. near_QR, far_QR:
    the first and last keys below the target, sorted; `LAST_KEY` or `FIRST_KEY` where there are
    fewer. top_QT: the best keys of all but the target, likewise. sample_row_N, sample_key_N: keys
    below the target whose priority is under the threshold.
    """

    above_Q: Tensor
    count_QB: Tensor
    first_QB: Tensor
    last_QB: Tensor
    near_QR: Tensor
    far_QR: Tensor
    top_QT: Tensor
    sample_row_N: Tensor
    sample_key_N: Tensor

    @classmethod
    def empty(cls, queries: int, device: torch.device | None = None, top: int = 0) -> Summary:
        def full(value: int, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=device)

        return cls(
            full(0, queries),
            full(0, queries, BUCKETS),
            full(LAST_KEY, queries, BUCKETS),
            full(FIRST_KEY, queries, BUCKETS),
            full(LAST_KEY, queries, ENDS),
            full(FIRST_KEY, queries, ENDS),
            full(LAST_KEY, queries, top),
            full(0, 0),
            full(0, 0),
        )

    def add(
        self,
        scores_QC: Tensor,
        first_column: int,
        anchors: Anchors,
        edges_QE: Tensor,
        image_words: Tensor | None,
    ) -> None:
        """Take in the scores of a chunk of images; ``image_words`` are the chunk's, to sample."""
        for start in range(0, len(scores_QC), _SLAB):
            rows = torch.arange(start, min(start + _SLAB, len(scores_QC)), device=scores_QC.device)
            self._add(
                scores_QC[rows], first_column, rows, anchors.rows(rows), edges_QE[rows], image_words
            )

    def _add(
        self,
        scores_QC: Tensor,
        first_column: int,
        rows: Tensor,
        anchors: Anchors,
        edges_QE: Tensor,
        image_words: Tensor | None,
    ) -> None:
        keys_QC = ranked_keys(scores_QC, first_column, anchors)
        if anchors.threshold:
            assert image_words is not None
            chosen = priorities(anchors.word_Q[:, None], image_words) < anchors.threshold
            chosen &= (keys_QC > anchors.target_key_Q[:, None]) & (keys_QC < LAST_KEY)
            row_N, column_N = torch.nonzero(chosen, as_tuple=True)
            self.sample_row_N = torch.cat([self.sample_row_N, rows[row_N]])
            self.sample_key_N = torch.cat([self.sample_key_N, keys_QC[row_N, column_N]])
        sorted_QC = sort_keys_(keys_QC)
        count_QB, first_QB, last_QB, place_QE = bucketed(sorted_QC, edges_QE)
        self.above_Q[rows] += place_QE[:, 0]
        self.count_QB[rows] += count_QB
        self.first_QB[rows] = torch.minimum(self.first_QB[rows], first_QB)
        self.last_QB[rows] = torch.maximum(self.last_QB[rows], last_QB)
        start_Q1, stop_Q1 = place_QE[:, :1], place_QE[:, -1:]
        step_R = torch.arange(ENDS, device=rows.device)
        last_place = sorted_QC.shape[1] - 1
        near_QR = sorted_QC.gather(1, (start_Q1 + step_R).clamp(max=last_place))
        near_QR.masked_fill_(start_Q1 + step_R >= stop_Q1, LAST_KEY)
        place_QR = stop_Q1 - ENDS + step_R
        far_QR = sorted_QC.gather(1, place_QR.clamp(min=0))
        far_QR.masked_fill_(place_QR < start_Q1, FIRST_KEY)
        self._keep_ends(rows, near_QR, far_QR, sorted_QC[:, : anchors.top])

    def _keep_ends(self, rows: Tensor, near_QR: Tensor, far_QR: Tensor, top_QT: Tensor) -> None:
        near = sort_keys_(torch.cat([self.near_QR[rows], near_QR], dim=1))
        far = sort_keys_(torch.cat([self.far_QR[rows], far_QR], dim=1))
        self.near_QR[rows] = near[:, :ENDS]
        self.far_QR[rows] = far[:, -ENDS:]
        if kept := self.top_QT.shape[1]:
            self.top_QT[rows] = sort_keys_(torch.cat([self.top_QT[rows], top_QT], dim=1))[:, :kept]

    def merge(self, other: Summary) -> None:
        """Take in the summary of other images of the same queries."""
        self.above_Q += other.above_Q
        self.count_QB += other.count_QB
        self.first_QB = torch.minimum(self.first_QB, other.first_QB)
        self.last_QB = torch.maximum(self.last_QB, other.last_QB)
        rows = torch.arange(len(self.above_Q), device=self.above_Q.device)
        self._keep_ends(rows, other.near_QR, other.far_QR, other.top_QT)
        self.sample_row_N = torch.cat([self.sample_row_N, other.sample_row_N])
        self.sample_key_N = torch.cat([self.sample_key_N, other.sample_key_N])

    def to_bytes(self) -> bytes:
        return tensors_to_bytes(vars(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> Summary:
        return cls(**tensors_from_bytes(data))


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Named tensors as an uncompressed .npz file."""
    file = io.BytesIO()
    arrays: dict[str, Any] = {name: value.cpu().numpy() for name, value in tensors.items()}
    np.savez(file, **arrays)
    return file.getvalue()


def tensors_from_bytes(data: bytes) -> dict[str, Tensor]:
    """The tensors of an .npz file, without running any pickle in it."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def merged(summaries: Iterable[Summary]) -> Summary:
    """One summary of all; at least one is needed."""
    whole: Summary | None = None
    for summary in summaries:
        if whole is None:
            whole = summary
        else:
            whole.merge(summary)
    assert whole is not None
    return whole
