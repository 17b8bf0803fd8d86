"""The control of a run: the same training but for what was mined."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import Runner, job

from qure_core.evaluation.stage import read_evaluation, read_rankings
from qure_core.model.checkpoint_files import checkpoint_digest

OURS = [
    "--cluster.in_process=true",
    "--objective.name=info_nce",
    "--mining.rule=target_drop",
    "--report.examples=0",
]


def digest(folder: Path) -> str:
    return checkpoint_digest(str(folder / "checkpoints/train-0003"))


def test_the_control_is_the_run_with_random_negatives(
    world: Path, run_pipeline: Runner, tmp_path: Path
) -> None:
    run_dir, plain = tmp_path / "run", tmp_path / "random"
    arguments = job(world, run_dir, *OURS, "--train.control=true")
    done = run_pipeline("train", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    without = run_pipeline("train", *job(world, plain, *OURS, "--train.negatives=random"))
    assert without.returncode == 0, without.stdout + without.stderr
    control = run_dir / "control"
    assert digest(control) == digest(plain) != digest(run_dir)
    rankings = [
        read_rankings(str(folder / "evaluations/epoch-0003")) for folder in (control, plain)
    ]
    assert rankings[0].equals(rankings[1])
    # What is said is the difference of the two ends.
    ends = [
        read_evaluation(str(folder / "evaluations/epoch-0003"))["metrics"]
        for folder in (run_dir, control)
    ]
    recall = [end["recall"]["average"]["R@10"] for end in ends]
    (said,) = re.findall(r"^mining added (.*) R@10, .*$", done.stdout, re.MULTILINE)
    assert float(said) == pytest.approx(recall[0] - recall[1], abs=0.006)
    assert "over the same epoch with random negatives (R@10: " in done.stdout
    rows = re.findall(r"^(start|end of warm-up|end|end, random negatives)  ", done.stdout, re.M)
    assert rows == ["start", "end of warm-up", "end", "end, random negatives"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["evaluations"]["end, random negatives"] == ends[1]
    assert "end, random negatives" in (run_dir / "report/index.html").read_text()
    assert "mining added" not in without.stdout

    # Lost on the way, it is made again as it was; a run that had none may still get one.
    before = digest(control)
    shutil.rmtree(control / "evaluations")
    shutil.rmtree(control / "checkpoints")
    again = run_pipeline("train", *arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert digest(control) == before
    note = control / "checkpoints/train-0003/notes.txt"
    shutil.rmtree(control)
    note.parent.mkdir(parents=True)
    note.write_text("mine")
    refused = run_pipeline("train", *arguments)
    assert refused.returncode == 2
    assert "notes.txt" in refused.stderr
    assert note.read_text() == "mine"
    late = run_pipeline(
        "train", *job(world, plain, *OURS, "--train.negatives=random", "--train.control=true")
    )
    assert late.returncode == 0
    assert not (plain / "control").exists()
