"""False negatives found within a batch, and cancelled (FNC, Huynh et al., arXiv 2011.11765)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from qure_core.model.relevance import token_likeness
from qure_core.objectives import options as shared
from qure_core.objectives.outputs import Outputs


class FNC:
    """Per triplet, contrast among the answers of the batch, some of which are found to fit it.

    Found is an answer among the ``top_k`` best detection scores and above ``threshold``, a cosine:
    the larger one of the query's score and of the target's likeness (`token_likeness`), which stand
    where the paper has further views of an image. cancel "elimination" leaves them out;
    "attraction" makes answers of them. With ``mask_likely`` what a mined set's threshold says is
    left out before.
    """

    class Options(shared.InBatchOptions):
        """temperature 0.1, top_k 10 and threshold 0.7 as published for images. detect: by the
        query's scores, the target's likeness, or the larger one of both."""

        temperature: float | None = Field(0.1, gt=0)
        top_k: int = Field(10, ge=1)
        threshold: float = 0.7
        cancel: Literal["elimination", "attraction"] = "attraction"
        detect: Literal["query", "target", "both"] = "both"

    in_batch: ClassVar[bool] = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        options, target_B1 = self.options, outputs.target_B[:, None]
        negative_BA = shared.negatives_in_batch(outputs, options)
        found_BA = found_false_negatives(
            self._detection(outputs).detach(), negative_BA, options.top_k, options.threshold
        )
        scores_BA = shared.precise(shared.divided(outputs.scores_BA, outputs, options))
        own_BA = torch.zeros_like(negative_BA).scatter(1, target_B1, True)
        figures = {"found_false_negatives": found_BA.sum(dim=1).float()}
        if options.cancel == "elimination":
            return attraction(scores_BA, own_BA, own_BA | (negative_BA & ~found_BA)), figures
        return attraction(scores_BA, own_BA | found_BA, own_BA | negative_BA), figures

    def _detection(self, outputs: Outputs) -> Tensor:
        if self.options.detect == "query":
            return outputs.scores_BA
        likeness_BA = token_likeness(outputs.image_ATD[outputs.target_B], outputs.image_ATD)
        if self.options.detect == "target":
            return likeness_BA
        return torch.maximum(outputs.scores_BA, likeness_BA)


def found_false_negatives(
    detection_BN: Tensor, candidate_BN: Tensor, top_k: int, threshold: float
) -> Tensor:
    """Which candidates are among a row's ``top_k`` best and above ``threshold``, [B, N]."""
    scores_BN = detection_BN.masked_fill(~candidate_BN, -torch.inf)
    best_BK = scores_BN.topk(min(top_k, scores_BN.shape[1]), dim=1).indices
    in_top_BN = torch.zeros_like(candidate_BN).scatter(1, best_BK, True)
    return in_top_BN & candidate_BN & (scores_BN > threshold)


def attraction(scores_BN: Tensor, positive_BN: Tensor, counted_BN: Tensor) -> Tensor:
    """``logsumexp`` of the counted scores less the mean of the positives', [B]."""
    mean_B = scores_BN.masked_fill(~positive_BN, 0).sum(dim=1) / positive_BN.sum(dim=1)
    return shared.log_sum(scores_BN, counted_BN) - mean_B
