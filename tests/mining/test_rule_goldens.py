"""Rules against selections of the original programs (`tests/goldens/README.md`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from baseline_goldens import arrays, cases, facts

from qure_core.base.config import MiningSettings
from qure_core.mining.engines.sort import rank_queries
from qure_core.mining.rules import Selection, rule_named
from qure_core.training.negatives import mined_negatives

TEXT = "mining_text_retrieval"


def scores() -> np.ndarray:
    """Cosines of every query to every document."""
    known = arrays(TEXT)
    query, document = (
        known[name] / np.linalg.norm(known[name], axis=1, keepdims=True)
        for name in ("query_embeddings", "document_embeddings")
    )
    product: np.ndarray = query @ document.T
    return product


def positives() -> list[np.ndarray]:
    """Each query's positive documents, the one with the smallest score first."""
    known, all_scores = arrays(TEXT), scores()
    found = []
    for query in range(len(all_scores)):
        own = known["pair_document"][known["pair_query"] == query]
        found.append(own[np.argsort(all_scores[query, own], kind="stable")])
    return found


def selected(
    rule: str, options: dict[str, Any], query: int
) -> tuple[Selection, np.ndarray, np.ndarray]:
    """What a rule selects for one query: with its documents and their scores, best first."""
    all_scores, own = scores(), positives()[query]
    left_out = torch.from_numpy(own[1:])[None] if len(own) > 1 else None
    row = torch.from_numpy(all_scores[query : query + 1])
    ranked = rank_queries(row, torch.tensor([int(own[0])]), left_out)
    selection = rule_named(rule).of(MiningSettings(rule=rule, options=options)).select(ranked)
    documents = ranked.columns(0, selection.ranks(0)).numpy()
    return selection, documents, all_scores[query, documents]


def of_nv_retriever(setting: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Our rule and options of a setting of NV-Retriever's."""
    value = setting["parameter"]
    rule, options = {
        "topk": ("top_k", {}),
        "shifted": ("top_k", {"skip": value}),
        "abs": ("top_k", {"max_score": value}),
        "margin_pos": ("margin_pos", {"margin": value}),
        "perc_pos": ("perc_pos", {"share": value, "guarded": False}),
    }[setting["rule"]]
    options |= {"among": "anywhere"} if rule == "top_k" else {}
    return rule, options | {"negatives": setting["num_negatives"]}


def of_sentence_transformers(setting: dict[str, Any], query: int) -> tuple[str, dict[str, Any]]:
    """Our rule and options of a setting of ``mine_hard_negatives``.

    It keeps K of what is left of the K + mp best documents, positives counted.
    """
    most = max(map(len, positives()))
    bounds = [setting.get(name) for name in ("absolute_margin", "relative_margin", "max_score")]
    first, wanted = setting.get("range_min", 0), setting["num_negatives"]
    many = 10 if any(bound is not None for bound in bounds) else 1
    kept = setting.get("range_max") or first + most + many * wanted
    best = np.argsort(-scores()[query], kind="stable")[: kept + most]
    # Of several positives all but one are left out of our ranking.
    depth = len(best) - len(np.intersect1d(best, positives()[query][1:]))
    random = setting["sampling_strategy"] == "random"
    options = {
        "margin": setting.get("absolute_margin"),
        "share": None if bounds[1] is None else 1 - bounds[1],
        "max_score": setting.get("max_score"),
        "min_score": setting.get("min_score"),
        "skip": first,
        "depth": depth,
        "negatives": kept - first if random else min(wanted, kept - first),
    }
    return "perc_pos", options


def settings_of(program: str) -> list[str]:
    return [name for name in facts(TEXT)["settings"] if name.startswith("nv_") == (program == "nv")]


@pytest.mark.parametrize("name", settings_of("nv"))
def test_nv_retriever(name: str) -> None:
    setting = facts(TEXT)["settings"][name]
    rule, options = of_nv_retriever(setting)
    expected = arrays(TEXT)[f"{name}__negatives"]
    for query, row in enumerate(expected):
        wanted = row[row >= 0].tolist()
        selection, documents, _ = selected(rule, options, query)
        if wanted:
            assert documents.tolist() == wanted, query
            assert int(selection.status_Q[0]) == 0
        else:  # ours names its fallback
            assert int(selection.status_Q[0]) > 0


@pytest.mark.parametrize("name", settings_of("sentence-transformers"))
def test_sentence_transformers(name: str) -> None:
    setting, known = facts(TEXT)["settings"][name], arrays(TEXT)
    for query in range(len(scores())):
        rule, options = of_sentence_transformers(setting, query)
        selection, documents, found = selected(rule, options, query)
        if setting["sampling_strategy"] == "random":
            drawn = known[f"{name}__times_drawn"][query]
            if int(selection.status_Q[0]):
                assert not drawn.any()
                continue
            assert set(np.flatnonzero(drawn)) <= set(documents.tolist())
            if drawn.sum() >= 40 * len(documents):
                assert set(np.flatnonzero(drawn)) == set(documents.tolist())
            continue
        row = known[f"{name}__negatives"][query]
        wanted = row[row >= 0].tolist()
        if not wanted:
            assert int(selection.status_Q[0]) > 0, query
            continue
        assert documents.tolist() == wanted, query
        expected = known[f"{name}__scores"][query][: len(wanted)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", cases("simans"))
def test_simans_weighs_as_its_program(name: str) -> None:
    case, known = cases("simans")[name], arrays("simans")
    positive, negative = known["positive_scores"], known["negative_scores"]
    options = _simans(case) | {"candidates": negative.shape[1]}
    rule = rule_named("simans").of(MiningSettings(rule="simans", options=options))
    for query, expected in enumerate(known[f"{name}__probabilities"]):
        weights = rule.weights(negative[query], float(positive[query]))
        np.testing.assert_allclose(weights / weights.sum(), expected, rtol=0, atol=1e-9)
    # As production ranks: of scores in float32.
    row = np.concatenate([positive[:, None], negative], axis=1).astype(np.float32)
    targets = torch.zeros(len(row), dtype=torch.int64)
    ranked = rank_queries(torch.from_numpy(row), targets)
    selection = rule.select(ranked)
    assert selection.weights is not None
    for query, expected in enumerate(known[f"{name}__probabilities"]):
        columns = ranked.columns(query, selection.ranks(query)).numpy() - 1
        share = selection.weights[query] / selection.weights[query].sum()
        assert sorted(columns.tolist()) == list(range(negative.shape[1]))
        np.testing.assert_allclose(share, expected[columns], rtol=0, atol=1e-4)


def _simans(case: dict[str, Any]) -> dict[str, Any]:
    if "tau" in case:  # the passages' law
        return {"law": "absolute", "a": case["tau"]}
    return {"a": case["a"], "b": case["b"]}


@pytest.mark.parametrize("name", cases("simans"))
def test_what_is_drawn_follows_the_weights(name: str) -> None:
    case, known = cases("simans")[name], arrays("simans")
    weights = known[f"{name}__probabilities"][0]
    ids = np.asarray([str(i) for i in range(len(weights))], dtype=object)

    def shares(count: int, epochs: int) -> np.ndarray:
        times = np.zeros(len(weights))
        for epoch in range(epochs):
            drawn = mined_negatives("q", ids, 0, 0, epoch, count, weights)
            assert len(set(drawn)) == count
            times[[int(image) for image in drawn]] += 1
        return times / epochs

    deviation = np.sqrt(weights * (1 - weights) / 3000)
    assert (np.abs(shares(1, 3000) - weights) < 5 * deviation + 1e-3).all()
    # The program cuts its surplus in no order of likelihood: only roughly is it the same.
    theirs = known[f"{name}__times_selected"][0] / case["runs"]
    assert np.corrcoef(shares(case["num_negatives"], 600), theirs)[0, 1] > 0.7
