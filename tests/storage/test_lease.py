"""One holder of a place: on one machine, elsewhere, gone silent, taken over."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from qure_core import storage
from qure_core.base.errors import BusyError
from qure_core.storage.lease import hold


def test_a_directory_has_one_holder(tmp_path: Path) -> None:
    directory = str(tmp_path / "rounds")
    with (
        hold(directory, "mining"),
        pytest.raises(BusyError, match=r"in use: mining by process \d+ on "),
        hold(directory, "mining"),
    ):
        pass
    with hold(directory, "mining"):
        pass  # given back
    assert storage.list_names(directory) == []
    # A holder that died on this machine is known at once.
    code = (
        "import os, sys\n"
        "from qure_core.storage.lease import hold\n"
        "held = hold(sys.argv[1], 'mining')\n"
        "held.__enter__()\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code, directory], check=False, cwd=ROOT)
    assert storage.list_names(directory) == [".mining.lease"]
    started = time.monotonic()
    with hold(directory, "mining"):
        assert time.monotonic() - started < 10


def test_a_holder_elsewhere_is_told_by_its_beat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No clock is compared: a file that changes is a holder that lives."""
    monkeypatch.setattr("qure_core.storage.lease.PATIENCE", 1.5)
    directory = str(tmp_path / "rounds")
    uri = storage.join(directory, ".mining.lease")
    elsewhere: dict[str, Any] = {
        "what": "mining",
        "token": "a",
        "host": "far",
        "place": "b",
        "process": 1,
        "started": "1",
        "beat": 0,
    }
    storage.write_json(uri, elsewhere)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.3):
            elsewhere["beat"] += 1
            storage.write_json(uri, elsewhere)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(BusyError, match="mining by process 1 on far"), hold(directory, "mining"):
        pass
    stop.set()
    thread.join()
    with hold(directory, "mining"):  # silent for long enough: gone
        assert storage.read_json(uri)["token"] != "a"


def test_one_of_two_waiters_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both see the same holder fall silent; even a file cut short by a kill is outlasted."""
    monkeypatch.setattr("qure_core.storage.lease.PATIENCE", 1.5)
    directory = str(tmp_path / "rounds")
    storage.write_bytes(storage.join(directory, ".mining.lease"), b'{"what": "min')
    release = threading.Event()

    def attempt(delay: float) -> str:
        time.sleep(delay)
        try:
            with hold(directory, "mining"):
                release.wait(6)
                return "held"
        except BusyError:
            return "busy"

    with ThreadPoolExecutor(2) as pool:
        outcomes = [pool.submit(attempt, delay) for delay in (0.0, 0.5)]
        while not any(outcome.done() for outcome in outcomes):
            time.sleep(0.05)
        release.set()
        assert sorted(outcome.result() for outcome in outcomes) == ["busy", "held"]


def test_a_lost_lease_stops_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qure_core.storage.lease.BEAT", 0.1)
    with hold(str(tmp_path), "mining") as lease:
        lease.check()
        other = {**lease.content, "token": "other"}
        storage.write_json(lease.uri, other)
        assert lease.lost.wait(5)
        with pytest.raises(BusyError, match="another process took over"):
            lease.check()
    assert storage.read_json(lease.uri) == other  # not ours to remove
