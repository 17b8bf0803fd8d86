"""Losses against their definitions, written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qure_core.base.errors import InputError
from qure_core.objectives import Outputs, make_objective
from qure_core.objectives.contrastive import contrastive_losses

SCORE = st.floats(-30, 30, width=32)


def outputs(scores: torch.Tensor, **other: torch.Tensor) -> Outputs:
    """Of scores [B, A] alone, the target in column 0 and the other columns its negatives."""
    rows, columns = scores.shape
    known = {
        "query_BD": torch.zeros(rows, 1),
        "image_ATD": torch.zeros(columns, 1, 1),
        "scores_BA": scores,
        "target_B": torch.zeros(rows, dtype=torch.int64),
        "negative_BK": torch.arange(1, columns).expand(rows, -1),
        "valid_B": torch.ones(rows, dtype=torch.bool),
        "temperature": torch.tensor(1.0, dtype=scores.dtype),
    }
    return Outputs(**(known | other))


@settings(deadline=None)
@given(st.lists(st.tuples(SCORE, SCORE), min_size=1, max_size=8), st.floats(0.25, 4))
def test_bradley_terry_is_the_negative_log_softmax(
    pairs: list[tuple[float, float]], temperature: float
) -> None:
    scores = torch.tensor(pairs, dtype=torch.float64)
    divisor = torch.tensor(temperature, dtype=torch.float64)
    losses, _ = make_objective("bradley_terry", {})(outputs(scores, temperature=divisor))
    torch.testing.assert_close(losses, -torch.log_softmax(scores / divisor, dim=1)[:, 0])


def test_bradley_terry_of_several_negatives_is_their_mean() -> None:
    scores = torch.randn(5, 4, dtype=torch.float64)
    objective = make_objective("bradley_terry", {})
    losses, _ = objective(outputs(scores))
    each = [objective(outputs(scores[:, [0, k]]))[0] for k in (1, 2, 3)]
    torch.testing.assert_close(losses, torch.stack(each).mean(dim=0))


def test_bradley_terry_does_not_overflow() -> None:
    scores = torch.tensor([[-1e4, 1e4], [1e4, -1e4]])
    assert make_objective("bradley_terry", {})(outputs(scores))[0].tolist() == [2e4, 0.0]


def test_info_nce_by_hand() -> None:
    scores = torch.randn(3, 5, dtype=torch.float64)
    candidates = torch.tensor([[0, 1, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
    targets = torch.tensor([0, 3, 0])
    temperature = torch.tensor(0.5, dtype=torch.float64)
    given = outputs(scores, target_B=targets, candidate_BA=candidates, temperature=temperature)
    losses, _ = make_objective("info_nce", {})(given)
    for row in range(3):
        counted = {int(targets[row]), *torch.nonzero(candidates[row]).flatten().tolist()}
        total = sum(math.exp(float(scores[row, column]) / 0.5) for column in counted)
        expected = math.log(total) - float(scores[row, targets[row]]) / 0.5
        assert float(losses[row]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bradley", {}, "objective.name: 'bradley' is not one of bradley_terry, info_nce"),
        ("info_nce", {"smoothing": 1}, r"objective.options.smoothing: .* has the options none"),
    ],
)
def test_unknown_objectives_and_options_are_refused(
    name: str, options: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_objective(name, options)


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
