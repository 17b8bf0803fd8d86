"""Stages in this very process (``cluster.in_process``), where starting workers would take longest.

The same functions do the work, in the same batches and on as many threads, so that what they write
is the same to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qure_core.base.config import ClusterSettings

_device: str | None = None


def device_here() -> str | None:
    """The device that stages of this process use; None where they run on the cluster."""
    return _device


@contextmanager
def stages_in_process(cluster: ClusterSettings) -> Iterator[None]:
    """Within it, stages run in this process if ``cluster`` says so."""
    global _device
    before = _device
    if cluster.in_process:
        import torch  # here, because a command that computes nothing needs none of it

        gpu = cluster.gpus not in ("none", 0) and torch.cuda.is_available()
        _device = "cuda" if gpu else "cpu"
    try:
        yield
    finally:
        _device = before
