"""The steep-drop rule (QuRe, section 4): hard negatives lie between two steep drops.

Shapes: Q queries, M images of the corpus, K steepest drops looked at first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qure_core.base.config import MiningSettings
from qure_core.base.errors import InputError
from qure_core.mining.engines.keys import key_columns
from qure_core.mining.engines.ranked import Ranked
from qure_core.mining.engines.sort import rank_queries
from qure_core.mining.rules.rule import Selection

STEEP, BELOW_TARGET, CORPUS, SMOOTH = 0, 1, 2, 3
STATUSES = ("steep", "below_target", "corpus", "smooth")
"""How a query's negatives were found: between two steep drops; all images below the target,
because no pair of drops qualifies; the whole corpus but target and what is left out, because no
image ranks below the target; or all images below the target, because the two drops are no steeper
than ``min_steepness``. With a window, "all images below the target" are those in it."""

NEIGHBOURS = 8  # gaps on either side of a drop that tell what is typical at its depth
_FIRST_LOOK = 32  # drops examined before a full sort; nearly every walk ends among them
_GROUP = 64  # drops that are first reduced to their steepest
_DROP = {"rank": "int64", "height": "float32", "score_above": "float32", "score_below": "float32"}


_Drop = tuple[int, float, float]


def drop_details(drops: tuple[_Drop, _Drop] | None, steepness: float | None) -> dict[str, Any]:
    """The rule's facts of one query, whichever engine found them.

    ``drops`` are the upper and the lower one: the rank of the last image above it, 0 the best, and
    the scores on both sides; None where the set is not cut by any.
    """

    def row(rank: int, above: float, below: float) -> dict[str, float]:
        height = float(np.float32(above) - np.float32(below))
        return {"rank": rank, "height": height, "score_above": above, "score_below": below}

    upper, lower = (row(*drop) for drop in drops) if drops else (None, None)
    return {"upper_drop": upper, "lower_drop": lower, "steepness": steepness}


@dataclass(frozen=True)
class DropRule:
    """Where drops are sought and which are good enough. The default is the released rule.

    Below the target, drops between neighbouring scores are ordered from the steepest (equal
    drops: the upper first). The first two neighbours of that ordering whose ranks differ by more
    than 1 bound the negatives: from just below the upper drop to just above the lower one. The
    gap between the target and the next image is no drop.

    window_ranks, window_quantile: drops are sought among so many images below the target, or
    such a share of them; the smaller where both are given.
    min_steepness: a query whose `steepness` is lower takes the named fallback "smooth".
    """

    window_ranks: int | None = None
    window_quantile: float | None = None
    min_steepness: float | None = None

    name: ClassVar[str] = "steep_drops"
    version: ClassVar[int] = 1
    statuses: ClassVar[tuple[str, ...]] = STATUSES
    found: ClassVar[str] = "between two steep drops"
    details: ClassVar[Mapping[str, Any]] = {
        "upper_drop": _DROP,
        "lower_drop": _DROP,
        "steepness": "float64",  # None where no pair of drops qualifies
    }
    figures: ClassVar[Mapping[str, str]] = {"steepness": "steepness of drops"}
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = True

    @classmethod
    def of(cls, mining: MiningSettings) -> DropRule:
        """The rule as the settings have it."""
        if mining.options:
            raise InputError(
                "mining.options: steep_drops has none; it is set by mining.window_ranks, "
                "mining.window_quantile and mining.min_steepness"
            )
        return cls(mining.window_ranks, mining.window_quantile, mining.min_steepness)

    def options(self) -> dict[str, Any]:
        """Its settings."""
        return asdict(self)

    def window(self, below: int) -> int:
        """How many of ``below`` images under the target are looked at."""
        limit = below
        if self.window_ranks is not None:
            limit = min(limit, self.window_ranks)
        if self.window_quantile is not None:
            limit = min(limit, math.ceil(self.window_quantile * below))
        return limit

    def status(self, below: int, steepness: float | None) -> int:
        """How a query's negatives are found: of so many images below its target, between drops of
        such a steepness, None where no pair of drops qualifies."""
        if below == 0:
            return CORPUS
        if steepness is None:
            return BELOW_TARGET
        weak = self.min_steepness is not None and steepness < self.min_steepness
        return SMOOTH if weak else STEEP

    def find(self, ranked: Ranked) -> SteepDrops:
        """The drops of every query, as tensors."""
        images = ranked.keys_QM.shape[1]
        device = ranked.keys_QM.device
        below_Q, target_rank_Q = ranked.below_Q, ranked.target_rank_Q
        window_Q = below_Q
        if self.window_ranks is not None or self.window_quantile is not None:
            window_Q = torch.tensor([self.window(n) for n in below_Q.tolist()], device=device)
        sorted_QM = ranked.scores_QM
        drop_QN = sorted_QM[:, :-1] - sorted_QM[:, 1:]
        rank_N = torch.arange(images - 1, device=device, dtype=torch.int32)
        first_Q, last_Q = (x.int()[:, None] for x in (target_rank_Q, target_rank_Q + window_Q))
        # A real drop is never negative.
        drop_QN.masked_fill_((rank_N <= first_Q) | (rank_N >= last_Q), -1.0)
        upper_Q, lower_Q = _first_separated_pair(drop_QN)
        steepness_Q = _steepness(sorted_QM, target_rank_Q, below_Q, upper_Q, lower_Q)

        found_Q = upper_Q >= 0
        status_Q = torch.where(found_Q, STEEP, torch.where(below_Q > 0, BELOW_TARGET, CORPUS))
        if self.min_steepness is not None:
            status_Q[found_Q & (steepness_Q < self.min_steepness)] = SMOOTH
        steep_Q = status_Q == STEEP
        upper_Q, lower_Q = (torch.where(steep_Q, x, -1) for x in (upper_Q, lower_Q))
        some_Q = below_Q > 0
        start_Q = torch.where(some_Q, target_rank_Q + 1, 0)
        stop_Q = torch.where(some_Q, target_rank_Q + 1 + window_Q, ranked.length_Q - 1)
        return SteepDrops(
            keys_QM=ranked.keys_QM,
            length_Q=ranked.length_Q,
            target_rank_Q=target_rank_Q,
            start_Q=torch.where(steep_Q, upper_Q + 1, start_Q),
            stop_Q=torch.where(steep_Q, lower_Q + 1, stop_Q),
            upper_Q=upper_Q,
            lower_Q=lower_Q,
            steepness_Q=steepness_Q,
            status_Q=status_Q,
        )

    def select(self, ranked: Ranked) -> Selection:
        """The hard negatives of every query."""
        drops = self.find(ranked)
        # Of queries without drops these are other scores, which nobody looks at.
        ranks_Q4 = torch.stack([drops.upper_Q, drops.upper_Q + 1, drops.lower_Q, drops.lower_Q + 1])
        scores_Q4 = ranked.scores_QM.gather(1, ranks_Q4.T.clamp(min=0)).tolist()
        details: list[dict[str, Any]] = []
        marks: list[list[int]] = []
        for upper, lower, steepness, scores in zip(
            drops.upper_Q.tolist(),
            drops.lower_Q.tolist(),
            drops.steepness_Q.tolist(),
            scores_Q4,
            strict=True,
        ):
            steep = upper >= 0
            drops_here = ((upper, *scores[:2]), (lower, *scores[2:])) if steep else None
            details.append(drop_details(drops_here, None if math.isnan(steepness) else steepness))
            marks.append([upper, lower] if steep else [])
        return Selection(drops.status_Q, drops.start_Q, drops.stop_Q, details, marks)

    @staticmethod
    def cut(details: Mapping[str, Any], target_rank: int) -> Any:
        """Both drops' places below the target."""
        drops = (details["upper_drop"], details["lower_drop"])
        return tuple(drop and drop["rank"] - target_rank for drop in drops)

    @staticmethod
    def describe(details: Mapping[str, Any]) -> list[str]:
        """Both drops and how steep they are."""
        lines = [
            f"{name} drop after rank {drop['rank']:,}: {drop['score_above']:.5f} to "
            f"{drop['score_below']:.5f} ({drop['height']:.5f})"
            for name in ("upper", "lower")
            if (drop := details[f"{name}_drop"])
        ]
        if details["steepness"] is not None:
            lines.append(f"steepness {details['steepness']:.2f} x the typical gap beside the drops")
        return lines


@dataclass(frozen=True)
class SteepDrops:
    """What the rule finds for Q queries over a corpus of M images.

    Ranks count from 0, the best, in the query's ranking without what is left out.

    keys_QM: the ranking, as sorted keys (`mining.engines.keys`); what is left out is last.
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
    left_out_QE: Tensor | None = None,
    rule: DropRule | None = None,
) -> SteepDrops:
    """Find each query's hard negatives between two steep drops, by `DropRule`.

    Args:
        scores_QM: relevance scores; equal scores rank in column order.
        target_Q: column of each query's target.
        left_out_QE: columns to leave out of each query's ranking, or -1 for none. A column that
            is also the target is kept.
        rule: where drops are sought and how steep they must be; the released rule if None.

    Raises `InputError` if a score is not finite, `ValueError` if a query has no image but its
    target.
    """
    return (rule or DropRule()).find(rank_queries(scores_QM, target_Q, left_out_QE))


def neighbourhood(position: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """First and last positions whose scores tell the typical gap around drops."""
    first = (position - NEIGHBOURS).clamp(min=0)
    return first, torch.minimum(below - 1, position + 1 + NEIGHBOURS)


def relative_height(
    position: Tensor, below: Tensor, first: Tensor, above: Tensor, under: Tensor, last: Tensor
) -> Tensor:
    """Drops' heights over the mean of their neighbouring gaps, float64.

    ``above`` and ``under`` are the scores at each drop, ``first`` and ``last`` those at its
    `neighbourhood`'s ends. Among equal scores a drop is as steep as its neighbours: 1.
    """
    start, stop = neighbourhood(position, below)
    typical = ((first - above) + (under - last)) / (stop - start - 1)
    height = above - under
    flat = torch.where(height > 0, torch.inf, 1.0).double()
    return torch.where(typical == 0, flat, height / typical)


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
