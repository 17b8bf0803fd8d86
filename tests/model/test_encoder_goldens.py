"""SPRC and CLIP4CIR against numbers of the original programs (`tests/goldens/README.md`)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from baseline_goldens import FOLDER, arrays, facts, tensor
from torch import Tensor, nn

from qure_core.model.base import Embedded
from qure_core.model.combiner import Combiner
from qure_core.model.lavis import convert_state, load_lavis_checkpoint, read_state
from qure_core.model.relevance import relevance_scores
from qure_core.model.sprc import SPRCModel, SPRCOptions
from qure_core.objectives import Outputs, make_objective
from qure_core.training.optimisation import make_optimizer
from qure_core.training.steps import TripletStep

SPRC = sorted(path.stem for path in FOLDER.glob("sprc_*.pth"))
CLIP4CIR = sorted(path.stem for path in FOLDER.glob("clip4cir_*.pth"))


def close(ours: Tensor, expected: Tensor, bound: float, name: str = "") -> None:
    """Within ``bound`` of the largest value."""
    limit = bound * max(float(expected.abs().max()), 1e-9)
    torch.testing.assert_close(
        ours.detach().to(expected.dtype), expected, rtol=0, atol=limit, msg=name or None
    )


def sprc(name: str, **options: float) -> SPRCModel:
    """The golden's model, with the weights of its auxiliary losses."""
    heads = facts(f"{name}_config")["heads"]
    model = load_lavis_checkpoint(FOLDER / f"{name}.pth", vision_heads=heads, qformer_heads=heads)
    assert isinstance(model, SPRCModel)
    model.options = SPRCOptions(**options)
    return model.eval()


def inputs(name: str) -> dict[str, Tensor]:
    """A batch as a step has it: references, then targets."""
    both = torch.cat([tensor(f"{name}_inputs", side) for side in ("reference", "target")])
    rows = len(both) // 2
    return {
        "vision": both,
        "reference_B": torch.arange(rows),
        "answer_A": torch.arange(rows, 2 * rows),
        "input_ids": tensor(f"{name}_inputs", "input_ids"),
        "attention_mask": tensor(f"{name}_inputs", "attention_mask"),
    }


def labels(rows: int) -> dict[str, Tensor]:
    return {
        "target_B": torch.arange(rows),
        "negative_BK": (torch.arange(rows)[:, None] + 1) % rows,
        "valid_B": torch.ones(rows, dtype=torch.bool),
        "candidate_BA": ~torch.eye(rows, dtype=torch.bool),
    }


def sprc_step(model: SPRCModel) -> TripletStep:
    return TripletStep(model, make_objective("info_nce", {"candidates": "targets"}))


@pytest.mark.parametrize("name", SPRC)
def test_sprc_embeddings(name: str) -> None:
    model, known = sprc(name), f"{name}_outputs"
    batch = inputs(name)
    rows, tokens = len(batch["input_ids"]), model.config.query_tokens
    text = (batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        # What comes after a padded position is attended to by nothing, and means nothing.
        real = torch.cat([torch.ones(rows, tokens), text[1]], dim=1).bool()
        fusion = model.query_hidden_states(batch["vision"][:rows], *text)
        prompts = fusion[:, :tokens]
        for what, hidden in (
            ("fusion_hidden", fusion),
            ("second_pass_hidden", model.prompted_hidden_states(prompts, *text)),
            ("prompt_only_hidden", model.learned_prompt_hidden_states(*text)),
        ):
            close(hidden[real], tensor(known, what)[real], 1e-5, what)
        close(prompts, tensor(known, "sentence_prompts"), 1e-5)
        queries = model.embed_queries(batch["vision"][:rows], *text)
        close(queries, tensor(known, "query"), 1e-5)
        plain = model.embed_queries(batch["vision"][:rows], *text, normalised=False)
        close(plain, tensor(known, "query_unnormalised"), 1e-5)
        targets = model.embed_images(batch["vision"][rows:])
        close(targets, tensor(known, "target_embeddings"), 1e-5)
        gallery = torch.cat([targets, model.embed_images(batch["vision"][:rows])])
        close(gallery, tensor(known, "gallery_embeddings"), 1e-5)
        close(relevance_scores(queries, gallery), tensor(known, "scores_inference"), 1e-5)


WEIGHTS: dict[str, Any] = {
    "fashioniq": lambda name: (1.0, 1.0),
    "cirr": lambda name: tuple(
        facts(f"{name}_config")["cirr_weights"][loss] for loss in ("loss_rtc", "loss_align")
    ),
}


@pytest.mark.parametrize("name", SPRC)
def test_sprc_losses(name: str) -> None:
    known, batch = f"{name}_outputs", inputs(name)
    rows = len(batch["input_ids"])

    def loss(prompt_weight: float, align_weight: float) -> float:
        model = sprc(name, prompt_weight=prompt_weight, align_weight=align_weight)
        return sprc_step(model)(**batch, **labels(rows))[0].mean().item()

    for what, weights in (("itc", (0, 0)), ("rtc", (1, 0)), ("align", (0, 1))):
        expected = float(tensor(known, f"loss_{what}"))
        expected += 0 if what == "itc" else float(tensor(known, "loss_itc"))
        assert loss(*weights) == pytest.approx(expected, rel=1e-5), what
    for program, weights_of in WEIGHTS.items():
        expected = float(tensor(known, f"total_{program}"))
        assert loss(*weights_of(name)) == pytest.approx(expected, rel=1e-5), program


@pytest.mark.parametrize("program", WEIGHTS)
@pytest.mark.parametrize("name", SPRC)
def test_sprc_gradients(name: str, program: str) -> None:
    weights = dict(zip(("prompt_weight", "align_weight"), WEIGHTS[program](name), strict=True))
    model, batch = sprc(name, **weights), inputs(name)
    losses, _ = sprc_step(model)(**batch, **labels(len(batch["input_ids"])))
    losses.mean().backward()
    prefix = f"grad_{program}__"
    golden = {
        key.removeprefix(prefix): torch.from_numpy(value)
        for key, value in arrays(f"{name}_outputs").items()
        if key.startswith(prefix)
    }
    assert "prompt_tokens" in golden
    expected, unknown = convert_state(golden)
    assert not unknown
    parameters = dict(model.named_parameters())
    for key, gradient in expected.items():
        found = parameters[key].grad
        close(torch.zeros_like(gradient) if found is None else found, gradient, 1e-4, key)


@pytest.mark.parametrize("name", SPRC)
def test_sprc_takes_the_programs_steps(name: str) -> None:
    weights = dict(zip(("prompt_weight", "align_weight"), WEIGHTS["cirr"](name), strict=True))
    model, batch, adamw = sprc(name, **weights), inputs(name), facts(f"{name}_config")["adamw"]
    optimizer = make_optimizer(model, adamw["lr"], adamw["weight_decay"])
    for group in optimizer.param_groups:
        group |= {"betas": tuple(adamw["betas"]), "eps": adamw["eps"]}
    step, totals = sprc_step(model), []
    for number in range(adamw["steps"] + 1):
        losses, _ = step(**batch, **labels(len(batch["input_ids"])))
        totals.append(losses.mean().item())
        if number < adamw["steps"]:
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
    known = f"{name}_outputs"
    assert totals == pytest.approx(tensor(known, "adamw_cirr_losses")[:, 0].tolist(), rel=1e-4)
    temperature = float(tensor(known, "adamw_temp_after"))
    assert float(model.temperature.detach()) == pytest.approx(temperature, rel=1e-5)
    close(model.prompt_tokens, tensor(known, "adamw_prompt_tokens_after"), 1e-3)


@pytest.mark.parametrize("name", SPRC)
def test_one_sprc_query_alone(name: str) -> None:
    model, batch = sprc(name), inputs(name)
    alone = model.embed_queries(
        batch["vision"][:1], batch["input_ids"][:1], batch["attention_mask"][:1]
    )
    close(alone, tensor(f"{name}_outputs", "query")[:1], 1e-5)


class Kept(nn.Module):
    """A dropout whose choice is given: kept values are doubled."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, values: Tensor) -> Tensor:
        return values * self.mask * 2


@cache
def combiner_state(name: str) -> dict[str, Tensor]:
    return {key: value.double() for key, value in read_state(FOLDER / f"{name}.pth").items()}


def combiner(name: str, dropped: bool = False) -> Combiner:
    config = facts(f"{name}_config")
    sizes = (config["feature_dim"], config["projection_dim"], config["hidden_dim"])
    made = Combiner(*sizes, config["dropout_probability_in_training"]).double().eval()
    made.load_state_dict(combiner_state(name))
    if dropped:
        for place, mask in (("dropout1", "text"), ("dropout2", "image"), ("dropout3", "combined")):
            setattr(made, place, Kept(tensor(f"{name}_inputs", f"dropout_{mask}")))
        made.dynamic_scalar[2] = Kept(tensor(f"{name}_inputs", "dropout_scalar"))
    return made


def features(name: str) -> list[Tensor]:
    return [
        tensor(f"{name}_inputs", f"{side}_features", torch.float64).requires_grad_()
        for side in ("image", "text", "target")
    ]


def clip4cir_loss(query: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP4CIR's loss as our objective has it, and the scores it is taken of."""
    rows = len(query)
    unit, answers = (nn.functional.normalize(values, dim=-1) for values in (query, target))
    batch = labels(rows)
    embedded = Embedded(unit, answers[:, None])
    scores = relevance_scores(embedded.query_BD, embedded.image_ATD)
    given = Outputs(
        embedded.query_BD,
        embedded.image_ATD,
        scores,
        batch["target_B"],
        batch["negative_BK"],
        batch["valid_B"],
        torch.tensor(1.0),
        batch["candidate_BA"],
    )
    objective = make_objective("info_nce", {"temperature": 0.01, "candidates": "targets"})
    return objective(given)[0].mean(), scores


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("name", CLIP4CIR)
def test_combiner(name: str, dropped: bool) -> None:
    known, prefix = f"{name}_outputs", "combiner_dropout_" if dropped else "combiner_"
    model = combiner(name, dropped)
    image, text, target = features(name)
    query = model(image, text)
    unit = nn.functional.normalize(query, dim=-1)
    close(unit, tensor(known, f"{prefix}combined"), 1e-6)
    loss, scores = clip4cir_loss(query, target)
    assert facts(f"{name}_config")["logit_scale"] == 100
    close(scores * 100, tensor(known, f"{prefix}logits"), 1e-6)
    assert loss.item() == pytest.approx(float(tensor(known, f"{prefix}loss")), rel=1e-6)
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad, tensor(known, f"{prefix}grad__{key}"), 1e-6, key)
    for side, value in (("image", image), ("text", text), ("target", target)):
        assert value.grad is not None
        close(value.grad, tensor(known, f"{prefix}grad_input__{side}"), 1e-6, side)


@pytest.mark.parametrize("name", CLIP4CIR)
def test_galleries_of_combiner_and_sum(name: str) -> None:
    known = f"{name}_outputs"
    image, text, target = features(name)
    gallery = nn.functional.normalize(
        tensor(f"{name}_inputs", "gallery_features", torch.float64), dim=-1
    )
    for kind, query in (("combiner", combiner(name)(image, text)), ("sum", image + text)):
        unit = nn.functional.normalize(query, dim=-1)
        scores = relevance_scores(unit, gallery[:, None])
        close(scores, tensor(known, f"{kind}_gallery_scores"), 1e-6)
    loss, scores = clip4cir_loss(image + text, target)
    close(nn.functional.normalize(image + text, dim=-1), tensor(known, "sum_combined"), 1e-6)
    close(scores * 100, tensor(known, "sum_logits"), 1e-6)
    assert loss.item() == pytest.approx(float(tensor(known, "sum_loss")), rel=1e-6)
    gradients = torch.autograd.grad(loss, [image, text, target])
    for side, value in zip(("image", "text", "target"), gradients, strict=True):
        close(value, tensor(known, f"sum_grad_input__{side}"), 1e-6, side)


@pytest.mark.parametrize("name", CLIP4CIR)
def test_combiner_takes_the_programs_steps(name: str) -> None:
    known, adam = f"{name}_outputs", facts(f"{name}_config")["adam"]
    model = combiner(name)
    image, text, target = (value.detach() for value in features(name))
    options = {key: adam[key] for key in ("lr", "eps", "weight_decay")}
    optimizer = torch.optim.Adam(model.parameters(), betas=tuple(adam["betas"]), **options)
    found = []
    for number in range(adam["steps"] + 1):
        loss, _ = clip4cir_loss(model(image, text), target)
        found.append(loss.item())
        if number < adam["steps"]:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    np.testing.assert_allclose(found, arrays(known)["adam_losses"], rtol=1e-6)
