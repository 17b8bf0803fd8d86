"""Images that score below a bound taken from the target's own score (NV-Retriever, Moreira et al.,
arXiv 2407.15831), with the further limits of sentence-transformers' ``mine_hard_negatives``.

Shapes: Q queries, M images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from qure_core.mining.engines.ranked import Ranked
from qure_core.mining.rules.listed import Listed, ListedOptions


class BoundOptions(ListedOptions):
    """Images qualify up to every bound that is given: the target's score less ``margin``; its
    ``share`` of the target's score; ``max_score``. Those under ``min_score`` do not, nor those
    beyond rank ``depth``, 0 the best.

    guarded: where the target's score is negative, the share is taken off its absolute value, so
    that the bound lies below it; without, as NV-Retriever's formula has it, above.
    """

    margin: float | None = Field(None, ge=0)
    share: float | None = Field(None, gt=0, le=1)
    guarded: bool = True
    max_score: float | None = None
    min_score: float | None = None
    depth: int | None = Field(None, ge=1)


class Bounded(Listed):
    """The best images up to a bound. One sort of the corpus for every query."""

    found = "up to the bound"
    options_of = BoundOptions
    chosen: BoundOptions

    def bound(self, target_score: float) -> float | None:
        """The score up to which images qualify."""
        chosen, bounds = self.chosen, []
        if chosen.margin is not None:
            bounds.append(target_score - chosen.margin)
        if chosen.share is not None:
            given = abs(target_score) if chosen.guarded else target_score
            bounds.append(target_score - given * (1 - chosen.share))
        if chosen.max_score is not None:
            bounds.append(chosen.max_score)
        return min(bounds, default=None)

    def places(self, ranked: Ranked) -> Sequence[tuple[int, int, float | None]]:
        """Between the bounds."""
        rank_Q1 = ranked.target_rank_Q[:, None]
        bounds = [self.bound(score) for score in ranked.scores_QM.gather(1, rank_Q1)[:, 0].tolist()]
        found = qualifying(ranked, bounds, self.chosen.min_score, self.chosen.depth)
        return [(*places, bound) for places, bound in zip(found, bounds, strict=True)]


def qualifying(
    ranked: Ranked,
    bounds: Sequence[float | None],
    min_score: float | None = None,
    depth: int | None = None,
) -> list[tuple[int, int]]:
    """Per query, the places [start, stop) of images whose score is at most its bound, at least
    ``min_score``, and whose rank is less than ``depth``."""
    scores_QM = ranked.scores_QM
    most_Q1 = torch.tensor(
        [torch.inf if bound is None else bound for bound in bounds],
        dtype=torch.float64,
        device=scores_QM.device,
    )[:, None]
    least = -torch.inf if min_score is None else min_score
    target_Q = ranked.target_rank_Q
    rank_M = torch.arange(scores_QM.shape[1], device=scores_QM.device)
    others_QM = (rank_M < ranked.length_Q[:, None]) & (rank_M != target_Q[:, None])
    start_Q = (others_QM & (scores_QM > most_Q1)).sum(dim=1)
    within_QM = others_QM & (scores_QM >= least)
    if depth is not None:
        within_QM &= rank_M < depth
    return list(zip(start_Q.tolist(), within_QM.sum(dim=1).tolist(), strict=True))
