"""The Plackett-Luce objective: the first choice among a target and its negatives at once."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qure_core.objectives import options as shared
from qure_core.objectives.outputs import Outputs


class PlackettLuce:
    """Per triplet, ``-log softmax`` of the target among itself and its K negatives, of scores over
    the temperature (Luce, 1959; Plackett, 1975). With one negative it is Bradley-Terry's."""

    class Options(shared.Options):
        """None of its own."""

    in_batch: ClassVar[bool] = False

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        both = torch.cat([outputs.target_scores(), outputs.negative_scores()], dim=1)
        scores = shared.precise(shared.divided(both, outputs, self.options))
        return scores.logsumexp(dim=1) - scores[:, 0], {}
