"""The released program's random tiny models and what they gave, for tests on any device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from conftest import GOLDENS
from torch import Tensor

from qure_core.model import QuReModel, load_lavis_checkpoint

NAMES = ("model_tiny", "model_eva_tiny")


@dataclass
class Golden:
    """A model of the released program and what it gave, with ours of the same weights."""

    model: QuReModel
    inputs: Any
    outputs: Any
    config: dict[str, Any]

    def tensor(self, name: str) -> Tensor:
        """An input, on the model's device."""
        return torch.from_numpy(self.inputs[name]).to(self.model.device)

    def error(self, ours: Tensor, name: str) -> float:
        """Largest difference over the largest golden value."""
        golden = torch.from_numpy(np.asarray(self.outputs[name]))
        ours = ours.detach().float().cpu()
        assert ours.shape == golden.shape, (name, ours.shape, golden.shape)
        return float((ours - golden).abs().max() / golden.abs().max())

    def batch(self) -> dict[str, Tensor]:
        """The golden triplets as a step's input."""
        size = len(self.tensor("ref"))
        rows = torch.arange(size, device=self.model.device)
        pixels = torch.cat([self.tensor(k) for k in ("ref", "tar", "neg")])
        return {
            "vision": self.model.encode_vision(pixels).detach(),
            "reference_B": rows,
            "answer_A": torch.arange(size, 3 * size, device=self.model.device),
            "target_B": rows,
            "negative_BK": rows[:, None] + size,
            "valid_B": torch.ones(size, dtype=torch.bool, device=self.model.device),
            "input_ids": self.tensor("input_ids"),
            "attention_mask": self.tensor("attention_mask"),
        }


def load_golden(name: str, device: str = "cpu") -> Golden:
    """The golden called ``name``, in evaluation mode."""
    path = GOLDENS / f"{name}.pth"
    return Golden(
        load_lavis_checkpoint(path, vision_heads=4, qformer_heads=4).eval().to(device),
        np.load(GOLDENS / f"{name}_inputs.npz"),
        np.load(GOLDENS / f"{name}_outputs.npz"),
        json.loads((GOLDENS / f"{name}_config.json").read_text()),
    )
