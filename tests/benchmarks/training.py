"""Fine-tuning from stored features against the released program's way, at real size.

    python tests/benchmarks/training.py step [--batch 8]     # an optimizer step, both ways
    python tests/benchmarks/training.py loader [--batch 8]   # the loader against the step
    python tests/benchmarks/training.py store [--images 96]  # the build against the encoder alone
    python tests/benchmarks/training.py schedule             # a FashionIQ-sized run, estimated
    python tests/benchmarks/training.py gpu                  # all but the store, on the GPU here

blip2-vit-l with random weights and random pictures, on the GPU if there is one. The released way
encodes reference, target and negative of every triplet, each by itself, and runs transformers' own
Q-Former on texts padded to 32 tokens.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from synthetic import write_features
from torch import Tensor, nn

from qure_core.base.config import Settings
from qure_core.data.schema import Triplet
from qure_core.model import QuReModel, QuReProcessor, encode_frozen, learn_tokenizer, preset
from qure_core.model.flops import encoder_flops, step_flops, vision_tokens
from qure_core.objectives import make_objective
from qure_core.runtime.prefetch import prefetched
from qure_core.training.batches import Batch, Share, TripletBatches, epoch_batches, epoch_order
from qure_core.training.optimisation import Optimisation, autocast_type, make_optimizer
from qure_core.training.steps import TripletStep
from qure_core.training.throughput import Throughput, matrix_product_rate, peak_memory_mb

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = autocast_type("auto", DEVICE)
TEXTS = ["is red with longer sleeves and a lower neck", "is shorter, and has stripes instead"]
TRIPLETS, IMAGES, EPOCHS, MININGS = 18_000, 46_000, 30, 5


def build(dropout: float) -> tuple[QuReModel, QuReProcessor]:
    torch.manual_seed(0)
    model = QuReModel(preset("blip2-vit-l", dropout=dropout)).to(DEVICE)
    return model, QuReProcessor(learn_tokenizer(TEXTS, 100), 224)


def triplets_of(count: int) -> list[Triplet]:
    """No image twice: nothing is saved by sharing."""
    return [
        Triplet(f"q{n:05d}", f"i{3 * n:06d}", TEXTS[n % 2], f"i{3 * n + 1:06d}", "all")
        for n in range(count)
    ]


def negative_of(triplet: Triplet) -> tuple[str, ...]:
    return (f"i{int(str(triplet.target_id)[1:]) + 1:06d}",)


class Memory:
    """Pictures or features held in memory, as a loader of the training's batches."""

    def __init__(self, name: str, values: Tensor) -> None:
        self.name, self.values = name, values

    def __call__(self, image_ids: Any) -> Tensor:
        return self.values[[int(name[1:]) for name in image_ids]]


class ReleasedWay(nn.Module):
    """Losses of triplets as the released program computes them."""

    def __init__(self, model: QuReModel) -> None:
        super().__init__()
        self.model = model

    def qformer(self, tokens: Tensor, vision: Tensor, mask: Tensor | None) -> Tensor:
        model = self.model
        output: Tensor = model.qformer(
            query_embeds=tokens,
            query_length=model.config.query_tokens,
            attention_mask=mask,
            encoder_hidden_states=model.ln_vision(vision),
        ).last_hidden_state
        return output

    def forward(self, pictures: list[Tensor], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        model = self.model
        with torch.no_grad(), torch.autocast("cuda", torch.float16, DEVICE.type == "cuda"):
            reference, target, negative = (model.encode_vision(p).float() for p in pictures)
        own = model.query_tokens.expand(len(reference), -1, -1)
        tokens = model.text_embeddings(input_ids=input_ids, query_embeds=own)
        mask = torch.cat([attention_mask.new_ones(own.shape[:2]), attention_mask], dim=1)
        hidden = self.qformer(tokens, reference, mask)[:, : own.shape[1]]
        query_BD = F.normalize(model.text_proj(hidden).mean(dim=1), dim=-1)
        scores = []
        for vision in (target, negative):
            image_BTD = F.normalize(model.vision_proj(self.qformer(own, vision, None)), dim=-1)
            scores.append(torch.einsum("bd,btd->bt", query_BD, image_BTD).amax(dim=-1))
        positive, negative = (score / model.temperature for score in scores)
        return F.softplus(negative - positive)


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(steps: int, take: Callable[[], Tensor]) -> tuple[list[float], list[float]]:
    """Seconds and results of each of ``steps``, after one that is not counted."""
    losses, seconds = [], []
    for _ in range(steps + 1):
        synchronise()
        started = time.monotonic()
        value = take()
        synchronise()
        seconds.append(time.monotonic() - started)
        losses.append(float(value))
    return seconds[1:], losses


def ours(model: QuReModel) -> Optimisation:
    model.train()
    return Optimisation(
        step=TripletStep(model, make_objective("bradley_terry", {})).to(DEVICE),
        optimizer=make_optimizer(model, 5e-6, 0.05),
        scaler=torch.amp.GradScaler(DEVICE.type, enabled=torch.float16 == DTYPE),
        device=DEVICE,
        dtype=DTYPE,
    )


def batch_of(load: Memory, processor: QuReProcessor, size: int) -> Batch:
    build = TripletBatches(triplets_of(size), negative_of, load, processor)
    return build(epoch_order(size, seed=0, epoch=0), Share())


def take_released_steps(
    model: QuReModel, own: Batch, steps: int
) -> tuple[list[float], list[float]]:
    """Seconds and losses of steps taken the released way."""
    inputs = own.inputs
    answer_A = inputs["answer_A"]
    rows = [
        inputs["reference_B"],
        answer_A[inputs["target_B"]],
        answer_A[inputs["negative_BK"][:, 0]],
    ]
    pictures = [inputs["pixel_values"][row].to(DEVICE) for row in rows]
    width = 32 - inputs["input_ids"].shape[1]
    ids = F.pad(inputs["input_ids"], (0, width)).to(DEVICE)
    mask = F.pad(inputs["attention_mask"], (0, width)).to(DEVICE)
    released = ReleasedWay(model).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-6, weight_decay=0.05)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=torch.float16 == DTYPE)

    def take() -> Tensor:
        torch.manual_seed(0)
        with torch.autocast(DEVICE.type, DTYPE or torch.bfloat16, enabled=DTYPE is not None):
            loss = released(pictures, ids, mask).mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return timed(steps, take)


def measure_step(batch: int, steps: int, dropout: float = 0.0) -> dict[str, float]:
    """Seconds of a step both ways, on the same triplets from the same weights."""
    model, processor = build(dropout)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3 * batch, 3, 224, 224, generator=generator)
    own = batch_of(Memory("pixel_values", pixels), processor, batch)
    inputs = dict(own.inputs)
    state = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    theirs, their_losses = take_released_steps(model, own, steps)
    # A CPU's figure is of the whole process, so it cannot tell the two ways apart.
    their_memory = peak_memory_mb(DEVICE) if DEVICE.type == "cuda" else 0.0
    model.load_state_dict(state)
    model.zero_grad()
    encoder = model.vision_encoder.eval()
    pixels = inputs.pop("pixel_values").to(DEVICE)
    inputs["vision"] = encode_frozen(encoder, pixels, "fp16").cpu()
    stored = Batch(inputs, own.weight_B, own.count, own.names)
    optimisation = ours(model)
    if DEVICE.type == "cuda":
        encoder.to("cpu")
        del pixels
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    mine, my_losses = timed(steps, lambda: optimisation.take(stored, 0).sums["loss"] / batch)
    flops = step_flops(model.config, 2 * batch, batch, inputs["input_ids"].shape[1])
    difference = max(abs(a - b) / abs(b) for a, b in zip(my_losses, their_losses, strict=True))
    return {
        "released": float(np.median(theirs)),
        "ours": float(np.median(mine)),
        "loss_difference": difference,
        "flops": flops,
        "released_flops": 3 * batch * encoder_flops(model.config) + flops,
        "peak": matrix_product_rate(DEVICE, DTYPE or torch.float32),
        "released_memory": their_memory,
        "memory": peak_memory_mb(DEVICE) if DEVICE.type == "cuda" else 0.0,
    }


def step(batch: int, steps: int) -> None:
    for dropout in (0.0, 0.1):
        got = measure_step(batch, steps, dropout)
        print(f"batch {batch}, dropout {dropout}, {DEVICE}, {DTYPE or torch.float32}")
        for name, seconds, flops, memory in (
            ("released way", got["released"], got["released_flops"], got["released_memory"]),
            ("stored features", got["ours"], got["flops"], got["memory"]),
        ):
            print(
                f"  {name:<16} {seconds:8.3f} s a step, {batch / seconds:8.2f} samples/s, "
                f"{flops / seconds / 1e9:8.0f} GFLOP/s ({flops / seconds / got['peak']:.0%} of a "
                f"matrix product's)" + (f", peak memory {memory:,.0f} MB" if memory else "")
            )
        print(
            f"  released / stored: {got['released'] / got['ours']:.2f} x (target: at least "
            f"{'5 on a GPU' if DEVICE.type == 'cuda' else '4 on a CPU'})"
        )
        if not dropout:
            print(f"  largest relative difference of a step's loss: {got['loss_difference']:.1e}")
            # Half precision's share of a score, divided by the temperature.
            assert got["loss_difference"] < (1e-3 if DTYPE is None else 1e-1)


def loader(batch: int, steps: int) -> None:
    """The loader alone, then the loader and the step together."""
    model, processor = build(0.0)
    config = model.config
    count = 64
    shape = (vision_tokens(config), config.vision["hidden_size"])
    with tempfile.TemporaryDirectory() as folder:
        uris = {f"i{n:06d}": f"/pictures/{n}" for n in range(3 * count * batch // 8)}
        store = write_features(folder, uris, shape, shard=256)
        stored = store(uris)
        triplets = triplets_of(len(uris) // 3)

        def batches(epoch: int) -> list[Callable[[], Batch]]:
            build = TripletBatches(triplets, negative_of, stored, processor)
            return epoch_batches(build, epoch_order(len(triplets), 0, epoch), batch, Share())

        rates = {}
        for name in ("from a cold disk", "from memory"):
            if name == "from a cold disk":
                for path in Path(folder).glob("*/*.arrow"):
                    with open(path, "rb") as file, suppress(AttributeError):
                        os.fsync(file.fileno())
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            own = batches(0)
            started = time.monotonic()
            for _ in prefetched(own):
                pass
            rates[name] = len(own) / (time.monotonic() - started)
        optimisation = ours(model)
        meter = Throughput(config, DEVICE, matrix_product_rate(DEVICE, DTYPE or torch.float32))
        optimisation.epoch(batches(1)[:steps], lambda number: number, meter)
        facts = meter.facts()
    rate = facts["samples_per_second"] / batch
    print(f"step: {rate:.3f} a second; {meter.line()}")
    for name, value in rates.items():
        print(
            f"loader {name}: {value:,.1f} batches/s, {value / rate:,.0f} x the step rate "
            "(target: at least 10)"
        )
    print(f"waiting for data: {facts['data_wait_share']:.2%} of the time (limit: 5 %)")


def store(images: int) -> None:
    """Marginal time of an image in the build, against the encoder alone on as many threads."""
    from qure_core.embeddings.feature_building import EncoderSource, build_store
    from qure_core.features.identity import feature_key
    from qure_core.model.checkpoints import save_checkpoint
    from qure_core.runtime.resources import connect, plan_resources

    model, processor = build(0.0)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = f"{folder}/checkpoint"
        save_checkpoint(checkpoint, model.cpu(), processor, {"stage": "train", "epoch": 0})
        uris = {}
        for number in range(images):
            path = f"{folder}/{number:05d}.jpg"
            Image.fromarray(rng.integers(0, 255, (600, 400, 3), np.uint8)).save(path)
            uris[f"i{number:05d}"] = path
        connect()
        seconds: dict[int, float] = {}
        for part in (images // 3, images):
            some = dict(list(uris.items())[:part])
            settings = Settings(feature_store={"dir": f"{folder}/store-{part}", "shard_images": 16})
            plan = plan_resources(settings.cluster)
            key = feature_key(checkpoint, "fp16")
            manifest = build_store(settings, plan, EncoderSource(checkpoint), key, some)
            seconds[part] = manifest["seconds"]
        torch.set_num_threads(settings.cluster.cpus_per_embed_actor)
        encoder = model.to(DEVICE).vision_encoder.eval()
        pixels = torch.randn(32, 3, 224, 224, device=DEVICE)
        own, _ = timed(3, lambda: encode_frozen(encoder, pixels, "fp16").sum())
    alone = float(np.median(own)) / len(pixels)
    added = (seconds[images] - seconds[images // 3]) / (images - images // 3)
    size = manifest["shard_bytes"] / images
    needed = manifest["tokens"] * manifest["width"] * 2
    print(f"encoder alone: {alone:.3f} s an image; in the build: {added:.3f} s")
    print(
        f"overhead of the build: {added / alone - 1:+.1%} (limit: 10 %), after a start of "
        f"{seconds[images // 3] - added * (images // 3):.0f} s"
    )
    print(f"size: {size:,.0f} bytes an image, {size / needed:.3f} x its fp16 values")


def schedule(batch: int, steps: int) -> None:
    """The paper's FashionIQ run, from rates measured here."""
    got = measure_step(batch, steps)
    model, processor = build(0.0)
    model.eval()
    pixels = torch.randn(32, 3, 224, 224, device=DEVICE)
    ids, mask = processor.texts(TEXTS * 16)
    with torch.inference_mode():
        own, _ = timed(2, lambda: encode_frozen(model.vision_encoder, pixels, "fp16").sum())
        vision = encode_frozen(model.vision_encoder, pixels, "fp16")
        image, _ = timed(2, lambda: model.embed_images(vision).sum())
        query, _ = timed(
            2, lambda: model.embed_queries(vision, ids.to(DEVICE), mask.to(DEVICE)).sum()
        )
    encode, embed, compose = (float(np.median(x)) / 32 for x in (own, image, query))
    steps_in_all = EPOCHS * TRIPLETS / batch
    released = steps_in_all * got["released"]
    released += MININGS * (2 * TRIPLETS * encode + TRIPLETS * (embed + compose))
    stored = IMAGES * encode + steps_in_all * got["ours"]
    stored += MININGS * TRIPLETS * (embed + compose)
    print(f"{TRIPLETS:,} triplets, {IMAGES:,} images, {EPOCHS} epochs, {MININGS} minings; {DEVICE}")
    print(f"  encode {encode:.3f} s, embed an image {embed:.4f} s, a query {compose:.4f} s")
    print(f"  released way:    {released / 3600:9.2f} h")
    print(
        f"  stored features: {stored / 3600:9.2f} h, of which the store "
        f"{IMAGES * encode / 3600:.2f} h and the minings "
        f"{MININGS * TRIPLETS * (embed + compose) / 3600:.2f} h"
    )
    print(f"  released / stored: {released / stored:.2f} x")


def compiled(batch: int, steps: int) -> None:
    """A step by `torch.compile` against the eager one, each from the same weights."""
    seconds, losses = {}, {}
    for way, mode in (("eager", None), ("compiled", "default"), ("graphs", "reduce-overhead")):
        model, processor = build(0.0)
        shape = (vision_tokens(model.config), model.config.vision["hidden_size"])
        generator = torch.Generator().manual_seed(1)
        features = torch.randn(3 * batch, *shape, generator=generator).half()
        own = batch_of(Memory("vision", features), processor, batch)
        optimisation = ours(model)
        if mode:
            optimisation.step = torch.compile(optimisation.step, mode=mode)  # type: ignore[assignment]
        taken, losses[way] = timed(
            steps, lambda o=optimisation, b=own: o.take(b, 0).sums["loss"] / batch
        )
        seconds[way] = float(np.median(taken))
    for way in ("compiled", "graphs"):
        pairs = zip(losses[way], losses["eager"], strict=True)
        difference = max(abs(a - b) / abs(b) for a, b in pairs)
        print(
            f"torch.compile ({way}), batch {batch}: {seconds['eager']:.4f} s a step eager, "
            f"{seconds[way]:.4f} s so: {seconds['eager'] / seconds[way]:.2f} x; "
            f"largest relative difference of a loss: {difference:.1e}"
        )


def gpu(batch: int, steps: int) -> None:
    """Everything of a step on this GPU: alone, compiled, with its loader, and a whole schedule."""
    if DEVICE.type != "cuda":
        sys.exit("gpu: torch finds no CUDA device on this machine")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for size in sorted({8, batch}):
        step(size, steps)
    loader(batch, steps)
    schedule(batch, steps)
    compiled(batch, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["step", "loader", "store", "schedule", "gpu"])
    parser.add_argument("--batch", type=int, default=8, help="triplets in a step")
    parser.add_argument("--steps", type=int, default=3, help="steps timed")
    parser.add_argument("--images", type=int, default=96, help="images of the larger store")
    chosen = parser.parse_args()
    if chosen.task == "store":
        store(chosen.images)
    else:
        {"step": step, "loader": loader, "schedule": schedule, "gpu": gpu}[chosen.task](
            chosen.batch, chosen.steps
        )


if __name__ == "__main__":
    main()
