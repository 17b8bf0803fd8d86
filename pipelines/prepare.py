"""Prepare data: draw the built-in world, or check a dataset and list all that is wrong with it.

python pipelines/prepare.py world --data.root data/world --data.world.images 2000
python pipelines/prepare.py validate --config configs/emoji.yaml --data.root /data/emoji-cir
"""

from __future__ import annotations

import argparse
import sys

from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.runtime.command import EXIT_PROBLEMS, run_job
from qure_core.runtime.settings import load_settings


def world(settings: Settings) -> int:
    from qure_core.data.world import make_world
    from qure_core.runtime.resources import connect

    connect()
    drawn = make_world(settings.data.root, settings.data.world)
    print(f"world: {settings.data.root}" + ("" if drawn else " (already there)"))
    return 0


def validate(settings: Settings, asked: str | None) -> int:
    from qure_core.data.sources import has_split
    from qure_core.data.validate import validate_dataset
    from qure_core.runtime.resources import connect

    splits = asked.split(",") if asked else ["train"]
    if not asked and has_split(settings.data, "val"):
        splits.append("val")
    connect()
    checked = validate_dataset(settings.data, splits)
    problems = checked.problems
    for problem in problems:
        print(problem)
    for name, split in checked.splits.items():
        galleries = ", ".join(
            f"{category} {len(ids):,}" for category, ids in split.galleries.items()
        )
        print(
            f"{name}: {len(split.triplets):,} triplets, {len(split.images):,} images; {galleries}"
        )
        for note in split.notes:
            print(f"{name}: {note}")
    for note in checked.notes:
        print(f"images: {note}")
    print(f"{len(problems)} problem(s) in {settings.data.root}", flush=True)
    return EXIT_PROBLEMS if problems else 0


def read() -> tuple[Settings, argparse.Namespace]:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("task", choices=["world", "validate"], help="what to do")
    options.add_argument(
        "--splits", help="splits to validate (default: train, and val if there is one)"
    )
    settings, chosen = load_settings(
        sys.argv[1:], "pipelines/prepare.py", "Draw the world, or validate a dataset.", options
    )
    if chosen.task == "world" and settings.data.format != "world":
        raise InputError("data.format: 'prepare.py world' needs data.format=world")
    return settings, chosen


def work(arguments: tuple[Settings, argparse.Namespace]) -> int:
    settings, chosen = arguments
    if chosen.task == "world":
        return world(settings)
    return validate(settings, chosen.splits)


if __name__ == "__main__":
    run_job("prepare", read, work)
