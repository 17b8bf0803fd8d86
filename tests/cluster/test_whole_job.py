"""The whole job on object storage that has bad days, over nodes that share nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import job, recovery
from flaky_storage import flaky_storage
from ray_cluster import (
    BRIDGE_ADDRESS,
    RayCluster,
    can_make_namespaces,
    network_bridge,
    ray_cluster,
)
from s3_server import s3_server
from s3fs import S3FileSystem
from test_faults import check_same, wait_until

from qure_core.data import read_split
from qure_core.search import Retriever
from qure_core.search.retriever import Question

RUN = "bucket/runs/whole"


def _ask(
    cluster: RayCluster, files: S3FileSystem, run: Path, options: list[str], logs: Path
) -> list[Question]:
    """Build the run's index on the cluster, and ask it there by ids of its images; return the same
    questions with the files of this machine."""
    faiss = ["--search.kind=faiss", "--search.factory=IVF4,SQ8", "--search.recall=1"]
    options = [word for word in options if word != "--features=build"]  # the store stays as it is
    index = [*options, "--features=off", *faiss, "--output", "s3://bucket/index"]
    built = cluster.submit("python", "pipelines/index.py", "build", *index, log=logs / "index.log")
    assert built.wait(300) == 0, built.output()[-6000:]
    triplets = read_split(str(run / "data/val")).triplets
    lines = [{"image": t.reference_id, "text": t.text, "category": t.category} for t in triplets]
    files.pipe_file("bucket/questions.jsonl", "\n".join(map(json.dumps, lines)).encode())
    batch = ["--batch", "s3://bucket/questions.jsonl", "--output", "s3://bucket/answers.parquet"]
    batch += ["--index", "s3://bucket/index", "--actors", "2", "--top", "5"]
    batch += ["--cache", "/tmp/index-copies"]
    asked = cluster.submit("python", "pipelines/search.py", *batch, log=logs / "asked.log")
    assert asked.wait(300) == 0, asked.output()[-6000:]
    images = read_split(str(run / "data/val")).images
    return [Question(images[t.reference_id], t.text, t.category) for t in triplets]


@pytest.mark.timeout(1200)
@pytest.mark.skipif(not can_make_namespaces(), reason="needs root and network namespaces")
def test_the_whole_job(finished: tuple[Path, str], world: Path, tmp_path: Path) -> None:
    """Every 9th request fails, each takes 10 ms more, and for 20 s the store is not there."""
    with (
        s3_server(tmp_path / "s3") as server,
        network_bridge() as bridge,
        flaky_storage(server.endpoint, BRIDGE_ADDRESS) as storage,
    ):
        files = server.files()
        files.put(f"{world}/", "bucket/world/", recursive=True)
        environment = server.environment | {"AWS_ENDPOINT_URL": storage.endpoint}
        storage.fail_every, storage.delay = 9, 0.01
        with ray_cluster(tmp_path / "ray", bridge=bridge, **environment) as cluster:
            options = job("s3://bucket/world", f"s3://{RUN}", "--features=build")
            options += ["--feature_store.dir=s3://bucket/features", "--cluster.embed_actors=2"]
            whole = cluster.submit(
                "python", "pipelines/train.py", *options, log=tmp_path / "job.log"
            )
            metric = "ray_qure_stage_done{"
            wait_until(lambda: metric in cluster.metrics(), metric, whole)
            committed = f"{RUN}/checkpoints/train-0001/manifest.json"
            wait_until(lambda: files.exists(committed), committed, whole, timeout=300)
            storage.away()
            time.sleep(20)
            storage.back()
            with recovery("object storage away for 20 s, to the next checkpoint"):
                following = f"{RUN}/checkpoints/train-0002/manifest.json"
                wait_until(lambda: files.exists(following), following, whole)
            assert whole.wait(500) == 0, whole.output()[-6000:]
            storage.fail_every, storage.delay = 0, 0.0  # the bad days are over
            asked = _ask(cluster, files, finished[0], options, tmp_path)
            logs = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*.log"))
        print(f"{storage.requests:,} requests, {storage.failed:,} failed", flush=True)
        assert storage.failed > 20
        files.get("bucket/index", str(tmp_path / "index"), recursive=True)
        here = Retriever.open(tmp_path / "index", finished[0] / "checkpoints/train-0003", "cpu")
        assert here.index.manifest["faiss"]["factory"] == "IVF4,SQ8"
        expected = here.ask_all(asked, 5)
        files.get("bucket/answers.parquet", str(tmp_path / "answers.parquet"))
        answers = pq.read_table(tmp_path / "answers.parquet").to_pylist()
        assert [row["image_id"] for row in answers] == [a.image_id for own in expected for a in own]
        scores = [answer.score for own in expected for answer in own]
        assert [row["score"] for row in answers] == pytest.approx(scores, abs=1e-5)
        for name in ("checkpoints/train-0003", "rounds/epoch-0002", "evaluations/epoch-0003"):
            check_same(server, RUN, finished[0], name)
        assert len(files.glob("bucket/features/*/shard-*.arrow")) == 1
        assert b"<h2>Val metrics</h2>" in files.cat_file(f"{RUN}/report/index.html")
        events = [json.loads(line) for line in files.cat_file(f"{RUN}/events.jsonl").splitlines()]
        kinds = [event["event"] for event in events]
        assert (kinds[0], kinds[-1]) == ("job begins", "job ends")
        assert {"epoch", "mined", "evaluated", "progress", "stage begins"} <= set(kinds)
        # Credentials come from the nodes' environment and stay there.
        assert server.secret not in logs
        for path in files.find("bucket"):
            assert server.secret.encode() not in files.cat_file(path), path
