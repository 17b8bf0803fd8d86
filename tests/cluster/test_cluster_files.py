"""The Kubernetes manifest, the container file and the local head."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import ray
import referencing
import yaml
from conftest import ROOT

from qure_core.config import Settings, load_settings

SCHEMAS = Path(__file__).parent / "schemas"
SCHEMA_OF = {
    "RayCluster": "ray.io-v1.json#/$defs/RayCluster",
    "RayJob": "ray.io-v1.json#/$defs/RayJob",
    "CronJob": "kubernetes-1.34.json#/$defs/io.k8s.api.batch.v1.CronJob",
    "NetworkPolicy": "kubernetes-1.34.json#/$defs/io.k8s.api.networking.v1.NetworkPolicy",
}


def schema_errors(manifest: dict[str, Any]) -> list[str]:
    registry = referencing.Registry().with_resources(
        (file.name, referencing.Resource.from_contents(json.loads(file.read_text())))
        for file in SCHEMAS.glob("*.json")
    )
    validator = jsonschema.Draft202012Validator(
        {"$ref": SCHEMA_OF[manifest["kind"]]}, registry=registry
    )
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    """What ``python cluster/render.py all`` prints, by kind."""
    command = [sys.executable, str(ROOT / "cluster/render.py"), "all"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(text)}


def test_manifests_follow_the_published_schemas(manifests: dict[str, dict[str, Any]]) -> None:
    assert set(manifests) == set(SCHEMA_OF)
    for manifest in manifests.values():
        assert not schema_errors(manifest)


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("RayJob", ("spec", "backofLimit"), 3),
        ("RayJob", ("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        ("RayCluster", ("spec", "workerGroupSpecs", 0, "maxReplicas"), "4"),
        ("RayCluster", ("spec", "headGroupSpec", "template", "spec", "container"), []),
        ("CronJob", ("spec", "jobTemplate", "spec", "template", "spec", "restart"), "Never"),
    ],
)
def test_the_schemas_find_mistakes(
    manifests: dict[str, dict[str, Any]], kind: str, place: tuple[Any, ...], value: Any
) -> None:
    manifest = copy.deepcopy(manifests[kind])
    node: Any = manifest
    for step in place[:-1]:
        node = node[step]
    node[place[-1]] = value
    assert schema_errors(manifest)


INSIDE = "/home/ray/qure/"


def settings_of(command: str) -> tuple[str, Settings]:
    """The pipeline that a manifest's command runs, and its settings as that pipeline reads them."""
    words = shlex.split(command)
    place = words.index("python")
    assert words[place + 1].startswith(INSIDE)
    script = words[place + 1].removeprefix(INSIDE)
    assert (ROOT / script).exists()
    arguments = [word.replace(INSIDE, f"{ROOT}/") for word in words[place + 2 :]]
    settings, _ = load_settings([a for a in arguments if a != "--if-newer"], script, "")
    return script, settings


def test_job_and_schedule_work_on_one_run_and_fit_the_pods(
    manifests: dict[str, dict[str, Any]],
) -> None:
    job = manifests["RayJob"]["spec"]
    script, train = settings_of(job["entrypoint"])
    assert script == "pipelines/train.py"
    pod = manifests["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "--if-newer" in container["args"][0]
    script, mine = settings_of(container["args"][0])
    assert script == "pipelines/mine.py"
    assert train.resolved() == mine.resolved()
    assert manifests["CronJob"]["spec"]["concurrencyPolicy"] == "Forbid"
    assert job["backoffLimit"] > 0
    spec = job["rayClusterSpec"]
    assert spec == manifests["RayCluster"]["spec"]
    assert spec["enableInTreeAutoscaling"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["rayVersion"] == ray.__version__
    (workers,) = spec["workerGroupSpecs"]
    cluster = train.cluster
    assert cluster.scale_up_seconds > 0  # the group starts empty
    assert workers["maxReplicas"] == cluster.train_workers == cluster.embed_actors
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["cpu"]) > max(cluster.cpus_per_train_worker, cluster.cpus_per_embed_actor)
    assert int(limits["nvidia.com/gpu"]) == cluster.gpus
    # The token is KubeRay's own secret of the standing cluster, the rest the storage's.
    secret = next(e for e in container["env"] if e["name"] == "RAY_AUTH_TOKEN")
    reference = secret["valueFrom"]["secretKeyRef"]
    assert reference == {"name": manifests["RayCluster"]["metadata"]["name"], "key": "auth_token"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"worker_cpus": 8}, "worker_cpus: 8 leave nothing beside the 8 CPUs"),
        ({"replicas": 3}, r"unknown values \['replicas'\]"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    own = yaml.safe_load((ROOT / "cluster/values.yaml").read_text()) | values
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(own))
    command = [sys.executable, str(ROOT / "cluster/render.py"), "all", "--values", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert re.search(message, result.stderr), result.stderr
    assert not result.stdout


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
        # A shell gives what it starts in the background a Ctrl-C that does nothing.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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
