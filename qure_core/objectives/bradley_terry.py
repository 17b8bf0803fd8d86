"""The Bradley-Terry objective (QuRe, section 3)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor

from qure_core.objectives.outputs import Outputs


class BradleyTerry:
    """Per triplet, ``-log sigmoid(target - negative)`` of scores divided by the temperature.

    With several negatives, the mean over them.
    """

    class Options(BaseModel, extra="forbid"):
        """It has none."""

    in_batch: ClassVar[bool] = False

    def __init__(self, options: Options) -> None:
        del options

    def __call__(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        columns = torch.cat([outputs.target_B[:, None], outputs.negative_BK], dim=1)
        scores = outputs.scores_BA.gather(1, columns) / outputs.temperature
        return F.softplus(scores[:, 1:] - scores[:, :1]).mean(dim=1), {}
