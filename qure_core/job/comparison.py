"""A comparison: warm-ups and lines as Ray tasks that fill the cluster, then its page.

Below its output, each line is a run directory of its own, so that a comparison that was killed goes
on line by line:

    compare.json    the mark, and the grid              starts/      a warm-up per seed and model
    lines/          a run per line and seed             logs/        what each of them said
    results.json, table.md, report/index.html
"""

from __future__ import annotations

import contextlib
import io
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import ray

from qure_core import storage
from qure_core.base.config import ClusterSettings, Settings
from qure_core.base.errors import InputError, input_error
from qure_core.data import read_split
from qure_core.data.packed_index import image_source
from qure_core.data.sources import Dataset, files_of
from qure_core.data.world import make_world
from qure_core.evaluation.protocols import of_format, of_manifest
from qure_core.evaluation.stage import target_ranks
from qure_core.job.grid import Grid, Line
from qure_core.job.layout import committed
from qure_core.job.metrics_log import read_metrics
from qure_core.job.place import claim
from qure_core.mining.mined_set import read_mined_set
from qure_core.report.build import false_negative_share
from qure_core.report.comparison import LineResult, Point, RoundFacts, write_comparison
from qure_core.runtime.progress import Progress
from qure_core.runtime.resources import connect, plan_resources
from qure_core.storage.lease import hold

_SAY_SECONDS = 60.0
COMPARISON_KIND, MARK = "comparison", "compare.json"
NAMES = {MARK, "starts", "lines", "logs", "results.json", "table.md", "report"}


def compare(grid: Grid, lines: Sequence[Line], output: str, protocol: str) -> dict[str, Any]:
    """Run all that is not finished, then write the page; return the results with its URI.

    A line that fails leaves the others alone; `InputError` names those that did when all have
    ended, and nothing is concluded without them.
    """
    _check_measured(grid, lines)
    claim(output, MARK, COMPARISON_KIND, NAMES, "output")
    connect()
    with hold(output, "comparing"):
        mark = {"kind": COMPARISON_KIND, "grid": grid.model_dump(mode="json")}
        storage.write_json(storage.join(output, MARK), mark)
        _prepare(lines)
        failures = _run_all(lines, output)
        if failures:
            raise InputError(
                f"{len(failures)} of {len(lines)} lines could not be finished:\n"
                + "\n".join(f"  {label}: {why}" for label, why in failures.items())
                + f"\nwhat each said is in {output}/logs; the others are kept, and the same "
                "command goes on from them"
            )
        results = [line_result(line) for line in lines]
        return write_comparison(output, grid, results, protocol)


def _check_measured(grid: Grid, lines: Sequence[Line]) -> None:
    """Raise `InputError` if the data have nothing to measure by, or not what the grid says."""
    known = {line.settings.data.model_dump_json(): line.settings.data for line in lines}
    for data in known.values():
        columns = of_format(data.format).columns
        if grid.metric not in columns:
            raise InputError(
                f"--grid: metric: {grid.metric!r} is none of the figures of {data.format} data: "
                f"{', '.join(columns)}"
            )
        if data.format != "world" and not Dataset(data).has("val"):
            raise InputError(
                f"data.root: {data.root} has no val split, by which lines are compared; add one"
            )


def _prepare(lines: Sequence[Line]) -> None:
    """Draw and list what the lines' data still need: that is work for the whole cluster, which
    none of them could wait for while it holds a part of it."""
    known = {line.settings.data.model_dump_json(): line.settings for line in lines}
    known |= {str(line.settings.mining.corpus): line.settings for line in lines}
    for settings in known.values():
        data, corpus = settings.data, settings.mining.corpus
        if data.format == "world" and make_world(data.root, data.world):
            print(f"[prepare] drew {data.world.images:,} images in {data.root}", flush=True)
        files_of(data)
        if corpus is not None:
            image_source(corpus, data.index_dir, "mining.corpus")


def _slot(cluster: ClusterSettings) -> dict[str, Any]:
    """What a line asks of the cluster: its own CPUs and GPU, or, of one with workers of its own,
    nothing, as they ask for themselves. `InputError` if no node has as much."""
    plan = plan_resources(cluster)
    if not cluster.in_process:
        return {"num_cpus": 0}
    cpus = max(cluster.cpus_per_train_worker, cluster.cpus_per_embed_actor)
    return {"num_cpus": cpus, "num_gpus": min(plan.gpus, 1)}


def _run_all(lines: Sequence[Line], output: str) -> dict[str, str]:
    """Run warm-ups, and each line when its own is done; why those failed that did, by label."""
    starts = {line.start.settings.run.dir: line.start.settings for line in lines}
    waiting = list(lines)
    progress = Progress("compare", len(starts) + len(lines), "runs")
    task = ray.remote(_run)
    # Lines with workers of their own would wait for one another's for ever.
    alone = not all(line.settings.cluster.in_process for line in lines)
    running: dict[Any, tuple[str, str]] = {}
    queued: list[tuple[str, str, Settings]] = [
        ("warm-up", uri, settings) for uri, settings in starts.items()
    ]
    failures: dict[str, str] = {}
    slots = {line.settings.run.dir: _slot(line.settings.cluster) for line in lines}
    slots |= {uri: _slot(settings.cluster) for uri, settings in starts.items()}
    while queued or running:
        while queued and not (alone and running):
            kind, label, settings = queued.pop(0)
            log = storage.join(output, "logs", f"{_log_name(settings, output)}.txt")
            # A run whose worker is lost goes on elsewhere; what it raises is not tried again.
            own = task.options(max_retries=settings.cluster.max_failures, **slots[settings.run.dir])
            running[own.remote(settings.resolved(), log)] = (kind, label)
        finished, _ = ray.wait(list(running), num_returns=1, timeout=_SAY_SECONDS)
        if not finished:
            print(f"[compare] under way or waiting for room: {_told(running.values())}", flush=True)
            continue
        (done,) = finished
        kind, label = running.pop(done)
        why = ""
        try:
            ray.get(done)
        except Exception as error:
            bad = input_error(error)
            why = str(bad) if bad is not None else f"{type(error).__name__}: {error}"
        progress.advance(1)
        if kind == "line":
            if why:
                failures[label] = why.splitlines()[0]
            continue
        for line in [line for line in waiting if line.start.settings.run.dir == label]:
            waiting.remove(line)
            if why:
                failures[line.label] = f"its warm-up failed: {why.splitlines()[0]}"
                progress.advance(1)
            else:
                queued.append(("line", line.label, line.settings))
    return failures


def _told(running: Iterable[tuple[str, str]]) -> str:
    """Lines by name, warm-ups by directory."""
    return ", ".join(label if kind == "line" else f"{kind} {label}" for kind, label in running)


def _log_name(settings: Settings, output: str) -> str:
    return settings.run.dir.removeprefix(output).strip("/").replace("/", "-")


def _run(settings: dict[str, Any], log: str) -> None:
    """Task: one run to its end; what it says goes to ``log``."""
    # Here, so that the driver needs no model libraries.
    from qure_core.job.run import run

    chosen = Settings(**settings)
    before = storage.read_bytes(log).decode() if storage.exists(log) else ""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            run(chosen)
    except Exception:
        said.write(traceback.format_exc())
        raise
    finally:
        storage.write_bytes(log, (before + said.getvalue()).encode())


def line_result(line: Line) -> LineResult:
    """What a finished line measured."""
    run_dir = line.settings.run.dir
    train = read_split(storage.join(run_dir, "data", "train"))
    evaluations = committed(run_dir, "evaluations")
    epochs = [
        row for row in read_metrics(run_dir) if row["kind"] == "epoch" and row["stage"] == "train"
    ]
    seen = np.cumsum([0, *(row["samples"] for row in epochs)]).tolist()
    took = np.cumsum([0.0, *(float(row["seconds"]) for row in epochs)])
    for manifest in committed(run_dir, "rounds"):
        times = manifest["seconds"]
        # What was mined at an epoch is waited for before the next.
        took[manifest["epoch"] + 1 :] += times["embed"] + times["score to write, wall"]
    points = [
        Point(
            seen[row["epoch"]],
            of_manifest(row).headline(row["metrics"]),
            round(float(took[row["epoch"]]), 3),
        )
        for row in evaluations
    ]
    rounds: list[RoundFacts] = []
    before: dict[str, np.ndarray] | None = None
    for manifest in committed(run_dir, "rounds"):
        mined = read_mined_set(manifest["uri"])
        negatives, statistics = mined.negatives(), manifest["statistics"]
        rounds.append(
            RoundFacts(
                manifest["epoch"],
                false_negative_share(mined, train),
                statistics["margin_to_target"]["median"],
                statistics["set_size"]["median"],
                statistics["found_share"],
                None if before is None else _overlap(before, negatives),
            )
        )
        before = negatives
    ranks = target_ranks(evaluations[-1]["uri"])
    return LineResult(line.name, line.seed, tuple(points), tuple(rounds), float(took[-1]), ranks)


def _overlap(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Mean intersection over union of the queries' sets."""
    shares = []
    for query, before in one.items():
        both = len(np.intersect1d(before, other[query]))
        shares.append(both / (len(before) + len(other[query]) - both))
    return float(np.mean(shares))
