"""What a person sees of a job: its own lines. All the rest goes to a log file.

Ray, its workers and the libraries write a great deal to the same two streams. `open_console` gives
both of a process's streams to a log file and puts an object in the place of ``sys.stdout`` that
shows what this project prints, here or in a worker, and files what Ray prints of others. On a
terminal a progress line takes the place of the one before it.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from qure_core.storage.temporary import own_folder

_WORKER = re.compile(r"(?:\x1b\[\d+m)?\((?:[^()]* )?(?:pid=)?[^()]*\)(?:\x1b\[0m)? ")
_OURS = re.compile(r"\[[a-z][^\]]*\] |warning: ")
"""How lines of this project begin: with the stage they are of."""
_PROGRESS = re.compile(r"\[[^\]]+\] (0/.*|.* left( to epoch \d+)?)")
_KEPT_DAYS = 7


class Console(io.TextIOBase):
    """A stream of lines: ours to ``shown``, those that Ray brings from elsewhere to ``log``.

    Lines that ``unshown`` matches as a whole are dropped.
    """

    def __init__(
        self, shown: TextIO, log: TextIO | None = None, unshown: re.Pattern[str] | None = None
    ) -> None:
        self.shown, self.log, self.unshown = shown, log, unshown
        self._terminal = shown.isatty()
        self._lock = threading.RLock()
        self._rest = ""
        self._progress = False  # whether the last line shown may be written over

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False  # nobody else draws bars here

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.shown.encoding or "utf-8"

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._line(line)
        return len(text)

    def flush(self) -> None:
        with suppress(ValueError):  # closed at the interpreter's end
            self.shown.flush()

    def end(self) -> None:
        """Show what has no line feed yet."""
        with self._lock:
            if self._rest:
                self._line(self._rest)
                self._rest = ""
            if self._progress:
                self.shown.write("\n")
                self._progress = False
            self.flush()

    def _line(self, line: str) -> None:
        if self.unshown and self.unshown.fullmatch(line):
            return
        if self.log is not None and (match := _WORKER.match(line)):
            # Of a worker, or of Ray itself.
            print(line, file=self.log, flush=True)
            line = line[match.end() :]
            if not _OURS.match(line):
                return
        if not self._terminal:
            self.shown.write(f"{line}\n")
            self.shown.flush()
            return
        before = "\r\x1b[K" if self._progress else ""
        self._progress = bool(_PROGRESS.fullmatch(line))
        self.shown.write(f"{before}{line}" + ("" if self._progress else "\n"))
        self.shown.flush()


def _log_file(name: str) -> Path:
    """A new log file among this user's; those of last week are removed."""
    folder = own_folder() / "logs"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in folder.glob("*.log"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _KEPT_DAYS * 86400:
                old.unlink()
    return folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


def open_console(name: str) -> tuple[Path | None, TextIO]:
    """From now on show this project's lines alone; return the log of the rest, and real stderr.

    Until the process ends: Ray prints what its workers said to the very last. Where no log can be
    written everything is shown, and the path is None.
    """
    try:
        path = _log_file(name)
        log = path.open("w", encoding="utf-8", errors="replace")
    except OSError:
        return None, sys.stderr
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = (
        os.fdopen(os.dup(number), "w", encoding="utf-8", errors="replace") for number in (1, 2)
    )
    # C++ and child processes write to the descriptors themselves.
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = Console(out, log), log
    return path, err
