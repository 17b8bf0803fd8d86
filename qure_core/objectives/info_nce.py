"""The contrastive objective over a batch (InfoNCE, van den Oord et al., arXiv 1807.03748)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from qure_core.objectives import options as shared
from qure_core.objectives.outputs import Outputs


class InfoNCE:
    """Per triplet, cross-entropy of the target among all answers that are its negatives.

    Of scores over the temperature. CLIP4CIR's loss has a constant temperature of 0.01 and the
    targets alone as candidates, SPRC's the targets and the learned temperature.
    """

    class Options(shared.InBatchOptions):
        """directions: "query" (to answers), or "both": the mean of that and of the cross-entropy of
        the query among those to which the target is a negative."""

        directions: Literal["query", "both"] = "query"

    in_batch: ClassVar[bool] = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        scores_BA = shared.precise(shared.divided(outputs.scores_BA, outputs, self.options))
        negative_BA = shared.negatives_in_batch(outputs, self.options)
        target_B1 = outputs.target_B[:, None]
        own_B = scores_BA.gather(1, target_B1).squeeze(1)
        forward_B = shared.log_sum(scores_BA, negative_BA.scatter(1, target_B1, True)) - own_B
        if self.options.directions == "query":
            return forward_B, {}
        back_BB, other_BB = (values[:, outputs.target_B].T for values in (scores_BA, negative_BA))
        other_BB = other_BB.clone().fill_diagonal_(True)
        return (forward_B + shared.log_sum(back_BB, other_BB) - own_B) / 2, {}
