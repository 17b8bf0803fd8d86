"""TopK-MarginPos (NV-Retriever, Moreira et al., arXiv 2407.15831)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from qure_core.mining.rules.bounded import Bounded, BoundOptions


class MarginPosOptions(BoundOptions):
    """The paper's margin of 0.05."""

    margin: float | None = Field(0.05, ge=0)


class MarginPos(Bounded):
    """The best images that score at least ``margin`` less than the target."""

    name: ClassVar[str] = "margin_pos"
    options_of = MarginPosOptions
