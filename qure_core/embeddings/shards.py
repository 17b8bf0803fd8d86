"""Committed embeddings on disk, read shard by shard."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from qure_core import storage
from qure_core.storage.arrow import read_arrow

EMBEDDINGS_KIND = storage.Kind("embeddings", r"(images|queries)-\d{5}\.arrow|shapes\.json")


def shard_files(number: int) -> tuple[str, str]:
    """Names of a shard's files: of its images, and of the queries that start from them."""
    return f"images-{number:05d}.arrow", f"queries-{number:05d}.arrow"


@dataclass(frozen=True)
class EmbeddingShards:
    """Committed embeddings, read shard by shard."""

    uri: str
    shards: int
    tokens: int
    width: int
    first_ids: tuple[str, ...]

    @classmethod
    def open(cls, uri: str) -> EmbeddingShards:
        manifest = storage.read_manifest(uri, EMBEDDINGS_KIND)
        return cls(
            uri,
            manifest["shards"],
            manifest["tokens"],
            manifest["width"],
            tuple(manifest["first_ids"]),
        )

    def shards_between(self, first_id: str, last_id: str) -> range:
        """The shards that can hold images from ``first_id`` to ``last_id``."""
        start = max(bisect_right(self.first_ids, first_id) - 1, 0)
        return range(start, bisect_right(self.first_ids, last_id))

    def _table(self, name: str) -> tuple[pa.Table, np.ndarray]:
        """A file's table, and its embeddings' values in one row."""
        table = read_arrow(storage.join(self.uri, name))
        column = table["embedding"]
        values = (
            column.chunk(0).flatten().to_numpy() if column.num_chunks else np.empty(0, np.float32)
        )
        return table, values

    def _read(self, name: str) -> tuple[list[str], np.ndarray]:
        table, values = self._table(name)
        return table["id"].to_pylist(), values

    def read_ahead(self, shard: int) -> None:
        """Have a local disk fetch a shard's images while others are worked on."""
        uri = storage.join(self.uri, shard_files(shard)[0])
        if storage.is_local(uri) and hasattr(os, "posix_fadvise"):
            file = os.open(storage.filesystem(uri)[1], os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)

    def images(self, shard: int) -> tuple[list[str], np.ndarray]:
        """Ids and embeddings [m, T, D] of one shard, sorted by id, in the type they are stored."""
        ids, values = self._read(shard_files(shard)[0])
        return ids, values.reshape(len(ids), self.tokens, self.width)

    def values(self, shard: int) -> np.ndarray:
        """Embeddings [m, T, D] of one shard, in the type they are stored."""
        _, values = self._table(shard_files(shard)[0])
        return values.reshape(-1, self.tokens, self.width)

    def queries(self, shard: int) -> tuple[list[str], np.ndarray]:
        """Ids and embeddings [q, D] of one shard."""
        ids, values = self._read(shard_files(shard)[1])
        return ids, values.reshape(len(ids), self.width)

    def rows(self, image_ids: Sequence[str]) -> np.ndarray:
        """Embeddings [n, T, D] of images by id, as they are stored. Of a local disk no more is read
        than these, of any other the shards that they are in: ask for many at once."""
        shard_of = np.asarray([bisect_right(self.first_ids, name) - 1 for name in image_ids])
        rows: np.ndarray | None = None
        for shard in np.unique(shard_of).tolist():
            table, values = self._table(shard_files(shard)[0])
            ids = table["id"].combine_chunks()
            values = values.reshape(len(ids), self.tokens, self.width)
            chosen = np.flatnonzero(shard_of == shard)
            names = [image_ids[place] for place in chosen.tolist()]
            places = [_place(ids, name) for name in names]
            if rows is None:
                rows = np.empty((len(image_ids), self.tokens, self.width), values.dtype)
            rows[chosen] = values[places]
        assert rows is not None, "no images"
        return rows

    def some_images(self, image_ids: set[str]) -> dict[str, np.ndarray]:
        """Embeddings [T, D] of the named images, by id."""
        names = sorted(image_ids)
        return dict(zip(names, self.rows(names), strict=True))


def _place(ids: pa.Array, name: str) -> int:
    """Where ``name`` is in sorted ids, of which a list would take longer to make."""
    place = bisect_left(range(len(ids)), name, key=lambda place: str(ids[place]))
    assert str(ids[min(place, len(ids) - 1)]) == name, f"{name} has no embedding"
    return place
