"""Configuration of the QuRe model, and its presets."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import Blip2QFormerConfig, Blip2VisionConfig, CLIPVisionConfig, PreTrainedConfig

from qure_core.base.config import QueryEncoder

VISION_CONFIGS = {
    "clip": CLIPVisionConfig,
    "eva": Blip2VisionConfig,
    "clip_projected": CLIPVisionConfig,
}
VisionType = Literal["clip", "eva", "clip_projected", "hf"]


class QuReConfig(PreTrainedConfig):
    """Sizes and constants of a `QuReModel`.

    Args:
        query_encoder: what makes a query of an image and a text (`query_encoders`).
        encoder_options: its own settings.
        vision_type: "clip" (pre-layer-norm, QuickGELU: BLIP-2's ViT-L), "eva" (BLIP-2's ViT-g),
            "clip_projected" (CLIP's image feature) or "hf" (any other, `vision.AnyVision`).
        vision: fields of the vision encoder's own transformers configuration, or of `AnyVision`.
            The last layer norm of "clip" and "eva" is not part of the model.
        text: fields of a text model's own configuration, ``model_type`` included, for query
            encoders that have one apart.
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
        vision_type: VisionType = "clip",
        vision: dict[str, Any] | None = None,
        qformer: dict[str, Any] | None = None,
        query_tokens: int = 32,
        embed_dim: int = 256,
        initial_temperature: float = 0.07,
        ln_vision_eps: float = 1e-5,
        max_text_tokens: int = 32,
        initializer_range: float = 0.02,
        query_encoder: QueryEncoder = "qformer",
        encoder_options: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if vision_type not in get_args(VisionType):
            raise ValueError(
                f"vision_type={vision_type!r} is not one of {', '.join(get_args(VisionType))}"
            )
        self.vision_type = vision_type
        self.vision = dict(vision or {})
        self.qformer = dict(qformer or {})
        self.query_tokens = query_tokens
        self.embed_dim = embed_dim
        self.initial_temperature = initial_temperature
        self.initializer_range = initializer_range
        self.ln_vision_eps = ln_vision_eps
        self.max_text_tokens = max_text_tokens
        self.query_encoder = query_encoder
        self.encoder_options = dict(encoder_options or {})
        self.text = dict(text or {})
        super().__init__(**kwargs)

    def vision_config(self) -> Any:
        """The vision encoder's own configuration, a CLIPVisionConfig or Blip2VisionConfig."""
        return VISION_CONFIGS[self.vision_type](**self.vision)

    @property
    def vision_width(self) -> int:
        """W, of the encoder's output."""
        name = {"hf": "width", "clip_projected": "projection_dim"}
        width: int = self.vision[name.get(self.vision_type, "hidden_size")]
        return width

    @property
    def image_size(self) -> int:
        """Side of the encoder's input, pixels."""
        size: int = self.vision["image_size"]
        return size

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
    return QuReConfig(**preset_fields(name, vocabulary_size, dropout))


def preset_fields(
    name: str, vocabulary_size: int | None = None, dropout: float | None = None
) -> dict[str, Any]:
    """`preset` as the fields of a configuration."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {sorted(PRESETS)}")
    fields = dict(PRESETS[name])
    qformer = dict(fields["qformer"])
    if vocabulary_size is not None:
        qformer["vocab_size"] = vocabulary_size
    if dropout is not None:
        qformer |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return fields | {"qformer": qformer}
