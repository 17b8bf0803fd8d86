"""The account of a job's time adds up, and tells starting from working."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qure_core.runtime import account
from qure_core.runtime.account import Account, account_table


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(account, "time", clock)
    monkeypatch.setattr(account, "_age", lambda: 4.0)
    return clock


def by_name(account: Account) -> dict[str, tuple[int, float, float]]:
    return {row["what"]: (row["stages"], row["starting"], row["working"]) for row in account.rows()}


def test_stages_from_their_beginning_to_their_end(clock: Clock) -> None:
    times = Account()
    clock.now += 2  # of nobody's
    times.begin("embed val", "images")
    clock.now += 10
    times.worked(3)  # the first part came, of three seconds' work
    clock.now += 5
    times.worked(1)  # another: it tells nothing more
    times.end()
    clock.now += 1
    times.begin("control to epoch 4", "steps")
    clock.now += 6
    times.worked(0.5)
    clock.now += 4
    times.begin("embed train", "images")  # which ends the training
    clock.now += 2
    times.worked(60)  # more than there was
    times.end()
    assert by_name(times) == {
        "start of the command": (1, 4.0, 0.0),
        "embedding": (2, 7.0, 10.0),
        "training": (1, 5.5, 4.5),
        "everything else": (1, 0.0, 3.0),
    }
    assert "in all" in account_table(times.rows())


def test_a_stage_that_never_worked_was_starting(clock: Clock) -> None:
    times = Account()
    times.begin("mine epoch 3", "queries")
    clock.now += 7
    assert by_name(times)["mining"] == (1, 7.0, 0.0)


def test_a_job_says_where_its_time_went(finished: tuple[Path, str]) -> None:
    run_dir, output = finished
    assert "where the time went" in output
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    (rows,) = [event["rows"] for event in events if event["event"] == "where the time went"]
    stages = {row["what"]: row for row in rows}
    assert {"embedding", "ranking", "mining", "training"} <= set(stages)
    assert stages["training"]["stages"] == 3
    assert stages["training"]["starting"] > 0
    assert all(row["starting"] >= 0 and row["working"] >= 0 for row in rows)
