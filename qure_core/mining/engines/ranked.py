"""Rankings of some queries, whole or their ends: what a rule is given.

Shapes: Q queries, M images of the corpus, R keys known at an end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qure_core.mining.engines.keys import LAST_KEY, key_columns, key_scores

LOOKED_AT = 500
"""Ranks from the top on, and after the target, that `RankedEnds` knows at least."""

IMAGES_AT_ONCE = 4096
"""Images whose embeddings are asked for together, unless a task's memory says otherwise."""


@dataclass(frozen=True)
class Ranked:
    """Rankings of Q queries over a corpus of M images; ranks count from 0, the best.

    keys_QM: sorted keys (`mining.engines.keys`); what is left out is last.
    length_Q: images ranked, M or M - 1. target_rank_Q: rank of the target.
    image_tokens: for a rule that needs them, gives the embeddings of corpus columns [n]: [n, T, D].
    vetoed_Q: how many images a second model kept out of each; None without one.
    images_at_once: how many embeddings are best asked for together.
    """

    keys_QM: Tensor
    length_Q: Tensor
    target_rank_Q: Tensor
    image_tokens: Callable[[Tensor], Tensor] | None = None
    vetoed_Q: Tensor | None = None
    images_at_once: int = IMAGES_AT_ONCE

    @cached_property
    def scores_QM(self) -> Tensor:
        """Scores best first; what is not ranked, at the end, has no meaning."""
        return key_scores(self.keys_QM)

    def keys(self, query: int, ranks: Tensor | slice) -> Tensor:
        """Keys at some ranks of a query, on the CPU."""
        return self._keys_here_QM[query, ranks]

    @cached_property
    def _keys_here_QM(self) -> Tensor:
        return self.keys_QM.cpu()

    def columns(self, query: int, ranks: Tensor | slice) -> Tensor:
        """Corpus columns of some ranks of a query, on the CPU."""
        return key_columns(self.keys(query, ranks))

    @property
    def below_Q(self) -> Tensor:
        """How many images rank below the target."""
        return self.length_Q - 1 - self.target_rank_Q


@dataclass(frozen=True)
class RankedEnds:
    """`Ranked` of which only ranks near the top and near the target are known, as streaming has it.

    top_QR: the best keys of all but the target; near_QR: those that follow the target; both sorted,
    and `LAST_KEY` where there are fewer. target_key_Q: the target's own.
    """

    top_QR: Tensor
    near_QR: Tensor
    target_key_Q: Tensor
    length_Q: Tensor
    target_rank_Q: Tensor
    image_tokens: Callable[[Tensor], Tensor] | None = None
    images_at_once: int = IMAGES_AT_ONCE
    vetoed_Q: None = None

    def keys(self, query: int, ranks: Tensor | slice) -> Tensor:
        """Keys at some ranks of a query; `IndexError` where one is not known."""
        if isinstance(ranks, slice):
            ranks = torch.arange(ranks.start, ranks.stop)
        target, known = int(self.target_rank_Q[query]), self.top_QR.shape[1]
        # The top has no target in it: what ranks below it stands one place earlier.
        place = ranks - (ranks > target).long()
        after = ranks - target - 1
        in_top = place < known
        near = (ranks == target) | ((after >= 0) & (after < known))
        if not bool((in_top | near).all()):
            raise IndexError(f"ranks {ranks.tolist()} are neither near the top nor the target")
        keys = torch.where(
            in_top,
            self.top_QR[query, place.clamp(max=known - 1)],
            self.near_QR[query, after.clamp(0, known - 1)],
        )
        keys = torch.where(ranks == target, self.target_key_Q[query], keys)
        assert bool((keys != LAST_KEY).all()), "a rank beyond the last"
        return keys

    def columns(self, query: int, ranks: Tensor | slice) -> Tensor:
        """Corpus columns of some ranks of a query."""
        return key_columns(self.keys(query, ranks))
