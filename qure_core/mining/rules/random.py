"""No rule: every image but the target, as in the warm-up, drawn from a mined set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from qure_core.base.config import MiningSettings
from qure_core.base.options import NoOptions, read_options
from qure_core.mining.engines.ranked import Ranked
from qure_core.mining.rules.listed import Listed, ListedOptions


class Random(Listed):
    """All images but the target, of which ``mining.max_negatives`` lists a uniform sample. One pass
    over the corpus, for the scores; no order matters.
    """

    name: ClassVar[str] = "random"
    found: ClassVar[str] = "of the whole corpus"

    @classmethod
    def of(cls, mining: MiningSettings) -> Self:
        """The rule as the settings have it: it has no options of its own."""
        read_options(NoOptions, mining.options, "mining.options", cls.name)
        return cls(ListedOptions(negatives=None))

    def options(self) -> dict[str, Any]:
        """It has none."""
        return {}

    def places(self, ranked: Ranked) -> Sequence[tuple[int, int, float | None]]:
        """All of them."""
        return [(0, length - 1, None) for length in ranked.length_Q.tolist()]
