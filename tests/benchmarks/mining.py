"""Mining near the machine's limit: against matrix products alone and against the released way.

    python tests/benchmarks/mining.py dress                 # FashionIQ-dress size, one minute
    python tests/benchmarks/mining.py corpus DIR [IMAGES]   # 1,000 queries, streaming against sort
    python tests/benchmarks/mining.py estimate              # 10 million and 1 billion images

``dress`` gives embeddings to two processes of one thread each, as two cores' mining tasks, and
times scores to hard sets. Its baselines, in the same run: the fp32 matrix products alone, in the
fastest of a few layouts; and the way of the released program, rebuilt. ``corpus`` mines 1,000
queries over random embeddings of 32 x 256 numbers an image, stored as fp16 in DIR (16 GB a
million), through the stage itself on a local Ray of two CPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from synthetic import make_split, unit_vectors, write_embeddings
from torch import Tensor

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.data.schema import Split
from qure_core.mining.mined_set import MINED_KIND
from qure_core.mining.rules.steep_drops import DropRule
from qure_core.mining.stage import hold_round, mine_round, mining_job
from qure_core.mining.tasks import RoundTask, _sorted_rows
from qure_core.model.checkpoint_files import CHECKPOINT_KIND
from qure_core.ranking.blocks import QueryBlock, make_blocks, prepare_worker

TOKENS, WIDTH = 32, 256
DRESS = 5985
CORES = 2


def peak_mb() -> float:
    """Peak resident memory since `reset_peak`, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def reset_peak() -> float:
    """Forget the peak so far (of a spawned process it is its parent's); memory now, MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mb()


def seconds_of(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def products_alone(query_QD: Tensor, image_TMD: Tensor) -> float:
    """Seconds of the products alone: the fastest layout of those tried, each its best of two."""

    def whole() -> None:
        out = torch.empty(len(query_QD), image_TMD.shape[1])
        for token_MD in image_TMD:
            torch.mm(query_QD, token_MD.T, out=out)

    def tiles(rows: int, columns: int) -> None:
        out = torch.empty(rows, columns)
        for first in range(0, image_TMD.shape[1] - columns + 1, columns):
            tile_TMD = image_TMD[:, first : first + columns].contiguous()
            for start in range(0, len(query_QD) - rows + 1, rows):
                for token_MD in tile_TMD:
                    torch.mm(query_QD[start : start + rows], token_MD.T, out=out)

    layouts: dict[str, Callable[[], None]] = {
        "whole [T, M, D]": whole,
        "tiles 1197 x 855": lambda: tiles(1197, 855),
    }
    best = {name: min(seconds_of(work) for _ in range(2)) for name, work in layouts.items()}
    for name, seconds in best.items():
        print(f"  products alone, {name:<18} {seconds:6.2f} s")
    return min(best.values())


def released_way(query_QD: Tensor, image_MTD: Tensor, target_Q: Tensor) -> tuple[float, float]:
    """Seconds of scoring and of the loop, as the released program goes about them."""
    started = time.monotonic()
    products = query_QD @ image_MTD.flatten(0, 1).T  # Q x M x T at once
    scores_QM = products.view(len(query_QD), *image_MTD.shape[:2]).max(dim=-1).values
    del products
    scored = time.monotonic()
    kept = []
    for q in range(len(scores_QM)):
        values, order = torch.sort(scores_QM[q], descending=True)
        rank = int((order == target_Q[q]).nonzero())
        below = values[rank + 1 :]
        drops = below[:-1] - below[1:]
        steepest = torch.argsort(drops, descending=True).tolist()
        for one, other in itertools.pairwise(steepest):
            if abs(one - other) > 1:
                first, last = min(one, other), max(one, other)
                kept.append(order[rank + 2 + first : rank + 2 + last].tolist())
                break
    return scored - started, time.monotonic() - scored


def _dress_block(block: QueryBlock, task: RoundTask) -> tuple[float, float, float, int]:
    prepare_worker()
    before = reset_peak()
    started = time.time()
    rows = list(_sorted_rows(block, task, torch.float32))
    return started, time.time(), peak_mb() - before, sum(row.size for row in rows)


def dress() -> None:
    torch.set_num_threads(CORES)
    split = make_split(DRESS, DRESS)
    print(f"{DRESS:,} queries x {DRESS:,} images x {TOKENS} x {WIDTH}, {CORES} cores")
    image_MTD = torch.from_numpy(unit_vectors((DRESS, TOKENS, WIDTH), 0, torch.float32))
    query_QD = torch.from_numpy(unit_vectors((DRESS, WIDTH), 1, torch.float32))
    products = products_alone(query_QD, image_MTD.transpose(0, 1).contiguous())
    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder) / "embeddings")
        write_embeddings(uri, split, tokens=TOKENS, width=WIDTH, shard=2048)
        task = RoundTask(
            uri, folder, folder, 0, 0, True, DropRule(), None, "fp32", memory_bytes=512 * 2**20
        )
        # Four blocks of about equal size, two for each core.
        blocks = make_blocks(split.triplets, split.galleries, 512, 1536)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(CORES, mp_context=context) as pool:
            list(pool.map(_dress_block, blocks[:CORES], [task] * CORES))  # start and warm up
            best, memory, sizes = float("inf"), 0.0, 0
            for _ in range(2):
                results = list(pool.map(_dress_block, blocks, [task] * len(blocks)))
                taken = max(end for _, end, _, _ in results) - min(start for start, *_ in results)
                best = min(best, taken)
                sizes = sum(size for *_, size in results)
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            _, _, memory, _ = pool.submit(_dress_block, blocks[0], task).result()
    embeddings_mb = DRESS * TOKENS * WIDTH * 4 / 2**20
    print(f"  this project, scores to sets    {best:6.2f} s, {sizes:,} negatives")
    print(f"  ratio to the products alone     {best / products:6.2f}    (limit 1.5)")
    above = CORES * memory - embeddings_mb
    print(f"  peak of {CORES} processes above libraries {CORES * memory:,.0f} MB; above the mapped")
    print(f"  embeddings {above:,.0f} MB (limit 1,024)")
    target_Q = torch.tensor([int(str(t.target_id)[1:]) for t in split.triplets])
    before = reset_peak()
    scoring, loop = released_way(query_QD, image_MTD, target_Q)
    print(
        f"  the released way                {scoring + loop:6.2f} s: scores {scoring:.2f}, ", end=""
    )
    print(f"loop {loop:.2f}; {peak_mb() - before:,.0f} MB more memory")
    print(f"  this project is                 {(scoring + loop) / best:6.2f} x as fast (target 8)")


def _products_share(images: int, rows: int, queries: int) -> tuple[float, float]:
    """Start and end of the products of ``queries`` over ``images``, on one thread."""
    torch.set_num_threads(1)
    query_QD = torch.randn(queries, WIDTH)
    tile_TMD = torch.randn(TOKENS, rows, WIDTH)
    out = torch.empty(queries, rows)
    started = time.time()
    for _ in range(images // rows):
        for token_MD in tile_TMD:
            torch.mm(query_QD, token_MD.T, out=out)
    return started, time.time()


def products_on_cores(images: int, queries: int) -> float:
    """Seconds of the products alone for ``queries`` over ``images``, each core its share."""
    # A second or two on each core.
    sample, best = max(2048, 16_384_000 // queries), float("inf")
    with ProcessPoolExecutor(CORES, mp_context=multiprocessing.get_context("spawn")) as pool:
        for rows in (256, 1024, 2048):
            list(pool.map(_products_share, [rows] * CORES, [rows] * CORES, [queries] * CORES))
            spans = list(
                pool.map(_products_share, [sample] * CORES, [rows] * CORES, [queries] * CORES)
            )
            taken = max(end for _, end in spans) - min(start for start, _ in spans)
            best = min(best, taken)
    return best * images / (sample * CORES)


def embed(folder: Path, split: Split, settings: Settings) -> str:
    """A checkpoint's manifest, and the embeddings the round would make; written once."""
    checkpoint = str(folder / "checkpoint")
    if not storage.is_committed(checkpoint):
        with storage.committed_directory(checkpoint, CHECKPOINT_KIND) as (files, _):
            (files / "model.safetensors").write_bytes(b"weights")
    job = mining_job(split, split.galleries, str(folder / "round"), "fp16")
    facts = {
        "checkpoint": hashlib.sha256(b"weights").hexdigest(),
        "split": "train",
        "inputs": job.digest(),
        "batch": settings.cluster.embed_batch,
        "vision_precision": settings.model.vision_precision,
    }
    write_embeddings(
        job.output, split, tokens=TOKENS, width=WIDTH, shard=2048, dtype=torch.float16, facts=facts
    )
    return checkpoint


def corpus_round(folder: str, images: int, queries: int, engine: str) -> None:
    """In a process of its own: one round, its time and memory."""
    import ray

    from qure_core.runtime.resources import connect, plan_resources

    ray.init(address="local", num_cpus=CORES, include_dashboard=False, logging_level="ERROR")
    connect()
    split = make_split(queries, images)
    mining = {"engine": engine, "max_negatives": 64, "stored": "fp16", "memory_mb": 1024}
    settings = Settings(mining=mining, cluster={"gpus": "none"})
    kept = f"{folder}/round-embeddings"
    hidden = f"{folder}/kept-embeddings"
    if storage.exists(hidden):
        os.rename(hidden, kept)
    elif not storage.is_committed(kept):
        started = time.monotonic()
        embed(Path(folder), split, settings)
        print(f"  wrote the embeddings in {time.monotonic() - started:.0f} s", flush=True)
    checkpoint = f"{folder}/checkpoint"
    # The round removes its embeddings; links keep the files for the next engine.
    subprocess.run(["cp", "-al", kept, hidden], check=True)
    output = f"{folder}/round"
    storage.discard(output, MINED_KIND)
    plan = plan_resources(settings.cluster)
    with hold_round(output) as lease:
        manifest = mine_round(settings, plan, checkpoint, split, split.galleries, output, 1, lease)
    print(
        f"RESULT {manifest['seconds']['score to write, wall']} {manifest['peak_task_memory_mb']} "
        f"{peak_mb():.0f} {manifest.get('second_looks', 0)}",
        flush=True,
    )


def corpus(folder: str, images: int, queries: int = 1000) -> None:
    rows = {}
    for size in sorted({100_000, images}):
        products = products_on_cores(size, queries)
        own = str(Path(folder) / f"{size}")
        for engine in ("streaming", "sort"):
            command = [sys.executable, __file__, "corpus-round", own, str(size), engine]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("RESULT"):
                    wall, task_mb, driver_mb, looks = map(float, line.split()[1:])
                    rows[size, engine] = wall
                    print(
                        f"{size:>10,} images, {engine:<9} {wall:8.1f} s, {wall / products:5.2f} x "
                        f"the products ({products:.1f} s), {wall / size * 1e6:7.1f} us an image, "
                        f"{looks:.0f} second looks, peak of a task {task_mb:,.0f} MB, of the "
                        f"driver {driver_mb:,.0f} MB (limit 3,072)",
                        flush=True,
                    )
                else:
                    print("   ", line, end="", flush=True)
            assert process.wait() == 0
    ratio = rows[images, "streaming"] / images / (rows[100_000, "streaming"] / 100_000)
    print(f"streaming, time per image at {images:,} / at 100,000: {ratio:.3f} (limit 1.1)")


def estimate() -> None:
    """From measured rates; nothing of this size was run."""
    queries = 18_000
    cpu = products_on_cores(4096, queries) / 4096  # seconds an image, both cores
    gpu_flops, disk = 40e12, 2e9  # fp32 of a current data-centre GPU, bytes/s read by one node
    flop = 2 * queries * TOKENS * WIDTH
    print(
        f"ESTIMATE, {queries:,} queries; this machine's products: {flop / cpu / 1e9:,.0f} GFLOP/s"
    )
    print(f"assumed of a GPU: {gpu_flops / 1e12:.0f} TFLOP/s fp32, reading {disk / 1e9:.0f} GB/s")
    for images in (10_000_000, 1_000_000_000):
        size = images * TOKENS * WIDTH * 2
        blocks = -(-queries // 1024)
        for gpus in (1, 8, 64):
            compute = 1.5 * images * flop / gpu_flops / gpus
            # A worker reads its range once for every query block.
            read = size * blocks / disk / gpus
            print(
                f"  {images:>13,} images on {gpus:>2} GPU(s): embeddings {size / 2**40:.2f} TiB, "
                f"read {size * blocks / 2**40:,.1f} TiB, products x 1.5 {compute / 3600:,.2f} h, "
                f"reading {read / 3600:,.2f} h, memory 1 GB a task; "
                f"on these two cores {1.5 * images * cpu / 3600:,.0f} h"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("dress")
    parts.add_parser("estimate")
    large = parts.add_parser("corpus")
    large.add_argument("folder")
    large.add_argument("images", type=int, nargs="?", default=1_000_000)
    one = parts.add_parser("corpus-round")
    for name, kind in (("folder", str), ("images", int), ("engine", str)):
        one.add_argument(name, type=kind)
    chosen = parser.parse_args()
    if chosen.part == "dress":
        dress()
    elif chosen.part == "estimate":
        estimate()
    elif chosen.part == "corpus":
        corpus(chosen.folder, chosen.images)
    else:
        corpus_round(chosen.folder, chosen.images, 1000, chosen.engine)


if __name__ == "__main__":
    main()
