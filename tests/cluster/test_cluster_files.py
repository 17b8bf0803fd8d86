"""The Kubernetes manifest, the container file and the local head."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT

from qure_core.config import load_settings


def test_rayjob_runs_a_command_that_this_tree_accepts() -> None:
    job = yaml.safe_load((ROOT / "cluster/rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    words = shlex.split(job["spec"]["entrypoint"])
    inside = "/home/ray/qure/"
    assert words[:2] == ["python", f"{inside}pipelines/train.py"]
    assert (ROOT / words[1].removeprefix(inside)).exists()
    arguments = [word.replace(inside, f"{ROOT}/") for word in words[2:]]
    settings, _ = load_settings(arguments, "train.py", "")
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert settings.cluster.train_workers == workers["replicas"] == workers["minReplicas"]
    (container,) = workers["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert int(limits["cpu"]) >= settings.cluster.cpus_per_train_worker
    assert int(limits["cpu"]) >= settings.cluster.cpus_per_embed_actor
    assert limits["nvidia.com/gpu"] == "1"
    assert job["spec"]["rayClusterSpec"]["authOptions"]["mode"] == "token"


def test_cronjob_submits_a_command_that_this_tree_accepts() -> None:
    job = yaml.safe_load((ROOT / "cluster/mining-cronjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    command = container["command"]
    place = command.index("--")
    assert command[:3] == ["ray", "job", "submit"]
    inside = "/home/ray/qure/"
    assert command[place + 1 : place + 3] == ["python", f"{inside}pipelines/mine.py"]
    arguments = [word.replace(inside, f"{ROOT}/") for word in command[place + 3 :]]
    arguments.remove("--if-newer")
    settings, _ = load_settings(arguments, "mine.py", "")
    rayjob = yaml.safe_load((ROOT / "cluster/rayjob.yaml").read_text())
    assert f"--run.dir {settings.run.dir}" in rayjob["spec"]["entrypoint"]
    assert f"--data.root {settings.data.root}" in rayjob["spec"]["entrypoint"]


def test_container_file_copies_what_exists() -> None:
    for line in (ROOT / "cluster/Containerfile").read_text().splitlines():
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source


MARK = "QURE_TEST_JOB"  # in the environment of a test's job and of the head started for it


def processes_of(tmp_path: Path) -> list[psutil.Process]:
    """Everything that a job of this test has started and that still runs."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(tmp_path):
                found.append(process)
    return found


def wait_until_gone(tmp_path: Path) -> None:
    deadline = time.monotonic() + 20
    while left := processes_of(tmp_path):
        assert time.monotonic() < deadline, f"{left} outlived the job"
        time.sleep(0.2)


def local(tmp_path: Path, code: str) -> subprocess.Popen[str]:
    """A job of one line of Python on a head of its own."""
    command = [sys.executable, str(ROOT / "cluster/local.py"), "submit", "--"]
    return subprocess.Popen(
        [*command, "python", "-c", code],
        cwd=tmp_path,
        env=os.environ | {MARK: str(tmp_path)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.mark.timeout(280)
def test_a_job_runs_on_a_head_that_does_not_outlive_it(tmp_path: Path) -> None:
    code = "import os; print('home', os.environ['QURE_HOME']); raise SystemExit(3)"
    job = local(tmp_path, code)
    output, _ = job.communicate(timeout=250)
    assert f"home {tmp_path}" in output, output
    assert job.returncode != 0
    wait_until_gone(tmp_path)
    assert "starting a local Ray head" in output


@pytest.mark.timeout(400)
def test_interrupt_stops_the_job_and_the_head(tmp_path: Path) -> None:
    marker = tmp_path / "running"
    code = f"import pathlib, time; pathlib.Path({str(marker)!r}).touch(); time.sleep(600)"
    job = local(tmp_path, code)
    deadline = time.monotonic() + 150
    while not marker.exists():
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.2)
    assert any("gcs_server" in process.name() for process in processes_of(tmp_path))
    os.killpg(job.pid, signal.SIGINT)
    output, _ = job.communicate(timeout=200)
    assert "stopping the job" in output, output
    assert job.returncode == 130
    wait_until_gone(tmp_path)
