"""Encoders trained elsewhere as parts of a model: any vision model, any BERT, the samples.

Shapes: W vision width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BertModel

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.data.images import CLIP_MEAN, CLIP_STD
from qure_core.model import samples
from qure_core.model.base import check_finite
from qure_core.model.modeling import QuReModel
from qure_core.model.vision import AnyVision, probe


def first_line(error: Exception) -> str:
    """The first line of a library's message, or its type where it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@dataclass(frozen=True)
class VisionPart:
    """A vision encoder: the fields of `AnyVision`, its weights, and P, the features of an image."""

    fields: dict[str, Any]
    state: Mapping[str, Tensor]
    positions: int


def load_vision(source: str, image_size: int | None = None) -> VisionPart:
    """The vision model at ``source``: a directory, its URI, a hub id or a sample's name.

    ``image_size`` replaces that of its own image processor. Raises `InputError` if it cannot be
    loaded, or its output is neither a sequence nor a grid of features.
    """
    if sample := samples.vision(source):
        model, facts = sample
    else:
        with storage.local_copy(source) as directory:
            model, facts = _load_vision(directory, source)
    size = image_size or facts["image_size"]
    fields: dict[str, Any] = {
        "model": fields_of(model.config),
        "mean": list(facts["mean"]),
        "std": list(facts["std"]),
        "image_size": size,
        "width": 0,
    }
    encoder = AnyVision(**fields)
    encoder.model = model
    try:
        positions, fields["width"] = probe(encoder, size)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise InputError(
            f"model.vision: {source!r} gives no features of an image of {size} x {size} pixels "
            f"({first_line(error)}); take a vision model whose output is a sequence or a grid of "
            "features, and a size that it takes (model.vision_size)"
        ) from None
    return VisionPart(fields, encoder.state_dict(), positions)


UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
# A pooler is no part of what is used; many models are published without one.
_MAY_LACK = re.compile(r"(.*\.)?pooler\..*")


def load_whole(
    kind: Any, directory: str, source: str, setting: str, what: str = "its model", **given: Any
) -> Any:
    """A model with all of its weights from ``directory``; what it lacks would be drawn at random,
    and is refused, as is what is not finite. ``what`` it lacks parameters of, for people."""
    loaded: Any = kind.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **given
    )
    model, info = loaded
    missing = sorted(n for n in map(str, info["missing_keys"]) if not _MAY_LACK.fullmatch(n))
    if missing:
        raise InputError(
            f"{setting}: {source!r} lacks {len(missing)} parameter(s) of {what}, first "
            f"{', '.join(missing[:3])}; take a whole one"
        )
    check_finite(model, f"{setting}: {source}")
    return model


def _load_vision(directory: str, source: str) -> tuple[nn.Module, dict[str, Any]]:
    try:
        config = AutoConfig.from_pretrained(directory)
        config = getattr(config, "vision_config", config)  # of an image-text model, its image side
        model = load_whole(AutoModel, directory, source, "model.vision", config=config)
        return model, _preprocessing(directory)
    except UNREADABLE as error:
        raise InputError(
            f"model.vision: cannot load {source!r} ({first_line(error)}); give a directory or URI "
            "of a vision model, or a hub id on a machine that reaches the hub"
        ) from None


def _preprocessing(directory: str) -> dict[str, Any]:
    """Mean, standard deviation and size of the image processor beside the weights."""
    processor: Any = AutoImageProcessor.from_pretrained(directory)
    size = getattr(processor, "crop_size", None) or processor.size
    sides = [size[name] for name in ("height", "shortest_edge") if name in dict(size)]
    return {
        "mean": getattr(processor, "image_mean", None) or CLIP_MEAN,
        "std": getattr(processor, "image_std", None) or CLIP_STD,
        "image_size": sides[0] if sides else 224,
    }


_NO_FIELDS = {
    *("architectures", "dtype", "transformers_version", "_name_or_path", "id2label", "label2id"),
}


def fields_of(config: Any) -> dict[str, Any]:
    """A configuration's fields, all of them, so that a later default changes nothing; without what
    is of a file or a classifier."""
    return {name: value for name, value in config.to_dict().items() if name not in _NO_FIELDS}


def load_text(source: str) -> BertModel:
    """The BERT at ``source``: a directory, its URI, a hub id or a sample's name."""
    with storage.local_copy(samples.text(source) or source) as directory:
        try:
            kind = AutoConfig.from_pretrained(directory).model_type
            if kind != "bert":
                raise InputError(
                    f"model.text: {source!r} is a {kind!r} model; a BERT is needed, whose layers "
                    "the Q-Former's are"
                )
            found: BertModel = load_whole(BertModel, directory, source, "model.text")
            if getattr(found.config, "position_embedding_type", "absolute") != "absolute":
                raise InputError(
                    f"model.text: {source!r} has positions of another kind than the Q-Former; take "
                    "a BERT with absolute ones"
                )
        except UNREADABLE as error:
            raise InputError(
                f"model.text: cannot load {source!r} ({first_line(error)}); give a directory or "
                "URI of a BERT, or a hub id on a machine that reaches the hub"
            ) from None
    return found


def qformer_fields(bert: BertModel) -> dict[str, Any]:
    """Fields of a Q-Former's configuration that starts from ``bert``."""
    config = bert.config
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": config.hidden_act,
    }


@torch.no_grad()
def start_from_bert(model: QuReModel, bert: BertModel) -> None:
    """Fill a Q-Former's first layers from a BERT, as BLIP-2 does.

    Self-attention and the text's feed-forward are copied, the query tokens' feed-forward starts as
    the text's, cross-attention stays random. Word vectors beyond BERT's stay random too, and the
    position of a token type is added to every word, as BERT has it for a single text.
    """
    theirs = bert.state_dict()
    words = theirs["embeddings.word_embeddings.weight"]
    types = theirs["embeddings.token_type_embeddings.weight"][0]
    vectors = model.text_embeddings.word_embeddings.weight
    vectors[: len(words)] = words + types
    model.text_embeddings.position_embeddings.weight.copy_(
        theirs["embeddings.position_embeddings.weight"]
    )
    model.qformer.layernorm.load_state_dict(_below(theirs, "embeddings.LayerNorm."))
    for number, layer in enumerate(model.qformer.encoder.layer):
        own: Any = layer
        prefix = f"encoder.layer.{number}."
        for name in ("query", "key", "value"):
            linear = getattr(own.attention.attention, name)
            linear.load_state_dict(_below(theirs, f"{prefix}attention.self.{name}."))
        own.attention.output.load_state_dict(_below(theirs, f"{prefix}attention.output."))
        for part in (own.intermediate, own.intermediate_query):
            part.load_state_dict(_below(theirs, f"{prefix}intermediate."))
        for part in (own.output, own.output_query):
            part.load_state_dict(_below(theirs, f"{prefix}output."))


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
