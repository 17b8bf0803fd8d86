"""What tells images apart: stamps without reading them, SHA-256 by threads or on Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.data.images import read_stored
from qure_core.data.packed import order_of, shard_of
from qure_core.runtime.in_process import device_here
from qure_core.runtime.progress import Progress

_BATCH = 512
_FEW = 4096  # files that are read sooner from here than tasks of Ray start
_THREADS = 16


def _hash(batch: Any) -> Any:
    digests = []
    for uri in batch["uri"]:
        try:
            digests.append(hashlib.sha256(read_stored(str(uri))).hexdigest())
        except (OSError, InputError):
            digests.append("")
    return {"uri": batch["uri"], "sha256": np.asarray(digests)}


def image_stamps(images: Iterable[str]) -> dict[str, str]:
    """`storage.stamps` of images by URI: of one in a shard, the shard's."""
    uris = set(images)
    shard_of_uri = {uri: shard for uri in uris if (shard := shard_of(uri)) is not None}
    stamps = storage.stamps({*shard_of_uri.values(), *(uris - set(shard_of_uri))})
    found = {uri: stamps[uri] for uri in uris if uri in stamps}
    return found | {uri: stamps[shard] for uri, shard in shard_of_uri.items() if shard in stamps}


def image_digests(images: Iterable[str]) -> dict[str, str]:
    """SHA-256 of every image file by URI, without those that cannot be read."""
    uris = sorted(set(images), key=order_of)
    if not uris:
        return {}
    if len(uris) <= _FEW or device_here() is not None:
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = list(pool.map(_hash, ({"uri": [uri]} for uri in uris)))
        return {str(p["uri"][0]): str(p["sha256"][0]) for p in parts if p["sha256"][0]}
    blocks = [pa.table({"uri": uris[i : i + _BATCH]}) for i in range(0, len(uris), _BATCH)]
    progress = Progress("hash", len(uris), "images")
    digest_of: dict[str, str] = {}
    for row in ray.data.from_arrow(blocks).map_batches(_hash, batch_size=None).iter_rows():
        if row["sha256"]:
            digest_of[str(row["uri"])] = str(row["sha256"])
        progress.advance(1)
    return digest_of
