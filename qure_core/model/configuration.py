"""Configuration of the QuRe model, and its presets."""

from __future__ import annotations

from typing import Any, Literal

from transformers import Blip2QFormerConfig, Blip2VisionConfig, CLIPVisionConfig, PreTrainedConfig

VISION_CONFIGS = {"clip": CLIPVisionConfig, "eva": Blip2VisionConfig}


class QuReConfig(PreTrainedConfig):
    """Sizes and constants of a `QuReModel`.

    Args:
        vision_type: "clip" (pre-layer-norm, QuickGELU: BLIP-2's ViT-L) or "eva" (BLIP-2's ViT-g).
        vision: fields of the vision encoder's own transformers configuration. Its last layer norm
            is not part of the model.
        qformer: fields of transformers' `Blip2QFormerConfig`, vocabulary included.
        query_tokens: learned query tokens; an image is this many vectors.
        embed_dim: width of the shared embedding space.
        initial_temperature: start of the learned temperature.
        ln_vision_eps: epsilon of the trainable layer norm between encoder and Q-Former.
        max_text_tokens: texts are cut to this many tokens.
        initializer_range: standard deviation of random weights.
    """

    model_type = "qure"

    def __init__(
        self,
        vision_type: Literal["clip", "eva"] = "clip",
        vision: dict[str, Any] | None = None,
        qformer: dict[str, Any] | None = None,
        query_tokens: int = 32,
        embed_dim: int = 256,
        initial_temperature: float = 0.07,
        ln_vision_eps: float = 1e-5,
        max_text_tokens: int = 32,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if vision_type not in VISION_CONFIGS:
            raise ValueError(f"vision_type={vision_type!r} is not one of {sorted(VISION_CONFIGS)}")
        self.vision_type = vision_type
        self.vision = dict(vision or {})
        self.qformer = dict(qformer or {})
        self.query_tokens = query_tokens
        self.embed_dim = embed_dim
        self.initial_temperature = initial_temperature
        self.initializer_range = initializer_range
        self.ln_vision_eps = ln_vision_eps
        self.max_text_tokens = max_text_tokens
        super().__init__(**kwargs)

    def vision_config(self) -> Any:
        """The vision encoder's own configuration, a CLIPVisionConfig or Blip2VisionConfig."""
        return VISION_CONFIGS[self.vision_type](**self.vision)

    def qformer_config(self) -> Blip2QFormerConfig:
        """The Q-Former's own configuration."""
        fields = {"use_qformer_text_input": True, "cross_attention_frequency": 2, **self.qformer}
        return Blip2QFormerConfig(**fields)


BERT_BASE_VOCABULARY = 30_523  # bert-base-uncased and one [DEC] token

PRESETS: dict[str, dict[str, Any]] = {
    # CLIP ViT-L/14 without its last layer, as BLIP-2 uses it.
    "blip2-vit-l": {
        "vision_type": "clip",
        "vision": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        "qformer": {"encoder_hidden_size": 1024, "vocab_size": BERT_BASE_VOCABULARY},
    },
    # EVA-CLIP ViT-g/14 without its last layer.
    "blip2-vit-g": {
        "vision_type": "eva",
        "vision": {
            "hidden_size": 1408,
            "intermediate_size": 6144,
            "num_hidden_layers": 39,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
        },
        "qformer": {"encoder_hidden_size": 1408, "vocab_size": BERT_BASE_VOCABULARY},
    },
    # About a million parameters, for a laptop's CPU.
    "tiny": {
        "vision_type": "clip",
        "vision": {
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 16,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        "qformer": {
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "encoder_hidden_size": 96,
        },
        "query_tokens": 8,
        "embed_dim": 64,
        # 0.02 suits a width of 768; a narrow model from random weights learns faster with more.
        "initializer_range": 0.08,
    },
}


def preset(
    name: str, vocabulary_size: int | None = None, dropout: float | None = None
) -> QuReConfig:
    """The configuration called ``name``, with the vocabulary size and dropout given, if any."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {sorted(PRESETS)}")
    fields = dict(PRESETS[name])
    qformer = dict(fields["qformer"])
    if vocabulary_size is not None:
        qformer["vocab_size"] = vocabulary_size
    if dropout is not None:
        qformer |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return QuReConfig(**(fields | {"qformer": qformer}))
