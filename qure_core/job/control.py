"""What mining added: the epochs after the warm-up once more, with random negatives in their place.

From the same checkpoint and optimizer, over the same batches, at the same rates; only the negatives
differ. Its checkpoints, metrics and evaluation are a run's own, in ``control/`` below the run.
"""

from __future__ import annotations

from typing import Any

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.data.schema import Split
from qure_core.evaluation.paired import figure_difference
from qure_core.evaluation.protocols import of_manifest
from qure_core.evaluation.stage import evaluate_checkpoint, target_ranks
from qure_core.job.layout import evaluation_uri
from qure_core.model.checkpoint_files import checkpoint_uri
from qure_core.runtime.resources import Plan
from qure_core.training.schedule import mining_epochs
from qure_core.training.segment import Segment
from qure_core.training.trainer import run_segment

CONTROL = "control"
NAME = "end, random negatives"


def has_control(settings: Settings) -> bool:
    """Whether a run has one: it was asked for, and the run mines."""
    train = settings.train
    return train.control and train.negatives == "mined" and bool(mining_epochs(train))


def run_control(settings: Settings, plan: Plan, val: Split, features: str | None) -> dict[str, Any]:
    """Train and evaluate what of the control remains; the evaluation's manifest with its URI."""
    run_dir, train = settings.run.dir, settings.train
    folder = storage.join(run_dir, CONTROL)
    evaluation = evaluation_uri(folder, train.epochs)
    checkpoint = checkpoint_uri(folder, "train", train.epochs)
    segment = Segment(
        stage="train",
        run_dir=run_dir,
        settings=settings.resolved(),
        last_epoch=train.epochs,
        keep=(train.epochs,),
        features=features,
        branch=CONTROL,
        branch_epoch=mining_epochs(train)[0],
    )
    if not storage.is_committed(checkpoint):
        run_segment(segment, settings.cluster, plan)
    return evaluate_checkpoint(settings, plan, checkpoint, val, evaluation, NAME) | {
        "epoch": train.epochs,
        "uri": evaluation,
    }


def what_mining_added(settings: Settings, end: dict[str, Any], control: dict[str, Any]) -> str:
    """One line: the run's end less its control's, and where 95 of 100 differences of the first
    figure lie when the queries are drawn again."""
    protocol = of_manifest(end)
    ours, theirs = (protocol.headline(row["metrics"]) for row in (end, control))
    added = ", ".join(
        f"{ours[name] - theirs[name]:+.2f} {name}"
        for name in ("R@10", "R-precision", "mAP@10")
        if name in ours
    )
    count = settings.train.epochs - mining_epochs(settings.train)[0]
    epochs = f"{count} epochs" if count > 1 else "epoch"
    line = f"mining added {added}, over the same {epochs} with random negatives"
    if "R@10" not in ours:
        return line
    ranks = [[target_ranks(row["uri"])] for row in (end, control)]
    difference = figure_difference("R@10", (ours["R@10"] - theirs["R@10"],), *ranks)
    return f"{line} (R@10: {difference.low:+.2f} to {difference.high:+.2f} over the queries)"
