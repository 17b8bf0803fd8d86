"""The Bradley-Terry objective (QuRe, section 3), with what reward models add to it."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from qure_core.objectives import options as shared
from qure_core.objectives.outputs import Outputs


class BradleyTerry:
    """Per triplet, ``-log sigmoid(target - negative - margin)`` of scores over the temperature,
    plus ``centring`` times the square of both scores' sum; the mean over several negatives.
    """

    class Options(shared.Options):
        """margin: by how much the target is to win, in scores over the temperature (Touvron et al.,
        arXiv 2307.09288). centring: pulls scores towards a mean of zero (Eisenstein et al.,
        arXiv 2312.09244; 0.01 there)."""

        margin: float = Field(0.0, ge=0)
        centring: float = Field(0.0, ge=0)

    in_batch: ClassVar[bool] = False

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        columns = torch.cat([outputs.target_B[:, None], outputs.negative_BK], dim=1)
        scores = shared.divided(outputs.scores_BA.gather(1, columns), outputs, self.options)
        target_B1, negative_BK = scores[:, :1], scores[:, 1:]
        losses_BK = F.softplus(negative_BK - target_B1 + self.options.margin)
        if self.options.centring:
            losses_BK = losses_BK + self.options.centring * (target_B1 + negative_BK).square()
        return losses_BK.mean(dim=1), {}
