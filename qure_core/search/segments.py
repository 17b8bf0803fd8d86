"""Embeddings of images that were added to an index together, by row.

Shapes: m images of a tile, T tokens of an image, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from qure_core import storage
from qure_core.embeddings.shards import EMBEDDINGS_KIND, EmbeddingShards
from qure_core.ranking.tiles import IMAGE_TILE, read_only
from qure_core.storage.fetch import kept_copy


class Segment:
    """Committed embeddings whose rows are numbered through all shards.

    places: of each row its image's place in the index, -1 of one that is in use no more.
    """

    def __init__(self, shards: EmbeddingShards, places: np.ndarray) -> None:
        self.shards, self.places = shards, places

    @classmethod
    def open(cls, uri: str, name: str, places: np.ndarray, cache: str) -> Segment:
        """The segment ``name`` of the index at ``uri``; a remote one is copied to ``cache``."""
        return cls(
            EmbeddingShards.open(kept_copy(storage.join(uri, name), EMBEDDINGS_KIND, cache)), places
        )

    @cached_property
    def _values(self) -> list[np.ndarray]:
        """Memory maps of all shards' embeddings [m, T, D]."""
        return [self.shards.values(number) for number in range(self.shards.shards)]

    @cached_property
    def _first_rows(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self._values)])

    def tiles(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield sorted ``rows`` and their embeddings [m, T, D], `IMAGE_TILE` at a time, float32; a
        tile is valid until the next one is asked for."""
        tile_MTD = torch.empty(IMAGE_TILE, self.shards.tokens, self.shards.width)
        for first in range(0, len(rows), IMAGE_TILE):
            some = rows[first : first + IMAGE_TILE]
            shard_of = np.searchsorted(self._first_rows, some, side="right") - 1
            for shard in range(shard_of[0], shard_of[-1] + 1):
                chosen = np.flatnonzero(shard_of == shard)
                if len(chosen):
                    own = some[chosen] - self._first_rows[shard]
                    values = self._values[shard]
                    together = own[-1] - own[0] + 1 == len(own)
                    part = values[own[0] : own[-1] + 1] if together else values[own]
                    tile_MTD[chosen[0] : chosen[-1] + 1] = read_only(part)
            yield some, tile_MTD[: len(some)]

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings [n, T, D] of sorted rows, float32."""
        parts = [tile_MTD.numpy().copy() for _, tile_MTD in self.tiles(rows)]
        return np.concatenate(parts or [np.empty((0, self.shards.tokens, self.shards.width), "f4")])
