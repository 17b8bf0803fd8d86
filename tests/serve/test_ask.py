"""What `make search` does, on a run that is finished."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path

import psutil
import pytest
from conftest import job
from service import service

from qure_core.search import Index

pytestmark = pytest.mark.job


def test_one_command_indexes_what_was_trained_answers_and_ends(
    finished_run: Path, world: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    arguments = job(world, run_dir, "--cluster.in_process=true")
    with service(*arguments, script="cluster/ask.py", seconds=200) as (address, process):
        index = Index.open(str(run_dir / "index"))
        form = f"image_id={index.ids[0]}&text=in+red&top=3".encode()
        with urllib.request.urlopen(f"{address}/v1/search", form) as answer:
            found = json.load(answer)
        assert found["images"] == len(index)
        ids = [row["id"] for row in found["results"]]
        assert len(ids) == 3
        assert index.ids[0] not in ids
        started = psutil.Process(process.pid).children(recursive=True)
        assert started
    assert process.returncode == 130
    _, alive = psutil.wait_procs(started, timeout=10)
    # Ray's own agents notice after a minute that their node is gone, and end then.
    assert all("Agent" in process.name() for process in alive)
