"""Progress of long stages: lines with stage, done/total, rate and time left, and the monitor."""

from __future__ import annotations

import time

from qure_core.runtime import monitor


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Prints a line when a stage starts, one every ``interval`` seconds, and one at its end."""

    def __init__(self, stage: str, total: int, unit: str, interval: float = 10.0) -> None:
        self.stage, self.total, self.unit, self.interval = stage, total, unit, interval
        self.done = 0
        self.started = self._printed = time.monotonic()
        self._monitor = monitor.current()
        if self._monitor:
            self._monitor.begin(stage, total, unit)
        print(f"[{stage}] 0/{total:,} {unit}", flush=True)

    def advance(self, count: int, seconds: float = 0.0) -> None:
        """So many more are done, by a worker that took so long for them."""
        self.done += count
        if self._monitor:
            self._monitor.advance(self.stage, self.done, seconds)
        now = time.monotonic()
        if self.done >= self.total or now - self._printed >= self.interval:
            self._printed = now
            elapsed = max(now - self.started, 1e-9)
            rate = self.done / elapsed
            if self._monitor:
                self._monitor.tell(self.stage, self.done, self.total, self.unit, rate)
            left = (self.total - self.done) / rate if rate else float("inf")
            end = (
                f"in {format_seconds(elapsed)}"
                if self.done >= self.total
                else f"{format_seconds(left)} left"
            )
            print(
                f"[{self.stage}] {self.done:,}/{self.total:,} {self.unit}, "
                f"{rate:,.1f} {self.unit}/s, {end}",
                flush=True,
            )
