"""The contrastive objective over a batch (InfoNCE, van den Oord et al., arXiv 1807.03748)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from qure_core.objectives.outputs import Outputs


class InfoNCE:
    """Per triplet, cross-entropy of the target among all answers that may be its negatives.

    Those are its own negatives and other triplets' targets and negatives
    (`Outputs.candidate_BA`), of scores divided by the temperature.
    """

    class Options(BaseModel, extra="forbid"):
        """It has none."""

    in_batch: ClassVar[bool] = True

    def __init__(self, options: Options) -> None:
        del options

    def __call__(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        scores_BA = outputs.scores_BA / outputs.temperature
        # Sums of exponentials in half precision would say little.
        scores_BA = scores_BA.to(torch.promote_types(scores_BA.dtype, torch.float32))
        target_B1 = outputs.target_B[:, None]
        assert outputs.candidate_BA is not None, "an in-batch objective"
        counted_BA = outputs.candidate_BA.scatter(1, target_B1, True)
        whole_B = scores_BA.masked_fill(~counted_BA, -torch.inf).logsumexp(dim=1)
        return whole_B - scores_BA.gather(1, target_B1).squeeze(1), {}
