"""What goes wrong on a cluster, made to go wrong: jobs on three nodes and object storage.

Every job ends with the bytes of the undisturbed local run that it is compared with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, job, recovery
from ray_cluster import Job, Node, RayCluster, ray_cluster
from s3_server import S3Server, s3_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        server.files().put(f"{world}/", "bucket/world/", recursive=True)
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, server: S3Server) -> Iterator[RayCluster]:
    with ray_cluster(tmp_path_factory.mktemp("ray"), **server.environment) as cluster:
        yield cluster


EMBEDS = "_embed_shard"  # a worker that embeds, in its process's title


def options(run: str, *more: str) -> list[str]:
    return job("s3://bucket/world", f"s3://{run}", *more)


def put_stage(server: S3Server, finished: Path, run: str, names: list[str]) -> None:
    """Some committed directories of the finished run, as a job that ended there left them."""
    for name in [*names, "run.json", "config.yaml"]:
        source = finished / name
        if source.is_dir():
            server.files().put(f"{source}/", f"{run}/{name}/", recursive=True)
        else:
            server.files().put_file(str(source), f"{run}/{name}")


def wait_until(
    condition: Callable[[], object], what: str, *jobs: Job, timeout: float = 150
) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        output = "\n".join(job.output()[-6000:] for job in jobs)
        assert any(job.process.poll() is None for job in jobs), f"ended before {what}:\n{output}"
        assert time.monotonic() < deadline, f"no {what}:\n{output}"
        time.sleep(0.25)


def find(cluster: RayCluster, title: str) -> tuple[Node, psutil.Process] | None:
    """A process of a worker node whose title has ``title``, and its node."""
    for node in cluster.workers.values():
        for process in node.processes(title):
            return node, process
    return None


def seen(cluster: RayCluster, title: str, job: Job) -> tuple[Node, psutil.Process]:
    wait_until(lambda: find(cluster, title), title, job)
    found = find(cluster, title)
    assert found
    return found


def check_same(server: S3Server, run: str, finished: Path, name: str) -> None:
    """A committed directory has the bytes of the undisturbed run's."""
    files = server.files()
    manifest = "_manifest.json" if name.startswith("rounds/") else "manifest.json"
    ours = json.loads(files.cat_file(f"{run}/{name}/{manifest}"))["files"]
    theirs = json.loads((finished / name / manifest).read_text())["files"]
    weights = [file for file in theirs if file.endswith((".safetensors", ".parquet"))]
    assert weights
    for file in weights:
        assert ours[file] == theirs[file], file
        assert len(files.cat_file(f"{run}/{name}/{file}")) == theirs[file]["bytes"]


STARTED = [
    *("checkpoints/train-0000", "checkpoints/pretrain-0001", "evaluations/epoch-0000"),
    "metrics/pretrain-0001.jsonl",
]


@pytest.mark.timeout(600)
def test_training_survives_a_worker_a_node_and_its_driver(
    cluster: RayCluster, server: S3Server, finished: tuple[Path, str], tmp_path: Path
) -> None:
    run = "bucket/runs/training"
    put_stage(server, finished[0], run, STARTED)
    command = ["python", "pipelines/train.py", *options(run)]
    first = cluster.submit(*command, log=tmp_path / "first.log")
    weights = f"{run}/checkpoints/train-0001/model.safetensors"
    wait_until(lambda: server.files().exists(weights), weights, first)
    # While it writes a checkpoint or, by now, trains on, the worker hangs: the job says so within
    # a minute, and where. Then it goes.
    _, worker = seen(cluster, "RayTrainWorker", first)
    worker.suspend()
    hung = time.monotonic()
    assert not server.files().exists(f"{run}/checkpoints/train-0002/manifest.json")
    first.wait_for("[no progress for", timeout=60)
    assert time.monotonic() - hung < 60
    assert "stage: train to epoch 2; " in first.output()
    assert "driver: training/trainer.py" in first.output()
    worker.kill()
    wait_until(lambda: not worker.is_running(), "the worker's end", first)
    with recovery("training worker killed, to the next worker"):
        node, _ = seen(cluster, "RayTrainWorker", first)
    # Another one has started; its whole node goes.
    cluster.kill_worker(node)
    cluster.add_worker()
    with recovery("node of the training worker killed, to the next worker"):
        _, worker = seen(cluster, "RayTrainWorker", first)
    # And when it trains again, the driver goes, and with it the job.
    for process in cluster.head.processes("pipelines/train.py"):
        process.kill()
    assert first.wait() != 0
    committed = f"{run}/checkpoints/train-0002/manifest.json"
    with recovery("driver killed and the job resubmitted, to the second epoch's checkpoint"):
        second = cluster.submit(*command, log=tmp_path / "second.log")
        wait_until(lambda: server.files().exists(committed), committed, second)
    check_same(server, run, finished[0], "checkpoints/train-0002")
    for process in cluster.head.processes("pipelines/train.py"):
        process.kill()
    second.wait()


@pytest.mark.timeout(600)
def test_mining_survives_a_task_and_a_node(
    cluster: RayCluster, server: S3Server, finished: tuple[Path, str], tmp_path: Path
) -> None:
    run = "bucket/runs/mining"
    put_stage(server, finished[0], run, [*STARTED, "checkpoints/train-0002"])
    # Many small shards, so that some are left when the first is there.
    command = ["python", "pipelines/mine.py", *options(run), "--mining.corpus_shards=51"]
    command += [f"--checkpoint=s3://{run}/checkpoints/train-0002"]
    command += [f"--output=s3://{run}/rounds/epoch-0002"]
    mining = cluster.submit(*command, log=tmp_path / "mining.log")
    shards = f"{run}/rounds/epoch-0002-embeddings/images-*.arrow"
    wait_until(lambda: server.files().glob(shards), shards, mining)
    _, task = seen(cluster, EMBEDS, mining)
    task.kill()
    wait_until(lambda: not task.is_running(), "the task's end", mining)
    with recovery("mining task killed, to the next one"):
        node, _ = seen(cluster, EMBEDS, mining)
    cluster.kill_worker(node)
    cluster.add_worker()
    with recovery("node of a mining task killed, to the round's commit"):
        assert mining.wait() == 0, mining.output()
    check_same(server, run, finished[0], "rounds/epoch-0002")


def with_a_wrong_clock() -> dict[str, str]:
    """The environment of processes whose clock is an hour ahead."""
    import libfaketime

    (library,) = Path(libfaketime.__file__).parent.rglob("libfaketime.so.1")
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": "+1h",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
        "FAKETIME_DISABLE_SHM": "1",
    }


@pytest.mark.timeout(400)
def test_two_rounds_at_once_and_a_clock_that_is_wrong(
    cluster: RayCluster, finished: tuple[Path, str], world: Path, tmp_path: Path
) -> None:
    """On a file system that the nodes share; the node that both need comes late, an hour ahead."""
    output = tmp_path / "run/rounds/epoch-0002"
    command = ["python", "pipelines/mine.py", *job(world, tmp_path / "run")]
    command += [f"--checkpoint={finished[0]}/checkpoints/train-0002", f"--output={output}"]
    command += ["--mining.corpus_shards=6", "--cluster.scale_up_seconds=120"]
    # There are as many CPUs already, but on two nodes.
    command += ["--cluster.cpus_per_embed_actor=2"]
    rounds = [cluster.submit(*command, log=tmp_path / f"{name}.log") for name in ("a", "b")]

    def output_of_both() -> str:
        return "".join(each.output() for each in rounds)

    lacking = "cluster.embed_actors=1 with 2 CPU(s) each, but the nodes have room for 0"
    wait_until(lambda: lacking in output_of_both(), lacking, *rounds)
    ahead = cluster.add_worker(cpus=2, **with_a_wrong_clock())
    try:
        wait_until(lambda: ahead.processes(EMBEDS), "a task on the new node", *rounds)
        results = {each.wait() for each in rounds}
    finally:
        cluster.kill_worker(ahead)
    assert results == {0, 1}
    (refused,) = (each for each in rounds if each.process.returncode)
    assert "in use: mining by process" in refused.output()
    assert "Traceback" not in refused.output()
    theirs = json.loads((finished[0] / "rounds/epoch-0002/_manifest.json").read_text())["files"]
    for name in (name for name in theirs if name.endswith(".parquet")):
        assert (output / name).read_bytes() == (
            finished[0] / "rounds/epoch-0002" / name
        ).read_bytes()


def test_object_storage_refuses_a_wrong_clock_and_the_error_says_so(server: S3Server) -> None:
    command = [sys.executable, str(ROOT / "pipelines/prepare.py"), "validate"]
    command += ["--data.root=s3://bucket/world", "--data.format=fashioniq"]
    environment = os.environ | server.environment | with_a_wrong_clock()
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert result.returncode == 74, result.stdout + result.stderr
    assert "set this node's clock" in result.stderr
    assert "Traceback" not in result.stderr
