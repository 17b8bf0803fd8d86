"""The streaming engine equals a full sort, whatever the scores, shards and buckets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_steep_drops import SCORES
from torch import Tensor

from qure_core.base.config import MiningSettings
from qure_core.mining.engines import sketch, streaming
from qure_core.mining.engines.keys import key_columns, key_scores, pack_keys
from qure_core.mining.engines.sketch import Anchors, Summary, merged
from qure_core.mining.engines.sort import rank_queries
from qure_core.mining.engines.streaming import (
    QueryRanking,
    Request,
    answer,
    settle_all,
    settle_ends,
    summarise_chunks,
)
from qure_core.mining.rows import MinedRow, rows_of, whole_curve
from qure_core.mining.rules import target_drop
from qure_core.mining.rules.steep_drops import DropRule
from qure_core.mining.rules.target_drop import TargetDrop
from qure_core.mining.sampling import image_words, query_words, threshold_for


def by_sorting(
    scores: Tensor,
    target: Tensor,
    reference: Tensor,
    rule: DropRule,
    wanted: int | None,
    words: tuple[Tensor, Tensor],
) -> list[MinedRow]:
    ranked = rank_queries(scores, target, reference)
    selection, curve = rule.select(ranked), whole_curve(ranked)
    return rows_of(ranked, selection, rule.statuses, *words, wanted, curve)


def by_streaming(
    scores: Tensor,
    target: Tensor,
    reference: Tensor,
    rule: DropRule,
    wanted: int | None,
    words: tuple[Tensor, Tensor],
    cuts: Sequence[int],
    low: Tensor | None = None,
    columns: int = 7,
) -> tuple[list[MinedRow], int]:
    rows = torch.arange(len(scores))
    images = scores.shape[1]
    target_score = scores[rows, target]
    threshold = threshold_for(wanted, images) if wanted else 0
    lowest = scores.amin(dim=1) if low is None else low
    anchors = Anchors.of(target_score, target, reference, lowest, words[0], threshold)

    def chunks(chosen: Sequence[int], first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        for start in range(first, last, columns):
            yield start, scores[list(chosen), start : min(start + columns, last)]

    bounds = [0, *sorted(set(cuts) - {0, images}), images]
    summaries = [
        Summary.from_bytes(
            summarise_chunks(chunks(range(len(scores)), a, b), anchors, words[1]).to_bytes()
        )
        for a, b in itertools.pairwise(bounds)
    ]
    settled = settle_all(
        merged(reversed(summaries)),
        anchors,
        rule,
        wanted,
        lambda chosen: chunks(chosen, 0, images),
        words[1],
        lambda asked: max(1, len(asked) // 2),
    )
    rows_and_looks = list(settled)
    return [row for row, _ in rows_and_looks], sum(again for _, again in rows_and_looks)


def plain(details: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in details.items()}


def assert_same(ours: list[MinedRow], expected: list[MinedRow]) -> None:
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        for name in ("target_score", "target_rank", "status", "size"):
            assert getattr(a, name) == getattr(b, name), name
        assert plain(a.details) == plain(b.details)
        np.testing.assert_array_equal(a.negative_keys, b.negative_keys)


def names(queries: int, images: int) -> tuple[Tensor, Tensor]:
    return (
        query_words([f"q{i}" for i in range(queries)], 1, 2),
        image_words([f"i{i}" for i in range(images)]),
    )


RULES = st.builds(
    DropRule,
    window_ranks=st.one_of(st.none(), st.integers(4, 40)),
    window_quantile=st.one_of(st.none(), st.floats(0.05, 1)),
    min_steepness=st.one_of(st.none(), st.floats(0.5, 20)),
)


# Coarse scores, as of quantised embeddings: cuts of equal width fall between equal scores.
DYADIC = st.integers(0, 40).map(lambda k: 1 - k / 64)


def test_a_cut_that_ends_inside_equal_scores() -> None:
    """What lies between two cut segments stays as it is, even where it follows at the next key."""
    below = [0.9, 0.85, 0.82, 0.8, 0.8, 0.8, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4]
    scores = torch.tensor([[2.0, *below]])
    keys = pack_keys(scores)[0, 1:].numpy()
    # Open, flat, one image, open: the first and the last are cut.
    bounds = [(0, 3), (4, 6), (7, 7), (8, 11)]
    ranking = QueryRanking(
        target_key=int(pack_keys(scores)[0, 0]),
        target_rank=0,
        first_S=keys[[first for first, _ in bounds]],
        last_S=keys[[last for _, last in bounds]],
        count_S=np.asarray([last - first + 1 for first, last in bounds]),
        sample=np.empty(0, np.int64),
        word=0,
        image_words=None,
    )
    edges = [streaming._cut(int(keys[first]), int(keys[last]), 4) for first, last in bounds[::3]]
    request = Request(cut=np.unique(np.concatenate(edges)))
    none, word = torch.tensor([-1]), torch.zeros(1, dtype=torch.int32)
    anchors = Anchors.of(scores[:, 0], torch.tensor([0]), none, scores.amin(1), word, 0)
    found = answer({0: request}, anchors, lambda _: [(0, scores)], None)
    ranking.take(request, found[0])
    assert ranking.below == len(below)
    assert (4, 3) in zip(ranking.start_S.tolist(), ranking.count_S.tolist(), strict=True)
    for position, key in enumerate(keys.tolist()):
        if position not in (5,):  # inside the flat segment, which nobody asked to look into
            assert ranking.key_at(position) == key


def drawn(data: st.DataObject, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of up to ``most`` images, targets, and what is left out: a reference and known
    positives; at least the target and one more are left."""
    images = data.draw(st.integers(3, most))
    kind = data.draw(st.sampled_from([SCORES, DYADIC]))
    rows = data.draw(
        st.lists(st.lists(kind, min_size=images, max_size=images), min_size=1, max_size=3)
    )
    target = torch.tensor([data.draw(st.integers(0, images - 1)) for _ in rows])
    left_out = st.lists(st.integers(-1, images - 1), min_size=3, max_size=3)
    reference = torch.tensor([data.draw(left_out) for _ in rows])[:, : min(3, images - 2)]
    return torch.tensor(rows, dtype=torch.float32), target, reference


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_equals_the_sort(data: st.DataObject) -> None:
    scores, target, reference = drawn(data, 120)
    images = scores.shape[1]
    rule, wanted = data.draw(RULES), data.draw(st.one_of(st.none(), st.integers(1, 20)))
    words = names(*scores.shape)
    cuts = data.draw(st.lists(st.integers(1, images - 1), max_size=4))
    low = torch.full((len(scores),), data.draw(st.sampled_from([-100.0, -1.0, 0.0, 0.9])))
    few = data.draw(st.sampled_from([4, 16, 1024]))
    with (
        patch.object(sketch, "BUCKETS", few),
        patch.object(streaming, "BUCKETS", few),
        patch.object(sketch, "ENDS", data.draw(st.sampled_from([2, 8, 512]))),
        patch.object(streaming, "LIST_AT_MOST", data.draw(st.sampled_from([3, 65_536]))),
    ):
        ours, _ = by_streaming(scores, target, reference, rule, wanted, words, cuts, low)
    assert_same(ours, by_sorting(scores, target, reference, rule, wanted, words))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_rule_of_the_ends_equals_the_sort(data: st.DataObject) -> None:
    scores, target, reference = drawn(data, 60)
    images = scores.shape[1]
    options = {
        "candidates": data.draw(st.integers(4, 9)),
        "among": data.draw(st.sampled_from(["below", "anywhere"])),
        "negatives": data.draw(st.sampled_from([None, 1, 3])),
    }
    rule = TargetDrop.of(MiningSettings(rule="target_drop", options=options))
    wanted = data.draw(st.one_of(st.none(), st.integers(1, 4)))
    words = names(*scores.shape)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    tokens = torch.randn(images, 2, 3, generator=generator)
    ranked = rank_queries(scores, target, reference, tokens.__getitem__)
    ranked = replace(ranked, images_at_once=data.draw(st.integers(1, 30)))
    few = (  # ranks that a rule may look at, and so the ends that are kept
        patch.object(target_drop, "LOOKED_AT", 10),
        patch.object(target_drop, "_FURTHER", 5),
        patch.object(sketch, "ENDS", 10),
    )
    with few[0], few[1]:
        selection = rule.select(ranked)
    expected = rows_of(ranked, selection, rule.statuses, *words, wanted, whole_curve(ranked))
    cuts = data.draw(st.lists(st.integers(1, images - 1), max_size=4))
    target_score = scores.gather(1, target[:, None])[:, 0]
    with few[0], few[1], few[2]:
        anchors = Anchors.of(target_score, target, reference, scores.amin(1), words[0], 0, 10)
        summaries = [
            Summary.from_bytes(
                summarise_chunks([(a, scores[:, a:b].clone())], anchors, words[1]).to_bytes()
            )
            for a, b in itertools.pairwise([0, *sorted(set(cuts)), images])
        ]
        ours = list(
            settle_ends(
                merged(reversed(summaries)), anchors, rule, wanted, words[1], tokens.__getitem__, 5
            )
        )
    assert_same(ours, expected)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(one.left_alone_keys, other.left_alone_keys)
        known = dict(zip(*(part.tolist() for part in other.curve), strict=True))
        # What is near the top is known also where the target is far below.
        assert 0 in one.curve[0]
        both = [(r, s) for r, s in zip(*(p.tolist() for p in one.curve), strict=True) if r in known]
        assert both
        assert all(known[rank] == score for rank, score in both)


def curves(images: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    x = np.arange(images, dtype=np.float32)
    return {
        "linear": -x / 4096,
        "equal": np.zeros(images),
        "one outlier": np.where(x == images - 1, -100, -x * 1e-7),
        "two outliers": np.where(x >= images - 2, -100 - x, -x * 1e-7),
        "smooth": np.exp(-x / 400),
        "staircase": -np.floor(x / 70),
        "duplicates": -np.sort(rng.integers(0, 5, images)),
        "denormals": -x * 1e-45,
        "normal": np.sort(rng.standard_normal(images))[::-1] * 0.1,
    }


@pytest.mark.parametrize("kind", sorted(curves(4)))
def test_adversarial_curves_of_thousands(kind: str) -> None:
    images = 6000
    curve = torch.from_numpy(curves(images)[kind].astype(np.float32))
    shuffled = curve[torch.randperm(images, generator=torch.Generator().manual_seed(0))]
    order = shuffled.sort(descending=True, stable=True).indices
    # The target first, near the top, in the middle and last.
    target = order[torch.tensor([0, 3, images // 2, images - 1])]
    scores = shuffled.expand(4, -1).contiguous()
    reference = torch.tensor([-1, int(order[10]), int(order[-1]), int(target[3])])
    words = names(4, images)
    for wanted in (None, 25):
        for list_at_most in (200, 65_536):
            with patch.object(streaming, "LIST_AT_MOST", list_at_most):
                ours, _ = by_streaming(
                    scores,
                    target,
                    reference,
                    DropRule(),
                    wanted,
                    words,
                    [1000, 2500],
                    columns=800,
                )
            assert_same(ours, by_sorting(scores, target, reference, DropRule(), wanted, words))


@pytest.mark.parametrize("name", ["mining_fashioniq.npz", "mining_cirr.npz"])
def test_equals_the_sort_on_the_goldens(name: str) -> None:
    """The sort engine is held against the goldens' sets themselves in test_steep_drops."""
    archive = np.load(GOLDENS / name)
    compared = 0
    for case in sorted({key.split("__")[0] for key in archive.files}):
        scores = torch.from_numpy(archive[f"{case}__scores"])
        if scores.shape[1] < 3:
            continue
        target = torch.randint(
            scores.shape[1], (len(scores),), generator=torch.Generator().manual_seed(1)
        )
        if f"{case}__target_id" in archive.files and "fashioniq" not in name:
            target = torch.from_numpy(archive[f"{case}__target_id"]).long()
        reference = torch.full_like(target, -1)
        words = names(*scores.shape)
        ours, _ = by_streaming(scores, target, reference, DropRule(), None, words, [5])
        assert_same(ours, by_sorting(scores, target, reference, DropRule(), None, words))
        compared += len(ours)
    assert compared > 100


def test_few_queries_need_a_second_look() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 0.1 * torch.randn(64, 30_000, generator=generator) + 0.2
    target = torch.randint(30_000, (64,), generator=generator)
    words = names(*scores.shape)
    reference = torch.full_like(target, -1)
    ours, seconds = by_streaming(
        scores, target, reference, DropRule(), 50, words, [11_000], columns=4000
    )
    assert_same(ours, by_sorting(scores, target, reference, DropRule(), 50, words))
    assert seconds <= 3


def test_keys_rank_as_scores_do() -> None:
    values = [0.0, -0.0, 1.5, -1.5, 1e-45, -1e-45, 3.4e38, -3.4e38, 0.1, np.float32(0.1)]
    scores = torch.tensor([values], dtype=torch.float32)
    keys = pack_keys(scores, 5)
    assert torch.equal(key_scores(keys), scores + 0.0)
    assert key_columns(keys).tolist() == [list(range(5, 15))]
    order = keys[0].argsort()
    assert torch.equal(order, scores[0].sort(descending=True, stable=True).indices)


def test_bad_scores_are_refused() -> None:
    scores = torch.randn(2, 10)
    scores[1, 3] = torch.inf
    with pytest.raises(ValueError, match=r"queries \[1\] are not finite"):
        by_streaming(
            scores,
            torch.tensor([0, 0]),
            torch.tensor([-1, -1]),
            DropRule(),
            None,
            names(2, 10),
            [],
        )


def test_scores_that_change_between_looks_are_noticed() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 5000, generator=generator)
    target, reference = scores.argmax(dim=1), torch.tensor([-1])
    words = names(1, 5000)
    anchors = Anchors.of(scores[0, target], target, reference, scores.amin(1), words[0], 0)
    summary = summarise_chunks([(0, scores)], anchors, None)

    def other(rows: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        yield 0, scores[list(rows)] * 1.001

    with pytest.raises(RuntimeError, match=r"mining\.engine"):
        list(settle_all(summary, anchors, DropRule(), None, other, None, len))
