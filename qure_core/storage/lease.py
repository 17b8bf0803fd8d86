"""One holder of a directory at a time, on any shared storage and without a common clock.

The holder keeps a small file there and rewrites it every few seconds. Whoever wants the directory
and finds such a file watches it: content that changes is a holder that lives; content that stays
the same for longer than a holder would leave it is one that is gone. Ages are told by the watcher's
own clock alone. Only where the holder's process can be seen from here, on the same boot and in the
same process namespace, does its process number decide, together with the time it started.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qure_core import storage
from qure_core.base.errors import BusyError, InputError
from qure_core.storage.owner import lives, this_process

BEAT = 5.0  # seconds between rewrites
PATIENCE = 20.0  # seconds of silence after which a holder is gone


@dataclass
class Lease:
    """A directory that is held. ``lost`` is set if another process took it all the same."""

    uri: str
    content: dict[str, Any]
    lost: threading.Event

    def check(self) -> None:
        """Raise `BusyError` if the directory is no longer held; call it before committing."""
        if self.lost.is_set():
            raise BusyError(
                f"{self.uri}: another process took over while this one was silent for more than "
                f"{PATIENCE:.0f} s; nothing was committed. Run the command again"
            )


def _read(uri: str) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        return None


def _parse(data: bytes | None) -> dict[str, Any]:
    """The holder, or an empty dict for a file that is not whole."""
    try:
        value = json.loads(data or b"")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _check_ours(uri: str, data: bytes) -> None:
    """Raise `InputError` for a file that no holder wrote, whole or in part: it is not removed."""
    holder = _parse(data)
    # A whole one, or the beginning of one that was cut short: as first made, or as renewed.
    starts = (b'{"what": ', b'{\n  "beat": ')
    torn = any(data[: len(start)] == start[: len(data)] for start in starts)
    if not ("token" in holder if holder else torn):
        raise InputError(
            f"{uri}: a file of this name says which process works here, and this one was not "
            "written by one; move it away, or choose another directory"
        )


def _busy(uri: str, holder: dict[str, Any]) -> BusyError:
    if not holder:
        return BusyError(f"{uri} is being taken by another process; try again")
    job = f" (job {holder['job']})" if holder.get("job") else ""
    return BusyError(
        f"{uri.rsplit('/', 1)[0]} is in use: {holder['what']} by process {holder['process']} "
        f"on {holder['host']}{job}; wait for it to end, or choose another directory"
    )


def _outlast(uri: str, data: bytes) -> None:
    """Return when whoever wrote ``data`` is gone; raise `BusyError` at a sign of life."""
    holder = _parse(data)
    alive = lives(holder)
    end = time.monotonic() + (0 if alive is False else PATIENCE)
    if alive:
        raise _busy(uri, holder)
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT / 5))
        asked = time.monotonic()
        now = _read(uri)
        if time.monotonic() - asked > BEAT:
            # The storage was away, from the holder too: silence counts from now.
            end = time.monotonic() + PATIENCE
        if now is None:
            return  # given back
        if now != data:
            raise _busy(uri, _parse(now) or holder)
    if _read(uri) == data:
        storage.remove_file(uri)


def _take(uri: str, content: dict[str, Any]) -> None:
    for _ in range(3):
        found = _read(uri)
        if found is not None:
            _check_ours(uri, found)
            _outlast(uri, found)
        made = storage.create(uri, json.dumps(content).encode())
        # If the answer was lost, what was asked again for is there already: one's own.
        if made or _parse(_read(uri)).get("token") == content["token"]:
            # Two that saw the same silence may both come here; the file says who stays.
            time.sleep(0.2)
            if _parse(_read(uri)).get("token") == content["token"]:
                return
    raise _busy(uri, _parse(_read(uri)))


@contextmanager
def hold(
    directory: str, what: str, name: str | None = None, *, wait: bool = False
) -> Iterator[Lease]:
    """Hold ``directory``, or what is called ``name`` in it, while ``what`` goes on there.

    If another process that lives holds it: raises `BusyError`, which names the holder, or with
    ``wait`` says so once and waits for it.
    """
    uri = storage.join(directory, f".{name or what}.lease")
    content: dict[str, Any] = {
        "what": what,
        "token": uuid.uuid4().hex,
        **this_process(),
        "job": os.environ.get("RAY_JOB_ID", ""),
        "beat": 0,
    }
    said = False
    while True:
        try:
            _take(uri, content)
            break
        except BusyError as error:
            if not wait:
                raise
            if not said:
                print(f"[{what}] waiting: {error}", flush=True)
            said = True
            time.sleep(BEAT)
    lease = Lease(uri, content, threading.Event())
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            try:
                if _parse(_read(uri)).get("token") != content["token"]:
                    lease.lost.set()
                    return
                content["beat"] += 1
                storage.write_json(uri, content)
            except Exception as error:  # a storage's bad moment: the next beat may do
                if storage.fault(error) is None and not isinstance(error, OSError):
                    lease.lost.set()  # nothing renews it from now on
                    raise
                print(f"[{what}] cannot renew {uri}: {error}", flush=True)

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        done.set()
        thread.join()
        # Interrupted, work goes on for a moment that this process started elsewhere: the lease is
        # left, and outlasted as that of any process that is gone.
        gone = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        if not gone and _parse(_read(uri)).get("token") == content["token"]:
            storage.remove_file(uri)
