"""What a batch is made of, and that any number of workers sees the same ones."""

from __future__ import annotations

import collections
import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qure_core.base.config import DataSettings
from qure_core.data import load_split, mining_galleries
from qure_core.data.loader import ImageLoader
from qure_core.data.schema import Triplet
from qure_core.embeddings.encoder import Encoder
from qure_core.model import QuReModel, QuReProcessor, build_model, learn_tokenizer
from qure_core.model.relevance import token_likeness
from qure_core.objectives import make_objective
from qure_core.runtime.prefetch import prefetched
from qure_core.training.batches import (
    Batch,
    CaptionBatches,
    Share,
    TripletBatches,
    epoch_batches,
    epoch_order,
)
from qure_core.training.negatives import mined_negatives, random_negatives
from qure_core.training.steps import TripletStep


def query(number: int, target: str = "c") -> Triplet:
    return Triplet(f"q{number}", "a", "text", target, "all")


def test_warmup_negative_is_uniform_over_all_but_the_target() -> None:
    corpus = ["a", "b", "c", "d"]
    drawn = collections.Counter(
        random_negatives(query(i), corpus, seed=1, epoch=e)[0]
        for i in range(1000)
        for e in range(6)
    )
    assert set(drawn) == {"a", "b", "d"}
    assert all(abs(count - 2000) < 150 for count in drawn.values()), drawn
    for target in corpus:
        assert random_negatives(query(0, target), corpus, 1, 0) != (target,)


@given(st.sets(st.sampled_from("abdefghxyz"), max_size=6), st.integers(1, 3), st.integers(0, 99))
def test_known_positives_are_no_negatives_of_the_warmup(
    positives: set[str], count: int, epoch: int
) -> None:
    corpus = list("abcdefgh")
    known = replace(query(1), positive_ids=tuple(positives))
    left = set(corpus) - {"c"} - positives
    if len(left) >= count:
        drawn = random_negatives(known, corpus, seed=1, epoch=epoch, count=count)
        assert len(set(drawn)) == count
        assert set(drawn) <= left


def test_known_positives_leave_the_rest_uniform() -> None:
    known = [replace(query(i), positive_ids=("e", "a", "q")) for i in range(6000)]
    drawn = collections.Counter(
        random_negatives(triplet, list("abcdefgh"), seed=1, epoch=0)[0] for triplet in known
    )
    assert set(drawn) == set("bdfgh")
    assert all(abs(count - 1200) < 150 for count in drawn.values()), drawn


def test_several_warmup_negatives_are_different_and_uniform() -> None:
    corpus = ["a", "b", "c", "d", "e"]
    drawn = collections.Counter(
        random_negatives(query(i), corpus, seed=1, epoch=0, count=2) for i in range(6000)
    )
    others = [name for name in corpus if name != "c"]
    assert set(drawn) == {(x, y) for x in others for y in others if x != y}
    assert all(abs(count - 500) < 100 for count in drawn.values()), drawn
    every = random_negatives(query(0), corpus, seed=1, epoch=0, count=4)
    assert sorted(every) == others
    # The first of several is the one that is drawn alone.
    assert every[:1] == random_negatives(query(0), corpus, seed=1, epoch=0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_hard_negatives_repeat_only_after_all_were_drawn(count: int) -> None:
    negatives = np.array([f"n{i}" for i in range(5)], dtype=object)
    drawn = [
        name
        for e in range(5, 20)
        for name in mined_negatives("q", negatives, seed=1, mined_at=5, epoch=e, count=count)
    ]
    assert len(drawn) == 15 * count
    cycles = [drawn[start : start + 5] for start in range(0, len(drawn), 5)]
    assert all(sorted(cycle) == sorted(negatives) for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) > 1
    first = collections.Counter(
        mined_negatives(f"q{i}", negatives, seed=1, mined_at=5, epoch=5)[0] for i in range(2000)
    )
    assert all(abs(count - 400) < 100 for count in first.values())


@dataclass(frozen=True)
class Parts:
    triplets: list[Triplet]
    corpora: dict[str, tuple[str, ...]]
    load: ImageLoader
    processor: QuReProcessor
    model: QuReModel

    def batches(
        self, share: Share, epoch: int = 0, *, negatives: int = 1, in_batch: bool = False
    ) -> list[Batch]:
        def negatives_of(t: Triplet) -> tuple[str, ...]:
            return random_negatives(t, self.corpora[t.category], 7, epoch, negatives)

        build = TripletBatches(self.triplets, negatives_of, self.load, self.processor, in_batch)
        order = epoch_order(len(self.triplets), 7, epoch)
        return list(prefetched(epoch_batches(build, order, 16, share)))

    def losses(self, batch: Batch, objective: str = "bradley_terry") -> Tensor:
        """The batch's losses, its images encoded on the fly."""
        inputs = dict(batch.inputs)
        inputs["vision"] = Encoder(self.model, self.processor, precision="fp32").vision(inputs)
        del inputs["pixel_values"]
        losses, _ = TripletStep(self.model, make_objective(objective, {}))(**inputs)
        result: Tensor = losses
        return result


@pytest.fixture(scope="module")
def parts(world: Path) -> Parts:
    data = DataSettings(root=str(world))
    split = load_split(data, "train")
    tokenizer = learn_tokenizer([t.text for t in split.triplets], 200)
    model, processor = build_model("tiny", tokenizer, 0.0, seed=1)
    load = ImageLoader(
        split.images, processor.image_size, processor.pixels, 10**6, threads=2, cache_mb=1
    )
    return Parts(list(split.triplets), mining_galleries(data, split), load, processor, model)


@pytest.mark.parametrize("negatives", [1, 3])
def test_workers_share_the_same_global_batches(parts: Parts, negatives: int) -> None:
    parts.model.train()
    alone = parts.batches(Share(), negatives=negatives)
    assert [b.count for b in alone] == [16] * 5 + [10]  # the last, short batch is kept
    assert sum(b.count for b in alone) == len(parts.triplets)
    for workers in (2, 3, 12):
        shared = [
            parts.batches(Share(rank, workers), negatives=negatives) for rank in range(workers)
        ]
        for step, whole in enumerate(alone):
            own = [part[step] for part in shared]
            assert sum(float(part.weight_B.sum()) for part in own) == whole.count
            names = [
                name
                for part in own
                for name, weight in zip(part.names, part.weight_B, strict=True)
                if weight
            ]
            assert tuple(names) == whole.names
            # The weighted losses of all parts add up to the whole batch's.
            with torch.no_grad():
                losses = sum((parts.losses(part) * part.weight_B).sum() for part in own)
                expected = parts.losses(whole).sum()
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_epochs_differ_and_repeat_exactly(parts: Parts) -> None:
    first, again, other = (parts.batches(Share(), epoch) for epoch in (0, 0, 1))
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
    assert not torch.equal(first[0].inputs["input_ids"], other[0].inputs["input_ids"])


def test_distinct_images_are_loaded_once(parts: Parts) -> None:
    pixels = parts.batches(Share())[0].inputs["pixel_values"]
    assert len({image.numpy().tobytes() for image in pixels}) == len(pixels)
    order = np.random.default_rng(0).permutation(len(parts.triplets))[:4]
    negatives = {t.query_id: parts.corpora[t.category][:2] for t in parts.triplets}
    build = TripletBatches(
        parts.triplets, lambda t: negatives[t.query_id], parts.load, parts.processor
    )
    built = build(order, Share()).inputs
    for row, triplet in enumerate(parts.triplets[i] for i in order):
        names = [triplet.reference_id, str(triplet.target_id), *negatives[triplet.query_id]]
        answers = built["answer_A"]
        got = built["pixel_values"][
            [
                int(built["reference_B"][row]),
                int(answers[built["target_B"][row]]),
                *(int(answers[column]) for column in built["negative_BK"][row]),
            ]
        ]
        assert torch.equal(got, parts.load(names))


@pytest.mark.parametrize("workers", [1, 2, 3, 12])
def test_in_batch_candidates_by_definition(parts: Parts, workers: int) -> None:
    # A second target of the first query, and a category of its own.
    first, second, third = parts.triplets[:3]
    odd = [
        replace(second, reference_id=first.reference_id, text=first.text, category=first.category),
        replace(third, category="another"),
    ]
    rest = list(parts.triplets[3:16])
    rest[0] = replace(rest[0], positive_ids=tuple(str(t.target_id) for t in rest[5:9]))
    triplets = [first, *odd, *rest]
    corpus = sorted({name for ids in parts.corpora.values() for name in ids})
    negatives_of = partial(random_negatives, corpus=corpus, seed=1, epoch=0, count=2)
    own = {t.query_id: negatives_of(t) for t in triplets}
    answers = sorted({str(t.target_id) for t in triplets}.union(*own.values()))
    build = TripletBatches(triplets, negatives_of, parts.load, parts.processor, in_batch=True)
    for rank in range(workers):
        inputs = build(np.arange(len(triplets)), Share(rank, workers)).inputs
        assert inputs["valid_B"].all()
        assert inputs["candidate_BA"].shape == (len(triplets), len(answers))
        for row, triplet in enumerate(triplets):
            same = [t for t in triplets if t.category == triplet.category]
            near = {str(t.target_id) for t in same}.union(*(own[t.query_id] for t in same))
            known = {
                str(t.target_id)
                for t in same
                if (t.reference_id, t.text) == (triplet.reference_id, triplet.text)
            }
            known |= set(triplet.positive_ids)
            expected = (near - known - {triplet.reference_id}) | set(own[triplet.query_id])
            found = [answers[column] for column in torch.nonzero(inputs["candidate_BA"][row])]
            assert set(found) == expected
            assert answers[inputs["target_B"][row]] == triplet.target_id
            listed = [answers[column] for column in inputs["negative_BK"][row]]
            assert tuple(listed) == own[triplet.query_id]


@pytest.mark.parametrize("workers", [2, 3])
def test_caption_batches_have_one_size(parts: Parts, workers: int) -> None:
    captions = {image_id: f"a dress {i}" for i, image_id in enumerate(sorted(parts.load.images))}
    build = CaptionBatches(captions, parts.load, parts.processor)
    order = epoch_order(len(captions), 1, 0, "caption order")

    def batches(share: Share) -> list[Batch]:
        return [step() for step in epoch_batches(build, order, 16, share, keep_short=False)]

    whole = batches(Share())
    assert len(whole) == len(captions) // 16
    shares = [batches(Share(rank, workers)) for rank in range(workers)]
    for step, batch in enumerate(whole):
        for name in ("pixel_values", "input_ids", "attention_mask", "same_BN"):
            joined = torch.cat([part[step].inputs[name] for part in shares])
            assert torch.equal(joined, batch.inputs[name])


def test_a_failing_batch_is_not_swallowed() -> None:
    def fail() -> int:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(prefetched([lambda: 1, fail, lambda: 2]))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_what_may_fit_is_told_as_mining_would(
    parts: Parts, dropout: float, precision: torch.dtype | None
) -> None:
    """Whatever the training's dropout and precision: the threshold is of neither."""
    model = copy.deepcopy(parts.model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    build = TripletBatches(
        parts.triplets,
        lambda t: random_negatives(t, parts.corpora[t.category], 7, 0, 2),
        parts.load,
        parts.processor,
        in_batch=True,
        threshold_of=lambda t: 0.0,
    )
    inputs = dict(build(np.arange(16), Share()).inputs)
    encoder = Encoder(model, parts.processor, precision="fp32")
    inputs["vision"] = encoder.vision(inputs)
    del inputs["pixel_values"]
    with torch.no_grad():
        image_ATD = copy.deepcopy(model).eval().embed_images(inputs["vision"][inputs["answer_A"]])
    candidate_BA, target_B = inputs["candidate_BA"], inputs["target_B"]
    likeness_BA = token_likeness(image_ATD[target_B], image_ATD)
    of_candidates_BA = likeness_BA.masked_fill(~candidate_BA, -torch.inf)
    # The fifth likest of each is at its threshold; one query has none.
    inputs["threshold_B"] = of_candidates_BA.topk(5, dim=1).values[:, -1]
    inputs["threshold_B"][3] = torch.inf
    expected_B = torch.full((16,), 5.0)
    expected_B[3] = 0
    step = TripletStep(model, make_objective("info_nce", {}))
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        losses_B, figures = step(**inputs)
    torch.testing.assert_close(figures["likely"], expected_B)
    assert model.qformer.training
    without = TripletStep(model, make_objective("info_nce", {"mask_likely": False}))
    more_B, figures = without(**inputs)
    assert "likely" not in figures
    if dropout == 0 and precision is None:
        assert (more_B > losses_B)[expected_B > 0].all()
        torch.testing.assert_close(more_B[3], losses_B[3])


def test_bf16_autocast_step_is_close_to_fp32(parts: Parts) -> None:
    parts.model.eval()
    batch = parts.batches(Share())[0]
    with torch.no_grad():
        exact = parts.losses(batch)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = parts.losses(batch)
    assert not torch.equal(rounded.float(), exact)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.3)
