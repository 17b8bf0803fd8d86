"""A run's metrics as scalars, and sending them to MLflow or Weights & Biases.

Both clients are optional (``pip install qure-core[tracking]``) and take their credentials and
servers from their own environment variables. What was sent is kept with the run, so a resumed run
goes on in the same remote run and sends nothing twice.
"""

from __future__ import annotations

import importlib
import time
import uuid
from collections.abc import Sequence
from typing import Any

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError

_BATCH = 1000  # scalars sent together: MLflow's limit
_EPOCH_FIGURES = (
    *("loss", "accuracy", "margin", "gradient_norm", "skipped_steps", "lr", "temperature"),
)
Scalar = tuple[str, int, float]
"""Name, step (a step of the stage, or an epoch) and value."""


def scalars(lines: Sequence[dict[str, Any]]) -> list[Scalar]:
    """The lines of metrics.jsonl as scalars."""
    values: list[Scalar] = []
    step = {"pretrain": 0, "train": 0}
    for line in lines:
        if line["kind"] == "step":
            values.append((f"{line['stage']}/step_loss", step[line["stage"]], line["loss"]))
            step[line["stage"]] += 1
        elif line["kind"] == "epoch":
            values += [
                (f"{line['stage']}/{name}", line["epoch"], line[name])
                for name in _EPOCH_FIGURES
                if name in line  # older runs told fewer
            ]
        elif line["kind"] == "mining":
            values.append(("mining/found_share", line["epoch"], line["found_share"]))
            values.append(("mining/set_size", line["epoch"], line["set_size"]["median"]))
        else:
            values += [
                (f"val/{name}", line["epoch"], value) for name, value in line["headline"].items()
            ]
    return values


def check_tracker(settings: Settings) -> None:
    """Raise `InputError` if the chosen tracker's client is not installed."""
    backend = settings.tracking.backend
    if backend == "none":
        return
    try:
        importlib.import_module(backend)
    except ImportError:
        raise InputError(
            f"tracking.backend: {backend} is not installed; pip install 'qure-core[tracking]', or "
            "set tracking.backend to none"
        ) from None


def track(settings: Settings, values: Sequence[Scalar]) -> None:
    """Send what the chosen tracker has not got yet; nothing without one."""
    backend = settings.tracking.backend
    if backend == "none":
        return
    uri = storage.join(settings.run.dir, "tracking.json")
    before = storage.read_json(uri) if storage.exists(uri) else {}
    state: dict[str, Any] = before.get(backend, {"run": None, "steps": {}})
    sent: dict[str, int] = state["steps"]
    new = [scalar for scalar in values if scalar[1] > sent.get(scalar[0], -1)]
    begin, send = {
        "mlflow": (_begin_mlflow, _send_to_mlflow),
        "wandb": (_begin_wandb, _send_to_wandb),
    }[backend]
    try:
        state["run"] = state["run"] or begin(settings)
    except Exception as error:
        _say(backend, error)
        return
    storage.write_json(uri, before | {backend: state})
    for start in range(0, len(new), _BATCH):
        batch = new[start : start + _BATCH]
        try:
            send(settings, state["run"], batch)
        except Exception as error:
            _say(backend, error)
            return
        for name, step, _ in batch:
            sent[name] = max(step, sent.get(name, -1))
        storage.write_json(uri, before | {backend: state})


def _say(backend: str, error: Exception) -> None:
    """A client or its server failed: no reason to lose the training."""
    # Without the message, which may hold the server's URI and what is in it.
    print(
        f"[tracking] {backend} did not take it all ({type(error).__name__}); the rest is sent at "
        "the end of the next stage, or by running the job once more",
        flush=True,
    )


def _run_name(settings: Settings) -> str:
    return settings.run.dir.rsplit("/", 1)[-1]


def _parameters(settings: Settings) -> dict[str, Any]:
    sections = settings.resolved()
    return {
        f"{section}.{name}": value
        for section, fields in sections.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
    }


def _begin_mlflow(settings: Settings) -> str:
    from mlflow import MlflowClient
    from mlflow.entities import Param

    client = MlflowClient(tracking_uri=settings.tracking.uri)
    project = settings.tracking.project
    experiment = client.get_experiment_by_name(project)
    number = experiment.experiment_id if experiment else client.create_experiment(project)
    params = [Param(name, str(value)[:500]) for name, value in _parameters(settings).items()]
    run: str = client.create_run(number, run_name=_run_name(settings)).info.run_id
    for start in range(0, len(params), 100):
        client.log_batch(run, params=params[start : start + 100])
    return run


def _send_to_mlflow(settings: Settings, run: str, values: Sequence[Scalar]) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    # MLflow takes "@" in no name.
    metrics = [Metric(name.replace("@", "_at_"), value, now, step) for name, step, value in values]
    MlflowClient(tracking_uri=settings.tracking.uri).log_batch(run, metrics=metrics)


def _begin_wandb(settings: Settings) -> str:
    return uuid.uuid4().hex[:8]  # W&B makes the run of that id when it first hears of it


def _send_to_wandb(settings: Settings, run: str, values: Sequence[Scalar]) -> None:
    import wandb

    with wandb.init(
        project=settings.tracking.project,
        id=run,
        name=_run_name(settings),
        resume="allow",
        config=_parameters(settings),
    ) as session:
        # Each name has steps of its own, which W&B's single step could not hold.
        for name in sorted({name for name, _, _ in values}):
            session.define_metric(name, step_metric=f"{name}.step")
        for name, step, value in values:
            session.log({name: value, f"{name}.step": step})
