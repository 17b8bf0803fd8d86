"""What is differentiated: per-sample losses of the two stages, as modules that DDP can wrap."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn

from qure_core.model import QuReModel
from qure_core.objectives.losses import bradley_terry_losses, contrastive_losses


class TripletStep(nn.Module):
    """Bradley-Terry loss of each triplet against its sampled negative."""

    def __init__(self, model: QuReModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return bradley_terry_losses(self.model(**inputs))


def _gather(local: Tensor) -> Tensor:
    """Rows of all workers in rank order, with gradients."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    return torch.cat(list(dist_nn.all_gather(local)))


class CaptionStep(nn.Module):
    """BLIP-2's image-text contrastive loss of each pair over the global batch."""

    def __init__(self, model: QuReModel, smoothing: float) -> None:
        super().__init__()
        self.model, self.smoothing = model, smoothing

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        model = self.model
        image_BTD = model.embed_images(model.encode_vision(pixel_values).float())
        text_BD = model.embed_texts(input_ids, attention_mask)
        image_NTD, text_ND = _gather(image_BTD), _gather(text_BD)
        ids_NL = _gather(input_ids)
        image_to_text_BN = torch.einsum("btd,nd->bnt", image_BTD, text_ND).amax(dim=-1)
        text_to_image_BN = torch.einsum("bd,ntd->bnt", text_BD, image_NTD).amax(dim=-1)
        same_BN = (input_ids[:, None] == ids_NL[None]).all(dim=-1).float()
        return contrastive_losses(
            image_to_text_BN / model.temperature,
            text_to_image_BN / model.temperature,
            same_BN / same_BN.sum(dim=1, keepdim=True),
            self.smoothing,
        )
