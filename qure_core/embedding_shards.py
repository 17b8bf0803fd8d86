"""Committed embeddings on disk, read shard by shard."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from qure_core import storage

EMBEDDINGS_KIND = "embeddings"
CHECKPOINT_KIND = "checkpoint"


def checkpoint_digest(checkpoint: str) -> str:
    """SHA-256 of a checkpoint's weights, from its manifest."""
    manifest = storage.read_manifest(checkpoint, CHECKPOINT_KIND)
    digest: str = manifest["files"]["model.safetensors"]["sha256"]
    return digest


@dataclass(frozen=True)
class EmbeddingShards:
    """Committed embeddings, read shard by shard."""

    uri: str
    shards: int
    tokens: int
    width: int

    @classmethod
    def open(cls, uri: str) -> EmbeddingShards:
        manifest = storage.read_manifest(uri, EMBEDDINGS_KIND)
        return cls(uri, manifest["shards"], manifest["tokens"], manifest["width"])

    def _read(self, kind: str, shard: int) -> tuple[list[str], np.ndarray]:
        uri = storage.join(self.uri, f"{kind}-{shard:05d}.arrow")
        if storage.is_local(uri):
            source = pa.memory_map(storage.filesystem(uri)[1])
        else:
            source = pa.BufferReader(storage.read_bytes(uri))
        table = pa.ipc.open_file(source).read_all().combine_chunks()
        column = table["embedding"]
        values = (
            column.chunk(0).flatten().to_numpy() if column.num_chunks else np.empty(0, np.float32)
        )
        return table["id"].to_pylist(), values

    def images(self, shard: int) -> tuple[list[str], np.ndarray]:
        """Ids and embeddings [m, T, D] of one shard, sorted by id."""
        ids, values = self._read("images", shard)
        return ids, values.reshape(len(ids), self.tokens, self.width)

    def queries(self, shard: int) -> tuple[list[str], np.ndarray]:
        """Ids and embeddings [q, D] of one shard."""
        ids, values = self._read("queries", shard)
        return ids, values.reshape(len(ids), self.width)
