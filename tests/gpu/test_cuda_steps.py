"""Optimizer steps on a GPU: the CPU's, without waiting for the device, in the memory they may
take."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gpus import DTYPES, needs_gpu
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from qure_core.data.schema import Triplet
from qure_core.model import (
    ComposedModel,
    QuReModel,
    QuReProcessor,
    encode_frozen,
    learn_tokenizer,
    preset,
)
from qure_core.model.flops import vision_tokens
from qure_core.objectives import OBJECTIVES, make_objective
from qure_core.training.batches import Batch, Share, TripletBatches
from qure_core.training.optimisation import Optimisation, make_optimizer
from qure_core.training.steps import TripletStep

pytestmark = needs_gpu

TEXTS = ["is red with longer sleeves", "is shorter, and has stripes instead"]
LIKENESS = 0.9  # of a mined set's thresholds


class Held:
    """Values by image id, as a loader of batches."""

    def __init__(self, name: str, values: Tensor) -> None:
        self.name, self.values = name, values

    def __call__(self, image_ids: object) -> Tensor:
        return self.values[[int(str(name)[1:]) for name in image_ids]]  # type: ignore[attr-defined]


def triplets(count: int) -> list[Triplet]:
    return [
        Triplet(f"q{n}", f"i{3 * n}", TEXTS[n % 2], f"i{3 * n + 1}", "all") for n in range(count)
    ]


def batch_of(
    processor: QuReProcessor,
    load: Held,
    count: int,
    in_batch: bool,
    share: Share | None = None,
    likeness: float = LIKENESS,
) -> Batch:
    def negative_of(triplet: Triplet) -> tuple[str, ...]:
        return (f"i{int(str(triplet.target_id)[1:]) + 1}",)

    build = TripletBatches(
        triplets(count),
        negative_of,
        load,
        processor,
        in_batch,
        threshold_of=(lambda _: likeness) if in_batch else None,
    )
    return build(np.arange(count), share or Share())


def tiny(dropout: float = 0.0) -> tuple[ComposedModel, QuReProcessor]:
    """A model that tells the images apart: to one with random weights all are alike, so that
    rounding decides what an objective leaves out."""
    model, processor = _random(dropout)
    model.load_state_dict(_learnt())
    return model, processor


def _random(dropout: float) -> tuple[ComposedModel, QuReProcessor]:
    torch.manual_seed(0)
    tokenizer = learn_tokenizer(TEXTS, 100)
    return QuReModel(preset("tiny", len(tokenizer), dropout)), QuReProcessor(tokenizer, 64)


@cache
def _learnt() -> dict[str, Tensor]:
    model, processor = _random(0.0)
    load = Held("vision", features_of(model, 48))
    batch = batch_of(processor, load, 16, in_batch=True, likeness=2.0)
    optimisation = optimisation_of(model, "cpu", "info_nce")
    for _ in range(30):
        optimisation.take(batch, 0)
    return model.state_dict()


def features_of(model: ComposedModel, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, vision_tokens(model.config), model.config.vision["hidden_size"])
    return torch.randn(shape, generator=generator).half()


def optimisation_of(
    model: ComposedModel,
    device: str,
    objective: str = "bradley_terry",
    precision: str = "fp32",
    lr: float = 1e-3,
    scale: float = 2.0**8,
) -> Optimisation:
    model.train().to(torch.device(device))  # type: ignore[arg-type]
    fp16 = precision == "fp16"
    return Optimisation(
        step=TripletStep(model, make_objective(objective, {})),
        optimizer=make_optimizer(model, lr, 0.05),
        scaler=torch.amp.GradScaler(device, init_scale=scale, enabled=fp16),
        device=torch.device(device),
        dtype=DTYPES[precision],
    )


def in_batch(objective: str) -> bool:
    return make_objective(objective, {}).in_batch


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", sorted(DTYPES))
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_a_step_is_the_cpus(objective: str, precision: str) -> None:
    found = {}
    for device, kind in (("cpu", "fp32"), ("cuda", precision)):
        model, processor = tiny()
        batch = batch_of(processor, Held("vision", features_of(model, 48)), 16, in_batch(objective))
        optimisation = optimisation_of(model, device, objective, kind)
        taken = optimisation.take(batch, 0)
        assert not taken.bad
        assert not taken.skipped
        weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
        figures = {name: float(value) / batch.count for name, value in taken.sums.items()}
        found[device] = (taken.losses_B.cpu(), float(taken.norm), weights, figures)
    (ours_B, norm, weights, figures), (expected_B, expected_norm, expected, expected_figures) = (
        found["cuda"],
        found["cpu"],
    )
    bound = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}[precision]
    torch.testing.assert_close(ours_B, expected_B, rtol=bound, atol=bound)
    assert norm == pytest.approx(expected_norm, rel=3 * bound)
    assert figures["loss"] == pytest.approx(expected_figures["loss"], rel=bound, abs=bound)
    if precision == "fp32":
        assert figures == pytest.approx(expected_figures, rel=1e-3, abs=1e-3)
        for name, value in expected.items():
            difference = (weights[name] - value).abs().flatten()
            # AdamW divides a gradient by its own size, so where it is rounding noise, so is the
            # step: all of it for the biases of attention keys, which change no attention.
            assert difference.max() <= 2.1e-3, name
            if not name.endswith("key.bias"):
                assert difference.quantile(0.9) <= 1e-5, name


@pytest.mark.parametrize("precision", sorted(DTYPES))
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("objective", ["bradley_terry", "hcl", "info_nce"])
def test_a_step_does_not_wait_for_the_device(
    objective: str, dropout: float, precision: str
) -> None:
    model, processor = tiny(dropout=dropout)
    batch = batch_of(processor, Held("vision", features_of(model, 48)), 16, in_batch(objective))
    optimisation = optimisation_of(model, "cuda", objective, precision)
    pinned = batch.pin_memory()
    optimisation.take(pinned, 0)  # makes the optimizer's state
    with no_synchronisation():
        taken = [optimisation.take(pinned, seed) for seed in (1, 2)]
    assert all(math.isfinite(float(one.norm)) for one in taken)


def test_a_loss_scale_that_is_too_large_skips_steps_and_falls() -> None:
    model, processor = tiny()
    load = Held("vision", features_of(model, 48))
    batch = batch_of(processor, load, 16, in_batch=False)
    optimisation = optimisation_of(model, "cuda", precision="fp16", scale=2.0**60)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    taken = optimisation.take(batch, 0)
    assert taken.skipped
    assert not taken.bad
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    tries = 1
    while taken.skipped:
        taken, tries = optimisation.take(batch, 0), tries + 1
        assert tries < 60
    assert optimisation.scaler.get_scale() == 2.0 ** (61 - tries)
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_compiled_step_is_the_eager_one() -> None:
    losses = {}
    for way in ("eager", "compiled"):
        model, processor = tiny()
        batch = batch_of(processor, Held("vision", features_of(model, 48)), 16, in_batch=True)
        optimisation = optimisation_of(model, "cuda", "info_nce")
        if way == "compiled":
            optimisation.step = torch.compile(optimisation.step)  # type: ignore[assignment]
        losses[way] = [float(optimisation.take(batch, 0).sums["loss"]) for _ in range(3)]
    assert losses["eager"][0] > 1
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-3)


@pytest.mark.parametrize("stored", [True, False], ids=["stored features", "pixels"])
@pytest.mark.parametrize("name", ["blip2-vit-l", "blip2-vit-g"])
def test_a_step_at_real_size_fits_24_gb(name: str, stored: bool) -> None:
    torch.cuda.empty_cache()
    count = 32
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = QuReModel(preset(name))
    processor = QuReProcessor(learn_tokenizer(TEXTS, 100), 224)
    if stored:
        model.vision_encoder.to("cpu")
        load = Held("vision", features_of(model, 3 * count))
        encode = None
    else:
        load = Held("pixel_values", torch.randn(3 * count, 3, 224, 224))
        encode = model.vision_encoder.eval()
    batch = batch_of(processor, load, count, in_batch=False)
    model.train()
    step = TripletStep(model, make_objective("bradley_terry", {}))
    optimisation = Optimisation(
        step,
        make_optimizer(model, 5e-6, 0.05),
        torch.amp.GradScaler("cuda", enabled=False),
        torch.device("cuda"),
        torch.bfloat16,
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        ready = batch
        if encode is not None:
            inputs = dict(batch.inputs)
            pixels = inputs.pop("pixel_values").cuda()
            inputs["vision"] = encode_frozen(encode, pixels, "fp16")
            ready = Batch(inputs, batch.weight_B, batch.count, batch.names)
        taken = optimisation.take(ready, 0)
    assert math.isfinite(float(taken.norm))
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"\n{name}, batch {count}, {'stored features' if stored else 'pixels'}: {peak:.1f} GB")
    assert peak < 24


def _worker(rank: int, workers: int, port: int, results: mp.SimpleQueue) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's own name may lead nowhere
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    model, processor = tiny()
    load = Held("vision", features_of(model, 48))
    optimisation = optimisation_of(model, "cuda")
    optimisation.step = DistributedDataParallel(optimisation.step)
    optimisation.workers = workers
    share = Share(rank, workers)
    batch = batch_of(processor, load, 16, in_batch=False, share=share)
    norms = [float(optimisation.take(batch, 0).norm) for _ in range(3)]
    if rank == 0:
        results.put(norms)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_on_one_gpu_take_the_steps_of_one() -> None:
    model, processor = tiny()
    load = Held("vision", features_of(model, 48))
    optimisation = optimisation_of(model, "cuda")
    batch = batch_of(processor, load, 16, in_batch=False)
    alone = [float(optimisation.take(batch, 0).norm) for _ in range(3)]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_worker, (2, 29611, results), nprocs=2, join=True)
    assert results.get() == pytest.approx(alone, rel=1e-3)
