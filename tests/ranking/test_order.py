"""Ranking one row of scores, against a sort written from the definition."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qure_core.ranking.order import rank_row

SCORES = st.lists(st.sampled_from([-1.0, -0.25, 0.0, -0.0, 0.5, 2.0]), min_size=2, max_size=12)


@settings(deadline=None)
@given(SCORES, st.data())
def test_rank_row_by_definition(values: list[float], data: st.DataObject) -> None:
    columns = range(len(values))
    left_out = data.draw(st.none() | st.sampled_from(list(columns)))
    kept = [column for column in columns if column != left_out]
    best_first = sorted(kept, key=lambda column: (-values[column], column))

    row = rank_row(torch.tensor(values), left_out)

    assert row.order_R.tolist() == best_first
    assert [row.rank_M[column] for column in best_first] == list(range(len(kept)))
    if left_out is not None:
        assert row.rank_M[left_out] == -1
    some = data.draw(st.lists(st.sampled_from(kept), unique=True))
    assert row.ordered(some) == [column for column in best_first if column in some]
    assert row.ranks(some) == [best_first.index(column) for column in row.ordered(some)]
    for column in kept:
        same = [other for other in kept if values[other] == values[column]]
        assert row.ties(column) == len(same) - 1
