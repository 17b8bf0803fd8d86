"""No rule: every image but the target, as in the warm-up, drawn from a mined set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from qure_core.mining.engines.ranked import Ranked
from qure_core.mining.rules.listed import Listed, ListedOptions


class RandomOptions(ListedOptions):
    """All images, unless told otherwise; ``mining.max_negatives`` lists a uniform sample."""

    negatives: int | None = Field(None, ge=1)


class Random(Listed):
    """All images but the target. One pass over the corpus, for the scores; no order matters."""

    name: ClassVar[str] = "random"
    found: ClassVar[str] = "of the whole corpus"
    options_of: ClassVar[type[ListedOptions]] = RandomOptions

    def places(self, ranked: Ranked) -> Sequence[tuple[int, int, float | None]]:
        """All of them."""
        return [(0, length - 1, None) for length in ranked.length_Q.tolist()]
