"""The relevance score of an image to a query. Q queries, M images, T tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor


def relevance_scores(query_QD: Tensor, image_MTD: Tensor) -> Tensor:
    """Relevance of every image to every query: max over tokens of the inner product, [Q, M].

    No temperature: it changes no order. One product per token and a running maximum, so that
    nothing of size Q x M x T exists.
    """
    scores_QM = query_QD @ image_MTD[:, 0].T
    for token in range(1, image_MTD.shape[1]):
        scores_QM = torch.maximum(scores_QM, query_QD @ image_MTD[:, token].T)
    return scores_QM
