"""Prepare data: draw the built-in world, check a dataset, pack its images, make triplets.

    python pipelines/prepare.py world --data.root data/world --data.world.images 2000
    python pipelines/prepare.py validate --config configs/emoji.yaml --data.root /data/emoji-cir
    python pipelines/prepare.py pack --config CONFIG --output s3://bucket/packed
    python pipelines/prepare.py triplets --attributes table.csv --output data/made \
        --templates configs/templates/clothes.yaml --data.images /data/images
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.runtime.command import EXIT_PROBLEMS, run_job
from qure_core.runtime.settings import load_settings


def world(settings: Settings, chosen: argparse.Namespace) -> int:
    from qure_core.data.world import make_world
    from qure_core.runtime.resources import connect

    del chosen
    connect()
    drawn = make_world(settings.data.root, settings.data.world)
    print(f"world: {settings.data.root}" + ("" if drawn else " (already there)"))
    return 0


def _splits(settings: Settings, asked: str | None) -> list[str]:
    """The splits asked for, else train, and val if there is one."""
    from qure_core.data.sources import has_split

    if asked:
        return asked.split(",")
    return ["train", *(["val"] if has_split(settings.data, "val") else [])]


def validate(settings: Settings, chosen: argparse.Namespace) -> int:
    from qure_core.data.validate import validate_dataset
    from qure_core.runtime.resources import connect

    splits = _splits(settings, chosen.splits)
    connect()
    checked = validate_dataset(settings.data, splits)
    for problem in checked.problems:
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
    print(f"{len(checked.problems)} problem(s) in {settings.data.root}", flush=True)
    return EXIT_PROBLEMS if checked.problems else 0


def pack(settings: Settings, chosen: argparse.Namespace) -> int:
    from qure_core.data.pack import pack_images
    from qure_core.data.sources import Dataset, all_images
    from qure_core.runtime.resources import connect
    from qure_core.storage.lease import hold

    output = storage.resolve(chosen.output).rstrip("/")
    dataset = Dataset(settings.data)
    splits = [dataset.load(name) for name in _splits(settings, chosen.splits)]
    images, category_of = all_images(splits)
    connect()
    folder, name = output.rsplit("/", 1)
    with hold(folder, "packing", name):
        manifest = pack_images(
            output, images, category_of, chosen.shard_images, settings.data.max_image_pixels
        )
    size = sum(facts["bytes"] for facts in manifest["files"].values()) / 2**20
    print(
        f"packed {manifest['images']:,} images in {len(manifest['files']):,} shard(s), "
        f"{size:,.1f} MB: {output}\ntake them with --data.images {output}",
        flush=True,
    )
    return 0


def triplets(settings: Settings, chosen: argparse.Namespace) -> int:
    from qure_core.data.made_triplets import describe_made, make_triplets
    from qure_core.data.templates import read_templates

    output = storage.resolve(chosen.output).rstrip("/")
    report = make_triplets(
        output,
        storage.resolve(chosen.attributes),
        read_templates(storage.resolve(chosen.templates)),
        images=settings.data.images,
        index_dir=settings.data.index_dir,
        wanted={"train": chosen.train, "val": chosen.val},
        by=chosen.split_by,
        val_fraction=chosen.val_fraction,
        seed=settings.run.seed,
    )
    print(describe_made(report))
    images = f" --data.images {settings.data.images}" if settings.data.images else ""
    print(
        f"triplets: {output}\ntake them with --data.format fashioniq --data.root {output}{images}",
        flush=True,
    )
    return 0


TASKS: dict[str, Callable[[Settings, argparse.Namespace], int]] = {
    "world": world,
    "validate": validate,
    "pack": pack,
    "triplets": triplets,
}
NEEDED = {"pack": ["output"], "triplets": ["output", "attributes", "templates"]}


def read() -> tuple[Settings, argparse.Namespace]:
    options = argparse.ArgumentParser(add_help=False)
    add = options.add_argument
    add("task", choices=list(TASKS), help="what to do")
    add("--splits", help="validate, pack: which (default: train, and val if there is one)")
    add("--output", help="pack, triplets: where they go, a path or URI")
    add("--shard-images", type=int, default=2000, help="pack: images in a shard (%(default)s)")
    add("--attributes", help="triplets: table of the images' attributes, .parquet, .csv, .jsonl")
    add(
        "--templates",
        help="triplets: YAML of what is said (pattern: configs/templates/clothes.yaml)",
    )
    add("--train", type=int, default=6000, help="triplets: so many, all categories (%(default)s)")
    add("--val", type=int, default=1200, help="triplets: so many to evaluate (%(default)s)")
    add(
        "--split-by",
        choices=["image", "combination"],
        default="image",
        help="triplets: val holds out images, or whole combinations of attributes (%(default)s)",
    )
    add("--val-fraction", type=float, default=0.3, help="triplets: share held out (%(default)s)")
    settings, chosen = load_settings(
        sys.argv[1:], "pipelines/prepare.py", "Draw, validate, pack or make data.", options
    )
    if chosen.task == "world" and settings.data.format != "world":
        raise InputError("data.format: 'prepare.py world' needs data.format=world")
    for name in NEEDED.get(chosen.task, []):
        if not getattr(chosen, name):
            raise InputError(f"--{name}: 'prepare.py {chosen.task}' needs it (--help says more)")
    for name, least in (("shard_images", 1), ("train", 1), ("val", 0)):
        if getattr(chosen, name) < least:
            option = name.replace("_", "-")
            raise InputError(f"--{option}: {getattr(chosen, name)} is less than {least}")
    if not 0 <= chosen.val_fraction < 1:
        raise InputError(f"--val-fraction: {chosen.val_fraction} is not from 0 to below 1")
    return settings, chosen


def work(arguments: tuple[Settings, argparse.Namespace]) -> int:
    settings, chosen = arguments
    return TASKS[chosen.task](settings, chosen)


if __name__ == "__main__":
    run_job("prepare", read, work)
