"""The main job: warm-up, (mine, fine-tune) x n, evaluate, report.

    python pipelines/train.py --config configs/quickstart.yaml
    ray job submit --working-dir . -- python pipelines/train.py --config configs/quickstart.yaml

Killed at any point, the same command goes on where it stopped. Without a config, and with no
setting that it would fill, configs/quickstart.yaml is taken.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.runtime.command import run_job
from qure_core.runtime.settings import load_settings

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
# Rates for weights that were pretrained on a hundred million pairs teach a small random model
# nothing.
SLOW_FOR_TINY = 5e-5


def read() -> Settings:
    settings, chosen = load_settings(
        sys.argv[1:], "pipelines/train.py", "Train QuRe from end to end.", default=QUICKSTART
    )
    if chosen.config is None and chosen.default_used:
        print(f"[train] no --config: taking {QUICKSTART.relative_to(QUICKSTART.parents[1])}")
    return settings


def warn(settings: Settings) -> None:
    """Say what a person would not expect of these settings."""
    from qure_core.training.schedule import mining_epochs

    train = settings.train
    if train.lr < SLOW_FOR_TINY and not settings.model.pretrained:
        print(
            f"warning: train.lr {train.lr:g} is a rate for pretrained weights; a "
            f"{settings.model.preset!r} model that starts at random learns next to nothing at it. "
            "Take configs/quickstart.yaml as the pattern, or give weights (model.pretrained)"
        )
    if train.negatives != "random" and not mining_epochs(train):
        print(
            f"warning: no negatives are mined: the warm-up takes all {train.epochs} epochs. Lower "
            "train.warmup_epochs or raise train.epochs; train.negatives random says it is meant"
        )


def work(settings: Settings) -> None:
    warn(settings)
    # Here, because importing them takes seconds that a wrong setting should not cost.
    from qure_core.evaluation.protocols import of_format
    from qure_core.job.control import CONTROL
    from qure_core.job.layout import committed
    from qure_core.job.run import run, summary_table

    summary = run(settings)
    if evaluations := committed(settings.run.dir, "evaluations"):
        told = summary["mining"]
        control = committed(storage.join(settings.run.dir, CONTROL), "evaluations") if told else []
        print(f"\nval, {of_format(settings.data.format).described} (percent)")
        print(summary_table([*evaluations, *control]))
        if told:
            print(f"\n{told}")
    print(f"\nmining rounds: {summary['rounds']}")
    print(f"run directory: {settings.run.dir}")
    print(f"report:        {summary['report']}", flush=True)


if __name__ == "__main__":
    run_job("train", read, work)
