"""The main job as users run it: to the end, killed and resumed, on two workers, and refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, Runner, job
from PIL import Image
from safetensors.torch import load_file
from training_oracle import Recipe, check_weights, plain_epoch

from qure_core.evaluation.stage import read_rankings
from qure_core.job.resume import save_config
from qure_core.mining import read_mined_set
from qure_core.runtime.settings import load_settings
from qure_core.storage.lease import hold

MEASURED = {
    *("seconds", "peak_mb", "memory_mb", "samples_per_second", "data_wait_share", "gflops"),
    *("peak_share", "features"),
}


def weights(run_dir: Path, epoch: int = 3) -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"checkpoints/train-{epoch:04d}/model.safetensors")


def test_a_whole_run(finished: tuple[Path, str]) -> None:
    run_dir, output = finished
    for part in ("start", "end of warm-up", "end ", "R@10", "report:", "mining rounds: 1"):
        assert part in output
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["train"]["lr"] == 1e-3
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if x["kind"] == "step" and x["stage"] == "train"]
    assert [(x["epoch"], x["step"]) for x in steps] == [(e, s) for e in range(3) for s in range(6)]
    epochs = [x for x in lines if x["kind"] == "epoch" and x["stage"] == "train"]
    assert [x["negatives"] for x in epochs] == ["random", "random", "steep_drops"]
    assert all(x["samples"] == 90 for x in epochs)
    assert [x["epoch"] for x in lines if x["kind"] == "mining"] == [2]
    assert [x["name"] for x in lines if x["kind"] == "evaluation"] == [
        "start",
        "end of warm-up",
        "end",
    ]
    assert list((run_dir / "tensorboard").glob("events.*"))
    mined = read_mined_set(str(run_dir / "rounds/epoch-0002"))
    assert mined.manifest["epoch"] == 2
    assert mined.table.num_rows == 90
    # No stage leaves scratch behind.
    left = {path.name for path in run_dir.iterdir()} - {".lock"}
    assert left == {
        "run.json",
        "config.yaml",
        "data",
        "checkpoints",
        "rounds",
        "evaluations",
        "metrics",
        "metrics.jsonl",
        "events.jsonl",
        "tensorboard",
        "report",
        "summary.json",
    }


def test_training_changes_all_but_the_encoder(finished: tuple[Path, str]) -> None:
    before, after = weights(finished[0], 0), weights(finished[0], 3)
    for name, value in before.items():
        same = torch.equal(value, after[name])
        assert same == name.startswith("vision_encoder."), name


def test_evaluation_ranks_agree_with_the_summary(finished: tuple[Path, str]) -> None:
    run_dir = finished[0]
    summary = json.loads((run_dir / "summary.json").read_text())
    rows = read_rankings(str(run_dir / "evaluations/epoch-0003")).to_pylist()
    assert len(rows) == 24
    by_category: dict[str, list[bool]] = {}
    for row in rows:
        hit = row["target_id"] in row["top_ids"][:10]
        assert hit == (row["target_rank"] < 10)
        assert row["top_scores"] == sorted(row["top_scores"], reverse=True)
        by_category.setdefault(row["category"], []).append(hit)
    average = sum(100 * sum(hits) / len(hits) for hits in by_category.values()) / len(by_category)
    shown = summary["evaluations"]["end"]["recall"]["average"]["R@10"]
    assert shown == pytest.approx(average)


def kill_when(path: Path, command: list[str], timeout: float = 200) -> None:
    """Start ``command`` and kill it, outright and whole, once ``path`` exists."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, f"the job ended before {path} appeared"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def started(finished: tuple[Path, str], run_dir: Path, options: list[str]) -> None:
    """A run directory as it is when a job of ``options`` was killed right after its start was
    evaluated."""
    for name in ("checkpoints/train-0000", "checkpoints/pretrain-0001", "evaluations/epoch-0000"):
        shutil.copytree(finished[0] / name, run_dir / name)
    shutil.copy(finished[0] / "run.json", run_dir)
    settings, _ = load_settings([*options, f"--run.dir={run_dir}"], "train.py", "")
    save_config(settings)
    (run_dir / "metrics").mkdir()
    shutil.copy(finished[0] / "metrics/pretrain-0001.jsonl", run_dir / "metrics")


@pytest.mark.timeout(600)
def test_killed_and_resumed_runs_end_with_the_same_weights(
    finished: tuple[Path, str], world: Path, tmp_path: Path, run_pipeline: Runner
) -> None:
    """And from stored features: the run it is compared with computed them on the fly."""
    run_dir = tmp_path / "killed"
    options = job(world, run_dir, "--features=build", f"--feature_store.dir={tmp_path}/features")
    started(finished, run_dir, options)
    command = [sys.executable, str(ROOT / "pipelines/train.py"), *options]
    # While a round is being mined; in the warm-up, tests/cluster/test_faults.py does it.
    kill_when(run_dir / "rounds/epoch-0002-embeddings", command)
    assert not (run_dir / "rounds/epoch-0002").exists()
    result = run_pipeline("train", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(list((tmp_path / "features").glob("*/shard-*.arrow"))) == 1
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    epochs = [x for x in lines if x["kind"] == "epoch" and x["stage"] == "train"]
    assert [x["features"] for x in epochs] == ["stored"] * 3
    assert all(0 < x["peak_share"] < 1.5 and x["memory_mb"] > 100 for x in epochs)
    assert all(0 <= x["data_wait_share"] < 1 for x in epochs)
    expected = weights(finished[0])
    for name, value in weights(run_dir).items():
        assert torch.equal(value, expected[name]), name
    ours, theirs = (
        read_mined_set(str(base / "rounds/epoch-0002")).negatives()
        for base in (run_dir, finished[0])
    )
    assert {k: v.tolist() for k, v in ours.items()} == {k: v.tolist() for k, v in theirs.items()}
    mine, whole = (
        [
            {k: v for k, v in json.loads(line).items() if k not in MEASURED}
            for line in (base / "metrics.jsonl").read_text().splitlines()
        ]
        for base in (run_dir, finished[0])
    )
    assert mine == whole


@pytest.mark.timeout(400)
def test_two_workers_train_the_same_model(
    finished: tuple[Path, str], world: Path, tmp_path: Path
) -> None:
    """Two workers of Ray Train against a plain loop over the global batches."""
    run_dir = tmp_path / "workers2"
    options = job(world, run_dir, "--model.dropout=0", "--cluster.train_workers=2")
    options.append("--train.batch_size=20")  # the last batch of 90 is short
    started(finished, run_dir, options)
    command = [sys.executable, str(ROOT / "pipelines/train.py"), *options]
    kill_when(run_dir / "checkpoints/train-0001/manifest.json", command)
    expected, losses = plain_epoch(run_dir, Recipe(batch_size=20))
    check_weights(weights(run_dir, 1), expected)
    lines = [
        json.loads(line) for line in (run_dir / "metrics/train-0001.jsonl").read_text().splitlines()
    ]
    assert [x["loss"] for x in lines[:-1]] == pytest.approx(losses, rel=1e-5)
    assert lines[-1]["samples"] == 90
    # Uniform negatives of a model that has learned next to nothing.
    assert 0.2 < lines[-1]["accuracy"] < 1
    assert lines[-1]["gradient_norm"] > 0


def test_a_changed_setting_is_refused_on_resume(
    finished: tuple[Path, str], world: Path, run_pipeline: Runner
) -> None:
    result = run_pipeline("train", *job(world, finished[0], "--train.lr=1e-4"))
    assert result.returncode == 2
    assert "train.lr: 0.001 there, 0.0001 now" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("standing_cluster")
def test_mine_alone_gives_the_rounds_bytes(
    finished: tuple[Path, str], world: Path, tmp_path: Path, run_pipeline: Runner
) -> None:
    run_dir = finished[0]
    output = tmp_path / "alone"
    result = run_pipeline(
        "mine",
        *job(world, run_dir, "--features=build", f"--feature_store.dir={tmp_path}/features"),
        f"--checkpoint={run_dir}/checkpoints/train-0002",
        f"--output={output}",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for part in ("between two steep drops", "negatives per query", f"mined set: {output}"):
        assert part in result.stdout
    # The run computed its features; these were stored.
    for file in output.glob("part-*.parquet"):
        theirs = run_dir / "rounds/epoch-0002" / file.name
        assert file.read_bytes() == theirs.read_bytes()
    # A scheduler's next call finds it mined; a person looks at it.
    settings = [*job(world, run_dir), f"--checkpoint={run_dir}/checkpoints/train-0002"]
    again = run_pipeline("mine", *settings, f"--output={output}", "--if-newer")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing to do" in again.stdout
    table = read_mined_set(str(output)).table.select(["query_id", "status", "negative_ids"])
    rows = [row for row in table.to_pylist() if row["status"] == "steep"]
    picture = tmp_path / "curve.png"
    shown = run_pipeline(
        "mine", "inspect", str(output), f"--query={rows[0]['query_id']}", f"--picture={picture}"
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for part in ("negatives per query", "exclude_reference=True", "upper drop", "lower drop"):
        assert part in shown.stdout
    for image_id in rows[0]["negative_ids"][:5]:
        assert image_id in shown.stdout
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert len(image.getcolors(10**6) or []) > 10
    # And while another process holds the place, a third comes back later.
    with hold(str(tmp_path), "mining", "other"):
        busy = run_pipeline("mine", *settings, f"--output={tmp_path / 'other'}")
    assert busy.returncode == 75
    assert "in use: mining by process" in busy.stderr
    assert "Traceback" not in busy.stderr
