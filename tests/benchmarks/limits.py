"""What one machine's driver needs for millions: seconds and memory of planning, without pixels.

    python tests/benchmarks/limits.py [--triplets 1000000] [--images 1000000]
    python tests/benchmarks/limits.py --triplets 100000 --images 10000000

Every step is done for a tenth and for the whole, each in a process of its own, whose memory before
is taken off. A step is linear if the last column is about 1: seconds (memory) of the whole over ten
times those of the tenth.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.data import mining_galleries, read_split, write_split
from qure_core.data.positives import with_known_positives
from qure_core.data.schema import Split, Triplet
from qure_core.embeddings.stage import _shards
from qure_core.mining.mined_set import MINED_KIND, SCHEMA_VERSION, mined_schema, read_mined_set
from qure_core.mining.stage import mining_job
from qure_core.ranking.blocks import make_blocks
from qure_core.report.build import false_negative_share
from qure_core.storage.parquet import parquet_bytes
from qure_core.training.batches import Share, epoch_batches, epoch_order
from qure_core.training.negatives import mined_negatives

NEGATIVES = 50  # of a query's mined set
TEXTS = [f"is more {word} and has {n} buttons" for word in ("red", "plain") for n in range(500)]


def peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def split_of(triplets: int, images: int) -> Split:
    rng = np.random.default_rng(0)
    ids = [f"image-{n:09d}" for n in range(images)]
    reference, target = rng.integers(images, size=(2, triplets)).tolist()
    rows = tuple(
        Triplet(
            f"q{n:08d}",
            ids[reference[n]],
            TEXTS[n % 1000],
            ids[target[n]],
            "all",
            relevant_ids=(ids[target[n]], ids[target[n] // 2]),
        )
        for n in range(triplets)
    )
    uris = {name: f"s3://bucket/images/{name}.jpg" for name in ids}
    return Split("train", rows, uris, {"all": tuple(ids)})


def write_round(uri: str, split: Split) -> None:
    """A mined set of random images, as a round of one part writes it."""
    count, ids = len(split.triplets), list(split.images)
    drawn = np.random.default_rng(1).integers(len(ids), size=count * NEGATIVES).astype(np.int32)
    offsets = pa.array(np.arange(count + 1) * NEGATIVES, pa.int64())

    def lists(values: pa.Array) -> pa.Array:
        return pa.LargeListArray.from_arrays(offsets, values)

    scores = pa.array(np.full(len(drawn), 0.5, np.float32))
    names = pa.DictionaryArray.from_arrays(pa.array(drawn), pa.array(ids))
    schema = mined_schema({"threshold": "float32"})
    known: dict[str, Any] = {
        "query_id": [t.query_id for t in split.triplets],
        "target_id": [t.target_id for t in split.triplets],
        "negative_ids": lists(names),
        "negative_scores": lists(scores),
    }
    columns = [
        known.get(field.name, pa.nulls(count, field.type))  # what no step below reads
        for field in schema
    ]
    storage.begin(uri, MINED_KIND)
    table = pa.table([pa.array(column) for column in columns], schema)
    data = parquet_bytes(table)
    storage.write_bytes(storage.join(uri, "part-00000.parquet"), data)
    about = {"schema_version": SCHEMA_VERSION, "settings": {}, "rule": {}, "statistics": {}}
    storage.commit(uri, MINED_KIND, about, {"part-00000.parquet": storage.file_facts(data)})


Told = Callable[[], None]


def step_split(folder: str, told: Told) -> None:
    told()
    read_split(f"{folder}/split")


def step_known(folder: str, told: Told) -> None:
    split = read_split(f"{folder}/split")
    told()
    with_known_positives(split, {})


def step_embedding(folder: str, told: Told) -> None:
    split, settings = read_split(f"{folder}/split"), Settings(data={"format": "jsonl"})
    told()
    corpora = mining_galleries(settings.data, split)
    job = mining_job(split, corpora, "s3://bucket/round", "fp16")
    job.digest()
    _shards(job, settings.cluster.embed_batch, None)


def step_mining(folder: str, told: Told) -> None:
    split, settings = read_split(f"{folder}/split"), Settings(data={"format": "jsonl"})
    told()
    make_blocks(split.triplets, mining_galleries(settings.data, split), 1024, None, 40_000)


def step_mined_set(folder: str, told: Told) -> None:
    told()
    read_mined_set(f"{folder}/round").negatives()


def step_epoch(folder: str, told: Told) -> None:
    split = read_split(f"{folder}/split")
    negatives = read_mined_set(f"{folder}/round").negatives()
    told()

    class Build:
        """Draws what a batch meets, and loads nothing."""

        def __call__(self, chosen: np.ndarray, share: Share) -> Any:
            for place in chosen.tolist():
                query = split.triplets[place].query_id
                mined_negatives(query, negatives[query], 0, 4, 5, 4)

    order = epoch_order(len(split.triplets), 0, 5)
    build: Any = Build()
    for step in epoch_batches(build, order, 256, Share()):
        step()


def step_report(folder: str, told: Told) -> None:
    split = read_split(f"{folder}/split")
    told()
    mined = read_mined_set(f"{folder}/round")
    false_negative_share(mined, split)
    mined.rows([t.query_id for t in split.triplets[:20]])


STEPS = {
    "reading the split": step_split,
    "known positives": step_known,
    "planning an embedding pass": step_embedding,
    "planning a mining round": step_mining,
    "reading its mined set": step_mined_set,
    "an epoch's batches, negatives drawn": step_epoch,
    "a round in the report": step_report,
}


def measured(name: str, folder: str, results: Any) -> None:
    began: list[tuple[float, float]] = []

    def told() -> None:
        Path("/proc/self/clear_refs").write_text("5")
        began.append((time.monotonic(), peak_mb()))

    STEPS[name](folder, told)
    seconds, memory = (time.monotonic() - began[0][0], peak_mb() - began[0][1])
    results.put((seconds, memory, peak_mb()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triplets", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--directory", help="where to work (default: a temporary folder)")
    chosen = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=chosen.directory) as work:
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in STEPS}
        for share in (10, 1):
            folder = f"{work}/{share}"
            split = split_of(chosen.triplets // share, chosen.images // share)
            started = time.monotonic()
            write_split(f"{folder}/split", split)
            print(f"1/{share}: the split was written in {time.monotonic() - started:,.1f} s")
            write_round(f"{folder}/round", split)
            del split
            for name in STEPS:
                results = context.SimpleQueue()
                process = context.Process(target=measured, args=(name, folder, results))
                process.start()
                process.join()
                assert process.exitcode == 0, name
                found[name].append(results.get())
        print(f"{chosen.triplets:,} triplets, {chosen.images:,} images, {NEGATIVES} negatives each")
        for name, ((small, little, _), (seconds, memory, whole)) in found.items():
            print(
                f"  {name:<36}{seconds:8.1f} s  {memory:8,.0f} MB more, {whole:8,.0f} MB in all   "
                f"{seconds / max(10 * small, 1e-9):5.2f} x, {memory / max(10 * little, 1):5.2f} x"
            )


if __name__ == "__main__":
    main()
