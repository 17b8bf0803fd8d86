"""Bad input to the pipelines: one clear message, a non-zero exit, and no hang."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Runner

pytestmark = pytest.mark.usefixtures("standing_cluster")
SMALL = ["--cluster.gpus=none", "--train.epochs=2", "--train.mining_definitions=1"]


@pytest.fixture
def broken(world: Path, tmp_path: Path) -> Path:
    """A copy of the world to break, as a plain FashionIQ layout."""
    copy = tmp_path / "data"
    shutil.copytree(world, copy)
    (copy / "manifest.json").unlink()
    return copy


def refused(run_pipeline: Runner, tmp_path: Path, *arguments: str) -> str:
    run_dir = tmp_path / "run"
    result = run_pipeline("train", f"--run.dir={run_dir}", *SMALL, *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    # Ray's own helpers may log tracebacks behind a prefix; the job itself must not end in one.
    assert not any(line.startswith("Traceback") for line in result.stderr.splitlines())
    assert "error: " in result.stderr
    assert not list(run_dir.glob("rounds/*/_manifest.json"))
    return result.stderr


def test_bad_settings_are_all_reported(run_pipeline: Runner, tmp_path: Path) -> None:
    message = refused(run_pipeline, tmp_path, "--train.lr=-1", "--train.speed=9", "--run.seed=x")
    for part in ("3 bad setting(s)", "train.lr", "--train.speed", "run.seed"):
        assert part in message


def test_too_few_cpus_is_an_error_not_a_hang(run_pipeline: Runner, tmp_path: Path) -> None:
    message = refused(
        run_pipeline, tmp_path, "--cluster.train_workers=64", "--cluster.embed_actors=100"
    )
    assert "cluster.train_workers=64 with 1 CPU(s) each, but the nodes have room for" in message
    assert "cluster.embed_actors=100" in message


def test_unwritable_output(run_pipeline: Runner, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run_pipeline("train", f"--run.dir={tmp_path}/file/run", *SMALL)
    assert result.returncode == 2
    assert "run.dir: cannot write to" in result.stderr
    assert "Traceback" not in result.stderr


def test_faulty_annotations_are_listed(run_pipeline: Runner, broken: Path, tmp_path: Path) -> None:
    captions = broken / "captions/cap.coat.train.json"
    rows = json.loads(captions.read_text())
    del rows[1]["captions"]
    rows[2]["target"] = "elsewhere"
    captions.write_text(json.dumps(rows))
    removed = rows[0]["target"]
    (broken / f"images/{removed}.png").unlink()
    message = refused(run_pipeline, tmp_path, "--data.format=fashioniq", f"--data.root={broken}")
    assert "cap.coat.train.json [1]: key 'captions' is missing" in message
    assert "cap.coat.train.json [2]: target 'elsewhere' is not in" in message
    assert f"image '{removed}' is missing" in message


@pytest.mark.timeout(400)
def test_a_damaged_image_met_on_the_way_is_named(
    run_pipeline: Runner, broken: Path, tmp_path: Path
) -> None:
    split = json.loads((broken / "image_splits/split.coat.val.json").read_text())
    image = broken / f"images/{split[0]}.png"
    image.write_bytes(image.read_bytes()[:200])
    data = ["--data.format=fashioniq", f"--data.root={broken}"]
    found = run_pipeline("prepare", "validate", *data)
    assert found.returncode == 65
    assert f"{image}: cannot be decoded as an image" in found.stdout
    assert "1 problem(s)" in found.stdout
    message = refused(run_pipeline, tmp_path, *data, "--pretrain.epochs=0")
    assert f"{image}: cannot be decoded as an image" in message


@pytest.mark.timeout(400)
def test_a_damaged_image_met_in_training_is_named(
    run_pipeline: Runner, broken: Path, tmp_path: Path
) -> None:
    rows = json.loads((broken / "captions/cap.coat.train.json").read_text())
    image = broken / f"images/{rows[0]['target']}.png"
    image.write_bytes(image.read_bytes()[:200])
    message = refused(
        run_pipeline,
        tmp_path,
        "--data.format=fashioniq",
        f"--data.root={broken}",
        "--pretrain.epochs=0",
        "--cluster.max_failures=0",
    )
    assert f"{image}: cannot be decoded as an image" in message
