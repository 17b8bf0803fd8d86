"""Losses against their definitions, written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qure_core.objectives.losses import bradley_terry_losses, contrastive_losses

SCORE = st.floats(-30, 30, width=32)


@settings(deadline=None)
@given(st.lists(st.tuples(SCORE, SCORE), min_size=1, max_size=8))
def test_bradley_terry_is_the_negative_log_softmax(pairs: list[tuple[float, float]]) -> None:
    scores = torch.tensor(pairs, dtype=torch.float64)
    expected = -torch.log_softmax(scores, dim=1)[:, 0]
    torch.testing.assert_close(bradley_terry_losses(scores), expected)


def test_bradley_terry_does_not_overflow() -> None:
    losses = bradley_terry_losses(torch.tensor([[-1e4, 1e4], [1e4, -1e4]]))
    assert losses.tolist() == [2e4, 0.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_contrastive_by_hand(smoothing: float) -> None:
    forward, backward = torch.randn(3, 4), torch.randn(3, 4)
    # The second pair shares its caption with candidate 3.
    target = torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0, 0.5], [0, 0, 1.0, 0]])
    ours = contrastive_losses(forward, backward, target, smoothing)
    for row in range(3):
        total = 0.0
        for scores in (forward[row], backward[row]):
            log_sum = math.log(sum(math.exp(float(s)) for s in scores))
            for n in range(4):
                share = float(target[row, n]) * (1 - smoothing) + smoothing / 4
                total -= share * (float(scores[n]) - log_sum) / 2
        assert float(ours[row]) == pytest.approx(total, rel=1e-5)
