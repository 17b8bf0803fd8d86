"""The order of a corpus for one query: pure, over one row of scores.

M images of a corpus, whose columns are in the order of their ids; ranks count from 0, the best.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RankedRow:
    """One query's ranking.

    order_R: columns of the images ranked, best first; equal scores in column order, so by id.
    rank_M: each column's rank; -1 of the one left out.
    scores_M: the scores it is of.
    """

    order_R: np.ndarray
    rank_M: np.ndarray
    scores_M: Tensor

    def ties(self, column: int) -> int:
        """How many other ranked images share this one's score, so that ids decide its rank."""
        ranked = torch.from_numpy(self.rank_M >= 0)
        return int(((self.scores_M == self.scores_M[column]) & ranked).sum()) - 1

    def ranks(self, columns: Iterable[int]) -> list[int]:
        """The ranks of some columns, best first."""
        return sorted(int(self.rank_M[column]) for column in columns)

    def ordered(self, columns: Iterable[int]) -> list[int]:
        """Some columns, best first (CIRR's order within an image set)."""
        return sorted(columns, key=self.rank_M.__getitem__)


def rank_row(scores_M: Tensor, left_out: int | None = None) -> RankedRow:
    """Rank a corpus by its finite scores [M], without the column ``left_out`` if that is given."""
    order_R = scores_M.sort(descending=True, stable=True).indices.numpy()
    if left_out is not None:
        order_R = order_R[order_R != left_out]
    rank_M = np.full(len(scores_M), -1, np.int64)
    rank_M[order_R] = np.arange(len(order_R))
    return RankedRow(order_R, rank_M, scores_M)
