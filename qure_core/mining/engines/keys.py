"""Ranking keys: one int64 for a score and its column, whose ascending order is the ranking.

The high half is the score's bits, turned so that larger scores come first; the low half is the
column, so equal scores rank in column order and no two keys of a query are equal. Sorting, counting
and cutting keys is exact and needs no rule for ties.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

LAST_KEY = torch.iinfo(torch.int64).max
"""Sorts after every image: the key of one that is not ranked."""

_LOW_HALF = 0xFFFFFFFF
_HIGH, _LOW = (1, 0) if sys.byteorder == "little" else (0, 1)


def _turn_(bits: Tensor) -> Tensor:
    """A float32's bits as an int32 that is smaller for larger scores, in place."""
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF)).bitwise_not_()


def pack_keys(scores: Tensor, first_column: int = 0) -> Tensor:
    """Keys [Q, m] of float32 scores [Q, m] whose first column is ``first_column``."""
    stop = first_column + scores.shape[-1]
    columns = torch.arange(first_column, stop, device=scores.device, dtype=torch.int32)
    return pack_key(scores, columns)


def pack_key(scores: Tensor, columns: Tensor) -> Tensor:
    """Keys of float32 scores at the given columns, under 2**31, of a shape that broadcasts."""
    halves = torch.empty(*scores.shape, 2, dtype=torch.int32, device=scores.device)
    halves[..., _HIGH] = _turn_((scores + 0.0).view(torch.int32))  # -0.0 ranks as 0.0
    halves[..., _LOW] = columns
    return halves.view(torch.int64).squeeze(-1)


def key_scores(keys: Tensor) -> Tensor:
    """The scores in keys, float32."""
    high = keys[..., None].view(torch.int32)[..., _HIGH]
    bits = high ^ (high >> 31).bitwise_not_().bitwise_and_(0x7FFFFFFF)
    return bits.bitwise_not_().view(torch.float32)


def key_columns(keys: Tensor) -> Tensor:
    """The columns in keys."""
    return keys & _LOW_HALF


def sort_keys_(keys_QM: Tensor) -> Tensor:
    """Sort each row of keys; on a CPU in place, by NumPy's vectorised sort."""
    if keys_QM.is_cuda:
        return keys_QM.sort(dim=-1).values
    keys_QM.numpy().sort(axis=-1)
    return keys_QM
