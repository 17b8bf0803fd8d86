"""SPRC's query encoder: sentence-level prompts (Bai et al., arXiv 2310.05473), on QuRe's parts.

The Q-Former's query tokens, fused with reference and text, become prompts that are prepended to the
text; the text pass over both gives the query. As the released program has it.

Shapes: B batch, T query tokens, L text tokens, H width, X all tokens of a pass, D embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor, nn

from qure_core.model.base import Embedded
from qure_core.model.configuration import QuReConfig
from qure_core.model.modeling import QuReModel
from qure_core.model.qformer import qformer_hidden_states


class SPRCOptions(BaseModel, extra="forbid", allow_inf_nan=False):
    """Weights of the auxiliary losses, 0.4 each as for CIRR; the program takes 1 on FashionIQ.

    prompt_weight: of the loss of queries made of the learned prompt and the text alone.
    align_weight: of the distance between an image's prompts and the learned one.
    """

    prompt_weight: float = Field(0.4, ge=0)
    align_weight: float = Field(0.4, ge=0)


class SPRCModel(QuReModel):
    """QuRe's model whose query is read from the text's class token, behind prompts."""

    def __init__(self, config: QuReConfig) -> None:
        most = config.qformer_config().max_position_embeddings
        if config.query_tokens + config.max_text_tokens > most:
            raise ValueError(
                f"sprc needs positions for {config.query_tokens} prompts and "
                f"{config.max_text_tokens} text tokens; the Q-Former has {most}"
            )
        super().__init__(config)
        self.options = SPRCOptions(**config.encoder_options)

    def finish(self) -> None:
        self.prompt_tokens = nn.Parameter(torch.zeros_like(self.query_tokens))
        super().finish()

    def freeze_vision_encoder(self, frozen: bool = True) -> None:
        """As `ComposedModel`; pretraining has no use of the learned prompt."""
        self.prompt_tokens.requires_grad_(frozen)
        super().freeze_vision_encoder(frozen)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SPRCModel):
            nn.init.normal_(module.prompt_tokens, std=0.02)

    def _text_pass(self, tokens_BXH: Tensor, mask_BL: Tensor) -> Tensor:
        """Hidden states [B, X, H] of T prompts and L text tokens without an image: all of them take
        the text's feed-forward."""
        prompts = tokens_BXH.shape[1] - mask_BL.shape[1]
        mask_BX = F.pad(mask_BL, (prompts, 0), value=1)
        _, hidden_BXH = qformer_hidden_states(
            self.qformer, self.ln_vision, None, None, tokens_BXH, mask_BX
        )
        assert hidden_BXH is not None
        return hidden_BXH

    def prompted_hidden_states(
        self, prompt_BTH: Tensor, input_ids_BL: Tensor, mask_BL: Tensor
    ) -> Tensor:
        """Hidden states [B, T + L, H] of an image's prompts and the text, which starts at T."""
        text_BLH = self.text_embeddings(input_ids=input_ids_BL)
        return self._text_pass(torch.cat([prompt_BTH, text_BLH], dim=1), mask_BL)

    def learned_prompt_hidden_states(self, input_ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Hidden states [B, T + L, H] of the class token, the learned prompt and the rest of the
        text, with positions throughout."""
        words_BLH = self.text_embeddings.word_embeddings(input_ids_BL)
        prompt_BTH = self.prompt_tokens.expand(len(words_BLH), -1, -1)
        tokens_BXH = torch.cat([words_BLH[:, :1], prompt_BTH, words_BLH[:, 1:]], dim=1)
        positions = torch.arange(tokens_BXH.shape[1], device=tokens_BXH.device)
        return self._text_pass(
            tokens_BXH + self.text_embeddings.position_embeddings(positions), mask_BL
        )

    def _query_vectors(
        self, hidden_BTH: Tensor, input_ids_BL: Tensor, attention_mask_BL: Tensor
    ) -> Tensor:
        both_BXH = self.prompted_hidden_states(hidden_BTH, input_ids_BL, attention_mask_BL)
        query_BD: Tensor = self.text_proj(both_BXH[:, hidden_BTH.shape[1]])
        return query_BD

    def _queries_and(
        self, image_ATD: Tensor, hidden_BTH: Tensor, input_ids_BL: Tensor, mask_BL: Tensor
    ) -> Embedded:
        plain = super()._queries_and(image_ATD, hidden_BTH, input_ids_BL, mask_BL)
        alone_BXH = self.learned_prompt_hidden_states(input_ids_BL, mask_BL)
        away_BH = hidden_BTH.mean(dim=1) - self.prompt_tokens.detach().mean(dim=1)
        return Embedded(
            plain.query_BD,
            image_ATD,
            F.normalize(self.text_proj(alone_BXH[:, 0]), dim=-1),
            self.options.prompt_weight,
            self.options.align_weight * away_BH.square().mean(dim=1),
        )
