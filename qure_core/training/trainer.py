"""Starting one stage's workers with Ray Train."""

from __future__ import annotations

import os
import sys
import threading
import uuid
from dataclasses import asdict
from typing import Any

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from qure_core import storage
from qure_core.base.config import ClusterSettings
from qure_core.base.errors import InputError, input_error
from qure_core.runtime.in_process import device_here
from qure_core.runtime.monitor import current
from qure_core.runtime.resources import Plan
from qure_core.training.segment import Segment

_NOTES_KIND = storage.Kind(
    "note of Ray Train", r"(.*/)?(\.validate_storage_marker|[a-z_]+\.(json|pkl))"
)


def _worker(config: dict[str, Any]) -> None:
    if storage.exists(config["fault"]):
        return  # another try, where the input is as bad as before: the driver says so
    # Imported here, so that Ray Train's controller, which unpickles this function, need not
    # import the model libraries too.
    from qure_core.training.loop import train_segment

    try:
        train_segment(Segment(**config["segment"]), config["board"])
    except Exception as error:
        if (bad := input_error(error)) is not None:
            storage.write_json(config["fault"], str(bad))
        raise


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
    from its newest checkpoint. Bad input met by a worker is raised as `InputError`. Of stages in
    one process the segment is run by it.
    """
    monitor = current()
    if (here := device_here()) is not None:
        # Here, because a driver of workers elsewhere needs no model libraries.
        from qure_core.training.loop import Worker, train_epochs

        if monitor:
            monitor.account.begin(segment.name, "steps")
            monitor.account.worked(0.0)
        train_epochs(segment, Worker(torch.device(here)))
        if monitor:
            monitor.account.end()
        return
    name = f"{segment.stage}-{segment.last_epoch}-{uuid.uuid4().hex[:8]}"
    scratch = _scratch(segment.run_dir)
    fault = storage.join(scratch, name, "fault.json")
    arrow_filesystem, arrow_path = storage.arrow_filesystem(scratch)
    if monitor:
        # The workers know how many steps there are; the board brings it.
        monitor.begin(f"{segment.name} to epoch {segment.last_epoch}", 0, "steps")
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "segment": asdict(segment),
            "fault": fault,
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
    # How often workers are asked whether they are done; every two seconds by default, which is much
    # of a short segment.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    try:
        _fit(trainer)
        raise_fault(fault)
        if monitor:
            monitor.end_training()
    except Exception as error:
        raise_fault(fault)
        if (bad := input_error(error)) is not None:
            raise bad from None
        raise
    finally:
        # Only this driver's: another may have begun. Interrupted, Ray Train still writes there.
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            storage.discard(storage.join(scratch, name), _NOTES_KIND)


def raise_fault(uri: str) -> None:
    """Raise the `InputError` that a worker noted at ``uri``, if one did."""
    if storage.exists(uri):
        raise InputError(storage.read_json(uri))


def _fit(trainer: TorchTrainer) -> None:
    """`trainer.fit` in a thread: in the main one it would take Ctrl-C for itself."""
    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # raised below
            failed.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)  # an interruption is seen in between
    if failed:
        raise failed[0]
