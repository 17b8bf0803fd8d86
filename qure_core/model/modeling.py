"""The QuRe model, assembled from transformers' BLIP-2 and CLIP parts.

Shapes: B batch, P vision tokens, W vision width, H Q-Former width, T query tokens, L text tokens,
D embedding width, A answers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from qure_core.model.base import ComposedModel, Embedded, check_positions
from qure_core.model.configuration import QuReConfig
from qure_core.model.qformer import qformer_hidden_states


class QuReModel(ComposedModel):
    """Composed-query and image encoder with a shared Q-Former (QuRe, section 3)."""

    def __init__(self, config: QuReConfig) -> None:
        super().__init__(config)
        qformer_config, width = config.qformer_config(), config.vision_width
        if qformer_config.encoder_hidden_size != width:
            raise ValueError(
                f"qformer.encoder_hidden_size={qformer_config.encoder_hidden_size} differs from "
                f"vision.hidden_size={width}"
            )
        check_positions(config.max_text_tokens, qformer_config.max_position_embeddings)
        hidden = qformer_config.hidden_size
        self.ln_vision = nn.LayerNorm(width, eps=config.ln_vision_eps)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.query_tokens, hidden))
        self.text_embeddings = Blip2TextEmbeddings(qformer_config)
        self.qformer = Blip2QFormerModel(qformer_config)
        self.vision_proj = nn.Linear(hidden, config.embed_dim)
        self.text_proj = nn.Linear(hidden, config.embed_dim)
        self.finish()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QuReModel):
            nn.init.normal_(module.query_tokens, std=0.02)
        elif isinstance(module, Blip2TextEmbeddings):
            length = module.position_ids.shape[-1]
            module.position_ids.copy_(torch.arange(length).expand((1, -1)))

    def _hidden_states(
        self,
        vision_RPW: Tensor | None,
        input_ids_BL: Tensor | None = None,
        attention_mask_BL: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """`qformer_hidden_states` of images and of the queries that the last rows start."""
        texts = None if input_ids_BL is None else self.text_embeddings(input_ids=input_ids_BL)
        tokens = None if vision_RPW is None else self.query_tokens[0]
        return qformer_hidden_states(
            self.qformer, self.ln_vision, tokens, vision_RPW, texts, attention_mask_BL
        )

    def _image_embeddings(self, hidden_BTH: Tensor) -> Tensor:
        return F.normalize(self.vision_proj(hidden_BTH), dim=-1)

    def _query_vectors(
        self, hidden_BTH: Tensor, input_ids_BL: Tensor, attention_mask_BL: Tensor
    ) -> Tensor:
        """Queries [B, D], not normalised, of their query tokens' hidden states and their texts."""
        del input_ids_BL, attention_mask_BL  # the hidden states have seen them
        mean_BD: Tensor = self.text_proj(hidden_BTH).mean(dim=1)
        return mean_BD

    def embed_images(self, vision_BPW: Tensor) -> Tensor:
        """Image embeddings [B, T, D]: one unit vector per query token."""
        hidden_BTH, _ = self._hidden_states(vision_BPW)
        assert hidden_BTH is not None
        return self._image_embeddings(hidden_BTH)

    def attention_maps(self, vision_BPW: Tensor) -> Tensor:
        """How much each of an image's vectors attends to each vision token, [B, T, P]: in the last
        layer of cross-attention, the mean over heads. Each [P] sums to one."""
        seen: list[Tensor] = []
        qformer_hidden_states(
            self.qformer, self.ln_vision, self.query_tokens[0], vision_BPW, seen=seen
        )
        return seen[-1]

    def query_hidden_states(
        self, vision_BPW: Tensor, input_ids_BL: Tensor, attention_mask_BL: Tensor
    ) -> Tensor:
        """Q-Former output over [query tokens; text tokens], [B, T + L, H]."""
        hidden_BTH, text_BLH = self._hidden_states(vision_BPW, input_ids_BL, attention_mask_BL)
        assert hidden_BTH is not None
        assert text_BLH is not None
        return torch.cat([hidden_BTH, text_BLH], dim=1)

    def embed_queries(
        self,
        vision_BPW: Tensor,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor,
        normalised: bool = True,
    ) -> Tensor:
        """Composed-query embeddings [B, D] of reference images and modification texts.

        ``normalised=False`` returns the vectors before their normalisation.
        """
        hidden_BTH, _ = self._hidden_states(vision_BPW, input_ids_BL, attention_mask_BL)
        assert hidden_BTH is not None
        query_BD = self._query_vectors(hidden_BTH, input_ids_BL, attention_mask_BL)
        return F.normalize(query_BD, dim=-1) if normalised else query_BD

    def embed_texts(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Caption embeddings [B, D] from the class token alone, for image-text pretraining."""
        _, hidden_BLH = self._hidden_states(None, input_ids_BL, attention_mask_BL)
        assert hidden_BLH is not None
        return F.normalize(self.text_proj(hidden_BLH[:, 0]), dim=-1)

    def forward(
        self,
        vision: Tensor,
        reference_B: Tensor,
        answer_A: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
    ) -> Embedded:
        """Embeddings of a batch (`ComposedModel.forward`): images and queries go through the
        Q-Former as one batch."""
        answers = answer_A.shape[0]
        hidden_RTH, _ = self._hidden_states(
            vision[torch.cat([answer_A, reference_B])], input_ids, attention_mask
        )
        assert hidden_RTH is not None
        image_ATD = self._image_embeddings(hidden_RTH[:answers])
        return self._queries_and(image_ATD, hidden_RTH[answers:], input_ids, attention_mask)

    def _queries_and(
        self, image_ATD: Tensor, hidden_BTH: Tensor, input_ids_BL: Tensor, mask_BL: Tensor
    ) -> Embedded:
        query_BD = self._query_vectors(hidden_BTH, input_ids_BL, mask_BL)
        return Embedded(F.normalize(query_BD, dim=-1), image_ATD)
