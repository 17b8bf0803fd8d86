"""Where a query's good answers end, for people: pure, over one list of scores, K of them.

No fixed number and no fixed score fits all queries. The paper parts a query's sorted scores where
they fall most steeply; so does this, among the best.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LOOKED_AT = 50
"""Best answers among which the drop is sought."""


def likely_matches(score_K: Sequence[float] | np.ndarray) -> int:
    """How many answers stand above the steepest drop of the best scores, which are sorted.

    At least one of any; all, where no score differs from another.
    """
    best = np.asarray(score_K, np.float64)[:LOOKED_AT]
    drops = best[:-1] - best[1:]
    if len(best) < 2 or not drops.max() > 0:
        return len(best)
    return int(drops.argmax()) + 1
