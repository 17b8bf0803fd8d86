"""The paper's schedule: when to mine, and the learning rate of each epoch."""

from __future__ import annotations

import math

from qure_core.base.config import TrainSettings


def mining_interval(epochs: int, definitions: int) -> int:
    """Epochs between minings: floor(epochs / n_def)."""
    return epochs // definitions


def mining_epochs(train: TrainSettings) -> list[int]:
    """Epochs before which negatives are mined; the warm-up precedes the first.

    In the paper every epoch divisible by floor(epochs / n_def), except epoch 0. A configured
    warm-up moves the first mining and keeps the interval after it.
    """
    interval = mining_interval(train.epochs, train.mining_definitions)
    first = interval if train.warmup_epochs is None else train.warmup_epochs
    return list(range(first, train.epochs, interval))


def learning_rate(epoch: int, epochs: int, initial: float, final: float) -> float:
    """Cosine per epoch from ``initial`` (epoch 0) towards ``final``, as LAVIS computes it."""
    return (initial - final) * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs)) + final


def stage_boundaries(train: TrainSettings) -> list[int]:
    """Epochs at which training stops for mining or evaluation, from 0 to the end."""
    stops = {0, train.epochs, *mining_epochs(train)}
    if train.eval_every:
        stops |= set(range(train.eval_every, train.epochs, train.eval_every))
    return sorted(stops)


def evaluation_epochs(train: TrainSettings) -> dict[int, str]:
    """Epochs after which the model is evaluated, and what each evaluation is called."""
    minings = mining_epochs(train)
    named = {0: "start", train.epochs: "end"}
    if minings:
        named.setdefault(minings[0], "end of warm-up")
    if train.eval_every:
        for epoch in range(train.eval_every, train.epochs, train.eval_every):
            named.setdefault(epoch, f"epoch {epoch}")
    return dict(sorted(named.items()))
