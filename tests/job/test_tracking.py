"""Metrics sent to MLflow and Weights & Biases through their own clients, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.job import tracking
from qure_core.job.metrics_log import read_metrics
from qure_core.job.tracking import check_tracker, scalars, track

LINES = [
    {"kind": "step", "stage": "train", "loss": 0.7},
    {"kind": "step", "stage": "train", "loss": 0.6},
    {"kind": "epoch", "stage": "train", "epoch": 1, "loss": 0.65, "lr": 1e-3, "temperature": 0.07},
]
MORE = [
    {"kind": "step", "stage": "train", "loss": 0.5},
    {"kind": "evaluation", "epoch": 1, "headline": {"R@10": 12.5}},
]


def settings(tmp_path: Path, backend: str) -> Settings:
    tracking = {"backend": backend, "uri": f"file://{tmp_path}/mlruns"}
    return Settings(run={"dir": str(tmp_path / "run")}, tracking=tracking)


def test_off_by_default(tmp_path: Path) -> None:
    track(Settings(run={"dir": str(tmp_path / "run")}), scalars(LINES))
    assert not (tmp_path / "run").exists()


def test_mlflow_gets_everything_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    chosen = settings(tmp_path, "mlflow")
    track(chosen, scalars(LINES))
    track(chosen, scalars(LINES + MORE))  # as after a resume: the first lines come again
    client = mlflow.MlflowClient(tracking_uri=chosen.tracking.uri)
    run = json.loads((tmp_path / "run/tracking.json").read_text())["mlflow"]["run"]
    history = client.get_metric_history(run, "train/step_loss")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.7), (1, 0.6), (2, 0.5)]
    assert client.get_metric_history(run, "val/R_at_10")[0].value == 12.5
    assert client.get_run(run).data.params["train.epochs"] == "30"


def test_what_a_server_took_before_it_failed_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(tracking, "_BATCH", 2)
    chosen = settings(tmp_path, "mlflow")
    log_batch = mlflow.MlflowClient.log_batch
    calls = []

    def fails_once(client: Any, run: str, **what: Any) -> None:
        calls.append(run)
        if what.get("metrics") and len(calls) == 3:  # after two batches of parameters or metrics
            raise ConnectionError("gone")
        log_batch(client, run, **what)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", fails_once)
    track(chosen, scalars(LINES))
    track(chosen, scalars(LINES))
    assert len(set(calls)) == 1, "a second run was made"
    client = mlflow.MlflowClient(tracking_uri=chosen.tracking.uri)
    for name, count in (("train/step_loss", 2), ("train/loss", 1), ("train/lr", 1)):
        assert len(client.get_metric_history(calls[0], name)) == count, name


def test_wandb_gets_everything_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    track(settings(tmp_path, "wandb"), scalars(LINES))
    (record,) = tmp_path.rglob("run-*.wandb")
    run = json.loads((tmp_path / "run/tracking.json").read_text())["wandb"]["run"]
    data = record.read_bytes()
    assert run.encode() in data
    assert b"train/step_loss" in data


def test_a_client_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(InputError, match=r"tracking.backend: wandb is not installed; pip install"):
        check_tracker(settings(tmp_path, "wandb"))


def test_a_server_that_is_away_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    away = settings(tmp_path, "mlflow")
    away.tracking.uri = "http://127.0.0.1:9"
    track(away, scalars(LINES))
    assert "[tracking] mlflow did not take it all" in capfd.readouterr().out
    back = settings(tmp_path, "mlflow")
    track(back, scalars(LINES))
    assert json.loads((tmp_path / "run/tracking.json").read_text())["mlflow"]["steps"]


def test_every_metric_of_a_run_is_a_scalar(finished_run: Path) -> None:
    values = scalars(read_metrics(str(finished_run)))
    names = {name for name, _, _ in values}
    assert {"train/loss", "pretrain/step_loss", "mining/found_share", "val/R@10"} <= names
    assert len({(name, step) for name, step, _ in values}) == len(values)
