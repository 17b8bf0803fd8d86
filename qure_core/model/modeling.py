"""The QuRe model, assembled from transformers' BLIP-2 and CLIP parts.

Shapes: B batch, P vision tokens, W vision width, H Q-Former width, T query tokens, L text tokens,
D embedding width, Q queries, M images.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerModel, Blip2VisionModel, CLIPVisionModel, PreTrainedModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.model.checkpoint_files import OPTIMIZER_FILE
from qure_core.model.configuration import QuReConfig
from qure_core.model.qformer import qformer_hidden_states

ENCODER_BATCH = 16
"""Images the frozen encoder takes at once, always: products of one shape give the same bits for an
image whatever is encoded beside it, so stored features equal those computed on the fly."""


def encode_vision(encoder: nn.Module, pixel_values: Tensor) -> Tensor:
    """A vision encoder's output for ``pixel_values`` [B, 3, S, S]: [B, P, W], class token first."""
    output: Tensor = encoder(pixel_values=pixel_values).last_hidden_state
    return output


@torch.no_grad()
def encode_frozen(encoder: nn.Module, pixel_values: Tensor, precision: str) -> Tensor:
    """A frozen encoder's features of ``pixel_values`` [B, 3, S, S]: [B, P, W].

    ``precision`` "fp16" gives float16 as BLIP-2's encoder does, which runs in half precision on a
    GPU (on a CPU, where that is slow, its float32 output is rounded); "fp32" gives float32. An
    image's features do not depend on the images beside it.
    """
    assert not encoder.training, "a frozen encoder is in evaluation mode"
    device = pixel_values.device
    half = precision == "fp16"
    parts = []
    with torch.autocast(device.type, torch.float16, enabled=half and device.type == "cuda"):
        for part in pixel_values.split(ENCODER_BATCH):
            filler = part.new_zeros(ENCODER_BATCH - len(part), *part.shape[1:])
            parts.append(encode_vision(encoder, torch.cat([part, filler]))[: len(part)])
    return torch.cat(parts).to(torch.float16 if half else torch.float32)


def check_finite(module: nn.Module, source: str) -> None:
    """Raise `InputError` naming the first of ``source``'s parameters that is not finite.

    One NaN makes every score NaN, which sorts first: all would be found at rank 1.
    """
    for name, value in module.state_dict().items():
        # A sum is quicker; it also exceeds a type's range where no element does.
        if not torch.isfinite(value.sum()) and not (finite := torch.isfinite(value)).all():
            raise InputError(
                f"{source}: {int((~finite).sum()):,} of {value.numel():,} values of {name} are not "
                "finite (NaN or infinite); take another checkpoint"
            )


class QuReModel(PreTrainedModel):
    """Composed-query and image encoder with a shared Q-Former (QuRe, section 3).

    The vision encoder is frozen and always in evaluation mode; everything else is trained.
    """

    config_class = QuReConfig
    config: QuReConfig
    base_model_prefix = "qure"
    main_input_name = "vision"
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
        self.vision_encoder: nn.Module = encoder(vision_config)
        # BLIP-2 hands the last block's raw output to ln_vision.
        self.vision_encoder.register_module("post_layernorm", nn.Identity())
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
    def from_pretrained(  # type: ignore[override]
        cls, source: Any, *args: Any, **kwargs: Any
    ) -> QuReModel:
        """As transformers' own, from a directory, its URI or a hub id, with its encoder frozen.

        A committed directory of ours is checked against its manifest. Raises `InputError` if a file
        is damaged, a parameter missing, unknown or not finite.
        """
        with storage.local_copy(str(source), leave_out={OPTIMIZER_FILE}) as directory:
            return cls.from_directory(directory, str(source), *args, **kwargs)

    @classmethod
    def from_directory(cls, directory: str, source: str, *args: Any, **kwargs: Any) -> QuReModel:
        """`from_pretrained` of a directory whose files were checked, called ``source``."""
        loaded: Any = super().from_pretrained(directory, *args, output_loading_info=True, **kwargs)
        model: QuReModel = loaded[0]
        faults = [
            f"{len(names)} parameter(s) {what}, first {min(map(str, names))}"
            for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if (names := loaded[1].get(what))
        ]
        if faults:
            raise InputError(
                f"{source}: does not hold this model's weights: {'; '.join(faults)}".replace(
                    "_keys", ""
                )
            )
        check_finite(model, source)
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

    def trained_part(self) -> nn.Module:
        """What fine-tuning trains, as a module that shares it: all but the vision encoder."""
        part = nn.Module()
        for name, child in self.named_children():
            if name != "vision_encoder":
                part.add_module(name, child)
        for name, parameter in self.named_parameters(recurse=False):
            part.register_parameter(name, parameter)
        return part

    def encoder_digest(self) -> str:
        """A digest of the vision encoder's architecture and weights."""
        config = self.config
        digest = hashlib.sha256(
            json.dumps([config.vision_type, config.vision], sort_keys=True).encode()
        )
        for name, value in sorted(self.vision_encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def encode_vision(self, pixel_values: Tensor) -> Tensor:
        """`encode_vision` by this model's encoder."""
        return encode_vision(self.vision_encoder, pixel_values)

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

    def _query_means(self, hidden_BTH: Tensor) -> Tensor:
        mean_BD: Tensor = self.text_proj(hidden_BTH).mean(dim=1)
        return mean_BD

    def embed_images(self, vision_BPW: Tensor) -> Tensor:
        """Image embeddings [B, T, D]: one unit vector per query token."""
        hidden_BTH, _ = self._hidden_states(vision_BPW)
        assert hidden_BTH is not None
        return self._image_embeddings(hidden_BTH)

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

        ``normalised=False`` returns the mean before its normalisation.
        """
        hidden_BTH, _ = self._hidden_states(vision_BPW, input_ids_BL, attention_mask_BL)
        assert hidden_BTH is not None
        mean_BD = self._query_means(hidden_BTH)
        return F.normalize(mean_BD, dim=-1) if normalised else mean_BD

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
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of a batch: its composed queries [B, D] and its answers [A, T, D].

        ``vision`` [U, P, W] is the encoder's output for the batch's distinct images, which
        ``reference_B`` and ``answer_A`` (the distinct targets and negatives) index. So no image is
        embedded twice, and images and queries go through the Q-Former as one batch.
        """
        answers = answer_A.shape[0]
        hidden_RTH, _ = self._hidden_states(
            vision[torch.cat([answer_A, reference_B])], input_ids, attention_mask
        )
        assert hidden_RTH is not None
        image_ATD = self._image_embeddings(hidden_RTH[:answers])
        return F.normalize(self._query_means(hidden_RTH[answers:]), dim=-1), image_ATD
