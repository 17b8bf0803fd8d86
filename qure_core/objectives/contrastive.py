"""The objective of image-text pretraining (BLIP-2's contrastive loss)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def contrastive_losses(
    image_to_text_BN: Tensor, text_to_image_BN: Tensor, target_BN: Tensor, smoothing: float
) -> Tensor:
    """BLIP-2's image-text contrastive loss per pair, both directions averaged, [B].

    Row b of either matrix scores pair b against N candidates of the other side. ``target_BN``
    distributes each row's label over the candidates that fit it (images may share a caption);
    ``smoothing`` spreads that much of it over all candidates.
    """
    forward = F.cross_entropy(
        image_to_text_BN, target_BN, label_smoothing=smoothing, reduction="none"
    )
    backward = F.cross_entropy(
        text_to_image_BN, target_BN, label_smoothing=smoothing, reduction="none"
    )
    return (forward + backward) / 2
