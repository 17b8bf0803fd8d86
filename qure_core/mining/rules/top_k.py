"""The best-scored images (ANCE, Xiong et al., arXiv 2007.00808; NV-Retriever's TopK variants)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from qure_core.mining.engines.ranked import Ranked
from qure_core.mining.rules.bounded import qualifying
from qure_core.mining.rules.listed import Listed, ListedOptions


class TopKOptions(ListedOptions):
    """among: images "below" the target alone, or "anywhere". max_score: those above it are left
    alone (NV-Retriever's TopK-Abs)."""

    among: Literal["below", "anywhere"] = "below"
    max_score: float | None = None


class TopK(Listed):
    """The best images below the target, or anywhere, after the first ``skip``. One sort."""

    name: ClassVar[str] = "top_k"
    found: ClassVar[str] = "the best that qualify"
    options_of: ClassVar[type[ListedOptions]] = TopKOptions
    chosen: TopKOptions

    def places(self, ranked: Ranked) -> Sequence[tuple[int, int, float | None]]:
        """From the target, or the top, or the bound on."""
        most = self.chosen.max_score
        bounds = [most] * len(ranked.length_Q)
        first = ranked.target_rank_Q.tolist() if self.chosen.among == "below" else [0] * len(bounds)
        return [
            (max(start, place), stop, most)
            for (start, stop), place in zip(qualifying(ranked, bounds), first, strict=True)
        ]
