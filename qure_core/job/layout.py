"""Where a run keeps what it has done."""

from __future__ import annotations

import re
from typing import Any

from qure_core import storage
from qure_core.evaluation.stage import read_evaluation
from qure_core.mining.mined_set import read_round
from qure_core.mining.stage import ROUNDS

_FINISHED = re.compile(r"epoch-\d+")  # not what a stage leaves beside it while it works
_READERS = {ROUNDS: read_round, "evaluations": read_evaluation}


def round_uri(run_dir: str, epoch: int) -> str:
    """Where the mined set used from ``epoch`` on is."""
    return storage.join(run_dir, ROUNDS, f"epoch-{epoch:04d}")


def evaluation_uri(run_dir: str, epoch: int) -> str:
    """Where the evaluation after ``epoch`` epochs is."""
    return storage.join(run_dir, "evaluations", f"epoch-{epoch:04d}")


def committed(run_dir: str, folder: str) -> list[dict[str, Any]]:
    """Manifests of the committed "rounds" or "evaluations" of a run, each with its epoch and URI,
    by epoch."""
    base = storage.join(run_dir, folder)
    found = []
    for name in storage.list_names(base):
        uri = storage.join(base, name)
        if _FINISHED.fullmatch(name) and storage.is_committed(uri):
            epoch = int(name.removeprefix("epoch-"))
            manifest = _READERS[folder](uri)
            found.append(manifest | {"epoch": epoch, "uri": uri})
    return found
