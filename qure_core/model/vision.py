"""Vision encoders: BLIP-2's two, CLIP's with its projection, and any other of transformers.

Shapes: B batch, S side, P features of an image (grid cells or tokens), W vision width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    Blip2VisionModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.modeling_outputs import BaseModelOutput

from qure_core.data.images import CLIP_MEAN, CLIP_STD
from qure_core.model.configuration import QuReConfig


def make_vision_encoder(config: QuReConfig) -> nn.Module:
    """The encoder that ``config`` names, with random weights; its output's ``last_hidden_state`` is
    [B, P, W]."""
    if config.vision_type == "hf":
        return AnyVision(**config.vision)
    if config.vision_type == "clip_projected":
        return ProjectedCLIP(config.vision_config())
    encoder = CLIPVisionModel if config.vision_type == "clip" else Blip2VisionModel
    made: nn.Module = encoder(config.vision_config())
    # BLIP-2 hands the last block's raw output to ln_vision.
    made.register_module("post_layernorm", nn.Identity())
    return made


class ProjectedCLIP(CLIPVisionModelWithProjection):
    """CLIP's image feature as a grid of one."""

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        """[B, 1, W] of [B, 3, S, S]."""
        embedded = super().forward(pixel_values=pixel_values).image_embeds
        return BaseModelOutput(last_hidden_state=embedded[:, None])


class AnyVision(nn.Module):
    """A vision model of transformers whose output is a sequence of tokens or a grid of features.

    model: fields of its own configuration, ``model_type`` included. mean, std: of the pixels as it
    expects them; ``pixel_values`` have CLIP's, and are brought to its own. image_size: side of its
    input. width: W, as `probe` found it.
    """

    def __init__(
        self,
        model: dict[str, Any],
        mean: list[float],
        std: list[float],
        image_size: int,
        width: int,
    ) -> None:
        super().__init__()
        fields = {name: value for name, value in model.items() if name != "model_type"}
        self.model: nn.Module = AutoModel.from_config(CONFIG_MAPPING[model["model_type"]](**fields))
        # No buffers: what is not in a checkpoint is lost where weights are loaded into a skeleton.
        self.scale = [clip / own for clip, own in zip(CLIP_STD, std, strict=True)]
        self.shift = [
            (clip - own) / deviation
            for clip, own, deviation in zip(CLIP_MEAN, mean, std, strict=True)
        ]

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        """[B, P, W] of [B, 3, S, S]."""
        scale, shift = (
            pixel_values.new_tensor(values)[:, None, None] for values in (self.scale, self.shift)
        )
        features: Tensor = self.model(pixel_values=pixel_values * scale + shift).last_hidden_state
        if features.ndim == 4:  # a grid [B, W, rows, columns]
            features = features.flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=features)


@torch.no_grad()
def probe(encoder: nn.Module, image_size: int) -> tuple[int, int]:
    """P and W of an encoder's output, as it gives it."""
    output = encoder.eval()(pixel_values=torch.zeros(1, 3, image_size, image_size))
    _, positions, width = output.last_hidden_state.shape
    return positions, width
