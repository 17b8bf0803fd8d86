"""Starting one stage's workers with Ray Train."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from qure_core import storage
from qure_core.config import ClusterSettings
from qure_core.errors import InputError, chain
from qure_core.monitor import current
from qure_core.resources import Plan
from qure_core.training.segment import Segment

_NOTES_KIND = storage.Kind(
    "note of Ray Train", r"(.*/)?(\.validate_storage_marker|[a-z_]+\.(json|pkl))"
)


def _worker(config: dict[str, Any]) -> None:
    # Imported here, so that Ray Train's controller, which unpickles this function, need not
    # import the model libraries too.
    from qure_core.training.loop import train_segment

    train_segment(Segment(**config["segment"]), config["board"])


def _scratch(run_dir: str) -> str:
    """Where Ray Train keeps notes of its own, of which nothing is needed after a segment."""
    return storage.join(run_dir, "ray_train")


def remove_scratch(run_dir: str) -> None:
    """Remove what drivers that were killed left of Ray Train's notes."""
    scratch = _scratch(run_dir)
    for name in storage.list_names(scratch):
        storage.discard(storage.join(scratch, name), _NOTES_KIND)
    storage.remove_empty_folder(scratch)


def run_segment(segment: Segment, cluster: ClusterSettings, plan: Plan) -> None:
    """Run a segment to its last epoch on ``cluster.train_workers`` workers.

    A worker lost on the way is replaced ``cluster.max_failures`` times; the segment then goes on
    from its newest checkpoint. Bad input met by a worker is raised as `InputError`.
    """
    name = f"{segment.stage}-{segment.last_epoch}-{uuid.uuid4().hex[:8]}"
    scratch = _scratch(segment.run_dir)
    arrow_filesystem, arrow_path = storage.arrow_filesystem(scratch)
    monitor = current()
    if monitor:
        # The workers know how many steps there are; the board brings it.
        monitor.begin(f"{segment.stage} to epoch {segment.last_epoch}", 0, "steps")
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "segment": asdict(segment),
            "board": monitor.make_board() if monitor else None,
        },
        scaling_config=ScalingConfig(
            num_workers=cluster.train_workers,
            use_gpu=plan.gpus > 0,
            resources_per_worker=plan.train,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # its stub is of Train V1
            name=name,
            storage_path=arrow_path,
            storage_filesystem=arrow_filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            # Workers' prints reach the driver already: no second copy through Train's logger.
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},
        ),
    )
    storage.begin(storage.join(scratch, name), _NOTES_KIND)
    try:
        trainer.fit()
    except Exception as error:
        if message := _input_error(error):
            raise InputError(message) from None
        raise
    finally:
        # Only this driver's: another may have begun.
        storage.discard(storage.join(scratch, name), _NOTES_KIND)


def _input_error(error: BaseException) -> str | None:
    """The message of an `InputError` raised in a worker, if that is what stopped the stage."""
    return next((str(link) for link in chain(error) if isinstance(link, InputError)), None)
