"""Agreement with the released program on its own random tiny weights (float32, CPU)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_goldens import NAMES, Golden, load_golden
from torch import Tensor

from qure_core.model.lavis import convert_state
from qure_core.model.relevance import relevance_scores
from qure_core.objectives import Objective, Outputs, make_objective
from qure_core.training.steps import TripletStep

BRADLEY_TERRY = make_objective("bradley_terry", {})


class Watched:
    """An objective that keeps the outputs it was given."""

    in_batch = False

    def __init__(self, objective: Objective) -> None:
        self.objective, self.outputs = objective, None
        self.options = objective.options

    def __call__(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        self.outputs = outputs
        return self.objective(outputs)


def losses(golden: Golden) -> Tensor:
    """What training differentiates, of the golden batch."""
    step = TripletStep(golden.model, BRADLEY_TERRY)
    return step(**golden.batch())[0]


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


def test_embeddings_and_scores(golden: Golden) -> None:
    model = golden.model
    ids, mask = golden.tensor("input_ids"), golden.tensor("attention_mask")
    errors: dict[str, float] = {}
    with torch.no_grad():
        vision = {k: model.encode_vision(golden.tensor(k)) for k in ("ref", "tar", "neg")}
        images = {k: model.embed_images(v) for k, v in vision.items()}
        query = model.embed_queries(vision["ref"], ids, mask)
        errors["vit_raw_ref"] = golden.error(vision["ref"], "vit_raw_ref")
        for k in vision:
            errors[f"vit_ln_{k}"] = golden.error(model.ln_vision(vision[k]), f"vit_ln_{k}")
            errors[f"index_feats_{k}"] = golden.error(images[k], f"index_feats_{k}")
        hidden = model.query_hidden_states(vision["ref"], ids, mask)
        errors["qformer_query_last_hidden"] = golden.error(hidden, "qformer_query_last_hidden")
        errors["query_feats"] = golden.error(query, "query_feats")
        raw = model.embed_queries(vision["ref"], ids, mask, normalised=False)
        errors["query_feats_unnormalised"] = golden.error(raw, "query_feats_unnormalised")
        circo = model.embed_queries(
            vision["ref"], golden.tensor("circo_input_ids"), golden.tensor("circo_attention_mask")
        )
        errors["query_feats_circo_prompt"] = golden.error(circo, "query_feats_circo_prompt")
        errors["score_query_x_tar"] = golden.error(
            relevance_scores(query, images["tar"]), "score_query_x_tar"
        )
        everything = torch.cat([images[k] for k in ("ref", "tar", "neg")])
        errors["score_query_x_all"] = golden.error(
            relevance_scores(query, everything), "score_query_x_all"
        )
        watched = Watched(BRADLEY_TERRY)
        losses_B, figures = TripletStep(model, watched)(**golden.batch())
        outputs = watched.outputs
        scores = torch.cat([outputs.target_scores(), outputs.negative_scores()], dim=1)
        errors["pair_scores_temp"] = golden.error(scores / model.temperature, "pair_scores_temp")
        errors["pair_scores_no_temp"] = golden.error(scores, "pair_scores_no_temp")
        errors["loss_temp"] = golden.error(losses_B.mean(), "loss_temp")
        plain, _ = BRADLEY_TERRY(replace(outputs, temperature=torch.ones(())))
        errors["loss_no_temp"] = golden.error(plain.mean(), "loss_no_temp")
        theirs = golden.outputs["pair_scores_no_temp"]
        assert figures["accuracy"].tolist() == (theirs[:, 0] > theirs[:, 1]).tolist()
        np.testing.assert_allclose(figures["margin"], theirs[:, 0] - theirs[:, 1], atol=1e-5)
    print("\nlargest relative error:", max(errors.values()), max(errors, key=errors.__getitem__))
    assert max(errors.values()) <= 1e-5, errors


def converted_name(lavis: str) -> str | None:
    """Our name of a LAVIS parameter that is renamed one to one; None for its unused heads."""
    names, unknown = convert_state({lavis: torch.zeros(1)})
    assert not unknown
    return next(iter(names), None)


def test_gradients(golden: Golden) -> None:
    model = golden.model
    losses(golden).mean().backward()
    ours = dict(model.named_parameters())
    errors = {}
    for key in golden.outputs.files:
        if key.startswith("grad__"):
            expected = torch.from_numpy(np.asarray(golden.outputs[key]))
            name = converted_name(key.removeprefix("grad__"))
            assert name is not None
            gradient = ours[name].grad
            assert gradient is not None, key
            scale = expected.abs().max() or torch.tensor(1.0)
            errors[key] = float((gradient - expected).abs().max() / scale)
    assert len(errors) > 15
    print("\nlargest relative gradient error:", max(errors.values()))
    assert max(errors.values()) <= 1e-4, errors
    for key in golden.config["gradient_facts"]["is_exact_zero"]:
        name = converted_name(key)
        assert name is not None
        gradient = ours[name].grad
        assert gradient is not None
        assert not gradient.any(), name
    assert all(p.grad is None for p in model.vision_encoder.parameters())


@pytest.mark.parametrize(("label", "rate"), [("lr5e-6", 5e-6), ("lr1e-3", 1e-3)])
def test_adamw_steps(golden: Golden, label: str, rate: float) -> None:
    prefix = f"adamw_{label}"
    if f"{prefix}_loss_after_5_steps" not in golden.outputs.files:
        pytest.skip("this golden has no optimizer steps")
    model = golden.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.05, fused=True)
    before, temperatures = [], []
    for _ in range(5):
        loss = losses(golden).mean()
        before.append(loss.item())
        temperatures.append(model.temperature.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = losses(golden).mean().item()
    # The losses fall to a thousandth of the scores they are differences of: hence atol.
    np.testing.assert_allclose(
        before, golden.outputs[f"{prefix}_loss_before_each_step"], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        after,
        golden.outputs[f"{prefix}_loss_after_5_steps"],
        rtol=1e-5,
        atol=1e-6,
    )
    temperatures.append(model.temperature.item())
    np.testing.assert_allclose(
        temperatures, golden.outputs[f"{prefix}_temp_before_each_step"], rtol=1e-5
    )
    ours = dict(model.named_parameters())
    errors, typical = [], []
    for key in golden.outputs.files:
        if key.startswith(f"adamw_{label}_param_after__"):
            name = converted_name(key.split("__")[1])
            if name is not None:
                expected = torch.from_numpy(np.asarray(golden.outputs[key]))
                error = (ours[name].detach() - expected).abs().flatten() / expected.abs().max()
                errors.append(float(error.max()))
                typical.append(float(error.quantile(0.999)))
    assert errors
    print("\nlargest relative parameter error after 5 steps:", max(errors), max(typical))
    assert max(typical) <= 1e-5
    # AdamW divides by the gradient's own size: where that is rounding noise, so is the step.
    assert max(errors) <= 5 * rate


def test_truncated_text_padding_changes_nothing(golden: Golden) -> None:
    model = golden.model
    short = golden.tensor("attention_mask").sum(dim=1) < 32
    ids, mask = golden.tensor("input_ids")[short], golden.tensor("attention_mask")[short]
    length = int(mask.sum(dim=1).max())
    assert length < ids.shape[1]
    with torch.no_grad():
        vision = model.encode_vision(golden.tensor("ref")[short])
        padded = model.embed_queries(vision, ids, mask)
        cut = model.embed_queries(vision, ids[:, :length], mask[:, :length])
    torch.testing.assert_close(cut, padded, rtol=1e-5, atol=1e-6)
