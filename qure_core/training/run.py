"""The main job: prepare, pretrain, (mine, fine-tune) x n, evaluate, report.

Everything a run has done is a committed directory below its run directory, so the same command
goes on where the last one stopped:

    config.yaml     settings as resolved            data/         the triplets and images used
    checkpoints/    after every epoch kept          rounds/       mined sets
    evaluations/    rankings and metrics            metrics.jsonl steps, epochs, rounds, evaluations
    events.jsonl    what happened, and when
    tensorboard/    the same as event files         report/       index.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import yaml
from tensorboardX import SummaryWriter

from qure_core import storage
from qure_core.config import Settings
from qure_core.data import Split, load_split, mining_galleries, read_split, write_split
from qure_core.data.sources import load_descriptions
from qure_core.data.world import make_world
from qure_core.embedding import embed_splits
from qure_core.errors import InputError
from qure_core.evaluation.stage import evaluate_checkpoint, evaluation_job
from qure_core.features.use import usable_store
from qure_core.lease import hold
from qure_core.mining.stage import check_corpora, hold_round, mine_round, mining_job, round_table
from qure_core.model import build_model, learn_tokenizer, load_model
from qure_core.model.pretrained import load_tokenizer
from qure_core.monitor import monitored
from qure_core.report.build import build_report
from qure_core.resources import Plan, connect, plan_resources
from qure_core.seeds import derive
from qure_core.training.checkpoints import checkpoint_uri, latest_epoch, save_checkpoint
from qure_core.training.layout import committed, evaluation_uri, round_uri
from qure_core.training.place import check_apart, claim_run
from qure_core.training.schedule import evaluation_epochs, mining_epochs, stage_boundaries
from qure_core.training.segment import Segment
from qure_core.training.tracking import Scalar, check_tracker, scalars, track
from qure_core.training.trainer import remove_scratch, run_segment

# Settings that may change between a run and its resumption: they do not change its result.
_FREE = {
    "run.dir",
    "data.root",
    "cluster.train_workers",
    "cluster.gpus",
    "cluster.cpus_per_train_worker",
    "cluster.embed_actors",
    "cluster.cpus_per_embed_actor",
    "cluster.decode_threads",
    "cluster.image_cache_mb",
    "cluster.max_failures",
    "cluster.scale_up_seconds",
    "features",
    "feature_store.dir",
    "feature_store.cache_dir",
    "feature_store.shard_images",
    "mining.corpus_shards",
    "mining.memory_mb",
    "mining.query_block",
    "mining.engine",
    "mining.corpus_range",
    "train.keep_checkpoints",
    "train.log_every",
    "report.examples",
    "tracking.backend",
    "tracking.project",
    "tracking.uri",
}


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def check_settings(settings: Settings, sections: Sequence[str]) -> None:
    """Raise `InputError` if the run there, if any, was made with other settings of ``sections``."""
    uri = storage.join(settings.run.dir, "config.yaml")
    if not storage.exists(uri):
        return
    before = _flatten(yaml.safe_load(storage.read_bytes(uri)))
    changed = [
        f"  {name}: {before.get(name)!r} there, {value!r} now"
        for name, value in _flatten(settings.resolved()).items()
        if name.split(".")[0] in sections and name not in _FREE and before.get(name) != value
    ]
    if changed:
        raise InputError(
            f"run.dir: {settings.run.dir} holds a run with other settings:\n"
            + "\n".join(changed)
            + "\nchoose another --run.dir, or remove that directory to start again"
        )


def save_config(settings: Settings) -> None:
    """Write config.yaml, or check that the run there was made with the same settings."""
    check_settings(settings, list(settings.resolved()))
    uri = storage.join(settings.run.dir, "config.yaml")
    storage.write_bytes(uri, yaml.safe_dump(settings.resolved(), sort_keys=False).encode())


def prepare_data(settings: Settings) -> tuple[Split, Split, dict[str, tuple[str, ...]]]:
    """Load train and val and the mining corpora; keep a copy of them with the run."""
    data = settings.data
    if data.format == "world" and make_world(data.root, data.world):
        print(f"[prepare] drew {data.world.images:,} images in {data.root}", flush=True)
    folder = storage.join(settings.run.dir, "data")
    splits = []
    for name in ("train", "val"):
        uri = storage.join(folder, name)
        split = load_split(data, name)
        kept = read_split(uri) if storage.is_committed(uri) else None
        if kept and (kept.triplets, kept.galleries) != (split.triplets, split.galleries):
            raise InputError(
                f"data.root: the {name} split of {data.root} has changed since this run "
                f"began ({uri}); choose another --run.dir, or restore the data"
            )
        if kept != split:  # it is new, or its images have moved
            write_split(uri, split)
        splits.append(split)
    train, val = splits
    corpora = mining_galleries(data, train)
    check_corpora(train, corpora)
    storage.write_json(storage.join(folder, "corpora.json"), corpora)
    storage.write_json(storage.join(folder, "captions.json"), load_descriptions(data, train))
    print(
        f"[prepare] {len(train.triplets):,} train and {len(val.triplets):,} val triplets; "
        f"mining corpus: "
        + ", ".join(f"{category} {len(ids):,}" for category, ids in corpora.items()),
        flush=True,
    )
    return train, val, corpora


def starting_checkpoint(settings: Settings, plan: Plan, train: Split) -> None:
    """Commit the checkpoint that fine-tuning starts from (stage "train", epoch 0)."""
    run_dir, model_settings = settings.run.dir, settings.model
    if latest_epoch(run_dir, "train") is not None:
        return
    start = checkpoint_uri(run_dir, "train", 0)
    if model_settings.pretrained:
        model, processor = load_model(
            model_settings.pretrained, model_settings.tokenizer, model_settings.dropout
        )
        facts = {"stage": "train", "epoch": 0, "origin": model_settings.pretrained}
        save_checkpoint(start, model, processor, facts)
        return
    captions = storage.read_json(storage.join(run_dir, "data", "captions.json"))
    if settings.pretrain.epochs and len(captions) < settings.pretrain.batch_size:
        raise InputError(
            f"data.descriptions: {len(captions)} captioned training images are fewer than "
            f"pretrain.batch_size={settings.pretrain.batch_size}. Give captions "
            "({image id: caption} in data.descriptions), or weights (model.pretrained), or start "
            "from random weights with --pretrain.epochs 0"
        )
    if latest_epoch(run_dir, "pretrain") is None:
        if model_settings.tokenizer:
            tokenizer = load_tokenizer(model_settings.tokenizer)
        else:
            texts = sorted({*captions.values(), *(t.text for t in train.triplets)})
            tokenizer = learn_tokenizer(texts, model_settings.vocabulary_size)
        model, processor = build_model(
            model_settings.preset,
            tokenizer,
            model_settings.dropout,
            derive(settings.run.seed, "weights"),
        )
        facts = {"stage": "pretrain", "epoch": 0, "origin": "random weights"}
        save_checkpoint(checkpoint_uri(run_dir, "pretrain", 0), model, processor, facts)
    done = settings.pretrain.epochs
    if (latest_epoch(run_dir, "pretrain") or 0) < done:
        segment = Segment("pretrain", run_dir, settings.resolved(), done)
        run_segment(segment, settings.cluster, plan)
    model, processor = load_model(checkpoint_uri(run_dir, "pretrain", done))
    model.freeze_vision_encoder()
    origin = f"{done} epochs of image-text pretraining on {len(captions)} captions"
    save_checkpoint(start, model, processor, {"stage": "train", "epoch": 0, "origin": origin})


def training_images(train: Split, corpora: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """URIs by id of the images that fine-tuning reads: references, targets and negatives."""
    wanted = {name for ids in corpora.values() for name in ids}
    for triplet in train.triplets:
        wanted |= {triplet.reference_id, str(triplet.target_id)}
    return {image_id: train.images[image_id] for image_id in sorted(wanted)}


def used_images(
    settings: Settings, train: Split, val: Split, corpora: dict[str, tuple[str, ...]]
) -> dict[str, str]:
    """URIs by id of all images that a run reads."""
    return training_images(train, corpora) | evaluation_job(settings, val, "").images()


def run(settings: Settings) -> dict[str, Any]:
    """Run the job to its end and return its summary; what is already done is not done again."""
    run_dir, train_settings = settings.run.dir, settings.train
    check_apart(run_dir, settings.data.root)
    check_tracker(settings)
    claim_run(run_dir)
    events = storage.join(run_dir, "events.jsonl")
    with (
        hold(run_dir, "training") as run_lease,
        monitored(events, "training", settings.resolved()) as monitor,
    ):
        save_config(settings)
        connect()
        plan = plan_resources(settings.cluster)
        train, val, corpora = prepare_data(settings)
        starting_checkpoint(settings, plan, train)
        start = checkpoint_uri(run_dir, "train", 0)
        if settings.features == "build":
            # Once for all that the run will read; each stage then finds its own images there.
            usable_store(settings, plan, start, used_images(settings, train, val, corpora))

        minings = set(mining_epochs(train_settings))
        evaluations = evaluation_epochs(train_settings)
        stops = stage_boundaries(train_settings)
        keep = tuple(stops)
        mined_at: int | None = None
        done = latest_epoch(run_dir, "train") or 0
        for stop, following in zip(stops, [*stops[1:], None], strict=True):
            run_lease.check()
            checkpoint = checkpoint_uri(run_dir, "train", stop)
            evaluation = evaluation_uri(run_dir, stop) if stop in evaluations else None
            mines = stop in minings and train_settings.negatives == "steep_drops"
            mined = round_uri(run_dir, stop) if mines else None
            with hold_round(mined, wait=True) if mined else nullcontext() as lease:
                jobs = []
                if evaluation and not storage.is_committed(evaluation):
                    jobs.append(evaluation_job(settings, val, evaluation))
                if mined and not storage.is_committed(mined):
                    jobs.append(mining_job(train, corpora, mined, settings.mining.stored))
                # Both at once: starting the actors is most of the cost on small data.
                if jobs:
                    embed_splits(checkpoint, jobs, settings, plan, settings.mining.corpus_shards)
                if evaluation:
                    manifest = evaluate_checkpoint(
                        settings, plan, checkpoint, val, evaluation, evaluations[stop]
                    )
                    print(describe_evaluation(manifest), flush=True)
                    recall = manifest["metrics"]["recall"]["average"]
                    monitor.event("evaluated", epoch=stop, uri=evaluation, **recall)
                if mined:
                    mined_at = stop
                    assert lease is not None
                    manifest = mine_round(
                        settings, plan, checkpoint, train, corpora, mined, stop, lease
                    )
                    print(round_table(manifest) + f"\n  written to {mined}", flush=True)
                    monitor.event("mined", epoch=stop, uri=mined, **manifest["statistics"])
            if following is not None and done < following:
                segment = Segment(
                    stage="train",
                    run_dir=run_dir,
                    settings=settings.resolved(),
                    last_epoch=following,
                    mined_uri=None if mined_at is None else round_uri(run_dir, mined_at),
                    mined_at=mined_at,
                    keep=keep,
                    features=usable_store(settings, plan, start, training_images(train, corpora)),
                )
                run_lease.check()
                run_segment(segment, settings.cluster, plan)
            track(settings, write_metrics(run_dir))
        run_lease.check()
        remove_scratch(run_dir)
        report = build_report(settings, train, val)
        summary = {
            "evaluations": {
                row["name"]: row["metrics"] for row in committed(run_dir, "evaluations")
            },
            "rounds": len(committed(run_dir, "rounds")),
            "report": report,
        }
        storage.write_json(storage.join(run_dir, "summary.json"), summary)
        return summary


def describe_evaluation(manifest: dict[str, Any]) -> str:
    """One evaluation in a few lines, for people."""
    average = manifest["metrics"]["recall"]["average"]
    line = (
        f"evaluation at {manifest['name']} (gallery: {manifest['gallery']}): "
        f"R@10 {average['R@10']:.2f}  R@50 {average['R@50']:.2f}  mean {average['mean']:.2f}"
    )
    if relevance := manifest["metrics"].get("relevance"):
        line += (
            f"  R-precision {relevance['R-precision']:.2f}"
            f"  relevant in top 10 {relevance['relevant in top 10']:.2f}"
        )
    return line


def read_metrics(run_dir: str) -> list[dict[str, Any]]:
    """All lines of metrics: of every committed epoch, round and evaluation."""
    lines: list[dict[str, Any]] = []
    folder = storage.join(run_dir, "metrics")
    for stage in ("pretrain", "train"):
        newest = latest_epoch(run_dir, stage) or 0
        for epoch in range(1, newest + 1):
            text = storage.read_bytes(storage.join(folder, f"{stage}-{epoch:04d}.jsonl")).decode()
            lines += [json.loads(line) for line in text.splitlines()]
    for manifest in committed(run_dir, "rounds"):
        lines.append(
            {"kind": "mining", "epoch": manifest["epoch"], **manifest["statistics"]}
            | {"seconds": manifest["seconds"], "peak_mb": manifest["peak_task_memory_mb"]}
        )
    for manifest in committed(run_dir, "evaluations"):
        lines.append(
            {"kind": "evaluation", "epoch": manifest["epoch"], "name": manifest["name"]}
            | manifest["metrics"]
        )
    return lines


def write_metrics(run_dir: str) -> list[Scalar]:
    """Write metrics.jsonl and the TensorBoard events from what is committed so far; return the
    latter's scalars."""
    lines = read_metrics(run_dir)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    storage.write_bytes(storage.join(run_dir, "metrics.jsonl"), text.encode())

    values = scalars(lines)
    with storage.temporary_folder("tensorboard") as staging:
        writer = SummaryWriter(staging)
        for name, step, value in values:
            writer.add_scalar(name, value, step)
        writer.close()
        (name,) = os.listdir(staging)
        # Always one file of one name, which takes the place of the last.
        target = storage.join(run_dir, "tensorboard", "events.out.tfevents.qure")
        storage.put_file(os.path.join(staging, name), target)
    return values
