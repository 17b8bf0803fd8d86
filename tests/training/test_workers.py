"""One, two and four workers against a plain loop, without Ray: same batches, same weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training_oracle import Recipe, check_weights, parts, plain_epoch

from qure_core import storage
from qure_core.base.config import QueryEncoder
from qure_core.data.loader import ImageLoader
from qure_core.data.schema import Triplet
from qure_core.embeddings.encoder import Encoder
from qure_core.objectives import make_objective
from qure_core.training.batches import (
    CaptionBatches,
    Share,
    TripletBatches,
    epoch_batches,
    epoch_order,
)
from qure_core.training.negatives import random_negatives
from qure_core.training.optimisation import Optimisation, make_optimizer
from qure_core.training.steps import CaptionStep, TripletStep
from qure_core.training.throughput import Throughput


def work(
    rank: int, workers: int, meeting: Path, run_dir: Path, recipes: Sequence[Recipe], out: Path
) -> None:
    """One worker's part of epochs, in a process group of its own."""
    torch.set_num_threads(1)
    # Met at a file: a port found free may be taken by another test before it is used. On the
    # loopback interface: others come and go with the networks that other tests make.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", f"file://{meeting}", rank=rank, world_size=workers, timeout=timedelta(minutes=2)
    )
    share = Share(rank, workers)
    results = [epoch(share, run_dir, recipe) for recipe in recipes]
    size = recipes[0].batch_size
    captions = {name: caption_epoch(share, run_dir, size, name) for name in ENCODERS}
    if rank == 0:
        torch.save((results, captions), out)
    # DDP must be gone by now: as the group's last owner it would wait for gloo's thread while it
    # holds the interpreter, which that thread may be waiting for to let go of a tensor.
    dist.destroy_process_group()


def epoch(
    share: Share, run_dir: Path, recipe: Recipe
) -> tuple[dict[str, Tensor], list[float], dict[str, float]]:
    """An epoch as the training loop takes it, in DDP: weights, mean losses and mean figures."""
    model, processor, split, corpora = parts(run_dir, recipe.query_encoder)
    model.train()
    objective = make_objective(recipe.objective, dict(recipe.options))
    optimisation = Optimisation(
        step=DistributedDataParallel(TripletStep(model, objective)),
        optimizer=make_optimizer(model, recipe.lr, 0.05),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=torch.device("cpu"),
        dtype=None,
        workers=share.workers,
        encoder=Encoder(model, processor),
    )

    def negatives_of(triplet: Triplet) -> tuple[str, ...]:
        corpus = corpora[triplet.category]
        return random_negatives(triplet, corpus, recipe.seed, 0, recipe.negatives)

    load = ImageLoader(
        split.images, processor.image_size, processor.pixels, 10**7, threads=1, cache_mb=8
    )
    build = TripletBatches(
        split.triplets,
        negatives_of,
        load,
        processor,
        objective.in_batch,
        threshold_of=None if recipe.threshold is None else lambda triplet: recipe.threshold,
    )
    order = epoch_order(len(split.triplets), recipe.seed, 0)
    steps = epoch_batches(build, order, recipe.batch_size, share)
    meter = Throughput(model.config, torch.device("cpu"), 1e9)
    sums = optimisation.epoch(steps, lambda step: step, meter)
    assert sum(sums.counts) == len(split.triplets)
    means = [total / count for total, count in zip(sums.losses, sums.counts, strict=True)]
    figures = {name: value / sum(sums.counts) for name, value in sums.figures.items()}
    return model.state_dict(), means, figures


THRESHOLD = 0.9
ENCODERS: tuple[QueryEncoder, ...] = ("qformer", "sprc", "combiner")


def caption_epoch(
    share: Share, run_dir: Path, batch_size: int, query_encoder: QueryEncoder
) -> list[float]:
    """Mean losses of an epoch of image-text pretraining in DDP."""
    model, processor, split, _ = parts(run_dir, query_encoder)
    model.freeze_vision_encoder(False)
    model.train()
    captions = storage.read_json(str(run_dir / "data/captions.json"))
    load = ImageLoader(
        split.images, processor.image_size, processor.pixels, 10**7, threads=1, cache_mb=8
    )
    step = DistributedDataParallel(CaptionStep(model, 0.1))
    optimisation = Optimisation(
        step=step,
        optimizer=make_optimizer(model, 1e-3, 0.05),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=torch.device("cpu"),
        dtype=None,
        workers=share.workers,
    )
    build = CaptionBatches(captions, load, processor)
    order = epoch_order(len(captions), 1000, 0, "caption order")
    steps = epoch_batches(build, order, batch_size, share, keep_short=False)
    meter = Throughput(model.config, torch.device("cpu"), 1e9)
    sums = optimisation.epoch(steps, lambda step: step, meter)
    return [total / count for total, count in zip(sums.losses, sums.counts, strict=True)]


def more(batch_size: int) -> list[Recipe]:
    """The other objectives of whole batches, each with what it shares between workers, and the
    other query encoders."""
    chosen: list[tuple[str, dict[str, Any]]] = [
        ("info_nce", {"directions": "both", "candidates": "own"}),
        ("hn_nce", {"weights": "released"}),
        ("hcl", {"form": "both"}),
        ("dcl", {"candidates": "targets"}),
        ("fnc", {"threshold": 0.2}),
    ]
    found = [Recipe(batch_size, name, tuple(options.items())) for name, options in chosen]
    for encoder in ("sprc", "combiner"):
        found.append(Recipe(batch_size, "info_nce", query_encoder=encoder))
    return found


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    """Figures by recipe, and pretraining by batch size, as the first workers tried had them."""
    return {}


# A last batch of 2 leaves two of four workers with nothing but filler.
@pytest.mark.parametrize(("workers", "batch_size"), [(1, 16), (2, 16), (4, 22), (1, 22)])
def test_workers_share_one_epoch(
    workers: int,
    batch_size: int,
    finished_run: Path,
    tmp_path: Path,
    alone: dict[Any, Any],
) -> None:
    recipes = [
        Recipe(batch_size),
        Recipe(batch_size, "info_nce", negatives=2),
        Recipe(batch_size, "info_nce", threshold=THRESHOLD),
        *more(batch_size),
    ]
    out = tmp_path / "out.pt"
    arguments: Sequence[object] = (workers, tmp_path / "meeting", finished_run, recipes, out)
    torch.multiprocessing.spawn(work, arguments, nprocs=workers)
    results, caption_losses = torch.load(out)
    # Each step's are of the weights that the steps before it made.
    for name, losses in caption_losses.items():
        assert len(losses) > 2
        assert losses == pytest.approx(alone.setdefault((batch_size, name), losses), rel=1e-5)
    for recipe, (state, means, figures) in zip(recipes, results, strict=True):
        if recipe in more(batch_size):  # held against their definitions elsewhere
            expected, losses = alone.setdefault((recipe, "epoch"), (state, means))
        else:
            expected, losses = plain_epoch(finished_run, recipe)
        check_weights(state, expected)
        assert means == pytest.approx(losses, rel=1e-5)
        assert {"accuracy", "margin"} <= set(figures)
        # Some of the answers are left alone, and not all.
        assert recipe.threshold is None or 1 < figures["likely"] < batch_size
        assert figures == pytest.approx(alone.setdefault(recipe, figures), rel=1e-4, abs=1e-6)
