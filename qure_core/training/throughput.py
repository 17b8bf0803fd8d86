"""How fast training goes: samples, waiting for data, floating-point operations, memory."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qure_core.model.configuration import QuReConfig
from qure_core.model.flops import encoder_flops, step_flops

_PROBE_SECONDS = 0.3


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this device in a large matrix product: the peak that a step is held against."""
    size = 8192 if device.type == "cuda" else 1024
    a_NN = torch.ones(size, size, device=device, dtype=dtype)
    best, end = float("inf"), time.monotonic() + _PROBE_SECONDS
    while time.monotonic() < end:
        _synchronise(device)
        started = time.perf_counter()
        torch.mm(a_NN, a_NN)
        _synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held so far, MB: on a GPU the tensors', else the whole process's."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def batch_flops(config: QuReConfig, inputs: dict[str, Tensor]) -> int | None:
    """Operations of a fine-tuning step on ``inputs``; None for one of pretraining, and of parts
    whose operations are not counted."""
    if "answer_A" not in inputs:
        return None
    if config.query_encoder != "qformer" or config.vision_type not in ("clip", "eva"):
        return None
    flops = step_flops(config, len(inputs["answer_A"]), *inputs["input_ids"].shape)
    if "pixel_values" in inputs:
        flops += len(inputs["pixel_values"]) * encoder_flops(config)
    return flops


@dataclass
class Throughput:
    """What one worker did since ``started``; ``peak`` is the FLOP/s it is held against.

    Steps are counted when they are handed to the device: nothing here waits for it.
    """

    config: QuReConfig
    device: torch.device
    peak: float
    started: float = field(default_factory=time.monotonic)
    samples: int = 0  # of the global batches
    waited: float = 0.0  # seconds without a batch
    flops: int | None = 0  # of this worker

    def add(self, inputs: dict[str, Tensor], count: int, waited: float) -> None:
        self.samples += count
        self.waited += waited
        own = batch_flops(self.config, inputs)
        self.flops = None if own is None or self.flops is None else self.flops + own

    def facts(self) -> dict[str, Any]:
        """Figures for metrics.jsonl."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        facts: dict[str, Any] = {
            "seconds": round(elapsed, 3),
            "samples_per_second": round(self.samples / elapsed, 3),
            "data_wait_share": round(self.waited / elapsed, 4),
            "memory_mb": round(peak_memory_mb(self.device), 1),
        }
        if self.flops is not None:
            facts["gflops"] = round(self.flops / elapsed / 1e9, 2)
            facts["peak_share"] = round(self.flops / elapsed / self.peak, 4)
        return facts

    def line(self) -> str:
        """The figures for people."""
        facts = self.facts()
        parts = [
            f"{facts['samples_per_second']:,.1f} samples/s",
            f"{facts['data_wait_share']:.1%} of it waiting for data",
        ]
        if "gflops" in facts:
            parts.append(
                f"{facts['gflops']:,.0f} GFLOP/s a worker ({facts['peak_share']:.0%} of a matrix "
                "product's)"
            )
        return ", ".join([*parts, f"{facts['memory_mb']:,.0f} MB"])
