"""A stretch of training between two stops of the schedule, as its workers are told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qure_core import storage
from qure_core.model.checkpoint_files import checkpoint_uri, latest_epoch


@dataclass(frozen=True)
class Segment:
    """Consecutive epochs of one stage, between two stops of the schedule.

    ``mined_uri`` is the mined set whose negatives are used, ``mined_at`` the epoch it was mined
    at; both None for random negatives. ``keep`` lists epochs whose checkpoints stay. ``features``
    is the feature store to read; without it features are computed. ``branch`` is a folder below the
    run whose checkpoints and metrics these are: it goes on from the run's epoch ``branch_epoch``.
    """

    stage: str  # "pretrain" or "train"
    run_dir: str
    settings: dict[str, Any]
    last_epoch: int
    mined_uri: str | None = None
    mined_at: int | None = None
    keep: tuple[int, ...] = ()
    features: str | None = None
    branch: str = ""
    branch_epoch: int | None = None

    @property
    def name(self) -> str:
        """What it is called before people."""
        return self.branch or self.stage

    @property
    def folder(self) -> str:
        """Where its checkpoints and metrics are."""
        return storage.join(self.run_dir, self.branch) if self.branch else self.run_dir

    def start(self) -> int | None:
        """The epoch that it goes on from, as far as checkpoints are committed."""
        newest = latest_epoch(self.folder, self.stage)
        return self.branch_epoch if newest is None else newest

    def checkpoint(self, epoch: int) -> str:
        """Where the checkpoint that it starts from, or one of its own, is."""
        own = epoch != self.branch_epoch
        return checkpoint_uri(self.folder if own else self.run_dir, self.stage, epoch)
