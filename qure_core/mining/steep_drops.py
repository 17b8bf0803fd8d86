"""The steep-drop rule (QuRe, section 4), as pure tensor code.

Shapes: Q queries, M images of the corpus, K steepest drops looked at first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEEP, BELOW_TARGET, CORPUS = 0, 1, 2
STATUSES = ("steep", "below_target", "corpus")
"""How a query's negatives were found: between two steep drops; all images below the target,
because no pair of drops qualifies; or the whole corpus but target and reference, because no image
ranks below the target."""

_FIRST_LOOK = 32  # drops examined before a full sort; nearly every walk ends among them


@dataclass(frozen=True)
class SteepDrops:
    """What the rule finds for Q queries over a corpus of M images.

    Ranks count from 0, the best, in the query's ranking without its excluded reference.

    order_QM: column of the image at each rank; an excluded reference stands last.
    scores_QM: scores in that order.
    length_Q: images ranked, M or M - 1.
    target_rank_Q: rank of the target.
    start_Q, stop_Q: the negatives are the ranks start <= r < stop; never empty.
    upper_Q, lower_Q: rank of the last image above each drop; -1 where status is not steep.
    status_Q: index into `STATUSES`.
    """

    order_QM: Tensor
    scores_QM: Tensor
    length_Q: Tensor
    target_rank_Q: Tensor
    start_Q: Tensor
    stop_Q: Tensor
    upper_Q: Tensor
    lower_Q: Tensor
    status_Q: Tensor

    def negatives(self, query: int) -> Tensor:
        """Columns of the hard negatives of one query, best first."""
        return self.order_QM[query, self.start_Q[query] : self.stop_Q[query]]


def steep_drop_negatives(
    scores_QM: Tensor, target_Q: Tensor, reference_Q: Tensor | None = None
) -> SteepDrops:
    """Find each query's hard negatives between two steep drops.

    Args:
        scores_QM: relevance scores; equal scores rank in column order.
        target_Q: column of each query's target.
        reference_Q: column to leave out of each query's ranking, or -1 for none. A column that
            is also the target is kept.

    Below the target, drops between neighbouring scores are ordered from the steepest (equal
    drops: the upper first). The first two neighbours of that ordering whose ranks differ by more
    than 1 bound the negatives: from just below the upper drop to just above the lower one. The
    gap between the target and the next image is no drop.

    Raises `ValueError` if a score is not finite, or a query has no image but its target.
    """
    queries, images = scores_QM.shape
    if not torch.isfinite(scores_QM).all():
        bad = torch.nonzero(~torch.isfinite(scores_QM).all(dim=1)).flatten()[:5].tolist()
        raise ValueError(f"scores of queries {bad} are not finite (NaN or infinite)")
    device = scores_QM.device
    rows_Q = torch.arange(queries, device=device)
    target_Q = target_Q.to(device)
    keys_QM = scores_QM
    length_Q = torch.full((queries,), images, device=device)
    if reference_Q is not None:
        reference_Q = reference_Q.to(device)
        excluded_Q = (reference_Q >= 0) & (reference_Q != target_Q)
        length_Q = length_Q - excluded_Q.long()
        keys_QM = scores_QM.clone()
        keys_QM[rows_Q[excluded_Q], reference_Q[excluded_Q]] = -torch.inf
    if bool((length_Q < 2).any()):
        bad = torch.nonzero(length_Q < 2).flatten()[:5].tolist()
        raise ValueError(f"queries {bad} have no image to rank but their target")

    sorted_QM, order_QM = keys_QM.sort(dim=1, descending=True, stable=True)
    target_rank_Q = (order_QM == target_Q[:, None]).int().argmax(dim=1)

    drop_QN = sorted_QM[:, :-1] - sorted_QM[:, 1:]
    rank_N = torch.arange(images - 1, device=device)
    below_QN = (rank_N > target_rank_Q[:, None]) & (rank_N < length_Q[:, None] - 1)
    drop_QN = torch.where(below_QN, drop_QN, -1.0)  # a real drop is never negative
    upper_Q, lower_Q = _first_separated_pair(drop_QN)

    steep_Q = upper_Q >= 0
    some_below_Q = target_rank_Q < length_Q - 1
    status_Q = torch.where(steep_Q, STEEP, torch.where(some_below_Q, BELOW_TARGET, CORPUS))
    start_Q = torch.where(steep_Q, upper_Q + 1, torch.where(some_below_Q, target_rank_Q + 1, 0))
    stop_Q = torch.where(steep_Q, lower_Q + 1, torch.where(some_below_Q, length_Q, length_Q - 1))
    return SteepDrops(
        order_QM=order_QM,
        scores_QM=scores_QM.gather(1, order_QM),
        length_Q=length_Q,
        target_rank_Q=target_rank_Q,
        start_Q=start_Q,
        stop_Q=stop_Q,
        upper_Q=upper_Q,
        lower_Q=lower_Q,
        status_Q=status_Q,
    )


def _walk(drop_QK: Tensor, rank_QK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First neighbours in drops sorted from the steepest whose ranks differ by more than 1.

    Returns which queries have such a pair, its place in the ordering, and (upper, lower) ranks.
    """
    qualifies_QJ = (rank_QK[:, :-1] - rank_QK[:, 1:]).abs() > 1
    qualifies_QJ &= drop_QK[:, 1:] >= 0
    found_Q = qualifies_QJ.any(dim=1)
    place_Q = qualifies_QJ.int().argmax(dim=1)
    pair_Q2 = torch.gather(rank_QK, 1, torch.stack([place_Q, place_Q + 1], dim=1))
    return found_Q, place_Q, pair_Q2.sort(dim=1).values


def _first_separated_pair(drop_QN: Tensor) -> tuple[Tensor, Tensor]:
    """The walk over all drops; negative drops do not count. Returns -1, -1 where no pair is."""
    queries, count = drop_QN.shape
    none_Q = torch.full((queries,), -1, device=drop_QN.device)
    if count < 2:
        return none_Q, none_Q.clone()
    k = min(_FIRST_LOOK, count)
    drop_QK, rank_QK = drop_QN.topk(k, dim=1)
    # topk leaves equal drops in any order: put them by rank, then by drop, both stably.
    rank_QK, by_rank_QK = rank_QK.sort(dim=1)
    drop_QK, by_drop_QK = drop_QK.gather(1, by_rank_QK).sort(dim=1, descending=True, stable=True)
    rank_QK = rank_QK.gather(1, by_drop_QK)
    found_Q, place_Q, pair_Q2 = _walk(drop_QK, rank_QK)
    if k < count:
        # Which of the drops equal to the last one made the cut is arbitrary: trust none of them.
        second_Q = drop_QK.gather(1, place_Q[:, None] + 1).squeeze(1)
        certain_Q = found_Q & (second_Q > drop_QK[:, -1])
        # A walk that met only negative drops has seen every real one.
        certain_Q |= ~found_Q & (drop_QK[:, -1] < 0)
        open_Q = torch.nonzero(~certain_Q).flatten()
        if len(open_Q):
            drop_RN, rank_RN = drop_QN[open_Q].sort(dim=1, descending=True, stable=True)
            found_Q[open_Q], _, pair_Q2[open_Q] = _walk(drop_RN, rank_RN)
    upper_Q = torch.where(found_Q, pair_Q2[:, 0], none_Q)
    lower_Q = torch.where(found_Q, pair_Q2[:, 1], none_Q)
    return upper_Q, lower_Q
