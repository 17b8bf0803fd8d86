"""An objective and a rule of one's own, as the pages show them: a file and a line each."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, job


def blocks(page: str) -> Iterator[str]:
    """The Python of a page."""
    text = (ROOT / page).read_text()
    return (match[1] for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL))


def shown(page: str, name: str) -> str:
    return next(block for block in blocks(page) if f"class {name}" in block)


@pytest.mark.job
def test_an_objective_and_a_rule_of_ones_own(world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    for folder in ("qure_core", "pipelines", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    readme = (ROOT / "README.md").read_text()
    line = re.search(r"`(from qure_core\.objectives\.squared import .*?)`", readme, re.DOTALL)
    assert line, "the line that adds the objective"
    for package, name, page, added in (
        ("objectives", "squared", "README.md", " ".join(line[1].split())),
        (
            "mining/rules",
            "middle",
            "qure_core/README.md",
            'from qure_core.mining.rules.middle import Middle; RULES["middle"] = Middle',
        ),
    ):
        room = copy / "qure_core" / package
        (room / f"{name}.py").write_text(shown(page, name.capitalize()))
        with (room / "__init__.py").open("a") as file:
            file.write(f"\n{added}\n")
    run_dir = tmp_path / "run"
    arguments = job(
        world,
        run_dir,
        "--cluster.in_process=true",
        "--objective.name=squared",
        '--objective.options={"margin": 0.5}',
        "--mining.rule=middle",
        '--mining.options={"share": 0.25, "negatives": 3}',
    )
    # A new interpreter: one that is forked knows this project's own modules.
    command = [sys.executable, str(copy / "pipelines/train.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    epochs = [row for row in lines if row["kind"] == "epoch" and row["stage"] == "train"]
    assert all(0 < row["short"] <= 1 for row in epochs)
    assert epochs[-1]["negatives"] == "middle"
    manifest = json.loads((run_dir / "rounds/epoch-0002/_manifest.json").read_text())
    assert manifest["rule"] == {
        "name": "middle",
        "version": 1,
        "negatives": 3,
        "skip": 0,
        "share": 0.25,
    }
    assert manifest["statistics"]["set_size"]["max"] == 3
