"""Compute each image's frozen vision features once, for training, mining and evaluation to read.

    python pipelines/embed.py --config CONFIG                     # of model.pretrained's encoder
    python pipelines/embed.py --config CONFIG --run.dir RUN       # of a run's own encoder
    python pipelines/embed.py --config CONFIG --checkpoint DIR

Run again after images were added or changed, only those are encoded. A build that was killed, or
that ran out of disk, is finished by the same command.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError, raise_problems
from qure_core.runtime.command import run_job
from qure_core.runtime.settings import load_settings

if TYPE_CHECKING:
    from qure_core.embeddings.feature_building import EncoderSource
    from qure_core.features.identity import FeatureKey


def choose_encoder(settings: Settings, checkpoint: str | None) -> tuple[EncoderSource, FeatureKey]:
    """The encoder asked for: a checkpoint's, the run's, or that of the pretrained weights."""
    from qure_core.embeddings.feature_building import EncoderSource
    from qure_core.features.identity import FeatureKey, feature_key
    from qure_core.model.checkpoint_files import checkpoint_uri, latest_epoch

    precision = settings.model.vision_precision
    if checkpoint is None and latest_epoch(settings.run.dir, "train") is not None:
        # All have the same encoder, and this one is never pruned.
        checkpoint = checkpoint_uri(settings.run.dir, "train", 0)
    if checkpoint is not None:
        return EncoderSource(checkpoint), feature_key(checkpoint, precision)
    if settings.model.pretrained is None:
        raise InputError(
            f"run.dir: {settings.run.dir} has no training checkpoint and model.pretrained is not "
            "set, so there is no encoder; give --checkpoint, or set features to 'build' and let "
            "pipelines/train.py fill the store after its pretraining"
        )
    source = EncoderSource(settings.model.pretrained, settings.model.tokenizer)
    encoder = source.load("cpu", precision)
    digest, size = encoder.model.encoder_digest(), encoder.processor.image_size
    return source, FeatureKey.of(digest, size, settings.data.pixels, precision)


def describe(uri: str, manifest: dict[str, Any]) -> str:
    """The store in a few lines, for people."""
    encoded, seconds = manifest["encoded"], max(manifest["seconds"], 1e-3)
    lines = [
        f"  images               {manifest['images']:>12,}",
        f"  encoded now          {encoded:>12,}  in {seconds:,.1f} s"
        + (f", {encoded / seconds:,.1f} images/s" if encoded else ""),
        f"  quarantined          {len(manifest['quarantined']):>12,}",
    ]
    lines += [f"    {facts['fault']}" for facts in list(manifest["quarantined"].values())[:20]]
    if "tokens" in manifest:
        lines.append(
            f"  features of an image [{manifest['tokens']}, {manifest['width']}] "
            f"{manifest['precision']}"
        )
    lines.append(
        f"  size                 {manifest['shard_bytes'] / 2**20:>12,.1f} MB "
        f"in {manifest['shards']:,} shard(s)"
    )
    return "\n".join([*lines, f"feature store: {uri}"])


def read() -> tuple[Settings, argparse.Namespace]:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--checkpoint",
        help="checkpoint whose encoder is used: a path or URI (default: run.dir's first, else "
        "model.pretrained, which must then be visible on all nodes)",
    )
    options.add_argument(
        "--splits", default="train,val", help="splits whose images are encoded (%(default)s)"
    )
    options.add_argument(
        "--prune",
        action="store_true",
        help="remove shards that no image needs any more; no job may be reading the store",
    )
    return load_settings(sys.argv[1:], "pipelines/embed.py", "Fill the feature store.", options)


def work(arguments: tuple[Settings, argparse.Namespace]) -> None:
    from qure_core.data.sources import Dataset
    from qure_core.embeddings.feature_building import build_store, prune_store
    from qure_core.runtime.monitor import monitored
    from qure_core.runtime.resources import connect, plan_resources
    from qure_core.storage.lease import hold

    settings, chosen = arguments
    images: dict[str, str] = {}
    absent: dict[str, dict[str, str]] = {}
    dataset = Dataset(settings.data)
    for name in chosen.splits.split(","):
        split, problems = dataset.read(name)
        images |= split.images
        # Whoever needs what is missing will refuse to start; the rest can be encoded.
        for problem in problems:
            place = f"{problem.file} [{problem.where}]"
            absent[place] = {"image_id": problem.where, "fault": str(problem)}
        if not images:
            raise_problems(problems, f"{settings.data.root} ({name} split)")
    checkpoint = storage.resolve(chosen.checkpoint) if chosen.checkpoint else None
    source, key = choose_encoder(settings, checkpoint)
    uri = key.uri(settings.feature_store.dir)
    storage.check_writable(settings.feature_store.dir, "feature_store.dir")
    stores, name = uri.rsplit("/", 1)
    connect()
    with (
        # Of its own: the store's is held for the build alone.
        hold(stores, "embedding", name),
        monitored(f"{uri}.events.jsonl", "embedding", settings.resolved()),
    ):
        plan = plan_resources(settings.cluster)
        manifest = build_store(settings, plan, source, key, images, absent=absent)
    if chosen.prune:
        print(f"[embed] removed {prune_store(uri):,} file(s) that nothing refers to")
    print(describe(uri, manifest), flush=True)


if __name__ == "__main__":
    run_job("embed", read, work)
