"""One holder of a directory at a time, on any shared storage and without a common clock.

The holder keeps a small file there and rewrites it every few seconds. Whoever wants the directory
and finds a holder's file watches it: if its content stays the same for longer than a holder would
leave it, the holder is gone. A holder that died on this very machine is known at once by its
process number. Ages are told by the watcher's own clock alone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qure_core import storage
from qure_core.errors import BusyError, InputError

BEAT = 5.0  # seconds between rewrites
PATIENCE = 20.0  # seconds of silence after which a holder is gone


def _boot() -> str:
    """This boot of this machine: process numbers mean nothing elsewhere."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


def _read(uri: str) -> dict[str, Any] | None:
    try:
        value = storage.read_json(uri)
    except InputError:
        return None  # gone, or being written
    return value if isinstance(value, dict) else None


def _alive_here(holder: dict[str, Any]) -> bool | None:
    """Whether the holder's process lives; None if that cannot be known from here."""
    if holder.get("boot") != _boot() or holder.get("host") != socket.gethostname():
        return None
    try:
        os.kill(int(holder["process"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _wait_for_silence(uri: str, holder: dict[str, Any]) -> None:
    """Return when the holder is gone; raise `BusyError` at the first sign of life."""
    alive = _alive_here(holder)
    if alive is False:
        return
    end = time.monotonic() + PATIENCE
    while alive is None and time.monotonic() < end:
        time.sleep(min(1.0, BEAT / 5))
        now = _read(uri)
        if now is None or now.get("token") != holder["token"]:
            break
        if now["beat"] != holder["beat"]:
            alive = True
    if alive:
        job = f" (job {holder['job']})" if holder.get("job") else ""
        raise BusyError(
            f"{uri.rsplit('/', 1)[0]} is in use: {holder['what']} by process {holder['process']} "
            f"on {holder['host']}{job}; wait for it to end, or choose another directory"
        )


@contextmanager
def hold(directory: str, what: str, name: str | None = None) -> Iterator[None]:
    """Hold ``directory``, or what is called ``name`` in it, while ``what`` goes on there.

    Raises `BusyError`, which names the holder, if another process that lives holds it.
    """
    uri = storage.join(directory, f".{name or what}.lease")
    holder = _read(uri)
    if holder is not None:
        _wait_for_silence(uri, holder)
        storage.remove(uri)
    mine: dict[str, Any] = {
        "what": what,
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "boot": _boot(),
        "process": os.getpid(),
        "job": os.environ.get("RAY_JOB_ID", ""),
        "beat": 0,
    }
    made = storage.create(uri, json.dumps(mine).encode())
    # Two that find the same holder gone could both put themselves in its place: the last one holds.
    time.sleep(0.2)
    now = _read(uri)
    if not made or now is None or now["token"] != mine["token"]:
        raise BusyError(f"{directory} was taken by another process at the same moment; try again")
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            mine["beat"] += 1
            storage.write_json(uri, mine)

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        storage.remove(uri)
