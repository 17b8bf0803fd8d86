"""A uniform sample of a query's hard negatives that depends on nothing but names.

Each (seed, round, query id, image id) has a priority; the sample of a set is its images of lowest
priority. So it is without replacement and the same under any shards, blocks or engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from qure_core.base.seeds import derive

HIGHEST = torch.iinfo(torch.int32).max
"""Priorities are uniform over 0 .. HIGHEST; equal ones are in the order of their places."""

_MIX_1, _MIX_2 = -2048144789, -1028477387  # of MurmurHash3's last step, as int32
_WORD = 2**32


def _words(values: Iterable[int]) -> Tensor:
    return torch.from_numpy(
        np.fromiter((value % _WORD for value in values), np.uint32).view(np.int32)
    )


def query_words(query_ids: Sequence[str], seed: int, epoch: int) -> Tensor:
    """One word per query of a round: int32 [Q]."""
    return _words(derive(seed, "negatives sample", epoch, name) for name in query_ids)


def image_words(image_ids: Sequence[str]) -> Tensor:
    """One word per image: int32 [M]."""
    return _words(derive("image", name) for name in image_ids)


def priorities(query_Q: Tensor, image_M: Tensor) -> Tensor:
    """Priorities of images for queries, from words that broadcast: int32, of their shape."""
    mixed = query_Q ^ image_M
    mixed ^= (mixed >> 16) & 0xFFFF
    mixed *= _MIX_1
    mixed ^= (mixed >> 13) & 0x7FFFF
    mixed *= _MIX_2
    mixed ^= (mixed >> 16) & 0xFFFF
    return mixed & HIGHEST


def threshold_for(wanted: int, count: int) -> int:
    """A priority below which at least ``wanted`` of ``count`` images almost surely lie."""
    share = (wanted + 8 * np.sqrt(wanted) + 16) / max(count, 1)
    return HIGHEST if share >= 1 else int(share * HIGHEST)


def lowest(priority_N: Tensor, wanted: int) -> Tensor:
    """Places of the ``wanted`` lowest priorities, ascending by place; all if there are fewer."""
    if wanted >= len(priority_N):
        return torch.arange(len(priority_N))
    return priority_N.argsort(stable=True)[:wanted].sort().values
