"""What every model of composed retrieval is: a frozen vision encoder and trained parts beside it.

Shapes: B batch, P vision tokens, W vision width, L text tokens, T vectors of an image, D embedding
width, A answers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.model.checkpoint_files import OPTIMIZER_FILE
from qure_core.model.configuration import QuReConfig
from qure_core.model.vision import make_vision_encoder

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


def check_positions(tokens: int, positions: int) -> None:
    """Raise `ValueError` if texts may have more ``tokens`` than a model has ``positions``."""
    if tokens > positions:
        raise ValueError(
            f"max_text_tokens {tokens} exceeds the {positions} positions of the text's layers"
        )


@dataclass(frozen=True)
class Embedded:
    """A batch's composed queries [B, D] and answers [A, T, D], unit vectors.

    second_BD: other embeddings of the queries, which the objective's loss is taken of too, times
    ``second_weight``. penalty_B: a loss of a query by itself. Both only shape the training.
    """

    query_BD: Tensor
    image_ATD: Tensor
    second_BD: Tensor | None = None
    second_weight: float = 0.0
    penalty_B: Tensor | None = None


class ComposedModel(PreTrainedModel):
    """A composed-query and image encoder. The vision encoder is frozen and always in evaluation
    mode, everything else is trained; `freeze_vision_encoder` says what pretraining does.
    """

    config_class = QuReConfig
    config: QuReConfig
    base_model_prefix = "qure"
    main_input_name = "vision"
    _supports_sdpa = True

    def __init__(self, config: QuReConfig) -> None:
        super().__init__(config)
        self.vision_encoder: nn.Module = make_vision_encoder(config)

    def finish(self) -> None:
        """What a subclass does last when it is made."""
        self.temperature = nn.Parameter(torch.tensor(self.config.initial_temperature))
        self.post_init()
        self.freeze_vision_encoder()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ComposedModel):
            nn.init.constant_(module.temperature, self.config.initial_temperature)

    def attention_maps(self, vision_BPW: Tensor) -> Tensor:
        """How much each of an image's vectors attends to each vision token, [B, T, P]; `InputError`
        of a model whose vectors attend to none."""
        raise InputError(f"{type(self).__name__} has no cross-attention to show")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, source: Any, *args: Any, **kwargs: Any
    ) -> Self:
        """As transformers' own, from a directory, its URI or a hub id, with its encoder frozen.

        A committed directory of ours is checked against its manifest. Raises `InputError` if a file
        is damaged, a parameter missing, unknown or not finite.
        """
        with storage.local_copy(str(source), leave_out={OPTIMIZER_FILE}) as directory:
            return cls.from_directory(directory, str(source), *args, **kwargs)

    @classmethod
    def from_directory(cls, directory: str, source: str, *args: Any, **kwargs: Any) -> Self:
        """`from_pretrained` of a directory whose files were checked, called ``source``."""
        loaded: Any = super().from_pretrained(directory, *args, output_loading_info=True, **kwargs)
        model: Self = loaded[0]
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

    def freeze_vision_encoder(self, frozen: bool = True) -> None:
        """Freeze the encoder (the method), or let pretraining from scratch train it; one that was
        trained elsewhere (``model.vision``) stays frozen."""
        self.vision_encoder.requires_grad_(not (frozen or self.config.vision_type == "hf"))
        self.train(self.training)

    @property
    def vision_is_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.vision_encoder.parameters())

    def train(self, mode: bool = True) -> Self:
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

    def embed_images(self, vision_BPW: Tensor) -> Tensor:
        """Image embeddings [B, T, D], unit vectors, of the encoder's features [B, P, W]."""
        raise NotImplementedError

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
        raise NotImplementedError

    def embed_texts(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Caption embeddings [B, D], for image-text pretraining."""
        raise NotImplementedError

    def forward(
        self,
        vision: Tensor,
        reference_B: Tensor,
        answer_A: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
    ) -> Embedded:
        """Embeddings of a batch.

        ``vision`` [U, P, W] is the encoder's output for the batch's distinct images, which
        ``reference_B`` and ``answer_A`` (the distinct targets and negatives) index, so that no
        image is embedded twice.
        """
        raise NotImplementedError
