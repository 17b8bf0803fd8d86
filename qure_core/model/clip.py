"""CLIP models of transformers as towers (CLIP4CIR's), and its released Combiner weights.

Shapes: F feature width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from safetensors import SafetensorError
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
from qure_core.model.parts import first_line
from qure_core.model.processing import QuReProcessor
from qure_core.model.towers import TowersModel

_COMMON = (
    "architectures",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "id2label",
    "label2id",
)


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
    parts = []
    try:
        for kind in (CLIPVisionModelWithProjection, CLIPTextModelWithProjection):
            loaded: Any = kind.from_pretrained(
                directory, dtype=torch.float32, output_loading_info=True
            )
            part, info = loaded
            if missing := sorted(map(str, info["missing_keys"])):
                raise InputError(
                    f"{source}: lacks {len(missing)} parameter(s) of a CLIP model, first "
                    f"{', '.join(missing[:3])}; take a whole one"
                )
            parts.append(part)
        tokenizer = CLIPTokenizer.from_pretrained(directory)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"model.pretrained: cannot load {source!r} as a CLIP model ({first_line(error)})"
        ) from None
    vision, text = parts
    config = QuReConfig(
        vision_type="clip_projected",
        vision=_fields(vision.config),
        text=_fields(text.config) | {"model_type": "clip_text_model"},
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
    check_finite(model, source)
    return model, QuReProcessor(tokenizer, config.image_size, config.max_text_tokens)


def _fields(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _COMMON}


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
