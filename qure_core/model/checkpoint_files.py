"""Checkpoints as directories: their files, their places in a run, which are there. No weights."""

from __future__ import annotations

import re

from qure_core import storage
from qure_core.base.config import Pixels
from qure_core.base.errors import InputError

CHECKPOINT_KIND = storage.Kind(
    "checkpoint",
    r"(config|qure_processor|tokenizer|tokenizer_config|special_tokens_map)\.json|vocab\.txt|"
    r"merges\.txt|vocab\.json|model\.safetensors|optimizer\.pt",
)
OPTIMIZER_FILE = "optimizer.pt"  # only training reads it


def checkpoint_digest(checkpoint: str) -> str:
    """SHA-256 of a checkpoint's weights, from its manifest."""
    manifest = storage.read_manifest(checkpoint, CHECKPOINT_KIND)
    digest: str = manifest["files"]["model.safetensors"]["sha256"]
    return digest


def checkpoint_pixels(checkpoint: str) -> Pixels:
    """How a checkpoint takes images (``data.pixels``); as stored, until that was said."""
    pixels: Pixels = storage.read_manifest(checkpoint, CHECKPOINT_KIND).get("pixels", "released")
    return pixels


def checkpoint_uri(run_dir: str, stage: str, epoch: int) -> str:
    """Where the checkpoint after ``epoch`` epochs of ``stage`` ("pretrain", "train") is."""
    return storage.join(run_dir, "checkpoints", f"{stage}-{epoch:04d}")


def _epochs(run_dir: str, stage: str) -> list[int]:
    names = storage.list_names(storage.join(run_dir, "checkpoints"))
    found = (re.fullmatch(rf"{stage}-(\d{{4,}})", name) for name in names)
    return sorted(int(name[1]) for name in found if name)


def committed_epochs(run_dir: str, stage: str) -> list[int]:
    """The epochs of ``stage`` whose checkpoints are committed, in order."""
    return [
        epoch
        for epoch in _epochs(run_dir, stage)
        if storage.is_committed(checkpoint_uri(run_dir, stage, epoch))
    ]


def latest_epoch(run_dir: str, stage: str) -> int | None:
    """The newest committed epoch of ``stage``, or None."""
    return max(committed_epochs(run_dir, stage), default=None)


def newest_checkpoint(run_dir: str) -> str:
    """The newest checkpoint of a run's fine-tuning; `InputError` if there is none."""
    epoch = latest_epoch(run_dir, "train")
    if epoch is None:
        raise InputError(
            f"run.dir: {run_dir} has no training checkpoint; give --checkpoint, or the directory "
            "of a run that has begun to train"
        )
    return checkpoint_uri(run_dir, "train", epoch)


def prune_checkpoints(run_dir: str, stage: str, keep: set[int], newest: int) -> None:
    """Remove checkpoints of ``stage`` but the epochs in ``keep`` and the ``newest`` latest."""
    committed = committed_epochs(run_dir, stage)
    # Also what is left of one whose removal, or making, was cut short.
    for epoch in _epochs(run_dir, stage):
        old = epoch in committed[:-newest] and epoch not in keep
        if old or (epoch not in committed and epoch < max(committed, default=0)):
            storage.discard(checkpoint_uri(run_dir, stage, epoch), CHECKPOINT_KIND)
