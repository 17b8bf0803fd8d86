"""Where a model's weights come from: a preset, a directory of ours, or a Hugging Face BLIP-2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    BertTokenizer,
    Blip2ForImageTextRetrieval,
    CLIPTokenizer,
    CLIPVisionModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from qure_core import storage
from qure_core.base.config import QueryEncoder
from qure_core.base.errors import InputError
from qure_core.model.base import ComposedModel, check_finite
from qure_core.model.checkpoint_files import OPTIMIZER_FILE
from qure_core.model.clip import from_clip
from qure_core.model.configuration import QuReConfig
from qure_core.model.lavis import load_converted, with_decoder_word
from qure_core.model.modeling import QuReModel
from qure_core.model.parts import first_line
from qure_core.model.processing import QuReProcessor, with_decoder_token
from qure_core.model.query_encoders import TOWERS, checked_options, model_class

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
    """A BERT tokenizer from a directory, its URI or a hub id, with BLIP-2's [DEC] appended."""
    with storage.local_copy(source) as directory:
        return _load_tokenizer(directory, source)


def _load_tokenizer(directory: str, source: str) -> PreTrainedTokenizerBase:
    try:
        return with_decoder_token(BertTokenizer.from_pretrained(directory))
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.tokenizer: cannot load {source!r} ({first_line(error)}); give a "
            "directory with a BERT vocabulary, or a hub id on a machine that reaches the hub"
        ) from None


_BLIP2_WORDS = 30_523
_BERT_WORDS = {"[PAD]": 0, "[CLS]": 101, "[SEP]": 102, "the": 1996}  # some, by their numbers


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: ComposedModel, source: str) -> None:
    """Raise `InputError` if ``tokenizer`` cannot be the one that ``model`` was trained with.

    That is: it has more words than the model has vectors, or, where there are as many vectors as
    BLIP-2 has, is not BERT's. With fewer words a warning is printed: vectors may be padding.
    """
    config = model.config
    vectors = (config.text or config.qformer)["vocab_size"]
    words = len(tokenizer)
    if isinstance(tokenizer, CLIPTokenizer):
        if words != vectors:
            raise InputError(
                f"{source}: its tokenizer has {words:,} words, where the model has vectors for "
                f"{vectors:,}"
            )
        return
    given = tokenizer.get_vocab()
    is_bert = all(given.get(word) == number for word, number in _BERT_WORDS.items())
    if words > vectors or (vectors == _BLIP2_WORDS and not is_bert):
        raise InputError(
            f"model.tokenizer: {source!r} has {words:,} words ([DEC] included), and not those that "
            f"the model has {vectors:,} vectors for: texts would be read as others; give the "
            "tokenizer that the weights were trained with (bert-base-uncased for BLIP-2)"
        )
    if tokenizer.pad_token_id is None or tokenizer.cls_token_id is None:
        raise InputError(f"model.tokenizer: {source!r} has no [PAD] or [CLS]: not BERT's")
    if words < vectors:
        print(
            f"warning: model.tokenizer: {source!r} has {words:,} words where the model has vectors "
            f"for {vectors:,}; make sure that it is the one the weights were trained with",
            flush=True,
        )


def load_model(
    source: str,
    tokenizer: str | None = None,
    dropout: float | None = None,
    query_encoder: QueryEncoder | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[ComposedModel, QuReProcessor]:
    """Load weights and processor from a directory of ours or a Hugging Face BLIP-2 or CLIP model.

    ``source`` is a directory, its URI, or the hub id of a `Blip2ForImageTextRetrieval` or a
    `CLIPModel`. ``dropout`` replaces the Q-Former's for training. ``query_encoder`` and its
    ``options`` replace what the weights were made with, where it can be made of them: what it has
    besides starts at random, by ``seed``.
    """
    options = options or {}
    model: ComposedModel
    with storage.local_copy(source, leave_out={OPTIMIZER_FILE}) as directory:
        if _is_clip(directory):
            if tokenizer:
                raise InputError(f"model.tokenizer: {source!r}, a CLIP, has its own; leave it out")
            kind: Literal["combiner", "sum"] = "combiner" if query_encoder == "combiner" else "sum"
            checked = checked_options(kind, options)
            model, processor = from_clip(directory, source, kind, checked, seed)
        else:
            model, processor = _load_model(directory, source, tokenizer, dropout)
    wanted, there = query_encoder or model.config.query_encoder, model.config.query_encoder
    known = model.config.encoder_options
    if wanted != there or known | options != known:
        given = known | options if wanted == there else options
        model = with_query_encoder(model, wanted, given, source, seed)
    return model, processor


def _is_clip(directory: str) -> bool:
    try:
        return (
            not _is_ours(directory) and AutoConfig.from_pretrained(directory).model_type == "clip"
        )
    except (OSError, ValueError):
        return False  # what it is not is said when it is read


def with_query_encoder(
    model: ComposedModel,
    query_encoder: QueryEncoder,
    options: dict[str, Any],
    source: str,
    seed: int,
) -> ComposedModel:
    """A model with the weights of ``model`` and another query encoder; what that has besides starts
    at random, by ``seed``. Raises `InputError` where it cannot be made of them."""
    if (model.config.query_encoder in TOWERS) != (query_encoder in TOWERS):
        needed = "a CLIP model" if query_encoder in TOWERS else "a BLIP-2 or QuRe model"
        raise InputError(
            f"model.query_encoder: {query_encoder} cannot be made of the weights of {source!r}, "
            f"which are of {model.config.query_encoder}; give those of {needed}"
        )
    fields = model.config.to_dict() | {"query_encoder": query_encoder}
    fields["encoder_options"] = checked_options(query_encoder, options)
    config = QuReConfig(**fields)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            changed = model_class(config)(config)
    except ValueError as error:
        raise InputError(f"model.query_encoder: {error}") from None
    theirs, own = model.state_dict(), changed.state_dict()
    if other := [n for n, v in theirs.items() if n in own and v.shape != own[n].shape]:
        raise InputError(
            f"model.encoder_options: {source!r} has a {other[0]} of another size; leave out what "
            "sizes it"
        )
    if left := sorted(name for name in theirs if name not in own):
        print(f"[weights] {source}: not taken for {query_encoder}: {', '.join(left[:5])}")
    changed.load_state_dict({name: theirs.get(name, value) for name, value in own.items()})
    changed.freeze_vision_encoder()
    return changed


def _of_the_hub(name: str) -> str:
    """A local copy of a model of ours on the hub; ``name`` itself of anything else."""
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    try:
        if not _is_ours(str(Path(hf_hub_download(name, "config.json")).parent)):
            return name
        return snapshot_download(name, ignore_patterns=[OPTIMIZER_FILE])
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        return name  # what it is not is said when it is read


def _load_model(
    directory: str,
    source: str,
    tokenizer: str | None,
    dropout: float | None,
) -> tuple[ComposedModel, QuReProcessor]:
    try:
        directory = _of_the_hub(directory)
        ours = _is_ours(directory)
        found = "qure" if ours else AutoConfig.from_pretrained(directory).model_type
    except (OSError, ValueError) as error:
        if Path(directory).is_file():
            raise InputError(
                f"model.pretrained: {source} is one file of weights; make a directory of it with "
                f"python -m qure_core.model.convert {source} TARGET, and give that"
            ) from None
        raise InputError(
            f"model.pretrained: cannot load {source!r} ({first_line(error)}); give a directory "
            "or its URI, or a hub id on a machine that reaches the hub"
        ) from None
    if found == "qure":
        config = QuReConfig.from_pretrained(directory)
        _set_dropout(config, dropout)
        model = model_class(config).from_directory(directory, source, config=config)
        processor = QuReProcessor.from_pretrained(directory)
        check_vocabulary(processor.tokenizer, model, source)
        if tokenizer and load_tokenizer(tokenizer).get_vocab() != processor.tokenizer.get_vocab():
            raise InputError(
                f"model.tokenizer: {tokenizer!r} has other words than those {source!r} was trained "
                "with, which lie beside it; leave model.tokenizer out"
            )
        return model, processor
    if found != "blip-2":
        raise InputError(
            f"model.pretrained: {source!r} is a {found!r} model; a QuRe, BLIP-2 "
            "image-text-retrieval or CLIP model is needed"
        )
    model = _from_hf_blip2(directory, source, dropout)
    check_finite(model, source)
    text = load_tokenizer(tokenizer) if tokenizer else _load_tokenizer(directory, source)
    check_vocabulary(text, model, tokenizer or source)
    return model, QuReProcessor(text, model.config.image_size, model.config.max_text_tokens)


def _is_ours(source: str) -> bool:
    file = Path(source) / "config.json"
    return file.exists() and '"model_type": "qure"' in file.read_text()


def _set_dropout(config: QuReConfig, dropout: float | None) -> None:
    if dropout is not None and config.text.get("model_type") == "bert":
        config.text |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if dropout is not None and config.qformer:
        config.qformer |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}


_CLIP_CONFIG = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


def _donor(kind: Any, source: str, option: str) -> Any:
    try:
        with storage.local_copy(source) as directory:
            return kind.from_pretrained(directory, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"{option}: cannot load {source!r} ({first_line(error)})") from None


def fill_vision_encoder(model: QuReModel, source: str) -> None:
    """Replace a CLIP-style encoder's weights by those of a Hugging Face CLIP directory or hub id.

    Of the donor's layers the first are taken: BLIP-2 uses 23 of CLIP ViT-L/14's 24.
    """
    if model.config.vision_type != "clip":
        raise InputError("--clip: the model's vision encoder is EVA's, not CLIP's")
    donor = _donor(CLIPVisionModel, source, "--clip")
    ours = model.config.vision_config()
    different = [
        f"{name} is {getattr(donor.config, name)} there, {getattr(ours, name)} here"
        for name in _CLIP_CONFIG
        if getattr(donor.config, name) != getattr(ours, name)
    ]
    if donor.config.num_hidden_layers < ours.num_hidden_layers:
        different.append(f"it has only {donor.config.num_hidden_layers} layers")
    if different:
        raise InputError(f"--clip: {source!r} does not fit: {'; '.join(different)}")
    state = donor.state_dict()
    wanted = model.vision_encoder.state_dict()
    model.vision_encoder.load_state_dict({name: state[name] for name in wanted})


def fill_qformer(model: QuReModel, source: str) -> None:
    """Replace all but the vision encoder and ln_vision by a Hugging Face BLIP-2's parts."""
    donor = _donor(Blip2ForImageTextRetrieval, source, "--blip2")
    kept = {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith(("vision_encoder.", "ln_vision.", "temperature"))
    }
    theirs = {
        name: value
        for name, value in _convert_hf(donor, source).items()
        if not name.startswith(("vision_encoder.", "ln_vision."))
    }
    load_converted(model, kept | theirs, source)


# Of a Hugging Face BLIP-2, what has no part in a query's or an image's embedding: the matching
# head, and what some versions of the library add.
_HF_UNUSED = re.compile(r"itm_head\..*|logit_scale|logit_bias|(.*\.)?position_ids")
_HF_WORDS = "text_embeddings.word_embeddings.weight"


def _convert_hf(donor: Any, source: str) -> dict[str, Tensor]:
    """A `Blip2ForImageTextRetrieval`'s tensors under our names."""
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, value in donor.state_dict().items():
        if _HF_UNUSED.fullmatch(name):
            continue
        for prefix, ours in _HF_PREFIXES.items():
            if name.startswith(prefix):
                converted[ours + name.removeprefix(prefix)] = value
                break
        else:
            unknown.append(name)
    if unknown:
        raise InputError(
            f"{source}: {len(unknown)} parameter(s) are not of a BLIP-2 image-text-retrieval model "
            f"as it is known here: {', '.join(unknown[:10])}{' ...' if len(unknown) > 10 else ''}"
        )
    converted[_HF_WORDS] = with_decoder_word(converted[_HF_WORDS], source)
    return converted


def _load_hf_blip2(directory: str, source: str) -> Any:
    """A Hugging Face BLIP-2 with all of its weights from ``directory``; what is left unread of them
    is said, and what they lack is refused: it would be drawn at random."""
    loaded: Any = Blip2ForImageTextRetrieval.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    donor, info = loaded
    missing = sorted(n for n in map(str, info["missing_keys"]) if not _HF_UNUSED.fullmatch(n))
    if missing:
        raise InputError(
            f"{source}: lacks {len(missing)} parameter(s) of a BLIP-2 image-text-retrieval model, "
            f"first {', '.join(missing[:5])}; take a whole one"
        )
    unread = sorted(n for n in map(str, info["unexpected_keys"]) if not _HF_UNUSED.fullmatch(n))
    if unread:
        print(
            f"[weights] {source}: {len(unread)} parameter(s) are not read, first "
            f"{', '.join(unread[:5])}",
            flush=True,
        )
    return donor


def _from_hf_blip2(directory: str, source: str, dropout: float | None) -> QuReModel:
    donor = _load_hf_blip2(directory, source)
    converted = _convert_hf(donor, source)
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
    config.qformer["vocab_size"] = len(converted[_HF_WORDS])
    _set_dropout(config, dropout)
    model = QuReModel(config)
    load_converted(model, converted, source)
    return model
