"""Speed, memory and recall of search; each line against what it is measured beside, in one run.

    python tests/benchmarks/search.py index DIR --images 100000    # FAISS, exact, and plain ways
    python tests/benchmarks/search.py service runs/quickstart/index  # overhead, overload, memory
    python tests/benchmarks/search.py cut RUN ...                  # where good answers end

``index`` makes DIR/index, of images x 32 x 256 numbers that lie as a trained model's do (16 GB a
million in fp16), and keeps it for the next time. ``cut`` reads the last evaluation of finished runs
whose data says which images answer a query.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import faiss
import numpy as np
import psutil
import ray
import torch
from synthetic import clustered_vectors
from synthetic_index import write_index

from qure_core.base.config import SearchSettings
from qure_core.data import read_split
from qure_core.evaluation.stage import read_rankings
from qure_core.model.relevance import relevance_scores
from qure_core.runtime.resources import connect
from qure_core.search import Index
from qure_core.search.approximate_build import factory_for
from qure_core.search.compact import compacted
from qure_core.search.likely import likely_matches

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from service import service

TOKENS, WIDTH, TOP = 32, 256, 20


def _said(what: str, value: str) -> None:
    print(f"{what:<58} {value}", flush=True)


def _each(work: Callable[[int], object], times: int) -> list[float]:
    """Seconds of each of so many calls, after one that does not count."""
    work(0)
    found = []
    for number in range(times):
        started = time.perf_counter()
        work(number)
        found.append(time.perf_counter() - started)
    return found


def _median_ms(work: Callable[[int], object], times: int) -> float:
    return 1000 * statistics.median(_each(work, times))


def _bytes(folder: Path, pattern: str) -> int:
    return sum(
        file.stat().st_size
        for part in folder.glob(pattern)
        for file in part.rglob("*")
        if file.is_file()
    )


def faiss_alone(folder: Path, factory: str) -> float:
    """Seconds of FAISS' own training and adding, in one process with all cores."""
    index = Index.open(str(folder / "index"))
    (segment,) = index.segments.values()
    made = faiss.index_factory(WIDTH, factory, faiss.METRIC_INNER_PRODUCT)
    lists = faiss.extract_index_ivf(made).nlist
    images = min(len(index), 64 * lists // TOKENS)
    rows = np.sort(np.random.default_rng(1).choice(len(index), images, replace=False))
    sample = segment.embeddings(rows).reshape(-1, WIDTH)
    started = time.perf_counter()
    made.train(sample)
    for first in range(0, len(index), 2048):
        some = np.arange(first, min(first + 2048, len(index)))
        made.add(segment.embeddings(some).reshape(-1, WIDTH))
    return time.perf_counter() - started


def index(chosen: argparse.Namespace) -> None:
    """The table of an index: built, as large, as fast and as good as what."""
    folder = Path(chosen.folder)
    folder.mkdir(parents=True, exist_ok=True)
    uri = str(folder / "index")
    connect()
    write_index(uri, chosen.images, TOKENS, WIDTH, SearchSettings(kind="exact"))
    compacted(uri)  # what FAISS had of it the last time
    plain = Index.open(uri)
    assert len(plain) == chosen.images, f"{uri} holds {len(plain):,} images"
    factory = factory_for(chosen.images * TOKENS)
    torch.set_num_threads(chosen.threads)
    faiss.omp_set_num_threads(chosen.threads)
    alone = faiss_alone(folder, factory) if chosen.images <= 200_000 else None
    settings = SearchSettings(kind="faiss", recall=chosen.recall)
    started = time.perf_counter()
    manifest = write_index(uri, chosen.images, TOKENS, WIDTH, settings)
    seconds = time.perf_counter() - started
    made = manifest["faiss"]
    torch.set_num_threads(chosen.threads)
    faiss.omp_set_num_threads(chosen.threads)
    opened = Index.open(uri)
    _said("images x vectors x width", f"{chosen.images:,} x {TOKENS} x {WIDTH}, {factory}")
    _said("build: exact answers, training, adding, tuning", f"{seconds:,.1f} s")
    if alone is not None:
        _said(
            "FAISS' own training and adding",
            f"{alone:,.1f} s; ratio {seconds / alone:.2f} (at most 1.5)",
        )
    ratio = (_bytes(folder / "index", "*")) / _bytes(folder / "index", "segment-*")
    _said("bytes of all files by those of the fp16 embeddings", f"{ratio:.3f} (at most 1.3)")
    _said("recall in the manifest", f"{made['recall']}, nprobe {made['nprobe']} of {made['lists']}")
    query_QD = torch.from_numpy(clustered_vectors((chosen.queries, WIDTH), 4242, torch.float32))
    near = opened.search(query_QD, 50)
    exact = opened.search(query_QD, 50, exact=True)
    for top in (10, 50):
        pairs = zip(near.place_QK[:, :top], exact.place_QK[:, :top], strict=True)
        _said(
            f"recall@{top}, {chosen.queries} other queries",
            f"{np.mean([np.isin(b, a).mean() for a, b in pairs]):.4f}",
        )
    one = [query_QD[i : i + 1] for i in range(chosen.queries)]
    fast = _median_ms(lambda i: opened.search(one[i], TOP), min(chosen.queries, 100))
    slow = _median_ms(lambda i: opened.search(one[i], TOP, exact=True), 7)
    _said("one query, FAISS and the model's own scores, p50", f"{fast:,.2f} ms")
    _said("one query, exact, p50", f"{slow:,.1f} ms; {slow / fast:,.0f} x as long (at least 20)")
    _said(
        "peak memory of this process",
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:,.2f} GiB",
    )
    if chosen.images <= 200_000:
        _beside_plain_ways(opened, one, exact.place_QK, slow)
    ray.shutdown()


def _beside_plain_ways(
    opened: Index, one: list[torch.Tensor], truth_QK: np.ndarray, slow: float
) -> None:
    """Exact search by plain products, and by FAISS' flat index of all vectors, in memory."""
    (segment,) = opened.segments.values()
    image_MTD = torch.from_numpy(segment.embeddings(np.arange(len(opened))))
    products = _median_ms(lambda i: relevance_scores(one[i], image_MTD).topk(TOP), 7)
    _said(
        "one query, torch products in fp32 and memory, p50",
        f"{products:,.1f} ms; exact takes {slow / products:.2f} x",
    )
    scores_QM = relevance_scores(torch.cat(one[:20]), image_MTD)
    order_QK = scores_QM.topk(10).indices.numpy()
    _said(
        "  its ten best are those of exact search",
        str(bool((order_QK == truth_QK[:20, :10]).all())),
    )
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(image_MTD.numpy().reshape(-1, WIDTH))
    asked = TOP * TOKENS

    def owners(i: int) -> np.ndarray:
        vectors = flat.search(one[i].numpy(), asked)[1][0] // TOKENS
        _, first = np.unique(vectors, return_index=True)
        return vectors[np.sort(first)]

    took = _median_ms(owners, 7)
    _said(
        "one query, FAISS flat over all vectors, p50",
        f"{took:,.1f} ms; exact takes {slow / took:.2f} x",
    )
    same = all((owners(i)[:10] == truth_QK[i, :10]).all() for i in range(20))
    _said("  its ten best are those of exact search", str(same))


# The service.


def _resident_mb(process: subprocess.Popen[bytes]) -> float:
    """Memory of the service's own processes: proxies, replicas and controller."""
    found = [
        child.memory_info().rss
        for child in psutil.Process(process.pid).children(recursive=True)
        if "Serve" in " ".join(child.cmdline()) or "ProxyActor" in " ".join(child.cmdline())
    ]
    return sum(found) / 2**20


async def _asked(client: aiohttp.ClientSession, number: int) -> tuple[int, float, float]:
    """Status, seconds, and seconds of encoding and searching alone, of one request."""
    texts = ("red", "larger", "a blue circle", "has stripes")
    started = time.perf_counter()
    form = {"text": texts[number % 4], "top": "20"}
    async with client.post("/v1/search", data=form) as answer:
        content = await answer.read()
    seconds = time.perf_counter() - started
    if answer.status != 200:
        return answer.status, seconds, 0.0
    times = json.loads(content)["times_ms"]
    return answer.status, seconds, (times["encode"] + times["search"]) / 1000


async def _closed(client: aiohttp.ClientSession, requests: int, at_once: int) -> float:
    """Requests a second of so many callers, each of whom asks again once answered."""
    left = iter(range(requests))

    async def caller() -> None:
        for number in left:
            status, *_ = await _asked(client, number)
            assert status == 200, status

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(at_once)))
    return requests / (time.perf_counter() - started)


async def _load(address: str, process: subprocess.Popen[bytes], waiting: int) -> None:
    # A client that takes little of the machine it shares with the service.
    connections = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(address, connector=connections) as client:
        for number in range(50):
            await _asked(client, number)
        one = [await _asked(client, number) for number in range(300)]
        whole, inside = (
            statistics.median(values) for values in zip(*((s, i) for _, s, i in one), strict=True)
        )
        over = statistics.median(seconds - own for _, seconds, own in one)
        _said(
            "one caller, p50", f"{1000 * whole:.1f} ms, of it encoder and index {1000 * inside:.1f}"
        )
        _said("overhead, p50", f"{1000 * over:.1f} ms (at most 5)")
        capacity = await _closed(client, 1500, waiting)
        _said(f"capacity, {waiting} callers", f"{capacity:.0f} requests/s")
        seconds = 15.0
        tasks = []
        started = time.perf_counter()
        while (now := time.perf_counter() - started) < seconds:
            while len(tasks) < 2 * capacity * now:
                tasks.append(asyncio.create_task(_asked(client, len(tasks))))
            await asyncio.sleep(0.005)
        done = await asyncio.gather(*tasks)
        took = time.perf_counter() - started
        answered = [s for status, s, _ in done if status == 200]
        refused = sum(status == 503 for status, *_ in done)
        assert len(answered) + refused == len(done), {status for status, *_ in done}
        rate = len(answered) / took
        beside = f"{rate:.0f} answered/s ({rate / capacity:.2f} of capacity)"
        _said("under twice that", f"{beside}, {refused:,} of {len(done):,} refused with 503")
        _said("  the slowest answer", f"{max(answered):.2f} s")
        before = _resident_mb(process)
        await _closed(client, 5000, 8)
        middle = _resident_mb(process)
        await _closed(client, 5000, 8)
        _said(
            "memory before, after 5,000 and 10,000 requests",
            f"{before:,.0f}, {middle:,.0f}, {_resident_mb(process):,.0f} MB",
        )


def serve(chosen: argparse.Namespace) -> None:
    """What the service costs beside the encoder and the index, and what it does when asked more
    than it can answer."""
    waiting = 16
    with service("--index", chosen.index, "--waiting", str(waiting)) as (address, process):
        asyncio.run(_load(address, process, waiting))


# Where good answers end.


def _answers(run: str) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Of each query which of its answers fit, their scores, and how many images do."""
    last = sorted(Path(run, "evaluations").iterdir())[-1]
    val = {t.query_id: t for t in read_split(f"{run}/data/val").triplets}
    found = []
    for row in read_rankings(str(last)).to_pylist():
        triplet = val[row["query_id"]]
        fit = set(triplet.relevant_ids) - {triplet.reference_id}
        if not fit:
            continue
        pairs = [
            (name in fit, score)
            for name, score in zip(row["top_ids"], row["top_scores"], strict=True)
            if name != triplet.reference_id
        ]
        hits, scores = map(np.asarray, zip(*pairs, strict=True))
        found.append((hits, scores, len(fit)))
    return found


Rule = Callable[[np.ndarray], int]


def _quality(answers: list[tuple[np.ndarray, np.ndarray, int]], rule: Rule) -> np.ndarray:
    """Means of F1, precision, recall and the number shown [4] of a rule over queries."""
    rows = []
    for hits, scores, fit in answers:
        shown = rule(scores)
        good = hits[:shown].sum()
        rows.append((2 * good / (shown + fit), good / shown if shown else 1.0, good / fit, shown))
    return np.mean(rows, axis=0)


def _number(wanted: int) -> Rule:
    return lambda scores: wanted


def _score(least: float) -> Rule:
    return lambda scores: int((scores >= least).sum())


def _margin(below: float) -> Rule:
    return lambda scores: int((scores >= scores[0] - below).sum())


def cut(chosen: argparse.Namespace) -> None:
    """Precision and recall of where answers end, beside the best fixed number, score and margin,
    which are chosen with known truth on half of the queries; all are measured on the other half."""
    print("| run | rule | F1 | precision | recall | shown |\n|---|---|---|---|---|---|")
    for run in chosen.runs:
        answers = _answers(run)
        order = np.random.default_rng(0).permutation(len(answers))
        learnt_on, measured = ([answers[i] for i in part] for part in (order[::2], order[1::2]))
        scores = np.quantile(
            np.concatenate([own for _, own, _ in learnt_on]), np.linspace(0, 1, 101)
        )
        families: dict[str, tuple[Callable[[Any], Rule], Sequence[Any]]] = {
            "best fixed number": (_number, range(1, 51)),
            "best fixed score": (_score, scores),
            "best margin below the first": (_margin, np.linspace(0, 0.4, 81)),
        }
        lines: list[tuple[str, Rule]] = [("steepest drop of the best 50", likely_matches)]
        for name, (make, values) in families.items():
            reached = [_quality(learnt_on, make(value))[0] for value in values]
            best = values[int(np.argmax(reached))]
            lines.append((f"{name}: {best:.3g}", make(best)))
        for name, rule in lines:
            figures = " | ".join(f"{value:.3f}" for value in _quality(measured, rule))
            print(f"| {run} | {name} | {figures} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    one = parts.add_parser("index")
    one.add_argument("folder")
    one.add_argument("--images", type=int, default=100_000)
    one.add_argument("--queries", type=int, default=200)
    one.add_argument("--recall", type=float, default=0.99)
    one.add_argument("--threads", type=int, default=2)
    one.set_defaults(work=index)
    three = parts.add_parser("service")
    three.add_argument("index")
    three.set_defaults(work=serve)
    two = parts.add_parser("cut")
    two.add_argument("runs", nargs="+")
    two.set_defaults(work=cut)
    chosen = parser.parse_args()
    chosen.work(chosen)


if __name__ == "__main__":
    main()
