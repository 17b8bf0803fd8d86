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
from dataclasses import replace
from typing import Any

import pyarrow as pa
import yaml
from tensorboardX import SummaryWriter

from qure_core import storage
from qure_core.base.config import Settings, flatten, free_settings
from qure_core.base.errors import InputError
from qure_core.base.seeds import derive
from qure_core.data import Split, load_split, mining_galleries, read_split, write_split
from qure_core.data.hashing import image_digests
from qure_core.data.schema import holds, is_older_split
from qure_core.data.sources import has_split, load_descriptions
from qure_core.data.world import make_world
from qure_core.embeddings.feature_use import usable_store
from qure_core.embeddings.stage import embed_splits
from qure_core.evaluation.protocols import of_manifest
from qure_core.evaluation.stage import evaluate_checkpoint, evaluation_job
from qure_core.job.layout import committed, evaluation_uri, round_uri
from qure_core.job.place import check_apart, check_places, claim_run
from qure_core.job.tracking import Scalar, check_tracker, scalars, track
from qure_core.mining.describe import round_table
from qure_core.mining.stage import check_corpora, hold_round, mine_round, mining_job, mining_rule
from qure_core.model import build_model, learn_tokenizer, load_model
from qure_core.model.checkpoint_files import CHECKPOINT_KIND, checkpoint_uri, latest_epoch
from qure_core.model.checkpoints import save_checkpoint
from qure_core.model.pretrained import load_tokenizer
from qure_core.objectives import make_objective
from qure_core.report.build import build_report
from qure_core.runtime.monitor import monitored
from qure_core.runtime.resources import Plan, connect, plan_resources
from qure_core.runtime.settings import parse_settings
from qure_core.storage.lease import hold
from qure_core.storage.parquet import read_parquet, write_parquet
from qure_core.training.schedule import evaluation_epochs, mining_epochs, stage_boundaries
from qure_core.training.segment import Segment
from qure_core.training.trainer import remove_scratch, run_segment


def _differences(settings: Settings, sections: Sequence[str]) -> list[str]:
    """The settings of ``sections`` that the run there, if any, was made with other values of."""
    uri = storage.join(settings.run.dir, "config.yaml")
    if not storage.exists(uri):
        return []
    # What it did not know yet has a default that means what was done then.
    before = flatten(parse_settings(yaml.safe_load(storage.read_bytes(uri)), uri).resolved())
    free = free_settings()
    return [
        f"  {name}: {before.get(name)!r} there, {value!r} now"
        for name, value in flatten(settings.resolved()).items()
        if name.split(".")[0] in sections and name not in free and before.get(name) != value
    ]


def check_settings(settings: Settings, sections: Sequence[str]) -> None:
    """Raise `InputError` if the run there, if any, was made with other settings of ``sections``."""
    run_dir = settings.run.dir
    if not _has_learned(run_dir):
        return
    if changed := _differences(settings, sections):
        raise InputError(
            f"run.dir: {run_dir} holds a run with other settings:\n"
            + "\n".join(changed[:7])
            + (f"\n  ... and {len(changed) - 7} more" if len(changed) > 7 else "")
            + f"\nto go on with that run give its own, --config {run_dir}/config.yaml; "
            "for other settings choose another --run.dir"
        )


def _has_learned(run_dir: str) -> bool:
    """Whether a run has trained at all: until then nothing is lost by beginning it again."""
    return any(latest_epoch(run_dir, stage) for stage in ("pretrain", "train"))


def save_config(settings: Settings) -> None:
    """Write config.yaml; what a run remembers of its settings."""
    uri = storage.join(settings.run.dir, "config.yaml")
    storage.write_bytes(uri, yaml.safe_dump(settings.resolved(), sort_keys=False).encode())


def begin(settings: Settings) -> None:
    """Say what a run goes on from; let one that has not trained begin again with these settings."""
    run_dir, sections = settings.run.dir, list(settings.resolved())
    check_settings(settings, sections)
    config = storage.join(run_dir, "config.yaml")
    known = storage.exists(config)
    if _has_learned(run_dir):
        if not known:
            raise InputError(
                f"run.dir: {config} is missing, by which a run is known; put it back, or choose "
                "another --run.dir"
            )
        stage = "train" if latest_epoch(run_dir, "train") is not None else "pretrain"
        epochs = (settings.train if stage == "train" else settings.pretrain).epochs
        newest = f"{stage}-{latest_epoch(run_dir, stage):04d} of {epochs} epochs"
        rounds = len(committed(run_dir, "rounds"))
        print(f"[run] goes on from checkpoint {newest}, {rounds} mined round(s)", flush=True)
        return
    if not known or _differences(settings, sections):
        _forget_first_weights(run_dir)
    if known:
        print(f"[run] {run_dir} had not trained yet and begins again", flush=True)


def _kept_split(settings: Settings, uri: str, split: Split, learned: bool) -> Split:
    """``split``, checked against what the run, which has ``learned`` from it, keeps of it."""
    kept = read_split(uri) if storage.is_committed(uri) else None
    if kept and learned:
        if is_older_split(uri) and kept.triplets == split.triplets and holds(kept, split):
            print(
                f"[prepare] this run was begun when images of other splits were part of the "
                f"{split.name} corpus; it goes on so",
                flush=True,
            )
            return replace(split, galleries=kept.galleries)
        if (kept.triplets, kept.galleries) != (split.triplets, split.galleries):
            raise InputError(
                f"data.root: the {split.name} split of {settings.data.root} has changed since this "
                f"run began ({uri}); choose another --run.dir, or restore the data"
            )
    if kept and (kept.triplets, kept.galleries) != (split.triplets, split.galleries):
        _forget_first_weights(settings.run.dir)
    if kept != split:  # it is new, or its images have moved
        write_split(uri, split)
    return split


def _forget_first_weights(run_dir: str) -> None:
    """Remove weights that no step has changed yet: they were made for other data or settings."""
    for stage in ("pretrain", "train"):
        storage.discard(checkpoint_uri(run_dir, stage, 0), CHECKPOINT_KIND)


def prepare_data(settings: Settings) -> tuple[Split, Split | None, dict[str, tuple[str, ...]]]:
    """Load train, val if there is one, and the mining corpora; keep a copy of them with the run.

    What the images hold is remembered too, so that a run does not go on with other pixels.
    """
    data = settings.data
    if data.format == "world" and make_world(data.root, data.world):
        print(f"[prepare] drew {data.world.images:,} images in {data.root}", flush=True)
    folder, learned = storage.join(settings.run.dir, "data"), _has_learned(settings.run.dir)

    def kept(name: str) -> Split:
        return _kept_split(settings, storage.join(folder, name), load_split(data, name), learned)

    train = kept("train")
    val = kept("val") if has_split(data, "val") else None
    corpora = mining_galleries(data, train)
    check_corpora(train, corpora, settings.train.negatives_per_triplet)
    storage.write_json(storage.join(folder, "corpora.json"), corpora)
    captions, described = storage.join(folder, "captions.json"), load_descriptions(data, train)
    if not storage.exists(captions) or not learned:  # a run keeps those that it began with
        if storage.exists(captions) and storage.read_json(captions) != described:
            _forget_first_weights(settings.run.dir)
        storage.write_json(captions, described)
    count = f"{len(val.triplets):,} val" if val else "no val"
    print(
        f"[prepare] {len(train.triplets):,} train and {count} triplets; mining corpus: "
        + ", ".join(f"{category} {len(ids):,}" for category, ids in corpora.items()),
        flush=True,
    )
    if not val:
        print("[prepare] there is no val split: evaluations and their figures are skipped")
    contents = storage.join(folder, "contents.parquet")
    if learned and not storage.exists(contents):
        print(
            "[prepare] this run did not remember what its images hold; from here on it does, but "
            "whether they changed before cannot be told",
            flush=True,
        )
    if not learned:
        storage.remove_file(contents)  # of an attempt whose images may have been put right since
    used = used_images(settings, train, val, corpora)
    remember_contents(contents, used | {name: train.images[name] for name in described})
    return train, val, corpora


def first_checkpoint(settings: Settings, train: Split) -> None:
    """Commit the weights that a run starts with, unless it has some: given, or random."""
    run_dir, model_settings = settings.run.dir, settings.model
    if any(latest_epoch(run_dir, stage) is not None for stage in ("pretrain", "train")):
        return
    if model_settings.pretrained:
        model, processor = load_model(
            model_settings.pretrained, model_settings.tokenizer, model_settings.dropout
        )
        facts = {"stage": "train", "epoch": 0, "origin": model_settings.pretrained}
        save_checkpoint(checkpoint_uri(run_dir, "train", 0), model, processor, facts)
        return
    captions = storage.read_json(storage.join(run_dir, "data", "captions.json"))
    if settings.pretrain.epochs and len(captions) < settings.pretrain.batch_size:
        raise InputError(
            f"data.descriptions: {len(captions)} captioned training images are fewer than "
            f"pretrain.batch_size={settings.pretrain.batch_size}. Give captions "
            "({image id: caption} in data.descriptions), or weights (model.pretrained), or start "
            "from random weights with --pretrain.epochs 0"
        )
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


def pretrain(settings: Settings, plan: Plan) -> None:
    """Commit the checkpoint that fine-tuning starts from (stage "train", epoch 0)."""
    run_dir = settings.run.dir
    if latest_epoch(run_dir, "train") is not None:
        return
    done = settings.pretrain.epochs
    if (latest_epoch(run_dir, "pretrain") or 0) < done:
        segment = Segment("pretrain", run_dir, settings.resolved(), done)
        run_segment(segment, settings.cluster, plan)
    model, processor = load_model(checkpoint_uri(run_dir, "pretrain", done))
    model.freeze_vision_encoder()
    captions = storage.read_json(storage.join(run_dir, "data", "captions.json"))
    origin = f"{done} epochs of image-text pretraining on {len(captions)} captions"
    facts = {"stage": "train", "epoch": 0, "origin": origin}
    save_checkpoint(checkpoint_uri(run_dir, "train", 0), model, processor, facts)


_CONTENTS = pa.schema([(name, pa.string()) for name in ("image_id", "uri", "stamp", "sha256")])


def training_images(train: Split, corpora: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """URIs by id of the images that fine-tuning reads: references, targets and negatives."""
    wanted = {name for ids in corpora.values() for name in ids}
    for triplet in train.triplets:
        wanted |= {triplet.reference_id, str(triplet.target_id)}
    return {image_id: train.images[image_id] for image_id in sorted(wanted)}


def used_images(
    settings: Settings, train: Split, val: Split | None, corpora: dict[str, tuple[str, ...]]
) -> dict[str, str]:
    """URIs by id of the images that fine-tuning, mining and evaluation read."""
    evaluated = evaluation_job(settings, val, "").images() if val else {}
    return training_images(train, corpora) | evaluated


def remember_contents(uri: str, images: dict[str, str]) -> None:
    """Note what each image file holds (SHA-256), or check that it still holds it.

    Only files whose place, size or times differ from before are read again. Raises `InputError` if
    one has changed: half of a run would have seen other pixels than the other half.
    """
    known: dict[str, dict[str, str]] = {}
    if storage.exists(uri):
        known = {row["image_id"]: row for row in read_parquet(uri).to_pylist()}
    stamps = storage.stamps(images.values())
    asked = {
        name: image
        for name, image in images.items()
        if name not in known
        or (known[name]["uri"], known[name]["stamp"]) != (image, stamps.get(image))
    }
    digests = image_digests(asked.values())
    changed = [
        image
        for name, image in asked.items()
        if name in known and digests.get(image) != known[name]["sha256"]
    ]
    if changed:
        raise InputError(
            f"data.root: {len(changed):,} image(s) are not what they were when this run began, "
            f"first {changed[0]}; restore them, or choose another --run.dir"
        )
    rows = [row for name, row in known.items() if name not in asked]
    rows += [
        {"image_id": name, "uri": image, "stamp": stamps[image], "sha256": digests[image]}
        for name, image in asked.items()
        if image in digests and image in stamps
    ]
    if asked:
        write_parquet(uri, pa.Table.from_pylist(rows, _CONTENTS))


def run(settings: Settings) -> dict[str, Any]:
    """Run the job to its end and return its summary; what is already done is not done again."""
    run_dir, train_settings = settings.run.dir, settings.train
    check_apart(run_dir, settings.data.root)
    check_tracker(settings)
    make_objective(settings.objective.name, settings.objective.options)
    mining_rule(settings)
    claim_run(run_dir)
    connect()
    events = storage.join(run_dir, "events.jsonl")
    with (
        hold(run_dir, "training") as run_lease,
        monitored(events, "training", settings.resolved()) as monitor,
    ):
        begin(settings)
        check_places(run_dir)
        plan = plan_resources(settings.cluster)
        train, val, corpora = prepare_data(settings)
        first_checkpoint(settings, train)
        # Only now: settings that fail a check so far may be corrected.
        save_config(settings)
        pretrain(settings, plan)
        start = checkpoint_uri(run_dir, "train", 0)
        if settings.features == "build":
            # Once for all that the run will read; each stage then finds its own images there.
            usable_store(settings, plan, start, used_images(settings, train, val, corpora))

        minings = set(mining_epochs(train_settings))
        evaluations = evaluation_epochs(train_settings) if val else {}
        stops = stage_boundaries(train_settings)
        keep = tuple(stops)
        mined_at: int | None = None
        done = latest_epoch(run_dir, "train") or 0
        for stop, following in zip(stops, [*stops[1:], None], strict=True):
            run_lease.check()
            checkpoint = checkpoint_uri(run_dir, "train", stop)
            evaluation = evaluation_uri(run_dir, stop) if stop in evaluations else None
            mines = stop in minings and train_settings.negatives == "mined"
            mined = round_uri(run_dir, stop) if mines else None
            with hold_round(mined, wait=True) if mined else nullcontext() as lease:
                jobs = []
                if val and evaluation and not storage.is_committed(evaluation):
                    jobs.append(evaluation_job(settings, val, evaluation))
                if mined and not storage.is_committed(mined):
                    jobs.append(mining_job(train, corpora, mined, settings.mining.stored))
                # Both at once: starting the actors is most of the cost on small data.
                if jobs:
                    embed_splits(checkpoint, jobs, settings, plan, settings.mining.corpus_shards)
                if val and evaluation:
                    manifest = evaluate_checkpoint(
                        settings, plan, checkpoint, val, evaluation, evaluations[stop]
                    )
                    print(describe_evaluation(manifest), flush=True)
                    figures = of_manifest(manifest).headline(manifest["metrics"])
                    monitor.event("evaluated", epoch=stop, uri=evaluation, **figures)
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
        measured, rounds = committed(run_dir, "evaluations"), committed(run_dir, "rounds")
        report = build_report(settings, train, val, measured, rounds, read_metrics(run_dir))
        summary = {
            "evaluations": {row["name"]: row["metrics"] for row in measured},
            "rounds": len(rounds),
            "report": report,
        }
        storage.write_json(storage.join(run_dir, "summary.json"), summary)
        return summary


def describe_evaluation(manifest: dict[str, Any]) -> str:
    """One evaluation in a line, for people."""
    figures = of_manifest(manifest).headline(manifest["metrics"])
    cells = "  ".join(f"{name} {value:.2f}" for name, value in figures.items())
    return f"evaluation at {manifest['name']} (gallery: {manifest['gallery']}): {cells}"


def summary_table(evaluations: Sequence[dict[str, Any]]) -> str:
    """The evaluations of a run side by side: start, end of warm-up, end."""
    protocol = of_manifest(evaluations[0])
    figures = [protocol.headline(row["metrics"]) for row in evaluations]
    columns = [name for name in protocol.columns if any(name in row for row in figures)]
    widths = [max(9, len(name) + 2) for name in columns]
    header = "".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))
    lines = [f"{'':<24}{header}"]
    for row, values in zip(evaluations, figures, strict=True):
        cells = [
            f"{values[name]:>{width}.2f}" if name in values else " " * width
            for name, width in zip(columns, widths, strict=True)
        ]
        lines.append(f"{row['name']:<24}{''.join(cells)}")
    return "\n".join(lines)


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
            | {"headline": of_manifest(manifest).headline(manifest["metrics"])}
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
