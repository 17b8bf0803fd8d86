"""What rules share whose negatives are neighbours in the ranking without its target.

Shapes: Q queries. A place is a rank among all images but the target, 0 the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import BaseModel, Field

from qure_core.base.config import MiningSettings
from qure_core.base.options import read_options
from qure_core.mining.engines.ranked import Ranked
from qure_core.mining.rules.rule import Selection

FOUND, BELOW_TARGET, CORPUS = 0, 1, 2
STATUSES = ("found", "below_target", "corpus")
"""How a query's negatives were found: by the rule; the best below the target, because the rule
finds none; the best of the whole corpus, because no image ranks below the target either."""


class ListedOptions(BaseModel, extra="forbid", allow_inf_nan=False):
    """negatives: how many a query has at most, the best; None for all. skip: so many of those that
    qualify are passed over first."""

    negatives: int | None = Field(50, ge=1)
    skip: int = Field(0, ge=0)


class Listed:
    """A rule that says from which to which place a query's negatives are."""

    version: ClassVar[int] = 1
    statuses: ClassVar[tuple[str, ...]] = STATUSES
    details: ClassVar[Mapping[str, Any]] = {
        "bound": "float32",  # the score up to which images qualify; None where all do
        "left_alone": "int64",  # images above the negatives, without the target
    }
    figures: ClassVar[Mapping[str, str]] = {"left_alone": "images left alone"}
    needs: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = False
    options_of: ClassVar[type[ListedOptions]] = ListedOptions  # its own, where it has more

    name: ClassVar[str]

    def __init__(self, chosen: ListedOptions) -> None:
        self.chosen = chosen

    @classmethod
    def of(cls, mining: MiningSettings) -> Self:
        """The rule as the settings have it."""
        return cls(read_options(cls.options_of, mining.options, "mining.options", cls.name))

    def options(self) -> dict[str, Any]:
        """Its settings."""
        return self.chosen.model_dump()

    def places(self, ranked: Ranked) -> Sequence[tuple[int, int, float | None]]:
        """Per query, the places [start, stop) that qualify, and the bound that says so."""
        raise NotImplementedError

    def select(self, ranked: Ranked) -> Selection:
        """The hard negatives of every query."""
        chosen = self.chosen
        status, spans, details, members = [], [], [], {}
        length, target = ranked.length_Q.tolist(), ranked.target_rank_Q.tolist()
        for query, (start, stop, bound) in enumerate(self.places(ranked)):
            start += chosen.skip
            found = FOUND
            if start >= stop:
                below = target[query] < length[query] - 1
                found = BELOW_TARGET if below else CORPUS
                start, stop = (target[query] if below else 0), length[query] - 1
            if chosen.negatives is not None:
                stop = min(stop, start + chosen.negatives)
            ranks = _ranks(start, stop, target[query])
            if isinstance(ranks, np.ndarray):
                members[query] = ranks
                ranks = (start, stop + 1)
            status.append(found)
            spans.append(ranks)
            details.append({"bound": bound, "left_alone": start})
        start_Q, stop_Q = torch.tensor(spans).unbind(dim=1)
        marks = [[start] for start in start_Q.tolist()]
        return Selection(torch.tensor(status), start_Q, stop_Q, details, marks, members)

    @staticmethod
    def cut(details: Mapping[str, Any], target_rank: int) -> Any:
        """How many images are left alone."""
        del target_rank
        return details["left_alone"]

    @staticmethod
    def describe(details: Mapping[str, Any]) -> list[str]:
        """The bound, and what it leaves alone."""
        bound = details["bound"]
        limit = "" if bound is None else f", scores up to {bound:.5f} qualify"
        return [f"{details['left_alone']:,} images above the negatives{limit}"]


def _ranks(start: int, stop: int, target: int) -> tuple[int, int] | np.ndarray:
    """Places as ranks: from one to another, or each where the target is among them."""
    if stop <= target:
        return start, stop
    if start >= target:
        return start + 1, stop + 1
    return np.concatenate([np.arange(start, target), np.arange(target + 1, stop + 1)])
