"""CLIP models of transformers as towers (CLIP4CIR's), and its released Combiner weights.

Shapes: F feature width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.model.base import check_finite
from qure_core.model.configuration import QuReConfig
from qure_core.model.lavis import read_state
from qure_core.model.parts import UNREADABLE, fields_of, first_line, load_whole
from qure_core.model.processing import QuReProcessor
from qure_core.model.towers import TowersModel


def from_clip(
    directory: str,
    source: str,
    query_encoder: Literal["combiner", "sum"],
    options: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[TowersModel, QuReProcessor]:
    """Towers with the weights of a CLIP model in ``directory``, called ``source``; a Combiner
    starts at random, by ``seed``. Raises `InputError` if a part of it cannot be loaded or is not
    finite.
    """
    try:
        vision, text = (
            load_whole(kind, directory, source, "model.pretrained", "a CLIP model")
            for kind in (CLIPVisionModelWithProjection, CLIPTextModelWithProjection)
        )
        tokenizer = CLIPTokenizer.from_pretrained(directory)
    except UNREADABLE as error:
        raise InputError(
            f"model.pretrained: cannot load {source!r} as a CLIP model ({first_line(error)})"
        ) from None
    config = QuReConfig(
        vision_type="clip_projected",
        vision=fields_of(vision.config),
        text=fields_of(text.config) | {"model_type": "clip_text_model"},
        query_tokens=1,
        embed_dim=text.config.projection_dim,
        max_text_tokens=text.config.max_position_embeddings,
        query_encoder=query_encoder,
        encoder_options=options or {},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TowersModel(config)
    model.vision_encoder.load_state_dict(vision.state_dict())
    model.text_encoder.load_state_dict(text.state_dict())
    return model, QuReProcessor(tokenizer, config.image_size, config.max_text_tokens)


def load_combiner(path: str, clip: str) -> tuple[TowersModel, QuReProcessor]:
    """Released Combiner weights (a PyTorch or safetensors file) over the CLIP model ``clip``: a
    directory, its URI or a hub id. Raises `InputError` if they do not fit each other."""
    state = read_state(path)
    names = ("text_projection_layer.weight", "combiner_layer.weight")
    if lacking := [name for name in names if name not in state]:
        raise InputError(f"{path}: no Combiner's weights: {lacking[0]} is missing")
    (projection, features), hidden = state[names[0]].shape, state[names[1]].shape[0]
    with storage.local_copy(clip) as directory:
        options = {"projection": projection, "hidden": hidden}
        model, processor = from_clip(directory, clip, "combiner", options)
    assert model.combiner is not None
    if features != model.config.embed_dim:
        raise InputError(
            f"{path}: a Combiner of features {features} wide; those of {clip!r} are "
            f"{model.config.embed_dim} wide"
        )
    try:
        model.combiner.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path}: no Combiner's weights: {first_line(error)}") from None
    check_finite(model, path)
    return model, processor
