"""Rules of the field against their definitions, written out for one query at a time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from benchmarks.synthetic import make_split, write_embeddings
from hypothesis import given, settings
from hypothesis import strategies as st

from qure_core.base.config import MiningSettings, Settings
from qure_core.base.errors import InputError
from qure_core.embeddings.shards import EmbeddingShards
from qure_core.mining.engines.sort import rank_queries
from qure_core.mining.rules import RULES, Selection, rule_named
from qure_core.mining.stage import choose_engine, mining_rule, summarise
from qure_core.mining.tasks import RoundTask, mine_by_sorting, part_name
from qure_core.ranking.blocks import QueryBlock

FEW = st.lists(st.sampled_from([-0.5, -0.1, 0.0, 0.2, 0.3, 0.5, 0.8]), min_size=2, max_size=9)


def select(rule: str, scores: list[float], target: int, tokens: Any = None, **options: Any) -> Any:
    """A rule's selection for one query over images with these scores."""
    return select_whole(rule, scores, target, tokens, **options)[:3]


def select_whole(rule: str, scores: list[float], target: int, tokens: Any, **options: Any) -> Any:
    """The same, with the images left alone."""
    made = rule_named(rule).of(MiningSettings(rule=rule, options=options))
    ranked = rank_queries(torch.tensor([scores]), torch.tensor([target]), image_tokens=tokens)
    selection: Selection = made.select(ranked)
    chosen = ranked.columns(0, selection.ranks(0)).tolist()
    left_alone = None
    if selection.left_alone is not None:
        left_alone = ranked.columns(0, torch.from_numpy(selection.left_alone[0])).tolist()
    status = made.statuses[int(selection.status_Q[0])]
    return status, chosen, selection.details[0], left_alone


def others(scores: list[float], target: int) -> list[int]:
    """All images but the target, best first, equal ones in order."""
    order = sorted(range(len(scores)), key=lambda i: (-np.float32(scores[i]), i))
    return [i for i in order if i != target]


def below(scores: list[float], target: int) -> list[int]:
    place = (-np.float32(scores[target]), target)
    return [i for i in others(scores, target) if (-np.float32(scores[i]), i) > place]


@settings(deadline=None)
@given(FEW, st.data(), st.integers(0, 3), st.integers(1, 4), st.booleans())
def test_top_k(
    scores: list[float], data: st.DataObject, skip: int, wanted: int, anywhere: bool
) -> None:
    target = data.draw(st.integers(0, len(scores) - 1))
    among = others(scores, target) if anywhere else below(scores, target)
    status, chosen, details = select(
        "top_k",
        scores,
        target,
        skip=skip,
        negatives=wanted,
        among="anywhere" if anywhere else "below",
    )
    expected = among[skip : skip + wanted]
    if expected:
        assert (status, chosen) == ("found", expected)
        assert details["left_alone"] == others(scores, target).index(expected[0])
        assert details["bound"] is None
    elif below(scores, target):
        assert (status, chosen) == ("below_target", below(scores, target)[:wanted])
    else:
        assert (status, chosen) == ("corpus", others(scores, target)[:wanted])


@settings(deadline=None)
@given(FEW, st.data(), st.sampled_from(["margin_pos", "perc_pos"]), st.booleans())
def test_bounds_from_the_target(
    scores: list[float], data: st.DataObject, rule: str, guarded: bool
) -> None:
    target = data.draw(st.integers(0, len(scores) - 1))
    options: dict[str, Any] = {"margin": 0.15} if rule == "margin_pos" else {"share": 0.7}
    options |= {"guarded": guarded, "negatives": 3}
    own = float(np.float32(scores[target]))
    share = own - abs(own) * 0.3 if guarded else own * 0.7
    bound = own - 0.15 if rule == "margin_pos" else share
    expected = [i for i in others(scores, target) if np.float32(scores[i]) <= bound][:3]
    status, chosen, details = select(rule, scores, target, **options)
    assert details["bound"] == pytest.approx(bound)
    assert (status == "found") == bool(expected)
    assert chosen == (expected or (below(scores, target) or others(scores, target))[:3])


def test_a_negative_target_score_lowers_the_guarded_bound() -> None:
    scores = [-0.5, -0.48, -0.51, -0.53, -0.7]
    _, guarded, _ = select("perc_pos", scores, 0, share=0.9, negatives=1)
    _, as_published, _ = select("perc_pos", scores, 0, share=0.9, negatives=1, guarded=False)
    assert (guarded, as_published) == ([4], [1])


@settings(deadline=None)
@given(FEW, st.data())
def test_random_is_all_but_the_target(scores: list[float], data: st.DataObject) -> None:
    target = data.draw(st.integers(0, len(scores) - 1))
    assert select("random", scores, target)[:2] == ("found", others(scores, target))


def test_random_has_no_options() -> None:
    with pytest.raises(InputError, match=r"mining.options.negatives: .*random has the options"):
        rule_named("random").of(MiningSettings(options={"negatives": 5}))


def test_a_weighted_set_keeps_its_likeliest(
    embedded: tuple[str, str, QueryBlock], tmp_path: Path
) -> None:
    own, _, block = embedded
    rule = rule_named("simans").of(MiningSettings(options={"a": 1e6}))
    rows = {}
    for most in (None, 3):
        output = str(tmp_path / str(most))
        task = RoundTask(own, output, output, 0, 1, True, rule, most, "fp32", 2**26)
        mine_by_sorting(block, task)
        rows[most] = pq.read_table(f"{output}/{part_name(0)}").to_pylist()
    for whole, few in zip(rows[None], rows[3], strict=True):
        assert max(few["negative_weights"]) == 1
        best = sorted(whole["negative_weights"], reverse=True)[:3]
        assert sorted(few["negative_weights"], reverse=True) == best
        weight = dict(zip(whole["negative_ids"], whole["negative_weights"], strict=True))
        assert few["negative_weights"] == [weight[name] for name in few["negative_ids"]]


def plain_target_drop(
    candidates: list[int], likeness: dict[int, float], wanted: int | None
) -> list[int]:
    """The rule as STUDY's words have it."""
    ordered = sorted(candidates, key=lambda i: -likeness[i])
    gaps = [likeness[one] - likeness[two] for one, two in itertools.pairwise(ordered)]
    first = gaps[: len(candidates) // 2]
    left = set(ordered[first.index(max(first)) + 1 :]) if first else set(candidates)
    return [i for i in candidates if i in left][:wanted]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 12), st.booleans(), st.sampled_from([None, 1, 3]))
def test_target_drop(seed: int, images: int, anywhere: bool, wanted: int | None) -> None:
    torch.manual_seed(seed)
    tokens = torch.nn.functional.normalize(torch.randn(images, 3, 4), dim=-1)
    scores = torch.randn(images).tolist()
    target = int(torch.randint(images, ()))
    among = "anywhere" if anywhere else "below"
    status, chosen, details, left_alone = select_whole(
        "target_drop",
        scores,
        target,
        tokens.__getitem__,
        candidates=6,
        among=among,
        negatives=wanted,
    )
    under = below(scores, target)
    candidates = (under if under and not anywhere else others(scores, target))[:6]
    likeness = {
        i: float(np.mean([max(float(a @ b) for b in tokens[i]) for a in tokens[target]]))
        for i in candidates
    }
    ranking = sorted(range(images), key=lambda i: (-scores[i], i))
    alike_first = sorted(candidates, key=lambda i: -likeness[i])
    if anywhere and ranking.index(target) >= 6:  # the target is not among the candidates
        further = [i for i in ranking[images // 2 :] if i != target]
        assert (status, chosen, left_alone) == ("unsure", further[:wanted], alike_first)
        assert details["threshold"] is None
        return
    assert chosen == plain_target_drop(candidates, likeness, wanted)
    assert left_alone == alike_first[: details["left_alone"]]
    whole = plain_target_drop(candidates, likeness, None)
    assert set(left_alone) == set(candidates) - set(whole)
    if len(candidates) > 1:
        assert status == "drop"
        alike = sorted(likeness.values(), reverse=True)
        assert details["threshold"] == pytest.approx(alike[details["left_alone"] - 1], abs=1e-6)
    else:
        assert status == ("below_target" if under else "corpus")
        assert details["threshold"] is None


def test_the_candidates_of_a_target_that_is_not_found_are_left_alone() -> None:
    torch.manual_seed(4)
    tokens = torch.nn.functional.normalize(torch.randn(700, 3, 4), dim=-1)
    scores = torch.linspace(1, 0, 700).tolist()
    for target, unsure in ((49, False), (50, True), (300, True), (699, True)):
        status, chosen, details, left_alone = drop_of(
            tokens, scores, target, among="anywhere", negatives=None
        )
        assert (status == "unsure") == unsure
        if unsure:
            assert chosen == [i for i in range(250, 500) if i != target]
            assert sorted(left_alone) == list(range(50))
            assert details["threshold"] is None


def drop_of(tokens: torch.Tensor, scores: list[float], target: int, **options: Any) -> Any:
    return select_whole("target_drop", scores, target, tokens.__getitem__, **options)


def test_a_drop_of_identical_pictures_is_none() -> None:
    one = torch.nn.functional.normalize(torch.randn(1, 3, 4), dim=-1)
    scores = [0.5] * 5
    status, chosen, details, left_alone = drop_of(one.expand(5, 3, 4), scores, 2, negatives=None)
    assert (status, details["threshold"], left_alone) == ("below_target", None, [])
    assert chosen == [3, 4]
    status, chosen, _, left_alone = drop_of(one.expand(5, 3, 4), scores, 4, among="anywhere")
    assert (status, chosen, left_alone) == ("corpus", [0, 1, 2, 3], [])


def test_copies_that_fill_half_of_the_candidates_are_left_alone() -> None:
    torch.manual_seed(3)
    tokens = torch.nn.functional.normalize(torch.randn(8, 3, 4), dim=-1)
    tokens[:6] = tokens[7].clone()
    scores = torch.linspace(1, 0, 8).tolist()
    status, chosen, _, left = drop_of(tokens, scores, 7, among="anywhere", negatives=None)
    assert (status, chosen, left) == ("drop", [6], [0, 1, 2, 3, 4, 5])


def test_copies_of_the_target_are_left_alone() -> None:
    torch.manual_seed(1)
    tokens = torch.nn.functional.normalize(torch.randn(12, 3, 4), dim=-1)
    tokens[[3, 7]] = tokens[5].clone()
    scores = torch.linspace(1, 0, 12).tolist()  # a smooth curve
    for among, left in (("anywhere", [3, 7]), ("below", [7])):
        status, chosen, details, found = drop_of(tokens, scores, 5, among=among, negatives=None)
        assert (status, found) == ("drop", left)
        assert details["threshold"] == pytest.approx(1)
        assert not set(chosen) & {3, 5, 7}


@pytest.mark.parametrize("among", ["below", "anywhere"])
@pytest.mark.parametrize("images", [2, 3, 5])
def test_a_tiny_corpus_whose_target_ranks_last_has_negatives(images: int, among: str) -> None:
    torch.manual_seed(2)
    tokens = torch.nn.functional.normalize(torch.randn(images, 3, 4), dim=-1)
    scores = torch.linspace(1, 0, images).tolist()
    status, chosen, _, left_alone = drop_of(tokens, scores, images - 1, among=among)
    assert sorted([*chosen, *left_alone]) == list(range(images - 1))
    assert chosen
    assert status == ("corpus" if images == 2 else "drop")


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("top_k", {"nagatives": 3}, "mining.options.nagatives: .*top_k has the options negatives"),
        ("perc_pos", {"share": 2}, "mining.options.share: .*less than or equal to 1"),
        ("steep_drops", {"window_ranks": 50}, "steep_drops has none; it is set by mining.window"),
        ("steep", {}, "mining.rule: 'steep' is not one of margin_pos, perc_pos, random, simans"),
    ],
)
def test_unknown_rules_and_options_are_refused(
    rule: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        mining_rule(Settings(mining={"rule": rule, "options": options}))


@pytest.mark.parametrize("rule", sorted(RULES))
def test_only_what_streams_is_streamed(rule: str) -> None:
    many = {"all": tuple(map(str, range(100_000)))}
    chosen = choose_engine(Settings(mining={"rule": rule}), many)
    streams = rule in ("steep_drops", "target_drop")
    assert (chosen == "streaming") == RULES[rule].streams == streams
    veto = Settings(mining={"rule": rule, "veto": "x"})
    assert choose_engine(veto, many) == "sort"
    with pytest.raises(
        InputError, match=r"mining.engine: .* set mining.engine to 'auto' or 'sort'"
    ):
        choose_engine(Settings(mining={"rule": rule, "veto": "x", "engine": "streaming"}), many)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, QueryBlock]:
    """Queries and images as two models embed them."""
    folder = tmp_path_factory.mktemp("embedded")
    split = make_split(12, 60)
    uris = [str(folder / name) for name in ("own", "second")]
    for seed, uri in enumerate(uris):
        write_embeddings(uri, split, tokens=3, width=8, shard=16, seed=seed)
    triplets = tuple(sorted(split.triplets, key=lambda t: t.query_id))
    return uris[0], uris[1], QueryBlock(0, "all", triplets, split.galleries["all"])


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_is_written_and_read_with_a_veto(
    rule: str, embedded: tuple[str, str, QueryBlock], tmp_path: Path
) -> None:
    own, second, block = embedded
    made = rule_named(rule).of(MiningSettings(rule=rule))
    kept: dict[bool, list[dict[str, Any]]] = {}
    for veto in (False, True):
        output = str(tmp_path / str(veto))
        task = RoundTask(own, output, output, 0, 1, True, made, None, "fp32", 2**26)
        if veto:
            task = RoundTask(own, output, output, 0, 1, True, made, None, "fp32", 2**26, second)
        told = summarise([mine_by_sorting(block, task)], made)
        kept[veto] = pq.read_table(f"{output}/{part_name(0)}").to_pylist()
        assert (told["vetoed"]["images"] > 0) == veto
    images = EmbeddingShards.open(second).some_images(set(block.corpus))
    shards = EmbeddingShards.open(second)
    queries = {
        name: value
        for number in range(shards.shards)
        for name, value in zip(*shards.queries(number), strict=True)
    }
    for row, triplet in zip(kept[True], block.triplets, strict=True):
        query = queries[triplet.query_id]
        score = {name: (image @ query).max() for name, image in images.items()}
        better = {name for name in score if score[name] > score[str(triplet.target_id)]}
        assert not better & set(row["negative_ids"])
        assert row["vetoed"] == len(better - {triplet.reference_id})
        assert row["negative_ids"]
        assert (row["negative_weights"] is None) == (rule != "simans")
    assert any(one != two for one, two in zip(kept[False], kept[True], strict=True))
