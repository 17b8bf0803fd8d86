"""A job seen from outside: its event log, its metrics, and where it is when nothing moves.

A pipeline wraps its work in `monitored`. Stages then report to it through `Progress` and, from
training workers, through a small actor, the `Board`. Everything goes to one file of JSON lines,
to Ray's metrics (``ray_qure_*`` on every node's Prometheus endpoint) and, after `STUCK_SECONDS`
without progress, to the job's own log.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.runtime.account import Account

STUCK_SECONDS = 45.0  # without progress, before the job says where it is
_LOOK_EVERY = 3.0  # seconds between looks at the board and writes of the log
_PACKAGE = str(Path(__file__).parent.parent)
_GAUGES = {
    "qure_stage_done": "units of the stage that are done",
    "qure_stage_total": "units of the stage",
    "qure_stage_rate": "units of the stage per second since it began",
    "qure_seconds_without_progress": "seconds since the stage last advanced",
    "qure_epoch": "training epochs that are done",
    "qure_loss": "mean loss of the last epoch",
    "qure_samples_per_second": "training samples per second of the last epoch",
}


class Board:
    """Actor: where training workers say how far they are, for the driver to read."""

    def __init__(self) -> None:
        self.where: dict[int, dict[str, Any]] = {}
        self.epochs: list[dict[str, Any]] = []

    def clear(self) -> None:
        """Forget where the workers of an earlier stage were."""
        self.where = {}

    def post(self, rank: int, where: dict[str, Any]) -> None:
        self.where[rank] = where

    def post_epoch(self, facts: dict[str, Any]) -> None:
        self.epochs.append(facts)

    def read(self) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
        """The last word of every worker, and the epochs that ended since the last call."""
        epochs, self.epochs = self.epochs, []
        return self.where, epochs


def _read_log(uri: str) -> list[bytes]:
    """The lines of an event log that earlier jobs wrote; `InputError` for any other file."""
    if not storage.exists(uri):
        return []
    lines = storage.read_bytes(uri).removesuffix(b"\n").split(b"\n")
    try:
        first = json.loads(lines[0])
        ours = {"time", "job", "event"} <= set(first)
    except (ValueError, TypeError):
        ours = False
    if not ours:
        raise InputError(
            f"{uri}: the job's event log goes there, and this file is none; move it away, or "
            "choose another directory"
        )
    return lines


class Monitor:
    """The state of one job. ``uri`` is its event log, to which earlier jobs may have written."""

    def __init__(self, uri: str, job: str) -> None:
        self.uri, self.job = uri, job
        self.name = os.environ.get("RAY_JOB_ID") or uuid.uuid4().hex[:12]
        self.stage: dict[str, Any] = {}
        self.board: Any = None
        self.account = Account()
        self._lock = threading.RLock()
        self._moved = time.monotonic()
        self._said = 0.0  # seconds without progress when it was last said
        self._seen: dict[int, dict[str, Any]] = {}
        self._gauges: dict[str, Gauge] = {}
        self._lines = _read_log(uri)
        self._written = len(self._lines)
        self._next_write = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)

    def event(self, event: str, **facts: Any) -> None:
        """Add a line to the event log; it is written within a few seconds."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "job": self.name, "event": event, **facts}
        with self._lock:
            self._lines.append(json.dumps(line, default=str).encode())

    def begin(self, stage: str, total: int, unit: str) -> None:
        """A stage begins; it is what the job is at until the next one."""
        self._rest()
        with self._lock:
            self.stage = {"stage": stage, "done": 0, "total": total, "unit": unit}
            self.stage["began"] = time.monotonic()
            self.account.begin(stage, unit)
            self._move()
        self.event("stage begins", stage=stage, total=total, unit=unit)

    def advance(self, stage: str, done: int, seconds: float = 0.0) -> None:
        """A stage has got so far; ``seconds`` is how long its worker took for this part."""
        with self._lock:
            if self.stage.get("stage") == stage:
                self.stage["done"] = done
                self.account.worked(seconds)
                if done >= self.stage["total"]:
                    self.account.end()
            self._move()

    def end_training(self) -> None:
        """Its workers are done; what they said last is heard."""
        self._try_to_look()
        with self._lock:
            self.account.end()

    def tell(self, stage: str, done: int, total: int, unit: str, rate: float) -> None:
        """Progress that people are told of."""
        self.event("progress", stage=stage, done=done, total=total, unit=unit, rate=round(rate, 3))

    def _move(self) -> None:
        self._moved, self._said = time.monotonic(), 0.0

    def make_board(self) -> Any:
        """The actor that training workers report to, made when it is first asked for."""
        if self.board is None:
            # On the driver's own node: others may be lost without the job.
            here = NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=True
            )
            actor = ray.remote(Board).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here)
            self.board = actor.remote()
        self.board.clear.remote()
        self._seen = {}
        return self.board

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_EVERY):
            self._try_to_look()

    def _try_to_look(self) -> None:
        try:
            self._look()
        except Exception as error:  # the job matters more than what is told of it
            print(f"[monitor] {type(error).__name__}: {error}", flush=True)

    def _look(self) -> None:
        if self.board is not None and ray.is_initialized():
            where, epochs = ray.get(self.board.read.remote(), timeout=_LOOK_EVERY * 3)
            with self._lock:
                if where != self._seen:
                    self._move()
                self._seen = where
                if where and self.stage.get("unit") == "steps":
                    self.account.worked(max(row["seconds"] for row in where.values()))
                    self.stage["done"] = min(row["done"] for row in where.values())
                    self.stage["total"] = max(row["total"] for row in where.values())
            for facts in epochs:
                self.event("epoch", **facts)
                for gauge, fact in (
                    ("qure_epoch", "epoch"),
                    ("qure_loss", "loss"),
                    ("qure_samples_per_second", "samples_per_second"),
                ):
                    self._set(gauge, facts[fact], facts["stage"])
        with self._lock:
            stage, idle = dict(self.stage), time.monotonic() - self._moved
        if stage:
            self._measure(stage, idle)
            if idle >= max(STUCK_SECONDS, 2 * self._said):
                self._said = idle
                self._say_where(stage, idle)
        if time.monotonic() >= self._next_write:
            self.write()

    def _rest(self) -> None:
        """A stage that has ended makes no progress, and that is as it should be."""
        if self.stage:
            self._set("qure_seconds_without_progress", 0, self.stage["stage"])

    def _measure(self, stage: dict[str, Any], idle: float) -> None:
        elapsed = max(time.monotonic() - stage["began"], 1e-9)
        self._set("qure_stage_done", stage["done"], stage["stage"])
        self._set("qure_stage_total", stage["total"], stage["stage"])
        self._set("qure_stage_rate", stage["done"] / elapsed, stage["stage"])
        self._set("qure_seconds_without_progress", idle, stage["stage"])

    def _set(self, name: str, value: float, stage: str) -> None:
        if not ray.is_initialized():
            return
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, _GAUGES[name], tag_keys=("job", "stage"))
        self._gauges[name].set(value, {"job": self.job, "stage": stage})

    def _say_where(self, stage: dict[str, Any], idle: float) -> None:
        facts: dict[str, Any] = {
            "stage": stage["stage"],
            "done": f"{stage['done']:,}/{stage['total']:,} {stage['unit']}",
            "seconds": round(idle),
            "driver": _frame(),
        }
        if stage["unit"] == "steps":
            facts["workers"] = {
                rank: " ".join(f"{name} {row[name]}" for name in row if name != "seconds")
                for rank, row in sorted(self._seen.items())
            } or "none has started"
        if ray.is_initialized():
            facts |= _cluster()
        text = "; ".join(f"{name}: {value}" for name, value in facts.items() if name != "seconds")
        print(f"[no progress for {idle:.0f} s] {text}", flush=True)
        self.event("no progress", **facts)

    def write(self) -> None:
        """Write the event log, if there is something new."""
        with self._lock:
            lines = list(self._lines)
        if len(lines) == self._written:
            return
        began = time.monotonic()
        storage.write_bytes(self.uri, b"".join(line + b"\n" for line in lines))
        self._written = len(lines)
        # An object store has no appending: a long log is written less often.
        now = time.monotonic()
        self._next_write = now + 20 * (now - began)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(2)  # it may wait for an answer that nobody needs now
        self._rest()
        try:
            self.write()
        except Exception as error:
            if storage.fault(error) is None and not isinstance(error, OSError):
                raise
            print(f"[monitor] cannot write {self.uri}: {error}", flush=True)


def _frame() -> str:
    """Where the main thread is, in this package's own code."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            return f"{os.path.relpath(file, _PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside this package"


def _cluster() -> dict[str, Any]:
    """Nodes that live, and what they have free of what they have."""
    total, free = ray.cluster_resources(), ray.available_resources()
    kinds = [kind for kind in ("CPU", "GPU") if total.get(kind)]
    alive = sum(node["Alive"] for node in ray.nodes())
    return {
        "nodes": f"{alive} alive, {len(ray.nodes()) - alive} lost",
        "free": ", ".join(f"{free.get(k, 0):g} of {total[k]:g} {k}s" for k in kinds) or "nothing",
    }


_current: Monitor | None = None


def current() -> Monitor | None:
    """The monitor of this process's job, if it has one."""
    return _current


@contextmanager
def monitored(uri: str, job: str, settings: dict[str, Any]) -> Iterator[Monitor]:
    """Watch the body, the job ``job`` under ``settings``, and write what happens to ``uri``."""
    global _current
    monitor = Monitor(uri, job)
    versions = {name: metadata.version(name) for name in ("ray", "torch")}
    monitor.event(
        "job begins",
        what=job,
        host=socket.gethostname(),
        process=os.getpid(),
        python=platform.python_version(),
        **versions,
        settings=settings,
    )
    _current = monitor
    monitor.start()
    try:
        yield monitor
        monitor.event("job ends")
    except BaseException as error:
        facts: dict[str, Any] = {"error": type(error).__name__, "message": str(error)[-4000:]}
        if not isinstance(error, InputError):
            facts["traceback"] = traceback.format_exc()[-8000:]
        monitor.event("job fails", **facts)
        raise
    finally:
        _current = None
        monitor.stop()
