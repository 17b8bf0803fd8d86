"""What a training step knows of a batch, and what an objective is.

Shapes: B triplets, A distinct answers (targets and negatives of all triplets of the batch), K
negatives of a triplet, T query tokens, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """A batch as an objective sees it: the worker's own part, or the whole of it (`Objective`).

    query_BD, image_ATD: embeddings of the composed queries and of the answers.
    scores_BA: relevance of every answer to every query, not divided by the temperature.
    target_B, negative_BK: columns of each query's target and of its sampled negatives.
    valid_B: False for a row that only fills up a worker's part; its loss counts nothing.
    temperature: the model's, a scalar.
    candidate_BA: for an in-batch objective, which answers may stand as a query's negatives: its
        own, and others of its category that are neither its reference nor the target of a triplet
        with the same query.
    likely_BA: of those, which may fit the query, being by the present weights as like its target as
        the images that the rule left alone; also the query's own negatives, once they are. None
        without thresholds, or where the objective's ``mask_likely`` is off.
    """

    query_BD: Tensor
    image_ATD: Tensor
    scores_BA: Tensor
    target_B: Tensor
    negative_BK: Tensor
    valid_B: Tensor
    temperature: Tensor
    candidate_BA: Tensor | None = None
    likely_BA: Tensor | None = None

    def target_scores(self) -> Tensor:
        """Scores of the targets, [B, 1]."""
        return self.scores_BA.gather(1, self.target_B[:, None])

    def negative_scores(self) -> Tensor:
        """Scores of the sampled negatives, [B, K]."""
        return self.scores_BA.gather(1, self.negative_BK)


class Objective(Protocol):
    """From the outputs of a step to a loss and further figures per triplet.

    options: its settings; of those, ``temperature`` is None where it takes the model's.
    in_batch: whether a triplet's loss depends on other triplets' answers. The outputs are then
    those of the whole batch on every worker, gathered with their gradients and without fillers, so
    that the loss is the same under any number of workers; the caller takes its own rows.
    """

    in_batch: ClassVar[bool]
    options: Any

    def __call__(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [B], and figures [B] by name, of which training tells the mean."""
        ...
