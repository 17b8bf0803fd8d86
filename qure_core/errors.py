"""Errors that a user can act on, and the exit status they end a pipeline with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


class InputError(ValueError):
    """Bad input: the message names the file, row or setting, and the remedy."""


class BusyError(InputError):
    """Another process holds what this one needs; trying again later may work."""


# The last two are sysexits' EX_IOERR and EX_TEMPFAIL, which schedulers know.
EXIT_BAD_INPUT, EXIT_STORAGE, EXIT_BUSY = 2, 74, 75


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a dataset: where (file, and row or key if any) and what."""

    file: str
    where: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file} [{self.where}]" if self.where else self.file
        return f"{place}: {self.message}"


def raise_problems(problems: Sequence[Problem], heading: str, shown: int = 20) -> None:
    """Raise one `InputError` listing the first ``shown`` problems, or return if there are none."""
    if not problems:
        return
    lines = [f"{heading}: {len(problems)} problem(s)"]
    lines += [f"  {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  ... and {len(problems) - shown} more; list them all with")
        lines.append("  python pipelines/prepare.py validate --config CONFIG")
    raise InputError("\n".join(lines))


def chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and all that it was raised from, on this node or, through Ray, on another."""
    left, seen = [error], set()
    while left:
        link = left.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        # Ray carries a task's or a worker's exception in attributes, not as __cause__.
        inner = [getattr(link, name, None) for name in ("_base_exc", "cause")]
        inner += [link.__cause__, *getattr(link, "worker_failures", {}).values()]
        if not link.__suppress_context__:
            inner.append(link.__context__)
        left += [item for item in inner if isinstance(item, BaseException)]


def run_main(main: Callable[[], int | None]) -> None:
    """Run a pipeline's ``main``; an `InputError` becomes its message and exit status 2, or 75
    if it is a `BusyError`; a storage that failed for good becomes status 74."""
    try:
        sys.exit(main() or 0)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BUSY if isinstance(error, BusyError) else EXIT_BAD_INPUT)
    except Exception as error:
        from qure_core.storage import fault  # which imports this module

        if (reason := fault(error)) is None:
            raise
        print(
            f"error: storage: {reason}\nWhat is committed is safe; once the storage is in order, "
            "the same command goes on from it",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(EXIT_STORAGE)
