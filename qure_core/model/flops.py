"""Floating-point operations of a training step, counted from the model's shape.

Two for each multiply-add of a matrix product, forward and backward, without what is recomputed;
elementwise work is left out, as is usual for the share of a device's peak.
"""

from __future__ import annotations

from qure_core.model.configuration import QuReConfig


def vision_tokens(config: QuReConfig) -> int:
    """P: patches and the class token of an image."""
    return int((config.vision["image_size"] // config.vision["patch_size"]) ** 2) + 1


def encoder_flops(config: QuReConfig) -> int:
    """Of the vision encoder, forward, for one image."""
    vision = config.vision
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    tokens = vision_tokens(config)
    patches = (tokens - 1) * 3 * vision["patch_size"] ** 2 * width
    layer = tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width
    return 2 * (patches + vision["num_hidden_layers"] * layer)


def step_flops(config: QuReConfig, answers: int, queries: int, text_tokens: int) -> int:
    """Of the Q-Former's part of a step, forward and backward.

    ``answers`` distinct targets and negatives, ``queries`` triplets with texts of ``text_tokens``.
    """
    qformer = config.qformer_config()
    width, inner = qformer.hidden_size, qformer.intermediate_size
    layers = qformer.num_hidden_layers
    crossed = len(range(0, layers, qformer.cross_attention_frequency))
    own, tokens = config.query_tokens, vision_tokens(config)
    rows = answers + queries
    texts = queries * text_tokens

    every = (rows * own + texts) * (4 * width**2 + 2 * width * inner)
    every += 2 * width * (answers * own**2 + queries * (own + text_tokens) ** 2)
    cross = rows * own * 2 * width**2 + 2 * width * rows * own * tokens
    heads = rows * own * width * config.embed_dim + 2 * queries * own * config.embed_dim
    # Keys and values of frozen features: no gradient goes back to the features.
    keys_values = rows * tokens * 2 * qformer.encoder_hidden_size * width
    return 2 * (3 * (layers * every + crossed * cross + heads) + 2 * crossed * keys_values)
