"""The schedule against the released program's, and what a batch is made of."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS

from qure_core.base.config import DataSettings, TrainSettings
from qure_core.data import load_split, mining_galleries
from qure_core.data.schema import Triplet
from qure_core.model import QuReModel, build_model, encode_frozen, learn_tokenizer
from qure_core.training.batches import (
    Batch,
    ImageLoader,
    caption_batches,
    mined_negative,
    prefetched,
    random_negative,
    triplet_batches,
)
from qure_core.training.optimisation import autocast_type
from qure_core.training.schedule import (
    evaluation_epochs,
    learning_rate,
    mining_epochs,
    stage_boundaries,
)

OUTPUTS = np.load(GOLDENS / "model_tiny_outputs.npz")


@pytest.mark.parametrize(
    ("key", "epochs", "rate"), [("lr_fashioniq_30", 30, 5e-6), ("lr_cirr_50", 50, 1e-5)]
)
def test_learning_rate_is_the_released_programs(key: str, epochs: int, rate: float) -> None:
    ours = [learning_rate(epoch, epochs, rate, rate / 100) for epoch in range(epochs)]
    assert ours == OUTPUTS[key].tolist()


def test_mining_epochs_are_the_released_programs() -> None:
    keys = [key for key in OUTPUTS.files if key.startswith("rerank_epochs_")]
    assert len(keys) == 2
    for key in keys:
        epochs = 30 if "fashioniq" in key else 50
        train = TrainSettings(epochs=epochs, mining_definitions=6)
        assert mining_epochs(train) == OUTPUTS[key].tolist()


def test_configured_warmup_and_stops() -> None:
    train = TrainSettings(epochs=18, warmup_epochs=9, mining_definitions=6, eval_every=6)
    assert mining_epochs(train) == [9, 12, 15]
    assert stage_boundaries(train) == [0, 6, 9, 12, 15, 18]
    assert evaluation_epochs(train) == {
        0: "start",
        6: "epoch 6",
        9: "end of warm-up",
        12: "epoch 12",
        18: "end",
    }


def query(number: int, target: str = "c") -> Triplet:
    return Triplet(f"q{number}", "a", "text", target, "all")


def test_warmup_negative_is_uniform_over_all_but_the_target() -> None:
    corpus = ["a", "b", "c", "d"]
    drawn = collections.Counter(
        random_negative(query(i), corpus, seed=1, epoch=e) for i in range(1000) for e in range(6)
    )
    assert set(drawn) == {"a", "b", "d"}
    assert all(abs(count - 2000) < 150 for count in drawn.values()), drawn
    for target in corpus:
        assert random_negative(query(0, target), corpus, 1, 0) != target


def test_hard_negatives_repeat_only_after_all_were_drawn() -> None:
    negatives = np.array([f"n{i}" for i in range(5)], dtype=object)
    drawn = [mined_negative("q", negatives, seed=1, mined_at=5, epoch=e) for e in range(5, 20)]
    for start in (0, 5, 10):
        assert sorted(drawn[start : start + 5]) == sorted(negatives)
    assert drawn[:5] != drawn[5:10] or drawn[5:10] != drawn[10:]
    first = collections.Counter(
        mined_negative(f"q{i}", negatives, seed=1, mined_at=5, epoch=5) for i in range(2000)
    )
    assert all(abs(count - 400) < 100 for count in first.values())


@pytest.fixture(scope="module")
def parts(world: Path) -> tuple[list[Triplet], dict[str, tuple[str, ...]], ImageLoader, QuReModel]:
    data = DataSettings(root=str(world))
    split = load_split(data, "train")
    tokenizer = learn_tokenizer([t.text for t in split.triplets], 200)
    model, processor = build_model("tiny", tokenizer, 0.0, seed=1)
    load = ImageLoader(split.images, processor, 10**6, threads=2, cache_mb=1)
    return list(split.triplets), mining_galleries(data, split), load, model


def epoch_batches(
    parts: tuple[list[Triplet], dict[str, tuple[str, ...]], ImageLoader, QuReModel],
    rank: int,
    workers: int,
    epoch: int = 0,
) -> list[Batch]:
    triplets, corpora, load, _ = parts

    def negative_of(t: Triplet) -> str:
        return random_negative(t, corpora[t.category], 7, epoch)

    steps = triplet_batches(
        triplets,
        negative_of,
        load,
        load.processor,
        batch_size=16,
        seed=7,
        epoch=epoch,
        rank=rank,
        workers=workers,
    )
    return list(prefetched(steps))


def score(model: QuReModel, batch: Batch) -> torch.Tensor:
    """The batch's scores, its images encoded on the fly."""
    inputs = dict(batch.inputs)
    encoder = model.vision_encoder
    vision = encode_frozen(encoder, inputs.pop("pixel_values"), "fp32")
    scores: torch.Tensor = model(vision=vision, **inputs)
    return scores


def test_workers_share_the_same_global_batches(
    parts: tuple[list[Triplet], dict[str, tuple[str, ...]], ImageLoader, QuReModel],
) -> None:
    triplets, _, _, model = parts
    model.train()
    alone = epoch_batches(parts, 0, 1)
    assert [b.count for b in alone] == [16] * 5 + [10]  # the last, short batch is kept
    assert sum(b.count for b in alone) == len(triplets)
    for workers in (2, 3, 12):
        shared = [epoch_batches(parts, rank, workers) for rank in range(workers)]
        for step, whole in enumerate(alone):
            kept = sum(float(part[step].weight_B.sum()) for part in shared)
            assert kept == whole.count
            # The weighted losses of all parts add up to the whole batch's.
            with torch.no_grad():
                losses = sum(
                    torch.nn.functional.softplus((s := score(model, part[step]))[:, 1] - s[:, 0])
                    .mul(part[step].weight_B)
                    .sum()
                    for part in shared
                )
                s = score(model, whole)
                expected = torch.nn.functional.softplus(s[:, 1] - s[:, 0]).sum()
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_epochs_differ_and_repeat_exactly(
    parts: tuple[list[Triplet], dict[str, tuple[str, ...]], ImageLoader, QuReModel],
) -> None:
    first, again, other = (epoch_batches(parts, 0, 1, epoch) for epoch in (0, 0, 1))
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
    assert not torch.equal(first[0].inputs["input_ids"], other[0].inputs["input_ids"])


def test_distinct_images_are_loaded_once(
    parts: tuple[list[Triplet], dict[str, tuple[str, ...]], ImageLoader, QuReModel],
) -> None:
    triplets, corpora, load, _ = parts
    batch = epoch_batches(parts, 0, 1)[0]
    pixels = batch.inputs["pixel_values"]
    assert len({image.numpy().tobytes() for image in pixels}) == len(pixels)
    order = np.random.default_rng(0).permutation(len(triplets))[:4]
    chosen = [triplets[i] for i in order]
    from qure_core.training.batches import triplet_batch

    negatives = [corpora[t.category][0] for t in chosen]
    built = triplet_batch(chosen, negatives, load, load.processor, 1.0, 4).inputs
    for row, triplet in enumerate(chosen):
        expected = load([triplet.reference_id, str(triplet.target_id), negatives[row]])
        answers = built["answer_A"]
        got = built["pixel_values"][
            [
                int(built["reference_B"][row]),
                int(answers[built["target_B"][row]]),
                int(answers[built["negative_B"][row]]),
            ]
        ]
        assert torch.equal(got, expected)


def test_caption_batches_have_one_size(
    parts: tuple[list[Triplet], dict[str, tuple[str, ...]], ImageLoader, QuReModel],
) -> None:
    load = parts[2]
    captions = {image_id: f"a dress {i}" for i, image_id in enumerate(sorted(load.images))}
    settings = {"batch_size": 16, "seed": 1, "epoch": 0}
    texts = load.processor
    whole = [s() for s in caption_batches(captions, load, texts, rank=0, workers=1, **settings)]
    assert len(whole) == len(captions) // 16
    halves = [
        [s() for s in caption_batches(captions, load, texts, rank=rank, workers=2, **settings)]
        for rank in range(2)
    ]
    for step, batch in enumerate(whole):
        joined = torch.cat([half[step].inputs["pixel_values"] for half in halves])
        assert torch.equal(joined, batch.inputs["pixel_values"])


def test_a_failing_batch_is_not_swallowed() -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(prefetched([lambda: 1, fail, lambda: 2]))


@pytest.mark.parametrize(
    ("name", "expected"), [("auto", None), ("fp32", None), ("bf16", torch.bfloat16)]
)
def test_precision_follows_the_device(name: str, expected: torch.dtype | None) -> None:
    assert autocast_type(name, torch.device("cpu")) == expected


def test_bf16_autocast_step_is_close_to_fp32(
    parts: tuple[list[Triplet], dict[str, tuple[str, ...]], ImageLoader, QuReModel],
) -> None:
    model = parts[3].eval()
    batch = epoch_batches(parts, 0, 1)[0]
    with torch.no_grad():
        exact = score(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = score(model, batch)
    assert not torch.equal(rounded.float(), exact)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.3)
