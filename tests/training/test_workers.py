"""One, two and four workers against a plain loop, without Ray: same batches, same weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from qure_core import storage
from qure_core.data import read_split
from qure_core.data.loader import ImageLoader
from qure_core.data.schema import Split, Triplet
from qure_core.embeddings.encoder import Encoder
from qure_core.model import QuReModel, QuReProcessor, encode_frozen, load_model
from qure_core.objectives import make_objective
from qure_core.training.batches import Share, TripletBatches, epoch_batches, epoch_order
from qure_core.training.negatives import random_negatives
from qure_core.training.optimisation import Optimisation, make_optimizer
from qure_core.training.steps import TripletStep
from qure_core.training.throughput import Throughput


@dataclass(frozen=True)
class Recipe:
    """What an epoch is taken with."""

    batch_size: int
    objective: str = "bradley_terry"
    negatives: int = 1
    seed: int = 1000
    lr: float = 1e-3


def parts(run_dir: Path) -> tuple[QuReModel, QuReProcessor, Split, dict[str, list[str]]]:
    model, processor = load_model(str(run_dir / "checkpoints/train-0000"), dropout=0.0)
    corpora = storage.read_json(str(run_dir / "data/corpora.json"))
    return model, processor, read_split(str(run_dir / "data/train")), corpora


def plain_loss(
    objective: str,
    triplet: Triplet,
    others: Sequence[Triplet],
    negatives: dict[str, tuple[str, ...]],
    score: Callable[[str], Tensor],
) -> Tensor:
    """One triplet's loss from its definition; ``score`` gives an image's score."""
    positive = score(str(triplet.target_id))
    own = negatives[triplet.query_id]
    if objective == "bradley_terry":
        losses = [-torch.nn.functional.logsigmoid(positive - score(name)) for name in own]
        return torch.stack(losses).mean()
    same = [other for other in others if other.category == triplet.category]
    names = {name for o in same for name in (str(o.target_id), *negatives[o.query_id])}
    query = (triplet.reference_id, triplet.text)
    names -= {str(o.target_id) for o in same if (o.reference_id, o.text) == query}
    names = (names - {triplet.reference_id}) | set(own)
    return torch.stack([positive, *map(score, sorted(names))]).logsumexp(dim=0) - positive


def plain_epoch(run_dir: Path, recipe: Recipe) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and mean losses of a run's first epoch, from the method alone.

    Each query and each image by itself through the model: no parts of batches, no scaling.
    """
    model, processor, split, corpora = parts(run_dir)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.05)
    load = ImageLoader(split.images, processor.image_size, 10**7, threads=1, cache_mb=8)

    @cache
    def vision(name: str) -> Tensor:
        return encode_frozen(model.vision_encoder, load([name]), "fp16")

    order = epoch_order(len(split.triplets), recipe.seed, 0)
    losses = []
    for start in range(0, len(order), recipe.batch_size):
        batch = [split.triplets[i] for i in order[start : start + recipe.batch_size]]
        negatives = {
            t.query_id: random_negatives(t, corpora[t.category], recipe.seed, 0, recipe.negatives)
            for t in batch
        }
        optimizer.zero_grad()
        image = cache(lambda name: model.embed_images(vision(name))[0])
        total = torch.zeros(())
        for triplet in batch:
            ids, mask = processor.texts([triplet.text])
            query_D = model.embed_queries(vision(triplet.reference_id), ids, mask)[0]

            def score(
                name: str, query_D: Tensor = query_D, image: Callable[[str], Tensor] = image
            ) -> Tensor:
                return (image(name) @ query_D).max() / model.temperature

            total = total + plain_loss(recipe.objective, triplet, batch, negatives, score)
        (total / len(batch)).backward()
        optimizer.step()
        losses.append(total.item() / len(batch))
    return model.state_dict(), losses


def check_weights(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        difference = (ours[name] - value).abs().flatten()
        # AdamW divides a gradient by its own size, so where it is rounding noise, so is the
        # step: all of it for the biases of attention keys, which change no attention.
        assert difference.max() <= 5 * 1e-3, name
        if not name.endswith("key.bias"):
            assert difference.quantile(0.99) <= 1e-5, name


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
    results = [epoch(Share(rank, workers), run_dir, recipe) for recipe in recipes]
    if rank == 0:
        torch.save(results, out)
    # DDP must be gone by now: as the group's last owner it would wait for gloo's thread while it
    # holds the interpreter, which that thread may be waiting for to let go of a tensor.
    dist.destroy_process_group()


def epoch(
    share: Share, run_dir: Path, recipe: Recipe
) -> tuple[dict[str, Tensor], list[float], dict[str, float]]:
    """An epoch as the training loop takes it, in DDP: weights, mean losses and mean figures."""
    model, processor, split, corpora = parts(run_dir)
    model.train()
    objective = make_objective(recipe.objective, {})
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

    load = ImageLoader(split.images, processor.image_size, 10**7, threads=1, cache_mb=8)
    build = TripletBatches(split.triplets, negatives_of, load, processor, objective.in_batch)
    order = epoch_order(len(split.triplets), recipe.seed, 0)
    steps = epoch_batches(build, order, recipe.batch_size, share)
    meter = Throughput(model.config, torch.device("cpu"), 1e9)
    sums = optimisation.epoch(steps, lambda step: step, meter)
    assert sum(sums.counts) == len(split.triplets)
    means = [total / count for total, count in zip(sums.losses, sums.counts, strict=True)]
    figures = {name: value / sum(sums.counts) for name, value in sums.figures.items()}
    return model.state_dict(), means, figures


@pytest.fixture(scope="module")
def alone() -> dict[Recipe, dict[str, float]]:
    """Figures by recipe of the first number of workers that was tried."""
    return {}


# A last batch of 2 leaves two of four workers with nothing but filler.
@pytest.mark.parametrize(("workers", "batch_size"), [(1, 16), (2, 16), (4, 22), (1, 22)])
def test_workers_share_one_epoch(
    workers: int,
    batch_size: int,
    finished_run: Path,
    tmp_path: Path,
    alone: dict[Recipe, dict[str, float]],
) -> None:
    recipes = [Recipe(batch_size), Recipe(batch_size, "info_nce", negatives=2)]
    out = tmp_path / "out.pt"
    arguments: Sequence[object] = (workers, tmp_path / "meeting", finished_run, recipes, out)
    torch.multiprocessing.spawn(work, arguments, nprocs=workers)
    for recipe, (state, means, figures) in zip(recipes, torch.load(out), strict=True):
        expected, losses = plain_epoch(finished_run, recipe)
        check_weights(state, expected)
        assert means == pytest.approx(losses, rel=1e-5)
        assert set(figures) == {"accuracy", "margin"}
        assert figures == pytest.approx(alone.setdefault(recipe, figures), rel=1e-4)
