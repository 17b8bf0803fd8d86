"""Prepare data: draw the built-in world, or check a dataset and list all that is wrong with it.

python pipelines/prepare.py world --data.root data/world --data.world.images 2000
python pipelines/prepare.py validate --config configs/emoji.yaml --data.root /data/emoji-cir
"""

from __future__ import annotations

import argparse
import sys

from qure_core.config import Settings, load_settings
from qure_core.data.validate import validate_dataset
from qure_core.data.world import make_world
from qure_core.errors import InputError, run_main
from qure_core.resources import connect


def world(settings: Settings) -> int:
    connect()
    drawn = make_world(settings.data.root, settings.data.world)
    print(f"world: {settings.data.root}" + ("" if drawn else " (already there)"))
    return 0


def validate(settings: Settings, splits: list[str]) -> int:
    connect()
    found, problems = validate_dataset(settings.data, splits)
    for problem in problems:
        print(problem)
    for name, split in found.items():
        galleries = ", ".join(
            f"{category} {len(ids):,}" for category, ids in split.galleries.items()
        )
        print(
            f"{name}: {len(split.triplets):,} triplets, {len(split.images):,} images; {galleries}"
        )
    print(f"{len(problems)} problem(s) in {settings.data.root}", flush=True)
    return 1 if problems else 0


def main() -> int:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("task", choices=["world", "validate"], help="what to do")
    options.add_argument(
        "--splits", default="train,val", help="splits to validate (default: %(default)s)"
    )
    settings, chosen = load_settings(
        sys.argv[1:], "pipelines/prepare.py", "Draw the world, or validate a dataset.", options
    )
    if chosen.task == "world":
        if settings.data.format != "world":
            raise InputError("data.format: 'prepare.py world' needs data.format=world")
        return world(settings)
    return validate(settings, chosen.splits.split(","))


if __name__ == "__main__":
    run_main(main)
