"""Errors that a user can act on, and what they were raised from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class InputError(ValueError):
    """Bad input: the message names the file, row or setting, and the remedy."""


class BusyError(InputError):
    """Another process holds what this one needs; trying again later may work."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a dataset: where (file, and row or key if any) and what."""

    file: str
    where: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file} [{self.where}]" if self.where else self.file
        return f"{place}: {self.message}"


def raise_problems(problems: Sequence[Problem], heading: str, shown: int = 6) -> None:
    """Raise one `InputError` listing the first ``shown`` problems, or return if there are none."""
    if not problems:
        return
    lines = [f"{heading}: {len(problems)} problem(s)"]
    lines += [f"  {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  ... and {len(problems) - shown} more")
    lines.append("list those of all splits with: python pipelines/prepare.py validate")
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


@contextmanager
def bad_input_of_workers(blame: str = "") -> Iterator[None]:
    """Raise the `InputError` that a worker's exception is or was raised from as itself.

    Its message comes after the name of what is to ``blame``, such as the checkpoint, if given.
    """
    try:
        yield
    except Exception as error:
        if (bad := input_error(error)) is None:
            raise
        raise type(bad)(f"{blame}: {bad}" if blame else str(bad)) from error


def input_error(error: BaseException) -> InputError | None:
    """The `InputError` that ``error`` is or was raised from, on whichever node; else None."""
    # Ray's own exceptions are also of the type of their cause, but speak of the whole way.
    found = (link for link in chain(error) if isinstance(link, InputError))
    return next((link for link in found if not hasattr(link, "cause")), None)
