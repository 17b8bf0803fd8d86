"""The steep-drop rule (QuRe, section 4) over whole rows of scores, as pure tensor code.

Shapes: Q queries, M images of the corpus, K steepest drops looked at first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qure_core.mining.engines.keys import LAST_KEY, key_columns, key_scores, pack_keys, sort_keys_
from qure_core.mining.rules.drop_rule import (
    BELOW_TARGET,
    CORPUS,
    SMOOTH,
    STEEP,
    DropRule,
    neighbourhood,
    relative_height,
)
from qure_core.model.relevance import refuse_bad_scores

_FIRST_LOOK = 32  # drops examined before a full sort; nearly every walk ends among them
_GROUP = 64  # drops that are first reduced to their steepest


@dataclass(frozen=True)
class SteepDrops:
    """What the rule finds for Q queries over a corpus of M images.

    Ranks count from 0, the best, in the query's ranking without its excluded reference.

    keys_QM: the ranking, as sorted keys (`mining.engines.keys`); an excluded reference is last.
    length_Q: images ranked, M or M - 1.
    target_rank_Q: rank of the target.
    start_Q, stop_Q: the negatives are the ranks start <= r < stop; never empty.
    upper_Q, lower_Q: rank of the last image above each drop; -1 where status is not steep.
    steepness_Q: the lesser relative height of both drops; NaN where no pair of drops qualifies.
    status_Q: index into `STATUSES`.
    """

    keys_QM: Tensor
    length_Q: Tensor
    target_rank_Q: Tensor
    start_Q: Tensor
    stop_Q: Tensor
    upper_Q: Tensor
    lower_Q: Tensor
    steepness_Q: Tensor
    status_Q: Tensor

    def negatives(self, query: int) -> Tensor:
        """Columns of the hard negatives of one query, best first."""
        return key_columns(self.keys_QM[query, self.start_Q[query] : self.stop_Q[query]])


def steep_drop_negatives(
    scores_QM: Tensor,
    target_Q: Tensor,
    reference_Q: Tensor | None = None,
    rule: DropRule | None = None,
) -> SteepDrops:
    """Find each query's hard negatives between two steep drops.

    Args:
        scores_QM: relevance scores; equal scores rank in column order.
        target_Q: column of each query's target.
        reference_Q: column to leave out of each query's ranking, or -1 for none. A column that
            is also the target is kept.
        rule: where drops are sought and how steep they must be; the released rule if None.

    Below the target, drops between neighbouring scores are ordered from the steepest (equal
    drops: the upper first). The first two neighbours of that ordering whose ranks differ by more
    than 1 bound the negatives: from just below the upper drop to just above the lower one. The
    gap between the target and the next image is no drop.

    Raises `InputError` if a score is not finite, `ValueError` if a query has no image but its
    target.
    """
    rule = rule or DropRule()
    queries, images = scores_QM.shape
    refuse_bad_scores(scores_QM)
    device = scores_QM.device
    rows_Q = torch.arange(queries, device=device)
    target_Q = target_Q.to(device)
    keys_QM = pack_keys(scores_QM)
    target_key_Q = keys_QM[rows_Q, target_Q]
    length_Q = torch.full((queries,), images, device=device)
    if reference_Q is not None:
        reference_Q = reference_Q.to(device)
        excluded_Q = (reference_Q >= 0) & (reference_Q != target_Q)
        length_Q = length_Q - excluded_Q.long()
        keys_QM[rows_Q[excluded_Q], reference_Q[excluded_Q]] = LAST_KEY
    if bool((length_Q < 2).any()):
        bad = torch.nonzero(length_Q < 2).flatten()[:5].tolist()
        raise ValueError(f"queries {bad} have no image to rank but their target")

    keys_QM = sort_keys_(keys_QM)
    target_rank_Q = torch.searchsorted(keys_QM, target_key_Q[:, None]).squeeze(1)
    below_Q = length_Q - 1 - target_rank_Q
    window_Q = below_Q
    if rule.window_ranks is not None or rule.window_quantile is not None:
        window_Q = torch.tensor([rule.window(n) for n in below_Q.tolist()], device=device)

    sorted_QM = key_scores(keys_QM)
    drop_QN = sorted_QM[:, :-1] - sorted_QM[:, 1:]
    rank_N = torch.arange(images - 1, device=device, dtype=torch.int32)
    first_Q, last_Q = (x.int()[:, None] for x in (target_rank_Q, target_rank_Q + window_Q))
    # A real drop is never negative.
    drop_QN.masked_fill_((rank_N <= first_Q) | (rank_N >= last_Q), -1.0)
    upper_Q, lower_Q = _first_separated_pair(drop_QN)
    steepness_Q = _steepness(sorted_QM, target_rank_Q, below_Q, upper_Q, lower_Q)

    found_Q = upper_Q >= 0
    status_Q = torch.where(found_Q, STEEP, torch.where(below_Q > 0, BELOW_TARGET, CORPUS))
    if rule.min_steepness is not None:
        status_Q[found_Q & (steepness_Q < rule.min_steepness)] = SMOOTH
    steep_Q = status_Q == STEEP
    upper_Q, lower_Q = (torch.where(steep_Q, x, -1) for x in (upper_Q, lower_Q))
    some_Q = below_Q > 0
    start_Q = torch.where(some_Q, target_rank_Q + 1, 0)
    stop_Q = torch.where(some_Q, target_rank_Q + 1 + window_Q, length_Q - 1)
    return SteepDrops(
        keys_QM=keys_QM,
        length_Q=length_Q,
        target_rank_Q=target_rank_Q,
        start_Q=torch.where(steep_Q, upper_Q + 1, start_Q),
        stop_Q=torch.where(steep_Q, lower_Q + 1, stop_Q),
        upper_Q=upper_Q,
        lower_Q=lower_Q,
        steepness_Q=steepness_Q,
        status_Q=status_Q,
    )


def _steepness(
    sorted_QM: Tensor, target_rank_Q: Tensor, below_Q: Tensor, upper_Q: Tensor, lower_Q: Tensor
) -> Tensor:
    first_Q = target_rank_Q + 1
    heights = []
    for rank_Q in (upper_Q, lower_Q):
        start_Q, stop_Q = neighbourhood(rank_Q - first_Q, below_Q)
        ranks_Q4 = torch.stack([start_Q + first_Q, rank_Q, rank_Q + 1, stop_Q + first_Q], dim=1)
        scores = sorted_QM.gather(1, ranks_Q4.clamp(0, sorted_QM.shape[1] - 1)).double().unbind(1)
        heights.append(relative_height(rank_Q - first_Q, below_Q, *scores))
    return torch.minimum(*heights).masked_fill_(upper_Q < 0, torch.nan)


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


def _steepest(drop_QN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest drops of each row and their ranks, through groups' largest drops.

    A drop above the k-th found is always among them: its group's largest is at least as large.
    """
    queries, count = drop_QN.shape
    groups = count // _GROUP
    if groups <= k:
        return drop_QN.topk(k, dim=1)
    whole_QGL = drop_QN[:, : groups * _GROUP].reshape(queries, groups, _GROUP)
    chosen_QK = whole_QGL.amax(dim=2).topk(k, dim=1).indices
    some_QL = whole_QGL.gather(1, chosen_QK[:, :, None].expand(-1, -1, _GROUP)).flatten(1)
    rank_QL = (
        chosen_QK[:, :, None] * _GROUP + torch.arange(_GROUP, device=drop_QN.device)
    ).flatten(1)
    rest_QR = drop_QN[:, groups * _GROUP :]
    rest = torch.arange(groups * _GROUP, count, device=drop_QN.device).expand(queries, -1)
    drop_QK, place_QK = torch.cat([some_QL, rest_QR], dim=1).topk(k, dim=1)
    return drop_QK, torch.cat([rank_QL, rest], dim=1).gather(1, place_QK)


def _first_separated_pair(drop_QN: Tensor) -> tuple[Tensor, Tensor]:
    """The walk over all drops; negative drops do not count. Returns -1, -1 where no pair is."""
    queries, count = drop_QN.shape
    none_Q = torch.full((queries,), -1, device=drop_QN.device)
    if count < 2:
        return none_Q, none_Q.clone()
    k = min(_FIRST_LOOK, count)
    drop_QK, rank_QK = _steepest(drop_QN, k)
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
