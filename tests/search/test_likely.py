"""Where a query's good answers end."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qure_core.search.likely import LOOKED_AT, likely_matches

SCORES = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=120).map(
    lambda scores: np.sort(np.asarray(scores, np.float32))[::-1]
)


@given(SCORES)
def test_no_drop_among_the_best_is_steeper(scores: np.ndarray) -> None:
    likely = likely_matches(scores)
    best = scores[:LOOKED_AT].astype(np.float64)
    assert 1 <= likely <= len(best)
    drops = best[:-1] - best[1:]
    if likely < len(best):
        assert drops[likely - 1] == drops.max() > 0
        assert (drops[: likely - 1] < drops.max()).all()
    else:
        assert not (drops > 0).any()


def test_examples() -> None:
    assert likely_matches([]) == 0
    assert likely_matches([0.3]) == 1
    assert likely_matches([0.9, 0.8, 0.3, 0.2]) == 2
    assert likely_matches([0.5, 0.5, 0.5]) == 3
    assert likely_matches([1.0] * 50 + [0.0] * 9) == 50  # further down nothing is sought
