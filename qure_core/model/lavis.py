"""Reading LAVIS-named checkpoints: BLIP-2's pretraining files, the QuRe authors' and SPRC's.

Every key of the file is converted, known to be unused (by name), or an error.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qure_core.base.errors import InputError
from qure_core.model.base import check_finite
from qure_core.model.configuration import QuReConfig
from qure_core.model.modeling import QuReModel
from qure_core.model.sprc import SPRCModel

BERT_WORDS = 30_522  # without [DEC], which BLIP-2 appends
# In LAVIS files but not in this model: the matching and captioning heads, and a buffer of indices.
_UNUSED = re.compile(r"itm_head\..*|Qformer\.cls\..*|Qformer\.bert\.embeddings\.position_ids")

_PLAIN = {
    "query_tokens": "query_tokens",
    "prompt_tokens": "prompt_tokens",  # SPRC's
    "temp": "temperature",
    "Qformer.bert.embeddings.word_embeddings.weight": "text_embeddings.word_embeddings.weight",
    "Qformer.bert.embeddings.position_embeddings.weight": (
        "text_embeddings.position_embeddings.weight"
    ),
}

_RENAMED: list[tuple[str, str]] = [
    (r"(ln_vision|vision_proj|text_proj)\.(weight|bias)", r"\1.\2"),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.(weight|bias)", r"qformer.layernorm.\1"),
    (
        r"Qformer\.bert\.encoder\.layer\.(\d+)\.(attention|crossattention)\.self\."
        r"(query|key|value)\.(weight|bias)",
        r"qformer.encoder.layer.\1.\2.attention.\3.\4",
    ),
    (
        r"Qformer\.bert\.encoder\.layer\.(\d+)\.(attention|crossattention)\.output\."
        r"(dense|LayerNorm)\.(weight|bias)",
        r"qformer.encoder.layer.\1.\2.output.\3.\4",
    ),
    (
        r"Qformer\.bert\.encoder\.layer\.(\d+)\.(intermediate|intermediate_query|output|"
        r"output_query)\.(dense|LayerNorm)\.(weight|bias)",
        r"qformer.encoder.layer.\1.\2.\3.\4",
    ),
    # CLIP-style ViT-L.
    (r"visual_encoder\.conv1\.weight", r"vision_encoder.embeddings.patch_embedding.weight"),
    (r"visual_encoder\.ln_pre\.(weight|bias)", r"vision_encoder.pre_layrnorm.\1"),
    (
        r"visual_encoder\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)",
        r"vision_encoder.encoder.layers.\1.self_attn.out_proj.\2",
    ),
    (
        r"visual_encoder\.transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)",
        r"vision_encoder.encoder.layers.\1.layer_norm\2.\3",
    ),
    (
        r"visual_encoder\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)",
        r"vision_encoder.encoder.layers.\1.mlp.fc1.\2",
    ),
    (
        r"visual_encoder\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)",
        r"vision_encoder.encoder.layers.\1.mlp.fc2.\2",
    ),
    # EVA ViT-g.
    (
        r"visual_encoder\.patch_embed\.proj\.(weight|bias)",
        r"vision_encoder.embeddings.patch_embedding.\1",
    ),
    (
        r"visual_encoder\.blocks\.(\d+)\.norm([12])\.(weight|bias)",
        r"vision_encoder.encoder.layers.\1.layer_norm\2.\3",
    ),
    (
        r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.weight",
        r"vision_encoder.encoder.layers.\1.self_attn.qkv.weight",
    ),
    (
        r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.(weight|bias)",
        r"vision_encoder.encoder.layers.\1.self_attn.projection.\2",
    ),
    (
        r"visual_encoder\.blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)",
        r"vision_encoder.encoder.layers.\1.mlp.\2.\3",
    ),
]


def _split_qkv(number: str, kind: str, value: Tensor) -> dict[str, Tensor]:
    prefix = f"vision_encoder.encoder.layers.{number}.self_attn"
    parts = value.chunk(3, dim=0)
    return {f"{prefix}.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}


def _q_bias(state: Mapping[str, Tensor], number: str, value: Tensor) -> dict[str, Tensor]:
    # EVA stores no key bias: it is zero.
    v_bias = state[f"visual_encoder.blocks.{number}.attn.v_bias"]
    bias = torch.cat([value, torch.zeros_like(value), v_bias])
    return {f"vision_encoder.encoder.layers.{number}.self_attn.qkv.bias": bias}


def convert_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename a LAVIS state dict to `QuReModel`'s names, in float32.

    Returns the converted tensors and the keys nothing is known about.
    """
    special: list[tuple[str, Callable[[re.Match[str], Tensor], dict[str, Tensor]]]] = [
        (
            r"visual_encoder\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)",
            lambda match, value: _split_qkv(match[1], match[2], value),
        ),
        (
            r"visual_encoder\.class_embedding",
            lambda _, value: {"vision_encoder.embeddings.class_embedding": value},
        ),
        (
            r"visual_encoder\.positional_embedding",
            lambda _, value: {"vision_encoder.embeddings.position_embedding.weight": value},
        ),
        (
            r"visual_encoder\.cls_token",
            lambda _, value: {"vision_encoder.embeddings.class_embedding": value},
        ),
        (
            r"visual_encoder\.pos_embed",
            lambda _, value: {"vision_encoder.embeddings.position_embedding": value},
        ),
        (
            r"visual_encoder\.blocks\.(\d+)\.attn\.q_bias",
            lambda match, value: _q_bias(state, match[1], value),
        ),
        # Consumed with the q_bias of its block.
        (r"visual_encoder\.blocks\.(\d+)\.attn\.v_bias", lambda match, value: {}),
    ]
    converted: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        value = value.float() if value.is_floating_point() else value
        if key in _PLAIN:
            converted[_PLAIN[key]] = value
            continue
        for pattern, handle in special:
            if match := re.fullmatch(pattern, key):
                converted |= handle(match, value)
                break
        else:
            for pattern, replacement in _RENAMED:
                if re.fullmatch(pattern, key):
                    converted[re.sub(pattern, replacement, key)] = value
                    break
            else:
                if not _UNUSED.fullmatch(key):
                    unknown.append(key)
    return converted, unknown


_WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "model_state")
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What training tools put before every name: DDP, torch.compile, Lightning."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a LAVIS-named file, unwrapped if need be, which is said; of a safetensors
    file, or of a PyTorch file, whose pickle is never run."""
    value = _unwrapped(_read_file(path), str(path))
    if value is None or not value:
        raise InputError(f"{path}: not a state dict of tensors")
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in value)), None):
        value = {name.removeprefix(prefix): tensor for name, tensor in value.items()}
        print(f"[weights] {path}: {prefix!r} before every name is left out", flush=True)
    kinds = {t.dtype for t in value.values() if t.is_floating_point()} - {torch.float32}
    if kinds:
        names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        print(f"[weights] {path}: values of {names} are taken as float32", flush=True)
    return value


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _unwrapped(value: Any, path: str) -> dict[str, Tensor] | None:
    """The tensors in what training tools save around them; None if there are none, or several."""
    if not isinstance(value, dict) or _is_state(value):
        return value if isinstance(value, dict) else None
    inner = [name for name in _WRAPPERS if isinstance(value.get(name), dict)]
    if not inner:
        inner = [name for name, part in value.items() if _is_state(part) and part]
        if len(inner) > 1:
            return None
    found = _unwrapped(value[inner[0]], path) if inner else None
    if found is not None:
        beside = ", ".join(sorted(map(str, set(value) - {inner[0]}))[:5])
        left = f" (not read: {beside})" if beside else ""
        print(f"[weights] {path}: taken from its entry {inner[0]!r}{left}", flush=True)
    return found


def _read_file(path: str | Path) -> Any:
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise InputError(
            f"{path}: refused, because it holds more than tensors and loading it could run code "
            f"({first})"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable PyTorch file ({first})") from None


_WORDS = "Qformer.bert.embeddings.word_embeddings.weight"


def with_decoder_word(words_VD: Tensor, source: str) -> Tensor:
    """BERT's 30,522 word vectors with one of zeros for [DEC], which QuRe never uses; others as
    they are."""
    if len(words_VD) != BERT_WORDS:
        return words_VD
    print(
        f"[weights] {source}: has vectors of BERT's {BERT_WORDS:,} words; one for [DEC], which is "
        "never used, is added",
        flush=True,
    )
    return torch.cat([words_VD, words_VD.new_zeros(1, words_VD.shape[1])])


_HEADS = {768: 12, 1024: 16, 1408: 16}
"""Attention heads of the published parts, by width: BERT-base, ViT-L/14 and ViT-g."""


def _heads(width: int, option: str) -> int:
    """The attention heads of a published part ``width`` wide; they leave no trace in shapes."""
    if width not in _HEADS:
        raise InputError(
            f"{option}: how many attention heads a part {width} wide has cannot be told from the "
            f"file; give {option}"
        )
    return _HEADS[width]


def infer_config(
    state: Mapping[str, Tensor], vision_heads: int | None = None, qformer_heads: int | None = None
) -> QuReConfig:
    """The configuration that a LAVIS state dict's shapes imply.

    Heads leave no trace in the shapes: by default they are those of the published widths.
    """

    def count(prefix: str) -> int:
        found = {int(match[1]) for key in state if (match := re.match(rf"{prefix}\.(\d+)\.", key))}
        return len(found)

    def shape(key: str) -> tuple[int, ...]:
        if key not in state:
            raise InputError(f"key {key!r} is missing: not a whole BLIP-2 or QuRe checkpoint")
        return tuple(state[key].shape)

    clip = "visual_encoder.conv1.weight" in state
    patches = shape(
        "visual_encoder.conv1.weight" if clip else "visual_encoder.patch_embed.proj.weight"
    )
    width, patch = patches[0], patches[-1]
    tokens = shape("visual_encoder.positional_embedding" if clip else "visual_encoder.pos_embed")[
        -2
    ]
    block = "visual_encoder.transformer.resblocks" if clip else "visual_encoder.blocks"
    vision = {
        "hidden_size": width,
        "intermediate_size": shape(f"{block}.0.mlp.{'c_fc' if clip else 'fc1'}.weight")[0],
        "num_hidden_layers": count(re.escape(block)),
        "num_attention_heads": vision_heads or _heads(width, "--vision-heads"),
        "image_size": round((tokens - 1) ** 0.5) * patch,
        "patch_size": patch,
        "hidden_act": "quick_gelu" if clip else "gelu",
        "layer_norm_eps": 1e-5 if clip else 1e-6,
    }
    if not clip:
        vision["qkv_bias"] = True
    vocabulary, hidden = shape("Qformer.bert.embeddings.word_embeddings.weight")
    layer = "Qformer.bert.encoder.layer"
    qformer = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shape(f"{layer}.0.intermediate_query.dense.weight")[0],
        "num_hidden_layers": count(re.escape(layer)),
        "num_attention_heads": qformer_heads or _heads(hidden, "--qformer-heads"),
        "max_position_embeddings": shape("Qformer.bert.embeddings.position_embeddings.weight")[0],
        "encoder_hidden_size": shape(f"{layer}.0.crossattention.self.key.weight")[1],
    }
    return QuReConfig(
        vision_type="clip" if clip else "eva",
        vision=vision,
        qformer=qformer,
        query_encoder="sprc" if "prompt_tokens" in state else "qformer",
        query_tokens=shape("query_tokens")[1],
        embed_dim=shape("text_proj.weight")[0],
    )


def load_lavis_checkpoint(
    path: str | Path, *, vision_heads: int | None = None, qformer_heads: int | None = None
) -> QuReModel:
    """Load a LAVIS-named checkpoint (.pth) into a `QuReModel`.

    Every dimension is inferred from the tensors' shapes. Raises `InputError` for a file that is
    damaged, foreign, incomplete, or would run code when unpickled.
    """
    state = read_state(path)
    if _WORDS in state:
        state[_WORDS] = with_decoder_word(state[_WORDS], str(path))
    converted, unknown = convert_state(state)
    if unknown:
        raise InputError(
            f"{path}: {len(unknown)} key(s) are not of a BLIP-2 or QuRe checkpoint: "
            + ", ".join(unknown[:10])
            + (" ..." if len(unknown) > 10 else "")
        )
    try:
        config = infer_config(state, vision_heads, qformer_heads)
        model = SPRCModel(config) if config.query_encoder == "sprc" else QuReModel(config)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    load_converted(model, converted, str(path))
    check_finite(model, str(path))
    return model


def load_converted(
    model: QuReModel,
    converted: dict[str, Tensor],
    path: str,
    may_lack: frozenset[str] = frozenset({"temperature"}),
) -> None:
    """Fill ``model``; an `InputError` lists every missing key and wrong shape.

    BLIP-2's pretraining file may lack the temperature, which then keeps its start.
    """
    expected = model.state_dict()
    faults = [
        f"{name}: missing" for name in expected if name not in converted and name not in may_lack
    ]
    faults += [
        f"{name}: shape {list(value.shape)}, expected {list(expected[name].shape)}"
        for name, value in converted.items()
        if name in expected and value.shape != expected[name].shape
    ]
    faults += [f"{name}: no such parameter" for name in converted if name not in expected]
    if faults:
        raise InputError(
            f"{path}: does not fit the model its shapes imply: " + "; ".join(faults[:10])
        )
    model.load_state_dict(converted, strict=False)
