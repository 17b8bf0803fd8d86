"""The relevance score of an image to a query. Q queries, M images, B and A
images of a batch, T tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from qure_core.base.errors import InputError


def relevance_scores(query_QD: Tensor, image_MTD: Tensor) -> Tensor:
    """Relevance of every image to every query: max over tokens of the inner product, [Q, M].

    No temperature: it changes no order. One product, which takes Q x M x T values: whoever scores a
    corpus does so tile by tile. Differentiable, and of all pairs even where a loss needs few:
    picking images first would sum their gradients in no fixed order.
    """
    return torch.einsum("qd,mtd->qmt", query_QD, image_MTD).amax(dim=-1)


def token_likeness(one_BTD: Tensor, other_ATD: Tensor) -> Tensor:
    """How like images are to one another, [B, A]: the mean over an image's tokens of the largest
    inner product with the other's. Of one vector each, their inner product. Not symmetric."""
    return torch.einsum("bsd,atd->bsat", one_BTD, other_ATD).amax(dim=-1).mean(dim=1)


def refuse_bad_scores(scores_QM: Tensor) -> None:
    """Raise `InputError` if a score is not finite: NaN would rank before every other."""
    low, high = torch.aminmax(scores_QM)  # both NaN if any score is
    if not torch.isfinite(high - low):
        bad = torch.nonzero(~torch.isfinite(scores_QM).all(dim=1)).flatten()[:5].tolist()
        raise InputError(f"scores of queries {bad} are not finite (NaN or infinite)")
