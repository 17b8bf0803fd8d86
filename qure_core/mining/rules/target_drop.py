"""The steepest drop of another curve: the candidates' likeness to the target.

An image that answers the query looks like its labelled target, whatever the query scores it. So the
best-scored images are sorted by that likeness, and those above its steepest drop are left alone.

Shapes: K candidates of a query, T tokens of an image, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field

from qure_core.base.config import MiningSettings
from qure_core.base.options import read_options
from qure_core.mining.engines.ranked import Ranked
from qure_core.mining.rules.rule import IMAGE_TOKENS, Selection
from qure_core.model.relevance import token_likeness

DROP, BELOW_TARGET, CORPUS = 0, 1, 2
STATUSES = ("drop", "below_target", "corpus")
"""How a query's negatives were found: below a drop of likeness; the best below the target, which
are too few to have one; the best of the corpus, because no image ranks below the target."""


class TargetDropOptions(BaseModel, extra="forbid"):
    """candidates: K, the best-scored images looked at. among: those "below" the target, or
    "anywhere". negatives: how many are kept of what is left, the best-scored; None for all."""

    candidates: int = Field(50, ge=4)
    among: Literal["below", "anywhere"] = "below"
    negatives: int | None = Field(10, ge=1)


class TargetDrop:
    """Of the K best-scored candidates, those below the steepest drop of likeness to the target.

    A candidate's likeness is `token_likeness` of the target to it. Candidates are sorted by it;
    of the first K/2 gaps the largest (the first of equal ones) is the drop. One sort of the corpus,
    and K x T x T x D products a query.
    """

    name: ClassVar[str] = "target_drop"
    version: ClassVar[int] = 1
    statuses: ClassVar[tuple[str, ...]] = STATUSES
    found: ClassVar[str] = "below a drop of likeness"
    details: ClassVar[Mapping[str, Any]] = {
        "threshold": "float32",  # likeness of the last image above the drop
        "height": "float32",
        "left_alone": "int64",  # candidates above the drop
    }
    figures: ClassVar[Mapping[str, str]] = {"left_alone": "images left alone"}
    needs: ClassVar[frozenset[str]] = frozenset({IMAGE_TOKENS})
    streams: ClassVar[bool] = False

    def __init__(self, chosen: TargetDropOptions) -> None:
        self.chosen = chosen

    @classmethod
    def of(cls, mining: MiningSettings) -> TargetDrop:
        """The rule as the settings have it."""
        return cls(read_options(TargetDropOptions, mining.options, "mining.options", cls.name))

    def options(self) -> dict[str, Any]:
        """Its settings."""
        return self.chosen.model_dump()

    def _candidates(self, length: int, target: int) -> np.ndarray:
        """Ranks of the images looked at."""
        below = target < length - 1
        first = target + 1 if below and self.chosen.among == "below" else 0
        ranks = np.arange(first, min(length, first + self.chosen.candidates + 1))
        return ranks[ranks != target][: self.chosen.candidates]

    def select(self, ranked: Ranked) -> Selection:
        """The hard negatives of every query."""
        assert ranked.image_tokens is not None
        status, details, members, marks, spans = [], [], {}, [], []
        numbers = zip(ranked.length_Q.tolist(), ranked.target_rank_Q.tolist(), strict=True)
        for query, (length, target) in enumerate(numbers):
            candidates = self._candidates(length, target)
            ranks = np.append(candidates, target)
            tokens = ranked.image_tokens(ranked.columns(query, torch.from_numpy(ranks)).cpu())
            likeness = token_likeness(tokens[-1:], tokens[:-1])[0].numpy()
            left, drop = _below_the_drop(likeness)
            status.append(DROP if drop else BELOW_TARGET if target < length - 1 else CORPUS)
            members[query] = candidates[left][: self.chosen.negatives]
            spans.append((int(members[query][0]), int(members[query][-1]) + 1))
            threshold, height = drop or (None, None)
            left_alone = len(candidates) - len(left)
            details.append({"threshold": threshold, "height": height, "left_alone": left_alone})
            marks.append([int(members[query][0])])
        start_Q, stop_Q = torch.tensor(spans).unbind(dim=1)
        return Selection(torch.tensor(status), start_Q, stop_Q, details, marks, members)

    @staticmethod
    def cut(details: Mapping[str, Any], target_rank: int) -> Any:
        """How many candidates are left alone."""
        del target_rank
        return details["left_alone"]

    @staticmethod
    def describe(details: Mapping[str, Any]) -> list[str]:
        """The drop, and what lies above it."""
        if details["threshold"] is None:
            return []
        return [
            f"{details['left_alone']:,} candidates may fit and are left alone: as like the target "
            f"as {details['threshold']:.5f}, before a drop of {details['height']:.5f}"
        ]


def _below_the_drop(likeness_K: np.ndarray) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Places of candidates below the steepest drop, ascending; and (threshold, height) of it, None
    where there are too few candidates to look for one."""
    order = np.argsort(-likeness_K, kind="stable")
    gaps = -np.diff(likeness_K[order])[: len(likeness_K) // 2]
    if not len(gaps):
        return np.arange(len(likeness_K)), None
    above = int(gaps.argmax()) + 1
    drop = (float(likeness_K[order[above - 1]]), float(gaps[above - 1]))
    return np.sort(order[above:]), drop
