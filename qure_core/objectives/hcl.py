"""Debiased and hard contrast (HCL, Robinson et al., arXiv 2010.04592)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from qure_core.model.relevance import token_likeness
from qure_core.objectives import options as shared
from qure_core.objectives.outputs import Outputs


class HCL:
    """Per triplet, ``-log(pos / (pos + N))`` with the estimate N of what true negatives sum to.

    N is the negatives' sum, reweighted by hardness (`options.hard_log_sum`), less the share of it
    that answers would be (``tau_plus``), and not less than it can be for scores of at least -1.

    form "query": a query among the answers, which is how composed retrieval is asked. "both": as
    SimCLR, every query and every target is a row, among all other queries and targets; two targets
    are as similar as `token_likeness` says. A triplet's loss is the mean of its two rows.
    """

    class Options(shared.InBatchOptions):
        """temperature 0.5, tau_plus 0.1 and beta 1 as published for images. tau_plus: the share of
        answers among what is taken as negatives. beta: hardness, of scores over the temperature."""

        temperature: float | None = Field(0.5, gt=0)
        tau_plus: float = Field(0.1, ge=0, lt=1)
        beta: float = Field(1.0, ge=0)
        form: Literal["query", "both"] = "query"

    in_batch: ClassVar[bool] = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        options, target_B = self.options, outputs.target_B
        temperature = options.temperature or outputs.temperature
        scores_BA = shared.precise(outputs.scores_BA) / temperature
        negative_BA = shared.negatives_in_batch(outputs, options)
        own_B = scores_BA.gather(1, target_B[:, None]).squeeze(1)
        if options.form == "query":
            return self._losses(own_B, scores_BA, negative_BA, temperature), {}
        query_BD, target_BTD = outputs.query_BD, outputs.image_ATD[target_B]
        alike_BB = shared.precise(token_likeness(target_BTD, target_BTD)) / temperature
        queries_BB = shared.precise(query_BD @ query_BD.T) / temperature
        across_BB = scores_BA[:, target_B]
        # A query may not face another whose target could be its own answer.
        other_BB = negative_BA[:, target_B]
        rows = (
            (torch.cat([queries_BB, across_BB], dim=1), torch.cat([other_BB, other_BB], dim=1)),
            (
                torch.cat([across_BB.T, alike_BB], dim=1),
                torch.cat([other_BB.T, other_BB], dim=1),
            ),
        )
        parts = [self._losses(own_B, *row, temperature) for row in rows]
        return (parts[0] + parts[1]) / 2, {}

    def _losses(
        self, own_B: Tensor, scores_BN: Tensor, negative_BN: Tensor, temperature: Tensor | float
    ) -> Tensor:
        """Losses of rows with the score ``own_B`` of their answer, in logs throughout."""
        tau_plus = self.options.tau_plus
        count_B = negative_BN.sum(dim=1).to(scores_BN.dtype)
        log_count_B = count_B.clamp(min=1).log()
        none_B = count_B == 0
        hard_B = shared.hard_log_sum(scores_BN, negative_BN, self.options.beta)
        estimate_B = hard_B.masked_fill(none_B, 0)
        if tau_plus:
            share_B = own_B + log_count_B + math.log(tau_plus) - estimate_B
            some_B = share_B < 0  # of the sum is left
            share_B = torch.where(some_B, share_B, -1.0)
            left_B = estimate_B + torch.log(-torch.expm1(share_B)) - math.log1p(-tau_plus)
            estimate_B = torch.where(some_B, left_B, -torch.inf)
        least_B = log_count_B - 1 / temperature
        estimate_B = torch.maximum(estimate_B, least_B).masked_fill(none_B, -torch.inf)
        return F.softplus(estimate_B - own_B)
