"""Checkpoints: safetensors weights, processor and optimizer state, committed by a manifest."""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
from typing import Any

import torch
from safetensors import SafetensorError

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.model import ComposedModel, QuReProcessor
from qure_core.model.checkpoint_files import CHECKPOINT_KIND, OPTIMIZER_FILE


def save_checkpoint(
    uri: str,
    model: ComposedModel,
    processor: QuReProcessor,
    facts: dict[str, Any],
    optimizer: dict[str, Any] | None = None,
) -> None:
    """Commit a checkpoint. ``facts`` (stage, epoch, ...) go into its manifest."""
    with storage.committed_directory(uri, CHECKPOINT_KIND) as (directory, description):
        try:
            model.save_pretrained(directory)
            processor.save_pretrained(directory)
            if optimizer is not None:
                torch.save(optimizer, directory / OPTIMIZER_FILE)
        except (SafetensorError, RuntimeError) as error:
            # Of these libraries' own kind even if the disk is full.
            size = sum(value.nbytes for value in model.state_dict().values())
            if shutil.disk_usage(directory).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory)) from error
            raise
        # What stored features of this encoder are known by.
        described = {
            "encoder": model.encoder_digest(),
            "image_size": processor.image_size,
            "pixels": processor.pixels,
        }
        description |= facts | described


def load_optimizer(uri: str) -> dict[str, Any] | None:
    """The optimizer and scaler state of a checkpoint, or None if it has none."""
    manifest = storage.read_manifest(uri, CHECKPOINT_KIND)
    if OPTIMIZER_FILE not in manifest["files"]:
        return None
    file = io.BytesIO(storage.read_committed(uri, OPTIMIZER_FILE, manifest))
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{storage.join(uri, OPTIMIZER_FILE)}: holds more than tensors and plain values, as no "
            "checkpoint of this project does; it was not read. Take the checkpoint from its source"
        ) from None
    return state
