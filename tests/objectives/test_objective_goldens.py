"""Objectives against numbers of the original programs (`tests/goldens/README.md`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from baseline_goldens import arrays, cases, tensor
from torch import Tensor

from qure_core.model.relevance import relevance_scores
from qure_core.objectives import Outputs, make_objective
from qure_core.objectives.fnc import attraction, found_false_negatives

DOUBLE = torch.float64


def paired(query_BD: Tensor, target_BD: Tensor, scores_BB: Tensor | None = None) -> Outputs:
    """A batch in which the other rows' targets are a triplet's negatives."""
    image_ATD = target_BD[:, None]
    scores = relevance_scores(query_BD, image_ATD) if scores_BB is None else scores_BB
    rows = len(scores)
    return Outputs(
        query_BD,
        image_ATD,
        scores,
        torch.arange(rows),
        torch.empty(rows, 0, dtype=torch.int64),
        torch.ones(rows, dtype=torch.bool),
        torch.tensor(1.0),
        ~torch.eye(rows, dtype=torch.bool),
    )


def held(losses_B: Tensor, loss: float, **gradients: tuple[Tensor, np.ndarray]) -> None:
    """The mean of the losses is ``loss`` to 1e-6, and its gradients are those to 5e-6 of each
    tensor's largest value."""
    mean = losses_B.mean()
    assert mean.item() == pytest.approx(loss, rel=1e-6), "loss"
    found = torch.autograd.grad(mean, [tensor for tensor, _ in gradients.values()])
    for (name, (_, expected)), value in zip(gradients.items(), found, strict=True):
        bound = 5e-6 * max(float(np.abs(expected).max()), 1e-12)
        np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("name", cases("covr_losses", kind="hn_nce"))
@pytest.mark.parametrize("weights", ["released", "paper"])
def test_hn_nce(name: str, weights: str) -> None:
    case = cases("covr_losses")[name]
    options = {key: case[key] for key in ("temperature", "alpha", "beta")} | {"weights": weights}
    objective = make_objective("hn_nce", options)
    query, target = (
        tensor("covr_losses", f"{name}__{side}", DOUBLE).requires_grad_()
        for side in ("query", "target")
    )
    known, prefix = arrays("covr_losses"), "paper_" if weights == "paper" else ""
    held(
        objective(paired(query, target))[0],
        float(known[f"{name}__{prefix}loss"]),
        query=(query, known[f"{name}__{prefix}grad_query"]),
        target=(target, known[f"{name}__{prefix}grad_target"]),
    )
    if weights == "released":
        scores = tensor("covr_losses", f"{name}__similarity", DOUBLE).requires_grad_()
        held(
            objective(paired(query, target, scores))[0],
            float(known[f"{name}__loss_from_similarity"]),
            similarity=(scores, known[f"{name}__grad_similarity"]),
        )


@pytest.mark.parametrize("name", cases("covr_losses", kind="cross_entropy"))
def test_info_nce_of_both_directions(name: str) -> None:
    case, known = cases("covr_losses")[name], arrays("covr_losses")
    query, target = (
        tensor("covr_losses", f"{name}__{side}", DOUBLE).requires_grad_()
        for side in ("query", "target")
    )
    options = {"temperature": case["temperature"], "directions": "both"}
    held(
        make_objective("info_nce", options)(paired(query, target))[0],
        float(known[f"{name}__loss"]),
        query=(query, known[f"{name}__grad_query"]),
        target=(target, known[f"{name}__grad_target"]),
    )


def _hcl(case: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if case["estimator"] == "easy":  # which knows neither
        return "hcl", {"tau_plus": 0.0, "beta": 0.0}
    if case["beta"] == 0:
        return "dcl", {"tau_plus": case["tau_plus"]}
    return "hcl", {"tau_plus": case["tau_plus"], "beta": case["beta"]}


@pytest.mark.parametrize("name", cases("hcl_losses"))
def test_hcl_and_dcl_of_both_sides(name: str) -> None:
    case, known = cases("hcl_losses")[name], arrays("hcl_losses")
    one, other = (tensor("hcl_losses", f"{name}__out_{n}", DOUBLE).requires_grad_() for n in (1, 2))
    objective, options = _hcl(case)
    options |= {"temperature": case["temperature"], "form": "both"}
    held(
        make_objective(objective, options)(paired(one, other))[0],
        case["loss"],
        out_1=(one, known[f"{name}__grad_out_1"]),
        out_2=(other, known[f"{name}__grad_out_2"]),
    )


FORMULAS: dict[str, Any] = {
    "infonce": lambda case: ("info_nce", {}),
    "hcl": lambda case: ("hcl", {key: case[key] for key in ("tau_plus", "beta")}),
    "elimination": lambda case: ("fnc", _found(case) | {"cancel": "elimination"}),
    "attraction": lambda case: ("fnc", _found(case) | {"cancel": "attraction"}),
}


def _found(case: dict[str, Any]) -> dict[str, Any]:
    return {"top_k": case["topk"], "threshold": case["threshold"], "detect": "target"}


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("name", cases("formula_losses"))
def test_formulas_of_queries_and_answers(
    name: str, formula: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, known = cases("formula_losses")[name], arrays("formula_losses")
    scores = tensor("formula_losses", f"{name}__similarity").requires_grad_()
    rows = tensor("formula_losses", f"{name}__positive_column")
    objective, options = FORMULAS[formula](case)
    made = make_objective(objective, options | {"temperature": case["temperature"]})
    if objective == "fnc":  # detection scores that no embeddings here could have
        detection = tensor("formula_losses", f"{name}__detection_scores")
        monkeypatch.setattr(made, "_detection", lambda outputs: detection)
        candidates = torch.ones_like(detection, dtype=torch.bool).scatter(1, rows[:, None], False)
        found = found_false_negatives(detection, candidates, case["topk"], case["threshold"])
        assert torch.equal(found, tensor("formula_losses", f"{name}__false_negatives"))
    batch = Outputs(
        torch.empty(len(scores), 1),
        torch.empty(scores.shape[1], 1, 1),
        scores,
        rows,
        torch.empty(len(scores), 0, dtype=torch.int64),
        torch.ones(len(scores), dtype=torch.bool),
        torch.tensor(1.0),
        torch.ones_like(scores, dtype=torch.bool).scatter(1, rows[:, None], False),
    )
    gradient = known[f"{name}__grad_{formula}"]
    held(made(batch)[0], case[f"loss_{formula}"], similarity=(scores, gradient))


@pytest.mark.parametrize("name", cases("fnc_losses"))
def test_fnc_of_many_views(name: str) -> None:
    """The released program's views of images and memory, on what `FNC` is made of."""
    case, known = cases("fnc_losses")[name], arrays("fnc_losses")
    views, batch = case["views"], case["batch"]
    hidden = tensor("fnc_losses", f"{name}__hidden", DOUBLE).requires_grad_()
    online = F.normalize(hidden, dim=1)
    keys, seen = online, online
    if case["memory"]:
        keys = F.normalize(tensor("fnc_losses", f"{name}__memory", DOUBLE), dim=1)
        seen = F.normalize(tensor("fnc_losses", f"{name}__momentum", DOUBLE), dim=1)
    columns = torch.arange(len(keys))
    own_BM = torch.zeros(batch, len(keys), dtype=torch.bool)
    own_BM[torch.arange(views * batch) % batch, columns[: views * batch]] = True
    detection = (seen @ keys.T).unflatten(0, (views, batch)).amax(dim=0).detach()
    shown = detection.masked_fill(own_BM, -torch.inf).numpy()
    np.testing.assert_allclose(shown, known[f"{name}__support_scores"], rtol=0, atol=1e-6)
    found = found_false_negatives(detection, ~own_BM, case["fn_topk"], case["fn_threshold"])
    assert torch.equal(found, tensor("fnc_losses", f"{name}__false_negatives"))
    total = torch.zeros(batch, dtype=DOUBLE)
    for view in range(views):
        rows = slice(view * batch, (view + 1) * batch)
        itself_BM = torch.zeros_like(own_BM)
        itself_BM[torch.arange(batch), columns[rows]] = True
        logits = online[rows] @ keys.T / case["temperature"]
        total = total + attraction(logits, (own_BM & ~itself_BM) | found, ~itself_BM)
    held(
        total * 2 / views,
        float(known[f"{name}__loss"]),
        hidden=(hidden, known[f"{name}__grad_hidden"]),
    )
