"""The schedule against the released program's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import GOLDENS

from qure_core.base.config import TrainSettings
from qure_core.training.optimisation import autocast_type
from qure_core.training.schedule import (
    evaluation_epochs,
    learning_rate,
    mining_epochs,
    stage_boundaries,
)

OUTPUTS = np.load(GOLDENS / "model_tiny_outputs.npz")


@pytest.mark.parametrize(
    ("key", "epochs", "rate"), [("lr_fashioniq_30", 30, 5e-6), ("lr_cirr_50", 50, 1e-5)]
)
def test_learning_rate_is_the_released_programs(key: str, epochs: int, rate: float) -> None:
    ours = [learning_rate(epoch, epochs, rate, rate / 100) for epoch in range(epochs)]
    assert ours == OUTPUTS[key].tolist()


def test_mining_epochs_are_the_released_programs() -> None:
    keys = [key for key in OUTPUTS.files if key.startswith("rerank_epochs_")]
    assert len(keys) == 2
    for key in keys:
        epochs = 30 if "fashioniq" in key else 50
        train = TrainSettings(epochs=epochs, mining_definitions=6)
        assert mining_epochs(train) == OUTPUTS[key].tolist()


def test_configured_warmup_and_stops() -> None:
    train = TrainSettings(epochs=18, warmup_epochs=9, mining_definitions=6, eval_every=6)
    assert mining_epochs(train) == [9, 12, 15]
    assert stage_boundaries(train) == [0, 6, 9, 12, 15, 18]
    assert evaluation_epochs(train) == {
        0: "start",
        6: "epoch 6",
        9: "end of warm-up",
        12: "epoch 12",
        18: "end",
    }


@pytest.mark.parametrize(
    ("name", "expected"), [("auto", None), ("fp32", None), ("bf16", torch.bfloat16)]
)
def test_precision_follows_the_device(name: str, expected: torch.dtype | None) -> None:
    assert autocast_type(name, torch.device("cpu")) == expected
