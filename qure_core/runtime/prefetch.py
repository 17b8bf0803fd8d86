"""Building what comes next while the present is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(steps: Sequence[Callable[[], T]], depth: int = 2, threads: int = 1) -> Iterator[T]:
    """Results of ``steps`` in order, built by background ``threads`` up to ``depth`` ahead."""
    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as pool:
        waiting: list[Future[T]] = [pool.submit(step) for step in steps[:depth]]
        try:
            for number in range(len(steps)):
                result = waiting.pop(0).result()
                if number + depth < len(steps):
                    waiting.append(pool.submit(steps[number + depth]))
                yield result
        finally:
            for future in waiting:
                future.cancel()
