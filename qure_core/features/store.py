"""Reading stored features: an index from images to (shard, row), shards mapped into memory.

A store holds, for one encoder, preprocessing and precision (`FeatureKey`):

    manifest.json            the commit: the key, counts, quarantined images, every file's size
    index-DIGEST.parquet     per image: id, URI, what its file looked like, SHA-256, shard and row
    shard-DIGEST.arrow       Arrow IPC: image ids and their features, a tensor column [P, W]

Files are only added, under names taken from their bytes, so jobs that read a store are not
disturbed by one that adds to it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from filelock import FileLock
from torch import Tensor

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.storage.arrow import read_arrow
from qure_core.storage.parquet import read_committed_parquet

FEATURES_KIND = storage.Kind(
    "feature store",
    r"index-[0-9a-f]{16}\.parquet|shard-[0-9a-f]{32}\.arrow|record-[0-9a-f]{16}\.json",
)
INDEX_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("stamp", pa.string()),  # storage.stamps, when its bytes were read
        ("sha256", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int32()),
    ]
)
_OPEN_SHARDS = 256  # each takes a file descriptor


@dataclass(frozen=True)
class FeatureStore:
    """A committed store at ``uri``."""

    uri: str
    manifest: dict[str, Any]

    @classmethod
    def open(cls, uri: str) -> FeatureStore:
        return cls(uri, storage.read_manifest(uri, FEATURES_KIND))

    def index(self, uris: Iterable[str] | None = None) -> pa.Table:
        """The index, or its rows of the images at ``uris``."""
        table = read_committed_parquet(self.uri, self.manifest["index"], self.manifest)
        if uris is None:
            return table
        return table.filter(pc.is_in(table["uri"], pa.array(uris, pa.string())))


class StoredFeatures:
    """The features of some images by id, from a committed store.

    ``images`` maps ids to the URIs they are stored under. Shards of a remote store are fetched
    to ``cache``, a local directory, when they are first needed, once per node.
    """

    name = "vision"  # the model's argument that they are

    def __init__(self, uri: str, images: dict[str, str], cache: str) -> None:
        store = FeatureStore.open(uri)
        self.uri, self.cache = uri, storage.join(cache, uri.rsplit("/", 1)[-1])
        self.files: dict[str, dict[str, Any]] = store.manifest["files"]
        rows = store.index(images.values())
        place_of = {
            image: (shard, row)
            for image, shard, row in zip(
                rows["uri"].to_pylist(),
                rows["shard"].to_pylist(),
                rows["row"].to_pylist(),
                strict=True,
            )
        }
        self._place = {name: place_of[image] for name, image in images.items() if image in place_of}
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return len(self._place)

    def view(self, image_id: str) -> np.ndarray:
        """The features [P, W] of one image, a read-only view of the mapped file."""
        shard, row = self._place[image_id]
        features: np.ndarray = self._shard(shard)[row]
        return features

    def __call__(self, image_ids: Sequence[str]) -> Tensor:
        """The features of the named images, copied into one tensor [B, P, W]."""
        first = self.view(image_ids[0])
        features = np.empty((len(image_ids), *first.shape), first.dtype)
        for row, image_id in enumerate(image_ids):
            features[row] = self.view(image_id)
        return torch.from_numpy(features)

    def _open(self, shard: str) -> np.ndarray:
        uri = storage.join(self.uri, shard)
        column = read_arrow(uri if storage.is_local(uri) else self._fetched(shard))["features"]
        values: np.ndarray = column.chunk(0).to_numpy_ndarray()
        return values

    def _fetched(self, shard: str) -> str:
        """This node's copy of a shard; of the processes that want it, one fetches it."""
        target = storage.join(self.cache, shard)
        with self._cache_faults():
            os.makedirs(self.cache, exist_ok=True)
            lock = FileLock(f"{target}.lock")
            lock.acquire()
        try:
            if not os.path.exists(target) or os.path.getsize(target) != self.files[shard]["bytes"]:
                data = storage.read_bytes(storage.join(self.uri, shard))
                if hashlib.sha256(data).hexdigest() != self.files[shard]["sha256"]:
                    raise InputError(
                        f"{storage.join(self.uri, shard)}: content differs from its manifest's "
                        "SHA-256; remove the file and run pipelines/embed.py again"
                    )
                with self._cache_faults():
                    storage.write_bytes(target, data)
        finally:
            lock.release()
        return target

    @contextmanager
    def _cache_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"feature_store.cache_dir: cannot write to {self.cache} "
                f"({error.strerror or error}); choose a directory with room on every node"
            ) from None
