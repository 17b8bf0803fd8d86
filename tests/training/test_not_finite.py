"""A step that is not finite: its update is not made, and it is known whose fault it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qure_core.training.batches import Batch
from qure_core.training.loop import epoch_figures, not_finite, told
from qure_core.training.optimisation import EpochSums, NotFinite, Optimisation, make_optimizer
from qure_core.training.throughput import Throughput


class Line(nn.Module):
    """A loss per sample that is as finite as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, values_B3: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (values_B3 * self.weight).sum(dim=1), {}


class Root(Line):
    """A loss of 0 whose gradient is infinite."""

    def forward(self, values_B3: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return super().forward(values_B3)[0].sqrt(), {}


def batch(number: int, values: list[list[float]]) -> Callable[[], Batch]:
    names = tuple(f"q{number}-{row}" for row in range(len(values)))
    rows = torch.tensor(values)
    return lambda: Batch({"values_B3": rows}, torch.ones(len(values)), len(values), names)


GOOD = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def take(
    steps: list[Callable[[], Batch]], scaler: torch.amp.GradScaler, kind: type[Line] = Line
) -> tuple[Line, Optimisation, Callable[[], EpochSums]]:
    module = kind()
    optimisation = Optimisation(
        step=module,
        optimizer=make_optimizer(module, 0.1, 0.0),
        scaler=scaler,
        device=torch.device("cpu"),
        dtype=None,
    )
    meter = Throughput(None, torch.device("cpu"), 1.0)  # type: ignore[arg-type]
    return module, optimisation, lambda: optimisation.epoch(steps, int, meter, check_every=2)


def plain() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_stops_training_before_its_update(value: float) -> None:
    bad = batch(1, [GOOD[0], [0.0, value, 0.0]])
    module, optimisation, run = take([batch(0, GOOD), bad], plain())
    good, _, run_good = take([batch(0, GOOD)], plain())
    run_good()
    with pytest.raises(NotFinite) as found:
        run()
    assert (found.value.step, found.value.names) == (1, ["q1-1"])
    # The weights are those of the good step alone.
    assert torch.equal(module.weight, good.weight)
    assert not torch.equal(module.weight, torch.ones(3))
    (state,) = optimisation.optimizer.state.values()
    assert state["step"] == 1
    message = str(not_finite(found.value, "train", 4))
    assert message.startswith(
        f"train: loss is {value} at epoch 5, step 1, queries q1-1; its update"
    )
    assert "lower train.lr" in message


def test_a_gradient_stops_training_before_its_update() -> None:
    module, _, run = take([batch(0, [[0.0, 0.0, 0.0]])], plain(), Root)
    with pytest.raises(NotFinite) as found:
        run()
    assert (found.value.what, found.value.names) == ("the gradient is not finite", ["q0-0"])
    assert torch.equal(module.weight, torch.ones(3))


def test_a_scale_that_is_too_large_skips_steps_and_tells() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    steps = [batch(number, [[4.0, 1.0, 0.0]]) for number in range(4)]
    module, _, run = take(steps, scaler)
    sums = run()
    assert 0 < sums.skipped < 4
    assert scaler.get_scale() == 2.0 ** (127 - sums.skipped)
    assert not torch.equal(module.weight, torch.ones(3))
    facts = epoch_figures(sums) | {"lr": 0.1, "temperature": 0.07}
    assert f"{sums.skipped} steps skipped for their loss scale" in told(facts)
    assert facts["gradient_norm"] == pytest.approx(17**0.5)


def test_a_bad_loss_is_no_matter_of_scale() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    module, _, run = take([batch(0, [[float("nan"), 0.0, 0.0]])], scaler)
    with pytest.raises(NotFinite, match="step 0: loss is nan"):
        run()
    assert torch.equal(module.weight, torch.ones(3))
