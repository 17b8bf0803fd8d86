"""The Kubernetes manifest, the container file and the local head."""

from __future__ import annotations

import contextlib
import copy
import importlib
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
from ray.serve.schema import ServeDeploySchema

from qure_core.base.config import Settings
from qure_core.runtime.settings import load_settings
from qure_core.serve.application import Arguments

SCHEMAS = Path(__file__).parent / "schemas"
SCHEMA_OF = {
    "RayCluster": "ray.io-v1.json#/$defs/RayCluster",
    "RayJob": "ray.io-v1.json#/$defs/RayJob",
    "RayService": "ray.io-v1.json#/$defs/RayService",
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
        ("RayService", ("spec", "serveConfig"), ""),
        ("RayService", ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "replicas"), "1"),
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


def test_the_service_runs_what_ray_serve_takes(manifests: dict[str, dict[str, Any]]) -> None:
    spec = manifests["RayService"]["spec"]
    config = ServeDeploySchema(**yaml.safe_load(spec["serveConfigV2"]))
    (application,) = config.applications
    module, name = application.import_path.split(":")
    built = getattr(importlib.import_module(module), name)
    arguments = Arguments(**application.args)
    assert arguments.index == yaml.safe_load((ROOT / "cluster/values.yaml").read_text())["index"]
    assert type(built(arguments)).__name__ == "Application"
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["minReplicas"] == arguments.encoders
    for group in (spec["rayClusterConfig"]["headGroupSpec"], workers):
        (container,) = group["template"]["spec"]["containers"]
        assert {"containerPort": config.http_options.port, "name": "serve"} in container["ports"]
        assert container["env"][0]["valueFrom"]["secretKeyRef"]["name"] == "qure-token"
    policy = yaml.safe_dump(manifests["NetworkPolicy"])
    assert "port: serve" in policy
    # The other clusters have no such port open.
    assert "serve" not in yaml.safe_dump(manifests["RayCluster"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"worker_cpus": 8}, "worker_cpus: 8 leave nothing beside the 8 CPUs"),
        ({"replicas": 3}, r"replicas: Extra inputs are not permitted \(got 3\)"),
        ({"workers": "12"}, r"workers: .* integer \(got '12'\); it is a whole number"),
        ({"image": None}, r"image: .* \(got None\); it is an image"),
        ({"schedule": "nonsense"}, "schedule: not right .* it is five fields of cron"),
        ({"schedule": "99 * * * *"}, "schedule: 99 is not from 0 to 59"),
        ({"worker_memory": "64Gigs"}, "worker_memory: not right .* a quantity such as 64Gi"),
        ({"run_dir": "runs/x"}, "run_dir: not right .* a URI that all pods reach"),
        ({"data_root": "file:///data"}, "data_root: not right .* a URI that all pods reach"),
        ({"index": "runs/x/index"}, "index: not right .* a URI that all pods reach"),
        ({"config": "nope"}, "config: no such config"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file"), ("a: [", "not valid YAML"), ("3", "not a mapping")],
)
def test_values_that_cannot_be_read_are_one_line(
    tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "values.yaml"
    if text is not None:
        file.write_text(text)
    command = [sys.executable, str(ROOT / "cluster/render.py"), "all", "--values", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_schedule_may_be_any_that_cron_takes() -> None:
    sys.path.insert(0, str(ROOT / "cluster"))
    from render import Values

    values = yaml.safe_load((ROOT / "cluster/values.yaml").read_text())
    for schedule in ("0 3 * * 1-5", "5,35 */2 1 JAN,JUL *", "@daily", "15 0-6/2 * * SUN"):
        assert Values(**values | {"schedule": schedule}).schedule == schedule


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
    for folder in (".git", ".venv"):  # of which Ray warns that it leaves them out
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").touch()
    job = local(tmp_path, code)
    output, _ = job.communicate(timeout=250)
    assert f"home {tmp_path}" in output, output
    assert job.returncode == 3
    wait_until_gone(tmp_path)
    # Nothing of Ray's packaging and job server stands between.
    assert output.splitlines() == [
        "[local] starting a Ray head for this job ...",
        f"home {tmp_path}",
    ]


@pytest.mark.timeout(400)
def test_the_heads_own_line_submits_a_job(tmp_path: Path) -> None:
    """As printed, from a shell that has no token: also where Ray never made one."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_A")}
    environment |= {MARK: str(tmp_path), "HOME": str(tmp_path)}
    head = subprocess.Popen(
        [sys.executable, str(ROOT / "cluster/local.py"), "head"],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert head.stdout is not None
        assert "Ray head: http://127.0.0.1:" in head.stdout.readline()
        line = head.stdout.readline().replace("python pipelines/train.py", "echo well submitted")
        done = subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "well submitted" in done.stdout
    finally:
        os.killpg(head.pid, signal.SIGINT)
        head.wait(timeout=10)
    wait_until_gone(tmp_path)


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
    output, _ = job.communicate(timeout=10)
    assert "stopping the job" in output, output
    assert job.returncode == 130
    wait_until_gone(tmp_path)
