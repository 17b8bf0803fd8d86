"""A model from its settings, where no whole one is given: a preset, and parts trained elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qure_core.base.config import ModelSizes, QueryEncoder
from qure_core.base.errors import InputError
from qure_core.model.base import ComposedModel
from qure_core.model.configuration import QuReConfig, preset_fields
from qure_core.model.modeling import QuReModel
from qure_core.model.parts import load_text, load_vision, qformer_fields, start_from_bert
from qure_core.model.processing import QuReProcessor
from qure_core.model.query_encoders import TOWERS, checked_options, model_class

_OF_THE_MODEL = ("query_tokens", "embed_dim", "max_text_tokens")  # other sizes are of its layers


def build_model(
    preset_name: str,
    tokenizer: PreTrainedTokenizerBase,
    dropout: float,
    seed: int,
    query_encoder: QueryEncoder = "qformer",
    encoder_options: dict[str, Any] | None = None,
    vision: str | None = None,
    vision_size: int | None = None,
    text: str | None = None,
    sizes: ModelSizes | None = None,
) -> tuple[ComposedModel, QuReProcessor]:
    """A model of a preset, and the processor that fits it; what no part fills starts at random.

    ``vision`` and ``text`` are weights for the frozen encoder (`parts.load_vision`) and for the
    Q-Former's text side or the text model (`parts.load_text`). ``sizes`` replaces some of the
    preset's; of a BERT with more layers the first are taken. Raises `InputError` for parts that do
    not fit.
    """
    fields = preset_fields(preset_name, len(tokenizer), dropout)
    bert = load_text(text) if text else None
    if bert is not None:
        if len(tokenizer) < bert.config.vocab_size:
            raise InputError(
                f"model.tokenizer: has {len(tokenizer):,} words, where model.text has vectors for "
                f"{bert.config.vocab_size:,}; leave it out, and the one beside them is taken"
            )
        fields["qformer"] |= qformer_fields(bert)
        _check_sizes(bert.config, sizes or ModelSizes())
    for name, value in (sizes or ModelSizes()).model_dump(exclude_none=True).items():
        (fields if name in _OF_THE_MODEL else fields["qformer"])[name] = value
    eyes = load_vision(vision, vision_size) if vision else None
    if eyes is not None:
        fields |= {"vision_type": "hf", "vision": eyes.fields}
        fields["qformer"]["encoder_hidden_size"] = eyes.fields["width"]
    fields["query_encoder"] = query_encoder
    fields["encoder_options"] = checked_options(query_encoder, encoder_options or {})
    if query_encoder in TOWERS:
        if sizes is not None and sizes.query_tokens is not None:
            raise InputError(
                f"model.sizes.query_tokens: with {query_encoder} an image is one vector; leave it "
                "out"
            )
        qformer = fields.pop("qformer")
        fields |= {"query_tokens": 1, "text": _text_fields(qformer)}
    try:
        config = QuReConfig(**fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config)(config)
        if eyes is not None:
            model.vision_encoder.load_state_dict(eyes.state)
        if bert is not None and isinstance(model, QuReModel):
            start_from_bert(model, bert)
        elif bert is not None:
            _fill_text(model.get_submodule("text_encoder"), bert.state_dict())
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"model.sizes, model.vision, model.text: they do not fit each other: {error}"
        ) from None
    return model, QuReProcessor(tokenizer, config.image_size, config.max_text_tokens)


def _check_sizes(bert: Any, sizes: ModelSizes) -> None:
    """Raise `InputError` for sizes that a BERT's layers cannot have."""
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        wanted, there = getattr(sizes, name), getattr(bert, name)
        if wanted not in (None, there):
            raise InputError(
                f"model.sizes.{name}: {wanted}, but model.text has {there}; leave it out"
            )
    if (sizes.num_hidden_layers or 0) > bert.num_hidden_layers:
        raise InputError(
            f"model.sizes.num_hidden_layers: {sizes.num_hidden_layers}, but model.text has "
            f"{bert.num_hidden_layers}, of which the first are taken"
        )


def _text_fields(qformer: Mapping[str, Any]) -> dict[str, Any]:
    """A Q-Former's fields as those of a BERT of its size."""
    names = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("intermediate_size", "max_position_embeddings", "layer_norm_eps"),
        *("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    )
    found = {name: qformer[name] for name in names if name in qformer}
    return {"model_type": "bert", "hidden_size": 768, **found}


def _fill_text(encoder: torch.nn.Module, theirs: Mapping[str, torch.Tensor]) -> None:
    """Fill a BERT from one of as many layers or more, and of as many words or fewer."""
    own = encoder.state_dict()
    filled = {name: theirs[name] for name in own}
    words = own["embeddings.word_embeddings.weight"].clone()
    given = theirs["embeddings.word_embeddings.weight"]
    words[: len(given)] = given
    encoder.load_state_dict(filled | {"embeddings.word_embeddings.weight": words})
