"""A stretch of training between two stops of the schedule, as its workers are told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Segment:
    """Consecutive epochs of one stage, between two stops of the schedule.

    ``mined_uri`` is the mined set whose negatives are used, ``mined_at`` the epoch it was mined
    at; both None for random negatives. ``keep`` lists epochs whose checkpoints stay. ``features``
    is the feature store to read; without it features are computed.
    """

    stage: str  # "pretrain" or "train"
    run_dir: str
    settings: dict[str, Any]
    last_epoch: int
    mined_uri: str | None = None
    mined_at: int | None = None
    keep: tuple[int, ...] = ()
    features: str | None = None
