"""Optimizer steps on global batches, by one of any number of workers; nothing here needs Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qure_core.model import encode_frozen
from qure_core.training.batches import Batch, prefetched
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


@dataclass
class Optimisation:
    """One worker's share of the training: a module of losses [B], which DDP may wrap.

    ``encoder`` turns pixels into features before a step; None where the step takes them as they
    are (stored features, or pretraining, which trains the encoder).
    """

    step: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype | None
    workers: int = 1
    encoder: nn.Module | None = None
    vision_precision: str = "fp32"

    def take(self, batch: Batch, seed: int) -> Tensor:
        """One optimizer step; the sum of this worker's losses, still on the device."""
        moved = batch.to(self.device)
        inputs = dict(moved.inputs)
        if self.encoder is not None:
            pixels = inputs.pop("pixel_values")
            inputs["vision"] = encode_frozen(self.encoder, pixels, self.vision_precision)
        torch.manual_seed(seed)
        with torch.autocast(
            self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None
        ):
            losses_B = self.step(**inputs)
        total = (losses_B.float() * moved.weight_B).sum()
        self.optimizer.zero_grad(set_to_none=True)
        # DDP averages over workers: scale so that every sample of the batch weighs the same.
        self.scaler.scale(total * (self.workers / batch.count)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total.detach()

    def epoch(
        self,
        steps: Sequence[Callable[[], Batch]],
        seed_of: Callable[[int], int],
        meter: Throughput,
        after: Callable[[int], None] = lambda done: None,
    ) -> tuple[list[float], list[int]]:
        """Take every step; each one's loss summed over all workers, and its samples.

        Batches are built ahead, and nothing waits for the device before the end. ``after`` is
        told how many steps were taken.
        """
        local: list[Tensor] = []
        counts: list[int] = []
        pin = self.device.type == "cuda"
        ready = prefetched([_pinned(step) if pin else step for step in steps])
        for number in range(len(steps)):
            asked = time.monotonic()
            batch = next(ready)
            waited = time.monotonic() - asked
            local.append(self.take(batch, seed_of(number)))
            counts.append(batch.count)
            meter.add(batch.inputs, batch.count, waited)
            after(number + 1)
        sums = torch.stack(local)
        if self.workers > 1:
            dist.all_reduce(sums)
        return sums.tolist(), counts


def _pinned(step: Callable[[], Batch]) -> Callable[[], Any]:
    return lambda: step().pin_memory()
