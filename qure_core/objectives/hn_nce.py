"""HN-NCE, hard-negative contrast in both directions (CoVR, Ventura et al., arXiv 2308.14746)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from qure_core.objectives import options as shared
from qure_core.objectives.outputs import Outputs


class HNNCE:
    """Per triplet, ``log(alpha e^s+ + sum of w e^s-) - s+``, of the query among answers, plus the
    same of the target among queries. Weights w grow with hardness (`options.hard_log_sum`).

    The targets of other triplets face this query as the query's negatives face its target, so the
    same pairs are left out of both directions. Both are added, not averaged, as the program does.
    """

    class Options(shared.InBatchOptions):
        """temperature: 0.07, constant. alpha: weight of the target's own term. beta: hardness, of
        scores over the temperature. weights: "paper" normalises a weight over its row; "released"
        as CoVR's program does it, whose published figures were made so: in the direction of the
        query, the weight of another triplet's target is normalised by that triplet's row."""

        temperature: float | None = Field(0.07, gt=0)
        alpha: float = Field(1.0, gt=0)
        beta: float = Field(0.5, ge=0)
        weights: Literal["paper", "released"] = "paper"

    in_batch: ClassVar[bool] = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        options, target_B = self.options, outputs.target_B
        scores_BA = shared.precise(shared.divided(outputs.scores_BA, outputs, options))
        negative_BA = shared.negatives_in_batch(outputs, options)
        own_B = scores_BA.gather(1, target_B[:, None]).squeeze(1)
        if options.weights == "released":
            answers_B = self._released(scores_BA, negative_BA, target_B)
        else:
            answers_B = shared.hard_log_sum(scores_BA, negative_BA, options.beta)
        back_BB, other_BB = (values[:, target_B].T for values in (scores_BA, negative_BA))
        queries_B = shared.hard_log_sum(back_BB, other_BB, options.beta)
        target_term_B = own_B + math.log(options.alpha)
        both = (torch.logaddexp(target_term_B, part) - own_B for part in (answers_B, queries_B))
        return sum(both, torch.zeros_like(own_B)), {}

    def _released(self, scores_BA: Tensor, negative_BA: Tensor, target_B: Tensor) -> Tensor:
        """`options.hard_log_sum` with the weights' norms exchanged; a column that is no triplet's
        target keeps its own row's."""
        beta = self.options.beta
        none_B = ~negative_BA.any(dim=1)
        norm_B = shared.log_sum(beta * scores_BA, negative_BA | none_B[:, None])
        count_B = negative_BA.sum(dim=1).to(scores_BA.dtype)
        row_of_A = torch.full_like(scores_BA[0], len(target_B), dtype=torch.int64)
        rows_B = torch.arange(len(target_B), device=target_B.device)
        row_of_A = row_of_A.scatter_reduce(0, target_B, rows_B, "amin")
        is_target_A = row_of_A < len(target_B)
        other_A = norm_B[row_of_A.clamp(max=len(target_B) - 1)]
        norm_BA = torch.where(is_target_A, other_A[None], norm_B[:, None])
        summed_B = shared.log_sum((1 + beta) * scores_BA - norm_BA, negative_BA | none_B[:, None])
        return (summed_B + count_B.clamp(min=1).log()).masked_fill(none_B, -torch.inf)
