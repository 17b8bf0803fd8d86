"""What a rule is: from a query's ranking to its hard negatives. Pure.

Shapes: Q queries, M images of the corpus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from qure_core.base.config import MiningSettings
from qure_core.mining.engines.ranked import Ranked, RankedEnds

IMAGE_TOKENS = "image tokens"
"""What a rule may need besides scores: the embeddings [T, D] of single images."""

THRESHOLD = "threshold"
"""The detail in which a rule tells from which `token_likeness` of the target to it an image may fit
the query: in-batch objectives leave such images alone."""


@dataclass(frozen=True)
class Selection:
    """What a rule finds for Q queries.

    status_Q: index into the rule's statuses.
    start_Q, stop_Q: the negatives are the ranks start <= r < stop, never none of them; or, where
        ``members`` has an entry for a query, those ranks, ascending.
    weights: per query of a rule that is a distribution, how likely its members are drawn, relative
        to one another; without, all are equally likely.
    details: per query, the rule's own facts, as its `Rule.details` declares them.
    left_alone: of a rule that looks for images that may fit, each query's ranks of those that it
        found among its candidates, the likeliest first.
    marks: per query, ranks near which the kept curve is dense, besides the target's.
    """

    status_Q: Tensor
    start_Q: Tensor
    stop_Q: Tensor
    details: Sequence[Mapping[str, Any]]
    marks: Sequence[Sequence[int]]
    members: Mapping[int, np.ndarray] | None = None
    weights: Mapping[int, np.ndarray] | None = None
    left_alone: Sequence[np.ndarray] | None = None

    def ranks(self, query: int) -> Tensor | slice:
        """The ranks of a query's negatives, best first."""
        if self.members is not None and query in self.members:
            return torch.from_numpy(self.members[query])
        return slice(int(self.start_Q[query]), int(self.stop_Q[query]))


class Rule(Protocol):
    """Which images are a query's hard negatives.

    name, version: what a mined set is known to be made by; another version means other sets.
    statuses: how negatives may have been found, the intended way first. found: that way in words.
    details: the rule's own facts about a query, with their types ("int64", "float32", "float64",
        "string", a mapping of such, or a list of one for a list of it); each may be None.
        figures: those of them that a round's statistics summarise, with what they are called.
    needs: what it must be given besides scores (`IMAGE_TOKENS`).
    streams: whether the streaming engine serves it exactly: `DropRule`, and any `EndsRule`.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    statuses: ClassVar[tuple[str, ...]]
    found: ClassVar[str]
    details: ClassVar[Mapping[str, Any]]
    figures: ClassVar[Mapping[str, str]]
    needs: ClassVar[frozenset[str]]
    streams: ClassVar[bool]

    @classmethod
    def of(cls, mining: MiningSettings) -> Rule:
        """The rule as the settings have it."""
        ...

    def options(self) -> dict[str, Any]:
        """Its settings: with name and version, all that its sets depend on besides scores."""
        ...

    def select(self, ranked: Ranked) -> Selection:
        """The hard negatives of every query."""
        ...

    @staticmethod
    def cut(details: Mapping[str, Any], target_rank: int) -> Any:
        """Where the set was cut, counted from the target: equal for equal cuts, whatever the scores
        (what reduced precision is held against)."""
        ...

    @staticmethod
    def describe(details: Mapping[str, Any]) -> list[str]:
        """One query's details in lines for people."""
        ...


class EndsRule(Rule, Protocol):
    """A rule that looks at no more than `LOOKED_AT` ranks from the top on or after the target."""

    def select(self, ranked: Ranked | RankedEnds) -> Selection:
        """The hard negatives of every query."""
        ...
