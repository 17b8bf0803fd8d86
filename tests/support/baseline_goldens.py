"""Numbers of other systems' original programs: the folder, its arrays and its cases by name."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(
    os.environ.get("QURE_BASELINE_GOLDENS") or Path(__file__).parents[1] / "goldens" / "baselines"
)


@cache
def facts(name: str) -> dict[str, Any]:
    """What ``NAME.json`` says."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """What ``NAME.npz`` holds."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def tensor(name: str, array: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An array of ``NAME.npz``, as stored or in another type."""
    return torch.from_numpy(np.asarray(arrays(name)[array])).to(dtype or None)


def cases(name: str, **of: Any) -> dict[str, dict[str, Any]]:
    """The cases of ``NAME.json`` that have these facts."""
    found: dict[str, dict[str, Any]] = facts(name)["cases"]
    return {k: case for k, case in found.items() if all(case[key] == of[key] for key in of)}
