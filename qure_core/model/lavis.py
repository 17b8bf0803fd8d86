"""Reading LAVIS-named checkpoints: BLIP-2's pretraining files and the QuRe authors' own.

Every key of the file is converted, known to be unused (by name), or an error.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qure_core.base.errors import InputError
from qure_core.model.configuration import QuReConfig
from qure_core.model.modeling import QuReModel, check_finite

# In LAVIS files but not in this model: the matching and captioning heads, and a buffer of indices.
_UNUSED = re.compile(r"itm_head\..*|Qformer\.cls\..*|Qformer\.bert\.embeddings\.position_ids")

_PLAIN = {
    "query_tokens": "query_tokens",
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


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a LAVIS file, unwrapped from ``model`` if need be; never runs its pickle."""
    try:
        value: Any = torch.load(path, map_location="cpu", weights_only=True)
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
    if isinstance(value, dict) and isinstance(value.get("model"), dict):
        value = value["model"]
    if not isinstance(value, dict) or not all(isinstance(v, Tensor) for v in value.values()):
        raise InputError(f"{path}: not a state dict of tensors")
    return value


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
    converted, unknown = convert_state(state)
    if unknown:
        raise InputError(
            f"{path}: {len(unknown)} key(s) are not of a BLIP-2 or QuRe checkpoint: "
            + ", ".join(unknown[:10])
            + (" ..." if len(unknown) > 10 else "")
        )
    try:
        model = QuReModel(infer_config(state, vision_heads, qformer_heads))
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
