"""The metrics of a run, from what is committed: lines of JSON and TensorBoard's events."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from tensorboardX import SummaryWriter

from qure_core import storage
from qure_core.evaluation.protocols import of_manifest
from qure_core.job.layout import committed
from qure_core.job.tracking import Scalar, scalars
from qure_core.model.checkpoint_files import latest_epoch


def read_metrics(run_dir: str) -> list[dict[str, Any]]:
    """All lines of metrics: of every committed epoch, round and evaluation."""
    lines: list[dict[str, Any]] = []
    folder = storage.join(run_dir, "metrics")
    for stage in ("pretrain", "train"):
        newest = latest_epoch(run_dir, stage) or 0
        for epoch in range(1, newest + 1):
            text = storage.read_bytes(storage.join(folder, f"{stage}-{epoch:04d}.jsonl")).decode()
            lines += [json.loads(line) for line in text.splitlines()]
    for manifest in committed(run_dir, "rounds"):
        lines.append(
            {"kind": "mining", "epoch": manifest["epoch"], **manifest["statistics"]}
            | {"seconds": manifest["seconds"], "peak_mb": manifest["peak_task_memory_mb"]}
        )
    for manifest in committed(run_dir, "evaluations"):
        lines.append(
            {"kind": "evaluation", "epoch": manifest["epoch"], "name": manifest["name"]}
            | {"headline": of_manifest(manifest).headline(manifest["metrics"])}
            | manifest["metrics"]
        )
    return lines


def write_metrics(run_dir: str, lines: Sequence[dict[str, Any]]) -> list[Scalar]:
    """Write a run's lines as metrics.jsonl and TensorBoard events; return the latter's scalars."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    storage.write_bytes(storage.join(run_dir, "metrics.jsonl"), text.encode())

    values = scalars(lines)
    with storage.temporary_folder("tensorboard") as staging:
        writer = SummaryWriter(staging)
        for name, step, value in values:
            writer.add_scalar(name, value, step)
        writer.close()
        (name,) = os.listdir(staging)
        # Always one file of one name, which takes the place of the last.
        target = storage.join(run_dir, "tensorboard", "events.out.tfevents.qure")
        storage.put_file(os.path.join(staging, name), target)
    return values
