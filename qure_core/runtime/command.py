"""Running a pipeline as a command: its exit status, its last line, interruption, and its log.

0 done   1 a fault of this project   2 bad input   65 validation found problems
74 the storage failed   75 another process is at it   130 interrupted
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from qure_core import storage
from qure_core.base.errors import BusyError, chain, input_error
from qure_core.runtime.console import Console, open_console

EXIT_FAULT, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
# sysexits' EX_DATAERR, EX_IOERR and EX_TEMPFAIL, which schedulers know.
EXIT_PROBLEMS, EXIT_STORAGE, EXIT_BUSY = 65, 74, 75
_SHOWN_LINES = 11  # of a message
T = TypeVar("T")


def _interrupt(*_: Any) -> None:
    # Once: cleaning up must not be interrupted itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _explained(error: BaseException, log: Path | None) -> tuple[int, str]:
    """The exit status for an exception, and what is said of it."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted; the same command goes on"
    if (bad := input_error(error)) is not None:
        busy = isinstance(bad, BusyError)
        return EXIT_BUSY if busy else EXIT_BAD_INPUT, f"error: {bad}"
    if (reason := storage.fault(error)) is not None:
        return EXIT_STORAGE, (
            f"error: storage: {reason}\nWhat is committed is safe; once the storage is in order, "
            "the same command goes on from it"
        )
    *_, cause = chain(error)
    first = (str(cause).strip().splitlines() or [""])[0][:300]
    where = f"the whole story is in {log}" if log else "the whole story is above"
    return EXIT_FAULT, f"error: unexpected {type(cause).__name__}: {first}\n{where}"


def _shortened(message: str) -> str:
    lines = message.splitlines()
    if len(lines) > _SHOWN_LINES:
        cut = f"  ... and {len(lines) - _SHOWN_LINES + 1:,} more lines"
        lines = [*lines[: _SHOWN_LINES - 1], cut]
    return "\n".join(lines)


def run_main(main: Callable[[], int | None]) -> None:
    """Run a short command's ``main`` and end the process; whatever goes wrong is one message."""
    _catch_signals()
    status, message = 0, ""
    try:
        status = main() or 0
    except (Exception, KeyboardInterrupt) as error:
        status, message = _explained(error, None)
        if status == EXIT_FAULT:
            traceback.print_exc()
    _end(status, message)


def run_job(name: str, read: Callable[[], T], work: Callable[[T], int | None]) -> None:
    """Run a job: ``read`` its arguments, then ``work`` with them; end the process.

    While it works only its own lines are shown; the rest goes to a log called ``name``, of which
    the first line tells. Whatever goes wrong is one message on stderr.
    """
    _catch_signals()
    status, message = 0, ""
    try:
        arguments = read()
    except (Exception, KeyboardInterrupt) as error:
        _end(*_explained(error, None))
    log, errors = open_console(name)
    if log:
        print(f"[{name}] starting; what Ray and the libraries say goes to {log}", flush=True)
    try:
        status = work(arguments) or 0
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc()
        status, message = _explained(error, log)
    _end(status, message, errors)


def _catch_signals() -> None:
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)


def _end(status: int, message: str, errors: TextIO | None = None) -> NoReturn:
    if isinstance(sys.stdout, Console):
        sys.stdout.end()
    sys.stdout.flush()
    sys.stderr.flush()
    if message:
        print(_shortened(message), file=errors or sys.stderr, flush=True)
    if status:
        # A Ray of this process's own takes long to end in order; without it, it ends by itself.
        os._exit(status)
    sys.exit(status)
