"""Whole rankings by sorting keys, as pure tensor code. Q queries, M images of the corpus."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qure_core.mining.engines.keys import LAST_KEY, pack_keys, sort_keys_
from qure_core.mining.engines.ranked import Ranked
from qure_core.model.relevance import refuse_bad_scores


def rank_queries(
    scores_QM: Tensor,
    target_Q: Tensor,
    left_out_QE: Tensor | None = None,
    image_tokens: Callable[[Tensor], Tensor] | None = None,
    vetoed_QM: Tensor | None = None,
) -> Ranked:
    """Rank the corpus for every query; equal scores in column order.

    ``target_Q`` are columns; ``left_out_QE`` those to leave out of each query's ranking (its
    reference, known positives; one may be [Q]), or -1 for none; the target is kept whatever they
    say. ``vetoed_QM`` leaves out further images; where none but the target would be left it is
    not heard. Raises `InputError` if a score is not finite, `ValueError` if a query has no image
    but its target.
    """
    queries, images = scores_QM.shape
    refuse_bad_scores(scores_QM)
    device = scores_QM.device
    rows_Q = torch.arange(queries, device=device)
    target_Q = target_Q.to(device)
    keys_QM = pack_keys(scores_QM)
    target_key_Q = keys_QM[rows_Q, target_Q]
    length_Q = torch.full((queries,), images, device=device)
    if left_out_QE is not None:
        left_out_QE = left_out_QE.to(device).reshape(queries, -1)
        there_QE = (left_out_QE >= 0) & (left_out_QE != target_Q[:, None])
        keys_QM[there_QE.nonzero()[:, 0], left_out_QE[there_QE]] = LAST_KEY
    vetoed_Q: Tensor | None = None
    if vetoed_QM is not None:
        vetoed_QM = vetoed_QM.to(device).scatter(1, target_Q[:, None], False)
        vetoed_QM &= ((keys_QM != LAST_KEY) & ~vetoed_QM).sum(dim=1, keepdim=True) > 1
        before_Q = (keys_QM == LAST_KEY).sum(dim=1)
        keys_QM.masked_fill_(vetoed_QM, LAST_KEY)
        vetoed_Q = (keys_QM == LAST_KEY).sum(dim=1) - before_Q
    if left_out_QE is not None or vetoed_QM is not None:
        length_Q -= (keys_QM == LAST_KEY).sum(dim=1)
    if bool((length_Q < 2).any()):
        bad = torch.nonzero(length_Q < 2).flatten()[:5].tolist()
        raise ValueError(f"queries {bad} have no image to rank but their target")
    keys_QM = sort_keys_(keys_QM)
    target_rank_Q = torch.searchsorted(keys_QM, target_key_Q[:, None]).squeeze(1)
    return Ranked(keys_QM, length_Q, target_rank_Q, image_tokens, vetoed_Q)
