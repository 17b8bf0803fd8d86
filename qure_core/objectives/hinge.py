"""The hinge of a margin (Schroff et al., arXiv 1503.03832), on scores in place of distances."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from qure_core.objectives import options as shared
from qure_core.objectives.outputs import Outputs


class Hinge:
    """Per triplet, by how much a negative comes within ``margin`` of the target, or 0; the mean
    over several negatives. The temperature is 1 unless set: the margin is in cosines."""

    class Options(shared.Options):
        """margin: in scores over the temperature (0.2 in the paper)."""

        temperature: float | None = Field(1.0, gt=0)
        margin: float = Field(0.2, ge=0)

    in_batch: ClassVar[bool] = False

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        ahead_BK = shared.divided(
            outputs.target_scores() - outputs.negative_scores(), outputs, self.options
        )
        return (self.options.margin - ahead_BK).clamp(min=0).mean(dim=1), {}
