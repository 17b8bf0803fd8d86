"""How like a query's candidates are to its target, by their embeddings.

Shapes: K candidates of a query, T tokens of an image, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from qure_core.mining.engines.ranked import Ranked, RankedEnds
from qure_core.model.relevance import token_likeness


def likeness_to_target(
    ranked: Ranked | RankedEnds, ranks_of: Sequence[np.ndarray]
) -> Iterator[np.ndarray]:
    """Per query, `token_likeness` of its target to the images at its ranks [K], float32 [K].

    K x T x T x D products a query. Embeddings are read for some queries together, each image's
    once for them.
    """
    assert ranked.image_tokens is not None, "a rule that needs IMAGE_TOKENS"
    targets = ranked.target_rank_Q.tolist()
    waiting: list[torch.Tensor] = []
    held = 0
    for query, ranks in enumerate(ranks_of):
        columns = ranked.columns(query, torch.from_numpy(np.append(ranks, targets[query])))
        if waiting and held + len(columns) > ranked.images_at_once:
            yield from _likeness(ranked, waiting)
            waiting, held = [], 0
        waiting.append(columns)
        held += len(columns)
    if waiting:
        yield from _likeness(ranked, waiting)


def _likeness(
    ranked: Ranked | RankedEnds, columns_of: Sequence[torch.Tensor]
) -> Iterator[np.ndarray]:
    """Of queries whose embeddings are held together; each's target is the last of its columns."""
    assert ranked.image_tokens is not None
    used, places = torch.cat(list(columns_of)).unique(return_inverse=True)
    tokens = ranked.image_tokens(used)
    for own in places.split([len(columns) for columns in columns_of]):
        yield token_likeness(tokens[own[-1:]], tokens[own[:-1]])[0].numpy()
