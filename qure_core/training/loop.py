"""The training loop of one worker, for pretraining and for fine-tuning.

Each epoch ends in a committed checkpoint. A worker that starts, for whatever reason, goes on from
the newest one, so a retry by Ray Train, a resubmitted job and a planned next stage are the same.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch import nn

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.data import read_split
from qure_core.data.loader import ImageLoader, VisionLoader
from qure_core.data.schema import Triplet
from qure_core.embeddings.encoder import Encoder
from qure_core.features.store import StoredFeatures
from qure_core.mining.mined_set import read_mined_set
from qure_core.model import ComposedModel, QuReProcessor, load_model
from qure_core.model.base import check_finite
from qure_core.model.checkpoint_files import prune_checkpoints
from qure_core.model.checkpoints import load_optimizer, save_checkpoint
from qure_core.objectives import make_objective
from qure_core.runtime.progress import format_seconds
from qure_core.training.batches import (
    Batch,
    CaptionBatches,
    Share,
    TripletBatches,
    drawn_text,
    epoch_batches,
    epoch_order,
    step_seed,
)
from qure_core.training.negatives import mined_negatives, random_negatives
from qure_core.training.optimisation import (
    EpochSums,
    NotFinite,
    Optimisation,
    autocast_type,
    make_optimizer,
)
from qure_core.training.schedule import learning_rate
from qure_core.training.segment import Segment
from qure_core.training.steps import CaptionStep, TripletStep
from qure_core.training.throughput import Throughput, matrix_product_rate


@dataclass(frozen=True)
class _Task:
    """What differs between pretraining and fine-tuning."""

    step: nn.Module
    epochs: int
    lr: float
    final_lr: float
    weight_decay: float
    batches: Callable[[int], Sequence[Callable[[], Batch]]]
    temperature: float | None = None  # where it is no parameter


def _make_task(
    segment: Segment,
    model: ComposedModel,
    load: VisionLoader,
    processor: QuReProcessor,
    share: Share,
) -> _Task:
    settings = Settings(**segment.settings)
    seed = settings.run.seed
    build: TripletBatches | CaptionBatches
    if segment.stage == "pretrain":
        captions = storage.read_json(storage.join(segment.run_dir, "data", "captions.json"))
        pretrain = settings.pretrain
        model.freeze_vision_encoder(False)
        build = CaptionBatches(captions, load, processor)

        def caption_epoch(epoch: int) -> Sequence[Callable[[], Batch]]:
            order = epoch_order(len(captions), seed, epoch, "caption order")
            return epoch_batches(build, order, pretrain.batch_size, share, keep_short=False)

        return _Task(
            CaptionStep(model, pretrain.label_smoothing),
            pretrain.epochs,
            pretrain.lr,
            pretrain.lr / 100,
            pretrain.weight_decay,
            caption_epoch,
        )

    train = settings.train
    split = read_split(storage.join(segment.run_dir, "data", "train"))
    corpora: dict[str, list[str]] = storage.read_json(
        storage.join(segment.run_dir, "data", "corpora.json")
    )
    mined: dict[str, np.ndarray] | None = None
    thresholds: dict[str, float] = {}
    if segment.mined_uri:
        mined_set = read_mined_set(segment.mined_uri)
        mined, weights = mined_set.negatives(), mined_set.weights()
        thresholds = mined_set.thresholds()
    objective = make_objective(settings.objective.name, settings.objective.options)
    count = train.negatives_per_triplet

    def triplet_epoch(epoch: int) -> Sequence[Callable[[], Batch]]:
        def negatives_of(triplet: Triplet) -> tuple[str, ...]:
            if mined is None:
                return random_negatives(triplet, corpora[triplet.category], seed, epoch, count)
            assert segment.mined_at is not None
            query = triplet.query_id
            at, own = segment.mined_at, weights.get(query)
            return mined_negatives(query, mined[query], seed, at, epoch, count, own)

        def text_of(triplet: Triplet) -> str:
            random = train.captions == "random"
            return drawn_text(triplet, seed, epoch) if random else triplet.text

        build = TripletBatches(
            split.triplets,
            negatives_of,
            load,
            processor,
            objective.in_batch,
            text_of,
            (lambda triplet: thresholds.get(triplet.query_id, math.inf)) if thresholds else None,
        )
        order = epoch_order(len(split.triplets), seed, epoch)
        return epoch_batches(build, order, train.batch_size, share)

    return _Task(
        TripletStep(model, objective),
        train.epochs,
        train.lr,
        train.lr * train.final_lr_ratio,
        train.weight_decay,
        triplet_epoch,
        objective.options.temperature,
    )


@dataclass(frozen=True)
class Worker:
    """Which worker this is, of how many; what wraps its step for them; whom it reports epochs to.

    ``prepare`` also brings the step to the device.
    """

    device: torch.device
    rank: int = 0
    workers: int = 1
    prepare: Callable[[nn.Module], nn.Module] | None = None
    report: Callable[[dict[str, Any]], None] | None = None
    board: Any = None  # an actor of `monitor.Board`, which is told how far it is


def train_segment(segment: Segment, board: Any = None) -> None:
    """This Ray Train worker's part of the epochs of ``segment`` that remain."""
    context = ray.train.get_context()
    worker = Worker(
        ray.train.torch.get_device(),
        context.get_world_rank(),
        context.get_world_size(),
        ray.train.torch.prepare_model,
        ray.train.report,
        board,
    )
    train_epochs(segment, worker)


def train_epochs(segment: Segment, worker: Worker) -> None:
    """One worker's part of the epochs of ``segment`` that remain."""
    settings = Settings(**segment.settings)
    rank, workers, device = worker.rank, worker.workers, worker.device
    torch.set_num_threads(settings.cluster.cpus_per_train_worker)

    tell = _Teller(worker.board, rank)
    tell("loading")
    first = _agreed(segment.start(), workers, device)
    start = segment.checkpoint(first)
    model, processor = load_model(start, dropout=settings.model.dropout)
    split = read_split(storage.join(segment.run_dir, "data", "train"))
    cluster = settings.cluster
    load: VisionLoader
    if segment.features:
        load = StoredFeatures(segment.features, split.images, settings.feature_store.cache_dir)
    else:
        load = ImageLoader(
            split.images,
            processor.image_size,
            processor.pixels,
            settings.data.max_image_pixels,
            cluster.decode_threads,
            cluster.image_cache_mb,
        )
    task = _make_task(segment, model, load, processor, Share(rank, workers))
    model.train()
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"model.encoder_options: nothing of {model.config.query_encoder} is left to train with "
            "a constant temperature; evaluate it as it is with pipelines/evaluate.py, or set "
            "train_towers"
        )
    if settings.train.compile:
        task.step.compile()
    prepare = worker.prepare or (lambda step: step.to(device))
    step_module = prepare(task.step)
    dtype = autocast_type(settings.train.precision, device)
    encoder = Encoder(model, processor, device, settings.model.vision_precision)
    optimisation = Optimisation(
        step=step_module,
        optimizer=make_optimizer(model, task.lr, task.weight_decay),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        device=device,
        dtype=dtype,
        workers=workers,
        encoder=encoder if model.vision_is_frozen else None,
    )
    optimizer, scaler = optimisation.optimizer, optimisation.scaler
    if state := load_optimizer(start):
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    peak = matrix_product_rate(device, dtype or torch.float32)

    for epoch in range(first, segment.last_epoch):
        rate = learning_rate(epoch, task.epochs, task.lr, task.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tell("preparing an epoch", epoch + 1)
        steps = task.batches(epoch)
        total = len(steps) * (segment.last_epoch - first)
        meter = Throughput(model.config, device, peak)

        def seed_of(step: int, epoch: int = epoch) -> int:
            return step_seed(settings.run.seed, segment.stage, epoch, step, rank)

        def progress(
            done: int,
            epoch: int = epoch,
            steps: int = len(steps),
            total: int = total,
            meter: Throughput = meter,
        ) -> None:
            tell("training", epoch + 1, done + steps * (epoch - first), total)
            if rank == 0 and done % settings.train.log_every == 0:
                _print_progress(segment, task, epoch, done, steps, meter)

        try:
            sums = optimisation.epoch(steps, seed_of, meter, progress, settings.train.log_every)
        except NotFinite as fault:
            raise not_finite(fault, segment.name, epoch) from None
        speed, measured = meter.line(), meter.facts()  # before the checkpoint is written
        check_weights(model, segment.name, epoch)
        facts: dict[str, Any] = {
            "stage": segment.name,
            "epoch": epoch + 1,
            **epoch_figures(sums),
            "lr": rate,
            "temperature": task.temperature or float(model.temperature.detach()),
            "samples": sum(sums.counts),
            **measured,
            "features": "stored" if segment.features else "computed",
            "negatives": "captions"
            if segment.stage == "pretrain"
            else (settings.mining.rule if segment.mined_uri else "random"),
        }
        tell("saving a checkpoint", epoch + 1, len(steps) * (epoch + 1 - first), total)
        if rank == 0:
            _write_epoch(segment, epoch, sums, facts)
            uri = segment.checkpoint(epoch + 1)
            state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            save_checkpoint(uri, model, processor, facts, state)
            prune_checkpoints(
                segment.folder,
                segment.stage,
                {0, *segment.keep},
                settings.train.keep_checkpoints,
            )
            line = f"[{segment.name}] epoch {epoch + 1}/{task.epochs}: {told(facts)}, {speed}"
            print(line, flush=True)
            tell.epoch(facts)
        if worker.report is not None:
            worker.report({"epoch": epoch + 1, "loss": facts["loss"]})


def _agreed(epoch: int | None, workers: int, device: torch.device) -> int:
    """The epoch to start from as the first worker sees it: a node's listing may be an older one."""
    box = [epoch]
    if workers > 1:
        torch.distributed.broadcast_object_list(box, device=device)
    assert box[0] is not None, "no checkpoint to start from"
    return box[0]


class _Teller:
    """Says on the board how far this worker is, at most once a second while it only trains."""

    def __init__(self, board: Any, rank: int) -> None:
        self.board, self.rank = board, rank
        self._doing, self._told, self._began = "", 0.0, time.monotonic()

    def __call__(self, doing: str, epoch: int = 0, done: int = 0, total: int = 0) -> None:
        now = time.monotonic()
        if self.board is None or (doing == self._doing and now - self._told < 1):
            return
        self._doing, self._told = doing, now
        where = {"doing": doing, "epoch": epoch, "done": done, "total": total}
        where["seconds"] = round(now - self._began, 3)
        self.board.post.remote(self.rank, where)

    def epoch(self, facts: dict[str, Any]) -> None:
        """An epoch is committed."""
        if self.board is not None:
            self.board.post_epoch.remote(facts)


def _print_progress(
    segment: Segment, task: _Task, epoch: int, done: int, steps: int, meter: Throughput
) -> None:
    elapsed = time.monotonic() - meter.started
    left = elapsed / done * (steps - done + steps * (segment.last_epoch - epoch - 1))
    print(
        f"[{segment.name}] epoch {epoch + 1}/{task.epochs}, step {done}/{steps}, "
        f"{meter.line()}, {format_seconds(left)} left to epoch {segment.last_epoch}",
        flush=True,
    )


def epoch_figures(sums: EpochSums) -> dict[str, Any]:
    """An epoch's loss and figures, each the mean over its samples."""
    samples = sum(sums.counts)
    norms = [norm for norm in sums.norms if math.isfinite(norm)]
    return {
        "loss": sum(sums.losses) / samples,
        **{name: value / samples for name, value in sums.figures.items()},
        "gradient_norm": sum(norms) / max(len(norms), 1),
        "skipped_steps": sums.skipped,
    }


def told(facts: dict[str, Any]) -> str:
    """An epoch's figures for people."""
    parts = [f"loss {facts['loss']:.4f}"]
    if "accuracy" in facts:
        parts.append(f"accuracy {facts['accuracy']:.1%}, margin {facts['margin']:.4f}")
    parts.append(f"gradient norm {facts['gradient_norm']:.3g}")
    if facts["skipped_steps"]:
        parts.append(f"{facts['skipped_steps']:,} steps skipped for their loss scale")
    parts.append(f"lr {facts['lr']:.2e}, temperature {facts['temperature']:.4f}")
    return ", ".join(parts)


def _remedy(stage: str) -> str:
    if stage not in ("pretrain", "train"):
        return f"the run itself is done: leave this out with train.{stage} false"
    return f"lower {stage}.lr, or use train.precision fp32 or bf16"


def not_finite(fault: NotFinite, stage: str, epoch: int) -> InputError:
    """What is said of a step that could not be made."""
    names = ", ".join(fault.names[:5]) + (", ..." if len(fault.names) > 5 else "")
    what = "images" if stage == "pretrain" else "queries"
    return InputError(
        f"{stage}: {fault.what} at epoch {epoch + 1}, step {fault.step}, {what} {names}; its "
        f"update was not made, and the last checkpoint is good; {_remedy(stage)}"
    )


def check_weights(model: ComposedModel, stage: str, epoch: int) -> None:
    """Raise `InputError` if an epoch's weights are not finite: nothing is kept of it."""
    try:
        check_finite(model, f"{stage}, epoch {epoch + 1}")
    except InputError as error:
        raise InputError(f"{str(error).partition(';')[0]}; {_remedy(stage)}") from None


def _write_epoch(segment: Segment, epoch: int, sums: EpochSums, facts: dict[str, Any]) -> None:
    """The epoch's lines of metrics, written before its checkpoint commits the epoch."""
    lines: list[dict[str, Any]] = [
        {"kind": "step", "stage": segment.name, "epoch": epoch, "step": step}
        | {"loss": loss / count, "gradient_norm": norm if math.isfinite(norm) else None}
        for step, (loss, count, norm) in enumerate(
            zip(sums.losses, sums.counts, sums.norms, strict=True)
        )
    ]
    lines.append({"kind": "epoch", **facts})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    name = f"{segment.stage}-{epoch + 1:04d}.jsonl"
    storage.write_bytes(storage.join(segment.folder, "metrics", name), text.encode())
