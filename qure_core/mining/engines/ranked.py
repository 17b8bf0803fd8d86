"""Whole rankings of some queries: what a rule is given. Q queries, M images of the corpus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from qure_core.mining.engines.keys import key_columns, key_scores


@dataclass(frozen=True)
class Ranked:
    """Rankings of Q queries over a corpus of M images; ranks count from 0, the best.

    keys_QM: sorted keys (`mining.engines.keys`); what is left out is last.
    length_Q: images ranked, M or M - 1. target_rank_Q: rank of the target.
    image_tokens: for a rule that needs them, gives the embeddings of corpus columns [n]: [n, T, D].
    vetoed_Q: how many images a second model kept out of each; None without one.
    """

    keys_QM: Tensor
    length_Q: Tensor
    target_rank_Q: Tensor
    image_tokens: Callable[[Tensor], Tensor] | None = None
    vetoed_Q: Tensor | None = None

    @cached_property
    def scores_QM(self) -> Tensor:
        """Scores best first; what is not ranked, at the end, has no meaning."""
        return key_scores(self.keys_QM)

    def columns(self, query: int, ranks: Tensor | slice) -> Tensor:
        """Corpus columns of some ranks of a query."""
        return key_columns(self.keys_QM[query, ranks])

    @property
    def below_Q(self) -> Tensor:
        """How many images rank below the target."""
        return self.length_Q - 1 - self.target_rank_Q
