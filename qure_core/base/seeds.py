"""Randomness derived from what it is for, never from who computes it.

A stream is named by a tuple such as ``(seed, "negatives", epoch, query_id)``, so its numbers are
the same under any number of workers, blocks or restarts.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(*parts: int | str) -> int:
    """A 63-bit seed for the stream named by ``parts``."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator for the stream named by ``parts``."""
    return np.random.Generator(np.random.PCG64(derive(*parts)))
