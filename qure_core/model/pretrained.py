"""Where a model's weights come from: a preset, a directory of ours, or a Hugging Face BLIP-2."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    BertTokenizer,
    Blip2ForImageTextRetrieval,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from qure_core.errors import InputError
from qure_core.model.configuration import QuReConfig, preset
from qure_core.model.lavis import load_converted
from qure_core.model.modeling import QuReModel
from qure_core.model.processing import QuReProcessor, with_decoder_token

transformers_logging.disable_progress_bar()  # a bar for every checkpoint drowns the log

_HF_PREFIXES = {
    "vision_model.post_layernorm.": "ln_vision.",
    "vision_model.": "vision_encoder.",
    "embeddings.": "text_embeddings.",
    "vision_projection.": "vision_proj.",
    "text_projection.": "text_proj.",
    "qformer.": "qformer.",
    "query_tokens": "query_tokens",
}


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """A BERT tokenizer from a directory or a hub id, with BLIP-2's [DEC] token appended."""
    try:
        return with_decoder_token(BertTokenizer.from_pretrained(source))
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.tokenizer: cannot load {source!r} ({str(error).splitlines()[0]}); give a "
            "directory with a BERT vocabulary, or a hub id on a machine that reaches the hub"
        ) from None


def build_model(
    preset_name: str, tokenizer: PreTrainedTokenizerBase, dropout: float, seed: int
) -> tuple[QuReModel, QuReProcessor]:
    """A model with random weights, and the processor that fits it."""
    config = preset(preset_name, vocabulary_size=len(tokenizer), dropout=dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = QuReModel(config)
    processor = QuReProcessor(tokenizer, config.vision["image_size"], config.max_text_tokens)
    return model, processor


def load_model(
    source: str, tokenizer: str | None = None, dropout: float | None = None
) -> tuple[QuReModel, QuReProcessor]:
    """Load weights and processor from a directory of ours or a Hugging Face BLIP-2 model.

    ``source`` is a directory, or the hub id of a `Blip2ForImageTextRetrieval`. ``dropout``
    replaces the Q-Former's for training.
    """
    try:
        found = AutoConfig.from_pretrained(source).model_type if not _is_ours(source) else "qure"
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.pretrained: cannot load {source!r} ({str(error).splitlines()[0]}); give a "
            "directory, or a hub id on a machine that reaches the hub"
        ) from None
    if found == "qure":
        config = QuReConfig.from_pretrained(source)
        _set_dropout(config, dropout)
        model = QuReModel.from_pretrained(source, config=config)
        processor = QuReProcessor.from_pretrained(source)
        return model, processor
    if found != "blip-2":
        raise InputError(
            f"model.pretrained: {source!r} is a {found!r} model; a QuRe or BLIP-2 "
            "image-text-retrieval model is needed"
        )
    model = _from_hf_blip2(source, dropout)
    text = load_tokenizer(tokenizer or source)
    vocabulary = model.config.qformer["vocab_size"]
    if len(text) > vocabulary:
        raise InputError(
            f"model.tokenizer: {len(text)} tokens do not fit the model's vocabulary of {vocabulary}"
        )
    return model, QuReProcessor(
        text, model.config.vision["image_size"], model.config.max_text_tokens
    )


def _is_ours(source: str) -> bool:
    file = Path(source) / "config.json"
    return file.exists() and '"model_type": "qure"' in file.read_text()


def _set_dropout(config: QuReConfig, dropout: float | None) -> None:
    if dropout is not None:
        config.qformer |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}


def _from_hf_blip2(source: str, dropout: float | None) -> QuReModel:
    donor = Blip2ForImageTextRetrieval.from_pretrained(source, dtype=torch.float32)
    theirs = donor.config
    config = QuReConfig(
        vision_type="eva",
        vision={
            key: getattr(theirs.vision_config, key)
            for key in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "image_size",
                "patch_size",
                "hidden_act",
                "layer_norm_eps",
                "qkv_bias",
            )
        },
        qformer={
            key: getattr(theirs.qformer_config, key)
            for key in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "max_position_embeddings",
                "encoder_hidden_size",
                "cross_attention_frequency",
                "layer_norm_eps",
            )
        },
        query_tokens=theirs.num_query_tokens,
        embed_dim=theirs.image_text_hidden_size,
    )
    _set_dropout(config, dropout)
    converted: dict[str, Tensor] = {}
    for name, value in donor.state_dict().items():
        for prefix, ours in _HF_PREFIXES.items():
            if name.startswith(prefix):
                converted[ours + name.removeprefix(prefix)] = value
                break
        else:
            if not name.startswith("itm_head."):
                raise InputError(f"{source}: unknown parameter {name!r}")
    model = QuReModel(config)
    load_converted(model, converted, source)
    return model
