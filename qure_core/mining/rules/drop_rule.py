"""The settings of the steep-drop rule and what both mining engines share of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STEEP, BELOW_TARGET, CORPUS, SMOOTH = 0, 1, 2, 3
STATUSES = ("steep", "below_target", "corpus", "smooth")
"""How a query's negatives were found: between two steep drops; all images below the target,
because no pair of drops qualifies; the whole corpus but target and reference, because no image
ranks below the target; or all images below the target, because the two drops are no steeper than
``min_steepness``. With a window, "all images below the target" are those in it."""

NEIGHBOURS = 8  # gaps on either side of a drop that tell what is typical at its depth


@dataclass(frozen=True)
class DropRule:
    """Where drops are sought and which are good enough. The default is the released rule.

    window_ranks, window_quantile: drops are sought among so many images below the target, or
    such a share of them; the smaller where both are given.
    min_steepness: a query whose `steepness` is lower takes the named fallback "smooth".
    """

    window_ranks: int | None = None
    window_quantile: float | None = None
    min_steepness: float | None = None

    def window(self, below: int) -> int:
        """How many of ``below`` images under the target are looked at."""
        limit = below
        if self.window_ranks is not None:
            limit = min(limit, self.window_ranks)
        if self.window_quantile is not None:
            limit = min(limit, math.ceil(self.window_quantile * below))
        return limit


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
