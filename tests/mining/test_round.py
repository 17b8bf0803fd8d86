"""A mining round by either engine: the same set from any cut, any interruption, any holder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from benchmarks.synthetic import make_split, write_embeddings
from conftest import ROOT

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.data.schema import Split
from qure_core.embeddings.shards import EmbeddingShards
from qure_core.mining import read_mined_set, steep_drop_negatives
from qure_core.mining.describe import round_table
from qure_core.mining.stage import hold_round, mine_round, mining_job
from qure_core.model.checkpoint_files import CHECKPOINT_KIND
from qure_core.model.relevance import relevance_scores
from qure_core.runtime.resources import plan_resources

SPLIT = make_split(queries=600, images=3000)


def settings_of(**mining: Any) -> Settings:
    return Settings(mining=mining, cluster={"gpus": "none"})


def prepare(folder: Path, split: Split, **mining: Any) -> str:
    """A checkpoint's manifest and the embeddings it would give; returns the checkpoint."""
    checkpoint = str(folder / "checkpoint")
    if not storage.is_committed(checkpoint):
        with storage.committed_directory(checkpoint, CHECKPOINT_KIND) as (files, _):
            (files / "model.safetensors").write_bytes(b"weights")
    settings = settings_of(**mining)
    job = mining_job(split, split.galleries, str(folder / "round"), settings.mining.stored)
    facts = {
        "checkpoint": hashlib.sha256(b"weights").hexdigest(),
        "split": "train",
        "inputs": job.digest(),
        "batch": settings.cluster.embed_batch,
        "vision_precision": settings.model.vision_precision,
        "pixels": "released",
    }
    write_embeddings(job.output, split, tokens=2, width=8, shard=700, facts=facts)
    return checkpoint


def mine(folder: Path, split: Split = SPLIT, **mining: Any) -> dict[str, Any]:
    settings = settings_of(**mining)
    plan = plan_resources(settings.cluster)
    checkpoint = prepare(folder, split, **mining)
    output = str(folder / "round")
    with hold_round(output) as lease:
        return mine_round(settings, plan, checkpoint, split, split.galleries, output, 3, lease)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The set without its curve, whose points are the engine's choice; scores to the last bit."""
    table = read_mined_set(str(folder / "round")).table.drop_columns(
        ["curve_ranks", "curve_scores"]
    )
    for name in ("negative_ids", "left_alone_ids"):
        plain = table[name].cast(pa.large_list(pa.string()))
        table = table.set_column(table.schema.get_field_index(name), name, plain)
    rows: list[dict[str, Any]] = table.sort_by("query_id").to_pylist()
    return rows


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory, local_ray: str) -> list[dict[str, Any]]:
    """The set by sorting, of at most 40 negatives a query."""
    folder = tmp_path_factory.mktemp("sampled")
    manifest = mine(folder, engine="sort", max_negatives=40)
    assert manifest["engine"] == "sort"
    found = rows(folder)
    assert {len(row["negative_ids"]) for row in found} > {40}
    assert any(row["num_negatives"] > 40 for row in found)
    return found


@pytest.mark.parametrize(
    "mining",
    [
        {"engine": "streaming", "max_negatives": 40},
        {"engine": "streaming", "max_negatives": 40, "corpus_range": 256, "query_block": 256},
        {"engine": "sort", "max_negatives": 40, "query_block": 256},
    ],
)
def test_engines_and_cuts_give_the_same_set(
    sampled: list[dict[str, Any]], tmp_path: Path, mining: dict[str, Any]
) -> None:
    manifest = mine(tmp_path, **mining)
    assert manifest["engine"] == mining["engine"]
    assert rows(tmp_path) == sampled
    assert not (tmp_path / "round-scratch").exists()
    assert not (tmp_path / "round-embeddings").exists()
    assert f"({mining['engine']} engine)" in round_table(manifest)


def test_whole_sets_are_the_same_too(tmp_path: Path, local_ray: str) -> None:
    for engine in ("sort", "streaming"):
        mine(tmp_path / engine, engine=engine, window_quantile=0.5, min_steepness=2.0)
    assert rows(tmp_path / "streaming") == rows(tmp_path / "sort")
    statuses = {row["status"] for row in rows(tmp_path / "sort")}
    assert {"steep", "smooth"} <= statuses


@pytest.mark.parametrize("among", ["below", "anywhere"])
def test_likeness_to_the_target_under_any_cut(among: str, tmp_path: Path, local_ray: str) -> None:
    cuts: list[dict[str, Any]] = [
        {"engine": "sort"},
        {"engine": "sort", "query_block": 64, "memory_mb": 64},
        {"engine": "streaming"},
        {"engine": "streaming", "corpus_range": 256, "query_block": 256},
    ]
    options = {"candidates": 20, "among": among, "negatives": 7}
    found = []
    for number, cut in enumerate(cuts):
        folder = tmp_path / str(number)
        mine(folder, rule="target_drop", options=options, **cut)
        found.append(rows(folder))
        # The likeliest images that were left alone are as like the target as the set says.
        left_alone = read_mined_set(str(folder / "round")).left_alone()
        for row in found[-1]:
            assert row["left_alone_ids"] == left_alone[row["query_id"]].tolist()
            assert len(row["left_alone_ids"]) == row["details"]["left_alone"] > 0
            assert not set(row["left_alone_ids"]) & {*row["negative_ids"], row["target_id"]}
            assert row["details"]["likeness"] == sorted(row["details"]["likeness"], reverse=True)
    assert found[1:] == found[:1] * 3


def with_positives(split: Split, seed: int) -> Split:
    """Some queries with known answers besides the target, of which one is not in the corpus."""
    rng = random.Random(seed)
    ids = split.galleries["all"]
    triplets = tuple(
        dataclasses.replace(t, positive_ids=(*rng.sample(ids, rng.randint(0, 40)), "elsewhere"))
        if rng.random() < 0.5
        else t
        for t in split.triplets
    )
    return dataclasses.replace(split, triplets=triplets)


def test_known_positives_are_as_if_they_were_not_there(tmp_path: Path, local_ray: str) -> None:
    split = with_positives(SPLIT, 1)
    for engine in ("sort", "streaming"):
        manifest = mine(tmp_path / engine, split, engine=engine)
    found = rows(tmp_path / "sort")
    assert rows(tmp_path / "streaming") == found
    known = {t.query_id: set(t.positive_ids) - {"elsewhere"} for t in split.triplets}
    # By definition: every query by itself, over a corpus without what is left out.
    prepare(tmp_path / "sort", split, engine="sort")
    embeddings = EmbeddingShards.open(str(tmp_path / "sort/round-embeddings"))
    parts = [embeddings.images(number) for number in range(embeddings.shards)]
    images_MTD = torch.from_numpy(np.concatenate([values for _, values in parts]))
    queries = [embeddings.queries(number) for number in range(embeddings.shards)]
    query_of = {n: v for names, values in queries for n, v in zip(names, values, strict=True)}
    ids = np.asarray(split.galleries["all"])
    triplets = {t.query_id: t for t in split.triplets}
    for row in found[::23]:
        triplet = triplets[row["query_id"]]
        left_out = known[triplet.query_id] | {triplet.reference_id}
        kept = np.asarray([n == triplet.target_id or n not in left_out for n in ids])
        query_1D = torch.from_numpy(query_of[triplet.query_id][None])
        scores_1M = relevance_scores(query_1D, images_MTD[torch.from_numpy(kept)])
        target = int(np.flatnonzero(ids[kept] == triplet.target_id)[0])
        drops = steep_drop_negatives(scores_1M, torch.tensor([target]))
        assert row["negative_ids"] == ids[kept][drops.negatives(0).numpy()].tolist()
        assert row["known_positives"] == len(known[triplet.query_id])
    assert manifest["statistics"]["known_positives"] == {
        "queries": sum(bool(names) for names in known.values()),
        "images": sum(map(len, known.values())),
    }
    assert "known answers left out" in round_table(manifest)
    plain = mine(tmp_path / "plain", SPLIT)
    assert plain["settings"]["known_positives"] != manifest["settings"]["known_positives"]
    assert "known answers left out" not in round_table(plain)


def digests(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / "round/_manifest.json").read_text())
    return {name: facts["sha256"] for name, facts in manifest["files"].items()}


def test_a_killed_driver_a_killed_worker_and_a_deleted_file(tmp_path: Path, local_ray: str) -> None:
    """Each ends, with the same call again, in the same bytes."""
    mining = {"engine": "streaming", "max_negatives": 40, "corpus_range": 1024, "query_block": 256}
    mine(tmp_path / "whole", **mining)

    folder = tmp_path / "killed"
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from mining.test_round import mine\n"
        "from qure_core.runtime.resources import connect\n"
        f"connect(); mine(Path(sys.argv[1]), **{mining!r})\n"
    )
    paths = [str(ROOT / "tests"), str(ROOT / "tests/support")]
    command = [sys.executable, "-c", code, str(folder), *paths]
    driver = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    scratch = folder / "round-scratch"
    end = time.monotonic() + 120
    while len(list(scratch.glob("summary-*"))) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    assert not (folder / "round/_manifest.json").exists()
    # A summary that is lost is made again.
    next(iter(scratch.glob("summary-*"))).unlink()

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_one_worker)
        mine(folder, **mining)
        assert killing.result()
    assert digests(folder) == digests(tmp_path / "whole")

    # A part that is deleted from a committed round: found out, and made again.
    part = folder / "round/part-00001.parquet"
    part.unlink()
    before = (folder / "round/part-00000.parquet").stat().st_mtime_ns
    mine(folder, **mining)
    assert digests(folder) == digests(tmp_path / "whole")
    assert (folder / "round/part-00000.parquet").stat().st_mtime_ns == before


def kill_one_worker() -> bool:
    """Kill the first process of this Ray that runs one of the round's tasks."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "MapBatches" in process.name() or "MapBatches" in " ".join(process.cmdline()):
                    process.kill()
                    return True
        time.sleep(0.02)
    return False


def test_reduced_precision_says_what_it_changes(tmp_path: Path, local_ray: str) -> None:
    manifest = mine(tmp_path, precision="bf16", stored="fp16")
    check = manifest["precision_check"]
    assert check["sampled"] == 256
    assert 0 < check["changed"] < 256
    assert "bf16 against fp32" in round_table(manifest)


def test_targets_in_a_tile_of_one_image(tmp_path: Path, local_ray: str) -> None:
    """A product of one column may take another kernel: tiles are whole, so it does not."""
    split = make_split(queries=40, images=257)
    last = split.galleries["all"][-1]
    triplets = tuple(dataclasses.replace(t, target_id=last) for t in split.triplets)
    split = dataclasses.replace(split, triplets=triplets)
    for engine in ("sort", "streaming"):
        mine(tmp_path / engine, split, engine=engine)
    assert rows(tmp_path / "streaming") == rows(tmp_path / "sort")
