"""TopK-PercPos (NV-Retriever, Moreira et al., arXiv 2407.15831), the best of its comparison."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from qure_core.mining.rules.bounded import Bounded, BoundOptions


class PercPosOptions(BoundOptions):
    """The paper's share of 0.95."""

    share: float | None = Field(0.95, gt=0, le=1)


class PercPos(Bounded):
    """The best images that score at most a ``share`` of the target's score."""

    name: ClassVar[str] = "perc_pos"
    options_of = PercPosOptions
