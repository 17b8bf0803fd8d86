"""What a job tells while it runs, and when nothing moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qure_core.base.errors import InputError
from qure_core.runtime import monitor
from qure_core.runtime.monitor import Board, Monitor, monitored
from qure_core.runtime.progress import Progress


def events(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_job_leaves_its_story(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    with monitored(str(log), "mining", {"a": 1}) as job:
        progress = Progress("embed", 4, "images")
        progress.advance(1)
        assert (job.stage["done"], job.stage["total"]) == (1, 4)
        progress.advance(3)
        job.event("mined", epoch=2)
    told = events(log)
    assert [row["event"] for row in told] == [
        *("job begins", "stage begins", "progress", "mined", "job ends"),
    ]
    assert told[0]["settings"] == {"a": 1}
    assert (told[2]["done"], told[2]["total"], told[2]["unit"]) == (4, 4, "images")
    assert monitor.current() is None
    # A later job goes on in the same file, and a failure is told with where it came from.
    with pytest.raises(ZeroDivisionError), monitored(str(log), "mining", {}):
        1 / 0  # noqa: B018
    told = events(log)
    assert [row["event"] for row in told[5:]] == ["job begins", "job fails"]
    assert "test_monitor.py" in told[-1]["traceback"]
    assert told[0]["job"] != told[-1]["job"]
    with pytest.raises(InputError, match="bad"), monitored(str(log), "mining", {}):
        raise InputError("bad")
    assert "traceback" not in events(log)[-1]


def test_another_file_is_not_taken_for_a_log(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    log.write_text("mine\n")
    with pytest.raises(InputError, match="this file is none; move it away"):
        Monitor(str(log), "mining")
    assert log.read_text() == "mine\n"


def test_where_a_job_is_when_nothing_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    job = Monitor(str(tmp_path / "events.jsonl"), "training")
    job.begin("train to epoch 4", 10, "steps")
    job._seen = {0: {"doing": "training", "done": 3}}
    said = []
    for second in range(0, 200, 5):
        now[0] = float(second)
        job._look()
        if "no progress" in capsys.readouterr().out:
            said.append(second)
    # At first after 45 seconds, then each time that has doubled.
    assert said == [45, 90, 180]
    job.advance("train to epoch 4", 4)
    now[0] += 44
    job._look()
    assert "no progress" not in capsys.readouterr().out
    now[0] += 2
    job._look()
    line = capsys.readouterr().out
    assert "stage: train to epoch 4; done: 4/10 steps" in line
    assert "doing training done 3" in line
    job.write()
    assert [row["event"] for row in events(tmp_path / "events.jsonl")].count("no progress") == 4


def test_the_board_keeps_the_last_word_of_each_worker() -> None:
    board = Board()
    board.post(0, {"done": 1})
    board.post(1, {"done": 2})
    board.post(0, {"done": 3})
    board.post_epoch({"epoch": 1})
    assert board.read() == ({0: {"done": 3}, 1: {"done": 2}}, [{"epoch": 1}])
    assert board.read() == ({0: {"done": 3}, 1: {"done": 2}}, [])
    board.clear()
    assert board.read() == ({}, [])
