"""Agreement with the released program on a GPU: in float32 closely, in half precision as far as
its mantissa goes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpus import DTYPES, needs_gpu
from model_goldens import NAMES, Golden, load_golden

from qure_core.model import encode_frozen
from qure_core.model.relevance import relevance_scores
from qure_core.objectives import make_objective
from qure_core.training.steps import TripletStep

pytestmark = needs_gpu

# Of the largest value. The encoder and the Q-Former are a dozen products deep.
BOUNDS = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 6e-2}


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param, "cuda")


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Convolutions in float32 too, which cuDNN would round to 10 bits of mantissa."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("precision", sorted(BOUNDS))
def test_embeddings_scores_and_losses(golden: Golden, precision: str) -> None:
    model, dtype = golden.model, DTYPES[precision]
    ids, mask = golden.tensor("input_ids"), golden.tensor("attention_mask")
    errors: dict[str, float] = {}
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype is not None):
        vision = {name: model.encode_vision(golden.tensor(name)) for name in ("ref", "tar", "neg")}
        errors["vit_raw_ref"] = golden.error(vision["ref"], "vit_raw_ref")
        images = {name: model.embed_images(features) for name, features in vision.items()}
        for name, image in images.items():
            errors[f"index_feats_{name}"] = golden.error(image, f"index_feats_{name}")
        query = model.embed_queries(vision["ref"], ids, mask)
        errors["query_feats"] = golden.error(query, "query_feats")
        everything = torch.cat([images[name] for name in ("ref", "tar", "neg")])
        scores = relevance_scores(query, everything)
        errors["score_query_x_all"] = golden.error(scores, "score_query_x_all")
        step = TripletStep(model, make_objective("bradley_terry", {}))
        losses_B, _ = step(**golden.batch())
        errors["loss_temp"] = golden.error(losses_B.mean(), "loss_temp")
    print(f"\n{precision}: largest relative error {max(errors.values()):.2e}", errors)
    assert max(errors.values()) <= BOUNDS[precision], errors


def test_the_frozen_encoder_in_half_precision(golden: Golden) -> None:
    # What a feature store holds: autocast products, float16 values.
    features = encode_frozen(golden.model.vision_encoder, golden.tensor("ref"), "fp16")
    assert features.dtype == torch.float16
    assert golden.error(features, "vit_raw_ref") <= BOUNDS["fp16"]
    exact = encode_frozen(golden.model.vision_encoder, golden.tensor("ref"), "fp32")
    assert golden.error(exact, "vit_raw_ref") <= BOUNDS["fp32"]


def test_an_image_alone_is_the_image_in_a_batch(golden: Golden) -> None:
    pixels = golden.tensor("ref")
    for precision in ("fp16", "fp32"):
        whole = encode_frozen(golden.model.vision_encoder, pixels, precision)
        alone = encode_frozen(golden.model.vision_encoder, pixels[:1], precision)
        assert torch.equal(alone, whole[:1]), precision
