"""Optimizer steps on global batches, by one of any number of workers; nothing here needs Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qure_core.data.loader import ImageLoader
from qure_core.embeddings.encoder import Encoder
from qure_core.runtime.prefetch import prefetched
from qure_core.training.batches import Batch
from qure_core.training.throughput import Throughput


def autocast_type(name: str, device: torch.device) -> torch.dtype | None:
    """The type that ``train.precision`` means on ``device``, or None for plain float32."""
    if name == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over every trained parameter, with decay on all of them, as the released program."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)


class NotFinite(Exception):
    """A step whose loss or gradient is not finite; its update was not made."""

    def __init__(self, step: int, what: str, names: Sequence[str]) -> None:
        super().__init__(f"step {step}: {what}")
        self.step, self.what, self.names = step, what, names


@dataclass(frozen=True)
class Taken:
    """An optimizer step of one worker, on the device: nothing here was waited for.

    losses_B: of its samples; names: theirs. sums: over its samples, of the loss and of each figure.
    norm: of the gradient of all workers, NaN where it is not finite. bad: whether the update was
    left out for a fault; skipped: whether it was for a scale that was too large.
    """

    losses_B: Tensor
    names: tuple[str, ...]
    sums: dict[str, Tensor]
    norm: Tensor
    bad: Tensor
    skipped: Tensor


@dataclass(frozen=True)
class EpochSums:
    """An epoch over all workers: per step the loss, its samples and the gradient's norm; figures
    summed over all samples; and how many steps a too large loss scale cost."""

    losses: list[float]
    counts: list[int]
    norms: list[float]
    figures: dict[str, float]
    skipped: int


@dataclass
class Optimisation:
    """One worker's share of the training: a module of losses and figures [B], which DDP may wrap.

    ``encoder`` gives a step the features of its batch; None where the step takes pixels itself
    (pretraining, which trains the encoder).
    """

    step: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype | None
    workers: int = 1
    encoder: Encoder | None = None

    def take(self, batch: Batch, seed: int) -> Taken:
        """One optimizer step, which is not made if its loss or gradient is not finite."""
        moved = batch.to(self.device)
        inputs = dict(moved.inputs)
        if self.encoder is not None:
            inputs["vision"] = self.encoder.vision(inputs)
            inputs.pop(ImageLoader.name, None)
        torch.manual_seed(seed)
        with torch.autocast(
            self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None
        ):
            losses_B, figures = self.step(**inputs)
        losses_B = losses_B.float()
        total = (losses_B * moved.weight_B).sum()
        self.optimizer.zero_grad(set_to_none=True)
        # DDP averages over workers: scale so that every sample of the batch weighs the same.
        self.scaler.scale(total * (self.workers / batch.count)).backward()
        self.scaler.unscale_(self.optimizer)
        norm = self._gradient_norm()
        unusable = ~torch.isfinite(norm)
        if self.scaler.is_enabled():
            # It leaves the step out itself where the gradient is not finite, and lowers its scale.
            self.scaler.step(self.optimizer)
            bad = ~torch.isfinite(total.detach())
        else:
            bad = unusable = unusable | ~torch.isfinite(total.detach())
            self._step_unless(bad)
        self.scaler.update()
        sums = {"loss": total.detach()}
        sums |= {name: (value * moved.weight_B).sum() for name, value in figures.items()}
        return Taken(losses_B.detach(), batch.names, sums, norm, bad, unusable & ~bad)

    def _gradient_norm(self) -> Tensor:
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def _step_unless(self, bad: Tensor) -> None:
        """The optimizer's step, which the device itself leaves out if ``bad``: the fused kernels
        take the flag that a loss scaler gives them, and nothing waits for it here."""
        optimizer: Any = self.optimizer
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf

    def epoch(
        self,
        steps: Sequence[Callable[[], Batch]],
        seed_of: Callable[[int], int],
        meter: Throughput,
        after: Callable[[int], None] = lambda done: None,
        check_every: int = 20,
    ) -> EpochSums:
        """Take every step and sum it over all workers; ``after`` is told how many were taken.

        Batches are built ahead, and the device is waited for once in ``check_every`` steps. Raises
        `NotFinite`, on every worker alike, for the first step that could not be made.
        """
        taken: list[Taken] = []
        counts: list[int] = []
        pin = self.device.type == "cuda"
        ready = prefetched([_pinned(step) if pin else step for step in steps])
        for number in range(len(steps)):
            asked = time.monotonic()
            batch = next(ready)
            waited = time.monotonic() - asked
            taken.append(self.take(batch, seed_of(number)))
            counts.append(batch.count)
            meter.add(batch.inputs, batch.count, waited)
            if (number + 1) % check_every == 0 or number + 1 == len(steps):
                start = number // check_every * check_every
                self._check(taken[start:], start)
            after(number + 1)
        names = list(taken[0].sums)
        sums = torch.stack([torch.stack([one.sums[name] for name in names]) for one in taken])
        if self.workers > 1:
            dist.all_reduce(sums)
        norms = torch.stack([one.norm for one in taken])
        whole = sums.sum(dim=0).tolist()
        return EpochSums(
            losses=sums[:, 0].tolist(),
            counts=counts,
            norms=norms.tolist(),
            figures={name: whole[i] for i, name in enumerate(names) if name != "loss"},
            skipped=int(torch.stack([one.skipped for one in taken]).sum()),
        )

    def _check(self, taken: Sequence[Taken], start: int) -> None:
        bad = torch.stack([one.bad for one in taken]).int()
        if self.workers > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if not bad.any():
            return
        step = int(bad.argmax())
        one = taken[step]
        losses = one.losses_B.tolist()
        faults = [
            (name, value)
            for name, value in zip(one.names, losses, strict=True)
            if not math.isfinite(value)
        ]
        told: list[Any] = [(faults, one.names)]
        if self.workers > 1:
            told = [None] * self.workers
            dist.all_gather_object(told, (faults, one.names))
        found = [fault for faults, _ in told for fault in faults]
        if found:
            raise NotFinite(start + step, f"loss is {found[0][1]}", [name for name, _ in found])
        names = [name for _, own in told for name in own]
        raise NotFinite(start + step, "the gradient is not finite", names)


def _pinned(step: Callable[[], Batch]) -> Callable[[], Batch]:
    return lambda: step().pin_memory()
