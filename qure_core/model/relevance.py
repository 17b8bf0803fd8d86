"""The relevance score of an image to a query. Q queries, M images, T tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from qure_core.base.errors import InputError


def relevance_scores(query_QD: Tensor, image_MTD: Tensor) -> Tensor:
    """Relevance of every image to every query: max over tokens of the inner product, [Q, M].

    No temperature: it changes no order. One product per token and a running maximum, so that
    nothing of size Q x M x T exists.
    """
    scores_QM = query_QD @ image_MTD[:, 0].T
    for token in range(1, image_MTD.shape[1]):
        scores_QM = torch.maximum(scores_QM, query_QD @ image_MTD[:, token].T)
    return scores_QM


def refuse_bad_scores(scores_QM: Tensor) -> None:
    """Raise `InputError` if a score is not finite: NaN would rank before every other."""
    low, high = torch.aminmax(scores_QM)  # both NaN if any score is
    if not torch.isfinite(high - low):
        bad = torch.nonzero(~torch.isfinite(scores_QM).all(dim=1)).flatten()[:5].tolist()
        raise InputError(f"scores of queries {bad} are not finite (NaN or infinite)")
