"""Prepare data: draw the built-in world, check a dataset, pack its images, make triplets.

python pipelines/prepare.py world --data.root data/world --data.world.images 2000
python pipelines/prepare.py validate --config configs/emoji.yaml --data.root /data/emoji-cir
python pipelines/prepare.py pack --config CONFIG --output s3://bucket/packed
"""

from __future__ import annotations

import argparse
import sys

from qure_core import storage
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


def pack(settings: Settings, asked: str | None, output: str, shard_images: int) -> int:
    from qure_core.data.pack import pack_images
    from qure_core.data.sources import Dataset
    from qure_core.runtime.resources import connect
    from qure_core.storage.lease import hold

    dataset = Dataset(settings.data)
    splits = asked.split(",") if asked else [n for n in ("train", "val") if dataset.has(n)]
    images: dict[str, str] = {}
    categories: dict[str, set[str]] = {}
    for name in splits:
        split = dataset.load(name)
        for image, uri in split.images.items():
            if images.setdefault(image, uri) != uri:
                raise InputError(
                    f"--splits: image {image!r} is {uri} in {name}, and {images[image]} in another "
                    "split; pack them apart"
                )
        for category, ids in split.galleries.items():
            for image in ids:
                categories.setdefault(image, set()).add(category)
    one = {image: min(own) for image, own in categories.items() if len(own) == 1}
    connect()
    folder, name = output.rsplit("/", 1)
    with hold(folder, "packing", name):
        manifest = pack_images(output, images, one, shard_images, settings.data.max_image_pixels)
    size = sum(facts["bytes"] for facts in manifest["files"].values()) / 2**20
    print(
        f"packed {manifest['images']:,} images in {len(manifest['files']):,} shard(s), "
        f"{size:,.1f} MB: {output}\ntake them with --data.images {output}",
        flush=True,
    )
    return 0


def read() -> tuple[Settings, argparse.Namespace]:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("task", choices=["world", "validate", "pack"], help="what to do")
    options.add_argument(
        "--splits", help="splits to validate or pack (default: train, and val if there is one)"
    )
    options.add_argument("--output", help="pack: where the shards go, a path or URI")
    options.add_argument(
        "--shard-images", type=int, default=2000, help="pack: images in a shard (%(default)s)"
    )
    settings, chosen = load_settings(
        sys.argv[1:], "pipelines/prepare.py", "Draw the world, or validate a dataset.", options
    )
    if chosen.task == "world" and settings.data.format != "world":
        raise InputError("data.format: 'prepare.py world' needs data.format=world")
    if chosen.task == "pack" and not chosen.output:
        raise InputError("--output: say where the shards go")
    if chosen.shard_images < 1:
        raise InputError(f"--shard-images: {chosen.shard_images} is less than 1")
    return settings, chosen


def work(arguments: tuple[Settings, argparse.Namespace]) -> int:
    settings, chosen = arguments
    if chosen.task == "world":
        return world(settings)
    if chosen.task == "pack":
        output = storage.resolve(chosen.output).rstrip("/")
        return pack(settings, chosen.splits, output, chosen.shard_images)
    return validate(settings, chosen.splits)


if __name__ == "__main__":
    run_job("prepare", read, work)
