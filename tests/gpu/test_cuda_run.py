"""The whole job on a GPU, and what it mines there against the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, job
from gpus import needs_gpu

from qure_core import storage
from qure_core.base.config import Settings, WorldSettings
from qure_core.data import read_split
from qure_core.data.world import make_world
from qure_core.mining import read_mined_set
from qure_core.mining.stage import hold_round, mine_round
from qure_core.runtime.in_process import stages_in_process
from qure_core.runtime.resources import plan_resources

pytestmark = [needs_gpu, pytest.mark.job]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "data"
    settings = WorldSettings(
        images=180, images_per_combination=3, train_triplets=90, val_triplets=24, image_size=32
    )
    assert make_world(str(root), settings)
    return root


def epochs(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if row["kind"] == "epoch"]


def ran(drawn: Path, run_dir: Path, *more: str) -> Path:
    """A whole job's directory; by a new interpreter, for a fork has no use of its parent's GPU."""
    arguments = job(drawn, run_dir, "--features=auto", "--train.precision=fp32", *more)
    command = [sys.executable, str(ROOT / "pipelines/train.py"), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stdout + result.stderr
    return run_dir


@pytest.fixture(scope="module")
def on_gpu(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("gpu") / "run"
    return ran(drawn, run_dir, "--cluster.gpus=auto", "--cluster.in_process=true")


def test_the_job_in_one_process_learns_as_on_a_cpu(
    drawn: Path, on_gpu: Path, tmp_path: Path
) -> None:
    on_cpu = ran(drawn, tmp_path / "cpu", "--cluster.in_process=true")
    ours, expected = epochs(on_gpu), epochs(on_cpu)
    assert [row["stage"] for row in ours] == [row["stage"] for row in expected]
    # Rounding grows from step to step, and decides what is mined.
    assert ours[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-2)
    assert ours[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=0.2)


def test_the_job_on_ray_workers(drawn: Path, on_gpu: Path, tmp_path: Path) -> None:
    on_ray = ran(drawn, tmp_path / "ray", "--cluster.gpus=1")
    ours, expected = epochs(on_ray), epochs(on_gpu)
    assert ours[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-2)


def test_engines_and_devices_mine_the_same(on_gpu: Path, tmp_path: Path) -> None:
    split = read_split(str(on_gpu / "data/train"))
    corpora = storage.read_json(str(on_gpu / "data/corpora.json"))
    corpora = {category: tuple(ids) for category, ids in corpora.items()}
    checkpoint = str(on_gpu / "checkpoints/train-0003")
    for rule in ("steep_drops", "target_drop"):
        found = {}
        for gpus in ("auto", "none"):
            for engine in ("sort", "streaming"):
                settings = Settings(
                    mining={"rule": rule, "engine": engine},
                    cluster={"in_process": True, "gpus": gpus, "embed_batch": 16},
                    features="off",
                )
                output = str(tmp_path / f"{rule}-{gpus}-{engine}")
                with stages_in_process(settings.cluster), hold_round(output) as lease:
                    plan = plan_resources(settings.cluster)
                    mine_round(settings, plan, checkpoint, split, corpora, output, 1, lease)
                negatives = read_mined_set(output).negatives()
                found[gpus, engine] = {query: tuple(ids) for query, ids in negatives.items()}
        # On one device to the last image; across devices but where rounding decides a drop.
        for gpus in ("auto", "none"):
            assert found[gpus, "streaming"] == found[gpus, "sort"], (rule, gpus)
        ours, expected = found["auto", "sort"], found["none", "sort"]
        same = sum(ours[query] == expected[query] for query in expected) / len(expected)
        print(f"\n{rule}: {same:.1%} of the queries have the same sets on both devices")
        assert same > 0.8, rule
