"""Where a job's time went: per kind of stage, until its workers worked and while they did."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# By the first word of a stage's name; training is called by what is trained.
_KINDS = {"embed": "embedding", "mine": "mining", "rank": "ranking"}
_TRAINING = "training"


@dataclass
class _Spell:
    """A stage from its beginning; ``started`` is when the first of its workers began to work."""

    kind: str
    began: float
    started: float | None = None
    ended: float | None = None


class Account:
    """Times of one job's stages, by this process's clock alone."""

    def __init__(self) -> None:
        self._from = time.monotonic() - _age()
        self._begun = time.monotonic()
        self._spells: list[_Spell] = []

    def begin(self, stage: str, unit: str) -> None:
        """A stage begins, and the one before it is over."""
        self.end()
        kind = _TRAINING if unit == "steps" else _KINDS.get(stage.split()[0], "data")
        self._spells.append(_Spell(kind, time.monotonic()))

    def worked(self, seconds: float) -> None:
        """The first time, of a stage: one of its workers has worked for so long by now."""
        if self._spells and self._spells[-1].started is None:
            spell = self._spells[-1]
            spell.started = max(time.monotonic() - seconds, spell.began)

    def end(self) -> None:
        """The stage is over."""
        if self._spells and self._spells[-1].ended is None:
            self._spells[-1].ended = time.monotonic()

    def rows(self) -> list[dict[str, Any]]:
        """Seconds by kind of stage: how many there were, until their workers worked, and while.

        Besides them the start of the command, and what is left: planning, reading and writing in
        this process, and the report.
        """
        now = time.monotonic()
        found: dict[str, dict[str, Any]] = {}
        for spell in self._spells:
            row = found.setdefault(
                spell.kind, {"what": spell.kind, "stages": 0, "starting": 0.0, "working": 0.0}
            )
            ended = now if spell.ended is None else spell.ended
            started = ended if spell.started is None else min(spell.started, ended)
            row["stages"] += 1
            row["starting"] += started - spell.began
            row["working"] += ended - started
        start = {"what": "start of the command", "stages": 1, "working": 0.0}
        start["starting"] = self._begun - self._from
        rows = [start, *(found[kind] for kind in sorted(found))]
        spent = sum(row["starting"] + row["working"] for row in rows)
        rest = {"what": "everything else", "stages": 1, "starting": 0.0}
        rows.append(rest | {"working": now - self._from - spent})
        return [
            {name: round(v, 1) if isinstance(v, float) else v for name, v in row.items()}
            for row in rows
        ]


def account_table(rows: list[dict[str, Any]]) -> str:
    """An account's rows, for people."""
    lines = [f"{'where the time went':<24}{'stages':>8}{'starting':>10}{'working':>10}  (seconds)"]
    lines += [
        f"{row['what']:<24}{row['stages']:>8}{row['starting']:>10.1f}{row['working']:>10.1f}"
        for row in rows
    ]
    starting, working = (sum(row[name] for row in rows) for name in ("starting", "working"))
    return "\n".join([*lines, f"{'in all':<24}{'':>8}{starting:>10.1f}{working:>10.1f}"])


def _age() -> float:
    """Seconds that this process has lived; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError):
        return 0.0
    return max(up - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
