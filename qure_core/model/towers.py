"""Query encoders over one feature of an image and one of a text: ``combiner`` and ``sum``.

CLIP's features (CLIP4CIR), or any vision encoder's and text model's, brought to one width. An image
is one vector: T = 1.

Shapes: B batch, P vision tokens, W vision width, L text tokens, F feature width, A answers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, CLIPTextModelWithProjection

from qure_core.model.base import ComposedModel, Embedded, check_positions
from qure_core.model.combiner import Combiner
from qure_core.model.configuration import QuReConfig


class SumOptions(BaseModel, extra="forbid"):
    """train_towers: fine-tune the text model and both projections to the common width (of CLIP,
    which has its own, the text model)."""

    train_towers: bool = True


class CombinerOptions(BaseModel, extra="forbid"):
    """projection, hidden: widths inside the Combiner; four and eight times the features' where they
    are not given, as published. dropout: inside it. train_towers: as `SumOptions`; the published
    second stage keeps them as they are."""

    projection: int | None = Field(None, ge=1)
    hidden: int | None = Field(None, ge=1)
    dropout: float = Field(0.5, ge=0, lt=1)
    train_towers: bool = False


class TowersModel(ComposedModel):
    """A query is the sum of an image's and a text's features, or what a Combiner makes of them."""

    def __init__(self, config: QuReConfig) -> None:
        super().__init__(config)
        features = config.embed_dim
        self.image_projection: nn.Module = (
            nn.Identity()
            if config.vision_type == "clip_projected"
            else nn.Linear(config.vision_width, features)
        )
        check_positions(config.max_text_tokens, config.text["max_position_embeddings"])
        self.text_encoder: nn.Module = make_text_encoder(config.text)
        self.is_clip = isinstance(self.text_encoder, CLIPTextModelWithProjection)
        self.text_projection: nn.Module = (
            nn.Identity() if self.is_clip else nn.Linear(config.text["hidden_size"], features)
        )
        self.combiner: Combiner | None = None
        options: SumOptions | CombinerOptions
        if config.query_encoder == "combiner":
            options = CombinerOptions(**config.encoder_options)
            projection, hidden = options.projection or 4 * features, options.hidden or 8 * features
            self.combiner = Combiner(features, projection, hidden, options.dropout)
        else:
            options = SumOptions(**config.encoder_options)
        self.train_towers = options.train_towers
        self.finish()

    def freeze_vision_encoder(self, frozen: bool = True) -> None:
        """As `ComposedModel`; with it goes what else fine-tuning may be told to leave alone."""
        for tower in (self.text_encoder, self.image_projection, self.text_projection):
            tower.requires_grad_(not frozen or self.train_towers)
        if self.combiner is not None:
            self.combiner.requires_grad_(frozen)  # pretraining has no queries
        super().freeze_vision_encoder(frozen)

    def train(self, mode: bool = True) -> TowersModel:
        super().train(mode)
        if hasattr(self, "text_encoder") and not any(
            p.requires_grad for p in self.text_encoder.parameters()
        ):
            self.text_encoder.eval()
        return self

    def image_features(self, vision_BPW: Tensor) -> Tensor:
        """Features of images [B, F], not normalised: of the mean over an encoder's output."""
        pooled_BW = vision_BPW.to(self.temperature.dtype).mean(dim=1)
        features_BF: Tensor = self.image_projection(pooled_BW)
        return features_BF

    def text_features(self, input_ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Features of texts [B, F], not normalised: CLIP's, or of the mean over a text's tokens."""
        encoded = self.text_encoder(input_ids=input_ids_BL, attention_mask=mask_BL)
        if self.is_clip:
            clip_BF: Tensor = encoded.text_embeds
            return clip_BF
        own_BL1 = mask_BL[:, :, None].to(encoded.last_hidden_state.dtype)
        mean_BH = (encoded.last_hidden_state * own_BL1).sum(dim=1) / own_BL1.sum(dim=1)
        features_BF: Tensor = self.text_projection(mean_BH)
        return features_BF

    def compose(self, image_BF: Tensor, text_BF: Tensor) -> Tensor:
        """Queries [B, F], not normalised, of both kinds of features."""
        if self.combiner is None:
            return image_BF + text_BF
        query_BF: Tensor = self.combiner(image_BF, text_BF)
        return query_BF

    def embed_images(self, vision_BPW: Tensor) -> Tensor:
        """Image embeddings [B, 1, F]."""
        return F.normalize(self.image_features(vision_BPW), dim=-1)[:, None]

    def embed_queries(
        self,
        vision_BPW: Tensor,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor,
        normalised: bool = True,
    ) -> Tensor:
        """Composed-query embeddings [B, F] of reference images and modification texts."""
        query_BF = self.compose(
            self.image_features(vision_BPW), self.text_features(input_ids_BL, attention_mask_BL)
        )
        return F.normalize(query_BF, dim=-1) if normalised else query_BF

    def embed_texts(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Text embeddings [B, F]."""
        return F.normalize(self.text_features(input_ids_BL, attention_mask_BL), dim=-1)

    def forward(
        self,
        vision: Tensor,
        reference_B: Tensor,
        answer_A: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
    ) -> Embedded:
        """Embeddings of a batch (`ComposedModel.forward`)."""
        # Rows first: the gradients of features that are picked would add up in no fixed order.
        answers = len(answer_A)
        image_RF = self.image_features(vision[torch.cat([answer_A, reference_B])])
        query_BF = self.compose(image_RF[answers:], self.text_features(input_ids, attention_mask))
        image_A1F = F.normalize(image_RF[:answers], dim=-1)[:, None]
        return Embedded(F.normalize(query_BF, dim=-1), image_A1F)


def make_text_encoder(fields: dict[str, Any]) -> nn.Module:
    """The text model of these fields of its own configuration, with random weights."""
    kind = CONFIG_MAPPING[fields["model_type"]]
    config = kind(**{name: value for name, value in fields.items() if name != "model_type"})
    if fields["model_type"] == "clip_text_model":
        return CLIPTextModelWithProjection(config)  # type: ignore[arg-type]
    # Its pooler is of no use here.
    made: nn.Module = AutoModel.from_config(config, add_pooling_layer=False)
    return made
