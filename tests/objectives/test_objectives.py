"""Losses against their definitions, written out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qure_core.base.errors import InputError
from qure_core.objectives import OBJECTIVES, Outputs, make_objective
from qure_core.objectives.contrastive import contrastive_losses

SCORE = st.floats(-30, 30, width=32)


def outputs(scores: torch.Tensor, **other: torch.Tensor) -> Outputs:
    """Of scores [B, A] alone, the target in column 0 and the other columns its negatives."""
    rows, columns = scores.shape
    known = {
        "query_BD": torch.zeros(rows, 1),
        "image_ATD": torch.zeros(columns, 1, 1),
        "scores_BA": scores,
        "target_B": torch.zeros(rows, dtype=torch.int64),
        "negative_BK": torch.arange(1, columns).expand(rows, -1),
        "valid_B": torch.ones(rows, dtype=torch.bool),
        "temperature": torch.tensor(1.0, dtype=scores.dtype),
    }
    return Outputs(**(known | other))


@settings(deadline=None)
@given(st.lists(st.tuples(SCORE, SCORE), min_size=1, max_size=8), st.floats(0.25, 4))
def test_bradley_terry_is_the_negative_log_softmax(
    pairs: list[tuple[float, float]], temperature: float
) -> None:
    scores = torch.tensor(pairs, dtype=torch.float64)
    divisor = torch.tensor(temperature, dtype=torch.float64)
    losses, _ = make_objective("bradley_terry", {})(outputs(scores, temperature=divisor))
    torch.testing.assert_close(losses, -torch.log_softmax(scores / divisor, dim=1)[:, 0])


def test_bradley_terry_of_several_negatives_is_their_mean() -> None:
    scores = torch.randn(5, 4, dtype=torch.float64)
    objective = make_objective("bradley_terry", {})
    losses, _ = objective(outputs(scores))
    each = [objective(outputs(scores[:, [0, k]]))[0] for k in (1, 2, 3)]
    torch.testing.assert_close(losses, torch.stack(each).mean(dim=0))


def test_bradley_terry_does_not_overflow() -> None:
    scores = torch.tensor([[-1e4, 1e4], [1e4, -1e4]])
    assert make_objective("bradley_terry", {})(outputs(scores))[0].tolist() == [2e4, 0.0]


def test_info_nce_by_hand() -> None:
    scores = torch.randn(3, 5, dtype=torch.float64)
    candidates = torch.tensor([[0, 1, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
    targets = torch.tensor([0, 3, 0])
    temperature = torch.tensor(0.5, dtype=torch.float64)
    given = outputs(scores, target_B=targets, candidate_BA=candidates, temperature=temperature)
    losses, _ = make_objective("info_nce", {})(given)
    for row in range(3):
        counted = {int(targets[row]), *torch.nonzero(candidates[row]).flatten().tolist()}
        total = sum(math.exp(float(scores[row, column]) / 0.5) for column in counted)
        expected = math.log(total) - float(scores[row, targets[row]]) / 0.5
        assert float(losses[row]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bradley", {}, "objective.name: 'bradley' is not one of bradley_terry, dcl, fnc"),
        (
            "info_nce",
            {"smoothing": 1},
            r"objective.options.smoothing: .* has the options temperature",
        ),
    ],
)
def test_unknown_objectives_and_options_are_refused(
    name: str, options: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_objective(name, options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_contrastive_by_hand(smoothing: float) -> None:
    forward, backward = torch.randn(3, 4), torch.randn(3, 4)
    # The second pair shares its caption with candidate 3.
    target = torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0, 0.5], [0, 0, 1.0, 0]])
    ours = contrastive_losses(forward, backward, target, smoothing)
    for row in range(3):
        total = 0.0
        for scores in (forward[row], backward[row]):
            log_sum = math.log(sum(math.exp(float(s)) for s in scores))
            for n in range(4):
                share = float(target[row, n]) * (1 - smoothing) + smoothing / 4
                total -= share * (float(scores[n]) - log_sum) / 2
        assert float(ours[row]) == pytest.approx(total, rel=1e-5)


def test_bradley_terry_with_margin_and_centring_by_hand() -> None:
    scores = torch.randn(4, 3, dtype=torch.float64)
    options = {"margin": 0.3, "centring": 0.05, "temperature": 0.5}
    losses, _ = make_objective("bradley_terry", options)(outputs(scores))
    for row in range(4):
        target, *negatives = (float(s) / 0.5 for s in scores[row])
        expected = [
            -math.log(1 / (1 + math.exp(-(target - other - 0.3)))) + 0.05 * (target + other) ** 2
            for other in negatives
        ]
        assert float(losses[row]) == pytest.approx(sum(expected) / 2, rel=1e-9)


def test_hinge_by_hand() -> None:
    scores = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.6, -0.5]], dtype=torch.float64)
    losses, _ = make_objective("hinge", {"margin": 0.25})(outputs(scores))
    assert losses.tolist() == pytest.approx([0.15 / 2, 0.65 / 2])


@settings(deadline=None)
@given(st.lists(SCORE, min_size=2, max_size=6), st.floats(0.25, 4))
def test_plackett_luce_is_the_first_choice(values: list[float], temperature: float) -> None:
    scores = torch.tensor([values], dtype=torch.float64)
    divisor = torch.tensor(temperature, dtype=torch.float64)
    losses, _ = make_objective("plackett_luce", {})(outputs(scores, temperature=divisor))
    torch.testing.assert_close(losses, -torch.log_softmax(scores / divisor, dim=1)[:, 0])
    if len(values) == 2:
        pair, _ = make_objective("bradley_terry", {})(outputs(scores, temperature=divisor))
        torch.testing.assert_close(losses, pair)


def batch(seed: int) -> Outputs:
    """Six triplets, of which two have the same target, among nine answers of two tokens; the last
    triplet has no negative in the batch but its own."""
    torch.manual_seed(seed)
    query, image = (
        torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)
        for shape in ((6, 4), (9, 2, 4))
    )
    target = torch.tensor([0, 1, 2, 1, 3, 4])
    negative = torch.tensor([[5], [6], [7], [8], [5], [6]])
    candidates = torch.rand(6, 9) < 0.6
    candidates[5] = False
    candidates = candidates.scatter(1, negative, True).scatter(1, target[:, None], False)
    candidates[[1, 3], 1] = False
    return Outputs(
        query,
        image,
        torch.einsum("bd,atd->bat", query, image).amax(dim=-1),
        target,
        negative,
        torch.ones(6, dtype=torch.bool),
        torch.tensor(0.2, dtype=torch.float64),
        candidates,
    )


def negatives_of(given: Outputs, row: int, candidates: str) -> list[int]:
    assert given.candidate_BA is not None
    chosen = {
        "targets": {*given.target_B.tolist()},
        "own": {*given.target_B.tolist(), *given.negative_BK[row].tolist()},
        "all": {*range(given.scores_BA.shape[1])},
    }[candidates]
    allowed = torch.nonzero(given.candidate_BA[row]).flatten().tolist()
    return [column for column in allowed if column in chosen]


def likeness(given: Outputs, one: int, other: int) -> float:
    products = given.image_ATD[one] @ given.image_ATD[other].T
    return float(products.max(dim=1).values.mean())


def hardened(scores: list[float], beta: float) -> float:
    """The sum of exponentials of scores, by weights of mean 1 that grow with them."""
    if not scores:
        return 0.0
    weights = [math.exp(beta * s) for s in scores]
    mean = sum(weights) / len(weights)
    return sum(w / mean * math.exp(s) for w, s in zip(weights, scores, strict=True))


@pytest.mark.parametrize("candidates", ["targets", "own", "all"])
@pytest.mark.parametrize("seed", range(3))
def test_hn_nce_by_hand(seed: int, candidates: str) -> None:
    given = batch(seed)
    options = {"temperature": 0.3, "alpha": 0.7, "beta": 0.4, "candidates": candidates}
    losses, _ = make_objective("hn_nce", options)(given)
    score = (given.scores_BA / 0.3).tolist()
    targets = given.target_B.tolist()
    for row, target in enumerate(targets):
        own = score[row][target]
        answers = [score[row][a] for a in negatives_of(given, row, candidates)]
        queries = [
            score[k][target] for k in range(6) if target in negatives_of(given, k, candidates)
        ]
        expected = sum(
            math.log(0.7 * math.exp(own) + hardened(some, 0.4)) - own for some in (answers, queries)
        )
        assert float(losses[row]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", ["query", "both"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "beta"), [("hcl", 0.8), ("dcl", 0.0)])
def test_hcl_by_hand(seed: int, form: str, name: str, beta: float) -> None:
    given = batch(seed)
    options = {"temperature": 0.4, "tau_plus": 0.15, "form": form, "candidates": "own"}
    options |= {"beta": beta} if name == "hcl" else {}
    losses, _ = make_objective(name, options)(given)
    targets = given.target_B.tolist()
    query_QQ = given.query_BD @ given.query_BD.T

    def loss(own: float, scores: list[float]) -> float:
        if not scores:
            return 0.0
        positive, count = math.exp(own / 0.4), len(scores)
        summed = hardened([s / 0.4 for s in scores], beta)
        estimate = (summed - 0.15 * count * positive) / 0.85
        estimate = max(estimate, count * math.exp(-1 / 0.4))
        return -math.log(positive / (positive + estimate))

    faces = [
        [i for i in range(6) if targets[i] in negatives_of(given, row, "own")] for row in range(6)
    ]
    for row, target in enumerate(targets):
        own = float(given.scores_BA[row, target])
        if form == "query":
            columns = negatives_of(given, row, "own")
            expected = loss(own, [float(given.scores_BA[row, a]) for a in columns])
        else:
            of_query = [float(query_QQ[row, i]) for i in faces[row]]
            of_query += [float(given.scores_BA[row, targets[i]]) for i in faces[row]]
            of_target = [float(given.scores_BA[i, target]) for i in range(6) if row in faces[i]]
            of_target += [likeness(given, target, targets[i]) for i in faces[row]]
            expected = (loss(own, of_query) + loss(own, of_target)) / 2
        assert float(losses[row]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("cancel", ["elimination", "attraction"])
@pytest.mark.parametrize("detect", ["query", "target", "both"])
@pytest.mark.parametrize("seed", range(3))
def test_fnc_by_hand(seed: int, detect: str, cancel: str) -> None:
    given = batch(seed)
    options = {"temperature": 0.3, "top_k": 2, "threshold": 0.1}
    objective = make_objective("fnc", options | {"detect": detect, "cancel": cancel})
    losses, figures = objective(given)
    for row, target in enumerate(given.target_B.tolist()):
        columns = negatives_of(given, row, "all")
        seen = {}
        for column in columns:
            both = {"query": float(given.scores_BA[row, column])}
            both["target"] = likeness(given, target, column)
            seen[column] = max(both.values()) if detect == "both" else both[detect]
        best = sorted(columns, key=lambda column: -seen[column])[:2]
        found = [column for column in best if seen[column] > 0.1]
        score = (given.scores_BA[row] / 0.3).tolist()
        counted, positives = {target, *columns}, [target]
        if cancel == "elimination":
            counted -= set(found)
        else:
            positives += found
        expected = math.log(sum(math.exp(score[c]) for c in counted))
        expected -= sum(score[c] for c in positives) / len(positives)
        assert float(losses[row]) == pytest.approx(expected, rel=1e-9)
        assert float(figures["found_false_negatives"][row]) == len(found)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_are_finite_at_small_temperatures(
    name: str, dtype: torch.dtype
) -> None:
    given = batch(0)
    scores = given.scores_BA.to(dtype).requires_grad_()
    own = replace(given, scores_BA=scores)
    assert own.candidate_BA is not None
    nobody = replace(own, candidate_BA=torch.zeros_like(own.candidate_BA))
    objective = make_objective(name, {"temperature": 0.01})
    for outputs_here in (own, nobody) if objective.in_batch else (own,):
        losses, figures = objective(outputs_here)
        assert losses.shape == (6,)
        assert torch.isfinite(losses).all()
        assert all(value.shape == (6,) for value in figures.values())
        (gradient,) = torch.autograd.grad(losses.sum(), [scores])
        assert torch.isfinite(gradient).all()
