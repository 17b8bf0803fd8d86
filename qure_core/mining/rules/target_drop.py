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
from qure_core.mining.engines.ranked import LOOKED_AT, Ranked, RankedEnds
from qure_core.mining.rules.likeness import likeness_to_target
from qure_core.mining.rules.rule import IMAGE_TOKENS, THRESHOLD, Selection

DROP, BELOW_TARGET, CORPUS, UNSURE = 0, 1, 2, 3
STATUSES = ("drop", "below_target", "corpus", "unsure")
"""How a query's negatives were found: below a drop of likeness; all candidates, which are too few
or too alike to have one, with images below the target, or with none; further down, for the target
is not among as many best images as are looked at: who is right, model or label, is not known."""
_FURTHER = LOOKED_AT // 2
"""The rank from which such a query's negatives are, up to `LOOKED_AT`: with a wrong label the best
images answer the query, and nothing of their likeness to that label tells."""


class TargetDropOptions(BaseModel, extra="forbid"):
    """candidates: K, the best-scored images looked at, fewer than 500. among: those "below" the
    target, or "anywhere". negatives: how many are kept of what is left, the best-scored; None for
    all."""

    candidates: int = Field(50, ge=4, lt=LOOKED_AT)
    among: Literal["below", "anywhere"] = "below"
    negatives: int | None = Field(10, ge=1)


class TargetDrop:
    """Of the K best-scored candidates, those below the steepest drop of likeness to the target.

    A candidate's likeness is `token_likeness` of the target to it. Candidates are sorted by it;
    of the first K/2 gaps the largest (the first of equal ones) is the drop. One sort of the corpus,
    and K x T x T x D products a query. Among "anywhere", a target below rank K leaves all
    candidates alone (`UNSURE`).
    """

    name: ClassVar[str] = "target_drop"
    # 2: copies that fill half of the candidates are left alone; 3: queries may be unsure.
    version: ClassVar[int] = 3
    statuses: ClassVar[tuple[str, ...]] = STATUSES
    found: ClassVar[str] = "below a drop of likeness"
    details: ClassVar[Mapping[str, Any]] = {
        THRESHOLD: "float32",  # likeness of the last image above the drop
        "height": "float32",
        "left_alone": "int64",  # candidates above the drop
        "likeness": ["float32"],  # of all candidates, the most alike first
    }
    figures: ClassVar[Mapping[str, str]] = {"left_alone": "images left alone"}
    needs: ClassVar[frozenset[str]] = frozenset({IMAGE_TOKENS})
    streams: ClassVar[bool] = True

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

    def _is_unsure(self, target: int) -> bool:
        """Whether a target ranks so low that its label, or the model, is not to be trusted."""
        return self.chosen.among == "anywhere" and target >= self.chosen.candidates

    def select(self, ranked: Ranked | RankedEnds) -> Selection:
        """The hard negatives of every query."""
        status, details, members, marks, spans, left_alone = [], [], {}, [], [], []
        lengths, targets = ranked.length_Q.tolist(), ranked.target_rank_Q.tolist()
        looked_at = [
            self._candidates(length, target)
            for length, target in zip(lengths, targets, strict=True)
        ]
        likeness_of = likeness_to_target(ranked, looked_at)
        for query, (candidates, likeness) in enumerate(zip(looked_at, likeness_of, strict=True)):
            order = np.argsort(-likeness, kind="stable")
            sorted_K = likeness[order]
            above = _above_the_drop(sorted_K)
            below = targets[query] < lengths[query] - 1
            unsure = self._is_unsure(targets[query])
            if unsure:
                above = len(order)
                rest = _further_down(lengths[query], targets[query])
            else:
                rest = candidates[np.sort(order[above:])]
            status.append(
                UNSURE if unsure else DROP if above else BELOW_TARGET if below else CORPUS
            )
            left_alone.append(candidates[order[:above]])
            members[query] = rest[: self.chosen.negatives]
            spans.append((int(members[query][0]), int(members[query][-1]) + 1))
            details.append(
                {
                    THRESHOLD: float(sorted_K[above - 1]) if above and not unsure else None,
                    "height": (
                        float(sorted_K[above - 1] - sorted_K[above])
                        if above and not unsure
                        else None
                    ),
                    "left_alone": above,
                    "likeness": sorted_K,
                }
            )
            marks.append([int(members[query][0])])
        start_Q, stop_Q = torch.tensor(spans).unbind(dim=1)
        status_Q = torch.tensor(status)
        return Selection(status_Q, start_Q, stop_Q, details, marks, members, left_alone=left_alone)

    @staticmethod
    def cut(details: Mapping[str, Any], target_rank: int) -> Any:
        """How many candidates are left alone."""
        del target_rank
        return details["left_alone"]

    @staticmethod
    def describe(details: Mapping[str, Any]) -> list[str]:
        """The drop, and what lies above it."""
        if details["threshold"] is None:
            if details["left_alone"]:
                return ["the target is not among the candidates, which are all left alone"]
            return []
        return [
            f"{details['left_alone']:,} candidates may fit and are left alone: as like the target "
            f"as {details['threshold']:.5f}, before a drop of {details['height']:.5f}"
        ]


def _further_down(length: int, target: int) -> np.ndarray:
    """Ranks from `_FURTHER` to `LOOKED_AT`, of few images those of the worse half."""
    ranks = np.arange(min(_FURTHER, length // 2), min(length, LOOKED_AT))
    return ranks[ranks != target]


def _above_the_drop(sorted_K: np.ndarray) -> int:
    """How many candidates lie above the steepest drop of their sorted likeness, which is looked for
    among the first K/2 gaps, or, where those are all as like, among all; 0 if there is none."""
    gaps = -np.diff(sorted_K)
    half = gaps[: len(sorted_K) // 2]
    chosen = half if half.any() else gaps
    return int(chosen.argmax()) + 1 if chosen.any() else 0
