"""A uniform sample of a query's hard negatives that depends on nothing but names.

Each (seed, round, query id, image id) has a priority; the sample of a set is its images of lowest
priority. So it is without replacement and the same under any shards, blocks or engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qure_core.seeds import derive

HIGHEST = torch.iinfo(torch.int64).max
"""Priorities are uniform over 0 .. HIGHEST."""

_MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687  # odd, of splitmix64


def query_words(query_ids: Sequence[str], seed: int, epoch: int) -> Tensor:
    """One word per query of a round: int64 [Q]."""
    return torch.tensor([derive(seed, "negatives sample", epoch, name) for name in query_ids])


def image_words(image_ids: Sequence[str]) -> Tensor:
    """One word per image: int64 [M]."""
    return torch.tensor([derive("image", name) for name in image_ids])


def priorities(query_Q: Tensor, image_M: Tensor) -> Tensor:
    """Priorities of images for queries, from broadcastable words; their broadcast shape."""
    mixed = (query_Q ^ image_M) * _MIX_1
    mixed ^= (mixed >> 32) & 0xFFFFFFFF
    mixed *= _MIX_2
    mixed ^= (mixed >> 29) & 0x7FFFFFFFF
    mixed *= _MIX_1
    return (mixed >> 1) & HIGHEST


def threshold_for(wanted: int, count: int) -> int:
    """A priority below which at least ``wanted`` of ``count`` images almost surely lie."""
    share = (wanted + 8 * np.sqrt(wanted) + 16) / max(count, 1)
    return HIGHEST if share >= 1 else int(share * HIGHEST)


def lowest(priority_N: Tensor, wanted: int) -> Tensor:
    """Places of the ``wanted`` lowest priorities, ascending by place; all if there are fewer."""
    if wanted >= len(priority_N):
        return torch.arange(len(priority_N))
    return priority_N.topk(wanted, largest=False).indices.sort().values
