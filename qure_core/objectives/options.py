"""Settings that objectives share, and the part of a batch that they choose."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from qure_core.objectives.outputs import Outputs


class Options(BaseModel, extra="forbid", allow_inf_nan=False):
    """temperature: divides scores, a constant; None takes the model's, which is learned."""

    temperature: float | None = Field(None, gt=0)


class InBatchOptions(Options):
    """Besides, candidates: which answers of the batch stand as a triplet's negatives, of those that
    may (`Outputs.candidate_BA`): "targets" (of all triplets), "own" (those, and the triplet's own
    negatives), "all" (those, and other triplets' negatives). mask_likely: leave out those that the
    mined set's thresholds say may fit (`Outputs.likely_BA`)."""

    candidates: Literal["targets", "own", "all"] = "all"
    mask_likely: bool = True


def divided(scores: Tensor, outputs: Outputs, options: Options) -> Tensor:
    """``scores`` over the temperature of ``options``, or the model's."""
    if options.temperature is None:
        return scores / outputs.temperature
    return scores / options.temperature


def precise(values: Tensor) -> Tensor:
    """At least in float32: sums of exponentials in half precision would say little."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def negatives_in_batch(outputs: Outputs, options: InBatchOptions) -> Tensor:
    """Which answers are each triplet's negatives, [B, A]; never its target."""
    assert outputs.candidate_BA is not None, "an in-batch objective"
    negative_BA = outputs.candidate_BA.scatter(1, outputs.target_B[:, None], False)
    if outputs.likely_BA is not None:
        negative_BA = negative_BA & ~outputs.likely_BA
    if options.candidates == "all":
        return negative_BA
    chosen_BA = torch.zeros_like(negative_BA)
    chosen_BA[:, outputs.target_B] = True
    if options.candidates == "own":
        chosen_BA = chosen_BA.scatter(1, outputs.negative_BK, True)
    return negative_BA & chosen_BA


def log_sum(scores_BN: Tensor, counted_BN: Tensor) -> Tensor:
    """Log of the sum of exponentials of each row's counted scores, [B]; -inf where none is."""
    return scores_BN.masked_fill(~counted_BN, -torch.inf).logsumexp(dim=1)


def hard_log_sum(scores_BN: Tensor, negative_BN: Tensor, beta: float) -> Tensor:
    """Log of the sum of exponentials of each row's negatives, reweighted by hardness, [B].

    The weight of a negative is its exponential to the power ``beta``; a row's weights average 1.
    0 gives the plain sum, -inf stands where a row has no negative.
    """
    count_B = negative_BN.sum(dim=1).to(scores_BN.dtype)
    none_B = count_B == 0
    counted_BN = negative_BN | none_B[:, None]  # a row of -inf alone has no gradient
    weighted_B = log_sum((1 + beta) * scores_BN, counted_BN) - log_sum(beta * scores_BN, counted_BN)
    return (weighted_B + count_B.clamp(min=1).log()).masked_fill(none_B, -torch.inf)
