"""The QuRe model, assembled from transformers' BLIP-2 and CLIP parts.

Shapes: B batch, P vision tokens, W vision width, H Q-Former width, T query tokens, L text tokens,
D embedding width, Q queries, M images.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerModel, Blip2VisionModel, CLIPVisionModel, PreTrainedModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from qure_core.model.configuration import QuReConfig
from qure_core.relevance import relevance_scores


def encoder_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The frozen encoder's precision: fp16 on a GPU, as BLIP-2 runs it; fp32 on a CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.float16)
    return nullcontext()


class QuReModel(PreTrainedModel):
    """Composed-query and image encoder with a shared Q-Former (QuRe, section 3).

    The vision encoder is frozen and always in evaluation mode; everything else is trained.
    """

    config_class = QuReConfig
    base_model_prefix = "qure"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: QuReConfig) -> None:
        super().__init__(config)
        vision_config, qformer_config = config.vision_config(), config.qformer_config()
        if qformer_config.encoder_hidden_size != vision_config.hidden_size:
            raise ValueError(
                f"qformer.encoder_hidden_size={qformer_config.encoder_hidden_size} differs from "
                f"vision.hidden_size={vision_config.hidden_size}"
            )
        hidden = qformer_config.hidden_size
        encoder = CLIPVisionModel if config.vision_type == "clip" else Blip2VisionModel
        self.vision_encoder = encoder(vision_config)
        # BLIP-2 hands the last block's raw output to ln_vision.
        self.vision_encoder.post_layernorm = nn.Identity()  # type: ignore[assignment]
        self.ln_vision = nn.LayerNorm(vision_config.hidden_size, eps=config.ln_vision_eps)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.query_tokens, hidden))
        self.text_embeddings = Blip2TextEmbeddings(qformer_config)
        self.qformer = Blip2QFormerModel(qformer_config)
        self.vision_proj = nn.Linear(hidden, config.embed_dim)
        self.text_proj = nn.Linear(hidden, config.embed_dim)
        self.temperature = nn.Parameter(torch.tensor(config.initial_temperature))
        self.post_init()
        self.freeze_vision_encoder()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> QuReModel:
        """As transformers' own; the encoder is frozen, which loading would otherwise undo."""
        model: QuReModel = super().from_pretrained(*args, **kwargs)
        model.freeze_vision_encoder()
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QuReModel):
            nn.init.normal_(module.query_tokens, std=0.02)
            nn.init.constant_(module.temperature, self.config.initial_temperature)
        elif isinstance(module, Blip2TextEmbeddings):
            length = module.position_ids.shape[-1]
            module.position_ids.copy_(torch.arange(length).expand((1, -1)))

    def freeze_vision_encoder(self, frozen: bool = True) -> None:
        """Freeze the encoder (the method), or let pretraining from scratch train it."""
        self.vision_encoder.requires_grad_(not frozen)
        self.train(self.training)

    @property
    def vision_is_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.vision_encoder.parameters())

    def train(self, mode: bool = True) -> QuReModel:
        super().train(mode)
        if hasattr(self, "vision_encoder") and self.vision_is_frozen:
            self.vision_encoder.eval()
        return self

    def encode_vision(self, pixel_values: Tensor) -> Tensor:
        """Encoder output of ``pixel_values`` [B, 3, S, S], class token first: [B, P, W]."""
        output: Tensor = self.vision_encoder(pixel_values=pixel_values).last_hidden_state
        return output

    def _run_qformer(
        self,
        tokens_BXH: Tensor,
        query_length: int,
        vision_BPW: Tensor | None = None,
        mask_BX: Tensor | None = None,
    ) -> Tensor:
        if vision_BPW is not None:
            vision_BPW = self.ln_vision(vision_BPW)
        output: Tensor = self.qformer(
            query_embeds=tokens_BXH,
            query_length=query_length,
            attention_mask=mask_BX,
            encoder_hidden_states=vision_BPW,
        ).last_hidden_state
        return output

    def embed_images(self, vision_BPW: Tensor) -> Tensor:
        """Image embeddings [B, T, D]: one unit vector per query token."""
        queries_BTH = self.query_tokens.expand(vision_BPW.shape[0], -1, -1)
        hidden_BTH = self._run_qformer(queries_BTH, queries_BTH.shape[1], vision_BPW)
        return F.normalize(self.vision_proj(hidden_BTH), dim=-1)

    def query_hidden_states(
        self, vision_BPW: Tensor, input_ids_BL: Tensor, attention_mask_BL: Tensor
    ) -> Tensor:
        """Q-Former output over [query tokens; text tokens], [B, T + L, H]."""
        batch, length = vision_BPW.shape[0], self.config.query_tokens
        queries_BTH = self.query_tokens.expand(batch, -1, -1)
        tokens_BXH = self.text_embeddings(input_ids=input_ids_BL, query_embeds=queries_BTH)
        mask_BX = torch.cat([attention_mask_BL.new_ones(batch, length), attention_mask_BL], dim=1)
        return self._run_qformer(tokens_BXH, length, vision_BPW, mask_BX)

    def embed_queries(
        self,
        vision_BPW: Tensor,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor,
        normalised: bool = True,
    ) -> Tensor:
        """Composed-query embeddings [B, D] of reference images and modification texts.

        ``normalised=False`` returns the mean before its normalisation.
        """
        hidden_BXH = self.query_hidden_states(vision_BPW, input_ids_BL, attention_mask_BL)
        mean_BD = self.text_proj(hidden_BXH[:, : self.config.query_tokens]).mean(dim=1)
        return F.normalize(mean_BD, dim=-1) if normalised else mean_BD

    def embed_texts(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Caption embeddings [B, D] from the class token alone, for image-text pretraining."""
        tokens_BLH = self.text_embeddings(input_ids=input_ids_BL)
        hidden_BLH = self._run_qformer(tokens_BLH, 0, mask_BX=attention_mask_BL)
        return F.normalize(self.text_proj(hidden_BLH[:, 0]), dim=-1)

    def score(self, query_QD: Tensor, image_MTD: Tensor) -> Tensor:
        """`relevance_scores`, without the temperature: [Q, M]."""
        return relevance_scores(query_QD, image_MTD)

    def forward(
        self,
        pixel_values: Tensor,
        reference_B: Tensor,
        answer_A: Tensor,
        target_B: Tensor,
        negative_B: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        """Scores of each triplet's target and negative, divided by the temperature: [B, 2].

        ``pixel_values`` [U, 3, S, S] holds the batch's distinct images. ``reference_B`` and
        ``answer_A`` index it; ``target_B`` and ``negative_B`` index ``answer_A``, the distinct
        targets and negatives. So no image is encoded or embedded twice.
        """
        trained = torch.is_grad_enabled() and not self.vision_is_frozen
        with torch.set_grad_enabled(trained), encoder_autocast(pixel_values.device):
            vision_UPW = self.encode_vision(pixel_values)
        vision_UPW = vision_UPW.float()
        query_BD = self.embed_queries(vision_UPW[reference_B], input_ids, attention_mask)
        image_ATD = self.embed_images(vision_UPW[answer_A])
        image_B2TD = image_ATD[torch.stack([target_B, negative_B], dim=1)]
        scores_B2 = torch.einsum("bd,bntd->bnt", query_BD, image_B2TD).amax(dim=-1)
        return scores_B2 / self.temperature
