"""What an evaluation keeps of one query's ranking: pure, and all that metrics are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qure_core.data.schema import Triplet
from qure_core.ranking.order import rank_row


def ranking_row(
    triplet: Triplet,
    scores_M: Tensor,
    corpus: Sequence[str],
    column_of: Mapping[str, int],
    *,
    top_k: int,
    drop_reference: bool,
) -> dict[str, Any]:
    """Rank the sorted ``corpus``, whose columns are ``column_of``, by ``scores_M`` for ``triplet``.

    ``drop_reference`` leaves the reference image out first, as CIRR does; one that is the target
    stays. Ranks count from 0. "subset_ids" is CIRR's image set without the reference.
    """
    dropped = drop_reference and triplet.reference_id != triplet.target_id
    ranked = rank_row(scores_M, column_of[triplet.reference_id] if dropped else None)
    target = None if triplet.target_id is None else column_of[triplet.target_id]
    members = [column_of[name] for name in triplet.group if name != triplet.reference_id]
    relevant = [column_of[name] for name in triplet.relevant_ids if name in column_of]
    top = ranked.order_R[:top_k]
    return {
        "query_id": triplet.query_id,
        "category": triplet.category,
        "target_id": triplet.target_id,
        "target_rank": None if target is None else int(ranked.rank_M[target]),
        "target_ties": None if target is None else ranked.ties(target),
        "top_ids": [corpus[column] for column in top],
        "top_scores": scores_M[top].tolist(),
        "relevant_ranks": ranked.ranks(relevant),
        "subset_ids": [corpus[column] for column in ranked.ordered(members)],
    }
