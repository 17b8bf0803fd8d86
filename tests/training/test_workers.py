"""One, two and four workers against a plain loop, without Ray: same batches, same weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from qure_core import storage
from qure_core.data import read_split
from qure_core.data.schema import Split, Triplet
from qure_core.model import QuReModel, QuReProcessor, encode_frozen, load_model
from qure_core.training.batches import ImageLoader, random_negative, triplet_batches
from qure_core.training.optimisation import Optimisation, make_optimizer
from qure_core.training.steps import TripletStep
from qure_core.training.throughput import Throughput


def parts(run_dir: Path) -> tuple[QuReModel, QuReProcessor, Split, dict[str, list[str]]]:
    model, processor = load_model(str(run_dir / "checkpoints/train-0000"), dropout=0.0)
    corpora = storage.read_json(str(run_dir / "data/corpora.json"))
    return model, processor, read_split(str(run_dir / "data/train")), corpora


def plain_epoch(
    run_dir: Path, batch_size: int, seed: int, lr: float
) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and mean losses of a run's first epoch, from the method alone.

    Each triplet by itself, its three images through the encoder: no shared images, no parts of
    batches, no scaling, gradients summed one by one.
    """
    model, processor, split, corpora = parts(run_dir)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.05)
    load = ImageLoader(split.images, processor, 10**7, threads=1, cache_mb=8)

    def vision(name: str) -> Tensor:
        return encode_frozen(model.vision_encoder, load([name]), "fp16")

    batches = triplet_batches(
        list(range(len(split.triplets))),  # type: ignore[arg-type]
        lambda number: number,  # type: ignore[arg-type, return-value]
        load,
        processor,
        batch_size=batch_size,
        seed=seed,
        epoch=0,
        rank=0,
        workers=1,
    )
    losses = []
    for step in batches:
        part, count = step.__defaults__[0], step.__defaults__[2]  # type: ignore[attr-defined]
        assert len(part) == count
        optimizer.zero_grad()
        total = 0.0
        for triplet in (split.triplets[number] for number in part):
            negative = random_negative(triplet, corpora[triplet.category], seed, 0)
            ids, mask = processor.texts([triplet.text])
            query_D = model.embed_queries(vision(triplet.reference_id), ids, mask)[0]
            positive, against = (
                (model.embed_images(vision(str(name)))[0] @ query_D).max() / model.temperature
                for name in (triplet.target_id, negative)
            )
            loss = -torch.nn.functional.logsigmoid(positive - against)
            (loss / count).backward()
            total += loss.item()
        optimizer.step()
        losses.append(total / count)
    return model.state_dict(), losses


def check_weights(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        difference = (ours[name] - value).abs().flatten()
        # AdamW divides a gradient by its own size, so where it is rounding noise, so is the
        # step: all of it for the biases of attention keys, which change no attention.
        assert difference.max() <= 5 * 1e-3, name
        if not name.endswith("key.bias"):
            assert difference.quantile(0.99) <= 1e-5, name


def work(rank: int, workers: int, meeting: Path, run_dir: Path, batch_size: int, out: Path) -> None:
    """One worker's part of an epoch, in a process group of its own."""
    torch.set_num_threads(1)
    # Met at a file: a port found free may be taken by another test before it is used. On the
    # loopback interface: others come and go with the networks that other tests make.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", f"file://{meeting}", rank=rank, world_size=workers, timeout=timedelta(minutes=2)
    )
    epoch(rank, workers, run_dir, batch_size, out)
    # DDP must be gone by now: as the group's last owner it would wait for gloo's thread while it
    # holds the interpreter, which that thread may be waiting for to let go of a tensor.
    dist.destroy_process_group()


def epoch(rank: int, workers: int, run_dir: Path, batch_size: int, out: Path) -> None:
    """An epoch as the training loop takes it, in DDP."""
    model, processor, split, corpora = parts(run_dir)
    encoder = model.vision_encoder
    model.vision_encoder = torch.nn.Identity()
    model.train()
    optimisation = Optimisation(
        step=DistributedDataParallel(TripletStep(model)),
        optimizer=make_optimizer(model, 1e-3, 0.05),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=torch.device("cpu"),
        dtype=None,
        workers=workers,
        encoder=encoder,
        vision_precision="fp16",
    )

    def negative_of(triplet: Triplet) -> str:
        return random_negative(triplet, corpora[triplet.category], 1000, 0)

    steps = triplet_batches(
        split.triplets,
        negative_of,
        ImageLoader(split.images, processor, 10**7, threads=1, cache_mb=8),
        processor,
        batch_size=batch_size,
        seed=1000,
        epoch=0,
        rank=rank,
        workers=workers,
    )
    meter = Throughput(model.config, torch.device("cpu"), 1e9)
    sums, counts = optimisation.epoch(steps, lambda step: step, meter)
    if rank == 0:
        model.vision_encoder = encoder
        torch.save((model.state_dict(), sums, counts), out)


# A last batch of 2 leaves two of four workers with nothing but filler.
@pytest.mark.parametrize(("workers", "batch_size"), [(1, 16), (2, 16), (4, 22)])
def test_workers_share_one_epoch(
    workers: int, batch_size: int, finished_run: Path, tmp_path: Path
) -> None:
    expected, losses = plain_epoch(finished_run, batch_size, seed=1000, lr=1e-3)
    out = tmp_path / "out.pt"
    arguments: Sequence[object] = (workers, tmp_path / "meeting", finished_run, batch_size, out)
    torch.multiprocessing.spawn(work, arguments, nprocs=workers)
    state, sums, counts = torch.load(out)
    check_weights(state, expected)
    assert sum(counts) == 90
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    assert means == pytest.approx(losses, rel=1e-5)
