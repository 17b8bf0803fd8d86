"""Filling the feature store on Ray Data: decoding in CPU tasks, the encoder in actors.

Work is cut into pieces of the sorted images that the store lacks. A task reads and decodes a
piece; an actor encodes it and writes a shard, then a record of it. Whatever is killed, the next
attempt keeps the pieces that have a record. An image that cannot be decoded is left out and named
in the manifest: it matters only to those who need it.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from qure_core import storage
from qure_core.base.config import ClusterSettings, Pixels, Settings
from qure_core.base.errors import InputError, bad_input_of_workers
from qure_core.data.hashing import image_digests, image_stamps
from qure_core.data.images import decode, preprocess_to_bytes, read_image_bytes
from qure_core.data.loader import pixel_values
from qure_core.data.packed import order_of, shard_of
from qure_core.features.identity import FeatureKey
from qure_core.features.store import FEATURES_KIND, INDEX_SCHEMA
from qure_core.runtime.in_process import device_here
from qure_core.runtime.prefetch import prefetched
from qure_core.runtime.progress import Progress
from qure_core.runtime.resources import Plan, granted_device
from qure_core.storage.arrow import arrow_bytes
from qure_core.storage.lease import hold
from qure_core.storage.parquet import parquet_bytes, read_parquet

if TYPE_CHECKING:
    from qure_core.embeddings.encoder import Encoder

_SHAPE = ("tokens", "width")  # of an image's features
_READERS = 16  # threads that read records, each a small file
_AHEAD = 8  # images that a task reads while it decodes others


@dataclass(frozen=True)
class EncoderSource:
    """Weights to encode with: a committed checkpoint, or what `load_model` takes."""

    source: str
    tokenizer: str | None = None

    def load(self, device: torch.device | str, precision: str) -> Encoder:
        # Here, because tasks that only decode need not import it.
        from qure_core.embeddings.encoder import Encoder

        return Encoder.load(self.source, device, tokenizer=self.tokenizer, precision=precision)


def build_store(
    settings: Settings,
    plan: Plan,
    source: EncoderSource,
    key: FeatureKey,
    images: dict[str, str],
    *,
    absent: dict[str, dict[str, str]] | None = None,
    wait: bool = False,
) -> dict[str, Any]:
    """Make the store of ``key`` hold the features of ``images`` (URIs by id); return its manifest.

    Only new and changed images are encoded. What cannot be decoded, or is missing, is listed under
    "quarantined", with what the caller knows to be ``absent``; images of earlier calls stay. While
    another process fills the same store this one raises `BusyError`, or waits for it.
    """
    uri = key.uri(settings.feature_store.dir)
    storage.adopt(uri, FEATURES_KIND)  # its files are named by their bytes: nobody else's are
    storage.check_place(uri, FEATURES_KIND, "feature_store.dir")
    with _writing(uri), hold(uri, "embedding", wait=wait) as lease:
        if not storage.is_committed(uri):
            storage.begin(uri, FEATURES_KIND)
        index, manifest = _committed(uri)
        index, manifest = _recovered(uri, index, manifest)
        stamps = image_stamps(images.values())
        index = _refreshed(index, images, stamps)
        held = set(index["uri"].to_pylist())
        wanted = [
            {"image_id": name, "uri": image, "stamp": stamps[image]}
            for name, image in sorted(images.items(), key=_reading_order)
            if image in stamps and image not in held
        ]
        missing = dict(absent or {}) | {
            image: {"image_id": name, "fault": f"{image}: image file is missing"}
            for name, image in images.items()
            if image not in stamps
        }
        pieces = _pieces(wanted, settings.feature_store.shard_images)
        started = time.monotonic()
        records = _encode(settings, plan, source, key, uri, pieces)
        lease.check()
        return _commit(uri, key, index, manifest, records, missing, time.monotonic() - started)


def _reading_order(item: tuple[str, str]) -> tuple[str, int, int, str]:
    """Images in shards as they lie there, others by id."""
    name, image = item
    return (*order_of(image), name) if shard_of(image) else ("", 0, 0, name)


@contextmanager
def _writing(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if storage.is_refused(error):
            raise InputError(
                f"feature_store.dir: cannot write to {uri} ({error.strerror or error}); make room "
                "there, or choose another --feature_store.dir. What is written stays: the same "
                "command goes on from it"
            ) from None
        raise


def _committed(uri: str) -> tuple[pa.Table, dict[str, Any]]:
    """What the store there holds: index rows of shards that are whole, and the manifest."""
    if not storage.is_committed(uri):
        return INDEX_SCHEMA.empty_table(), {"files": {}, "quarantined": {}}
    manifest = storage.read_json(str(storage.manifest_uri(uri)))
    lost = set(storage.faults(uri, manifest))
    if manifest["index"] in lost:
        return INDEX_SCHEMA.empty_table(), {"files": {}, "quarantined": {}}
    index = read_parquet(storage.join(uri, manifest["index"]))
    whole = np.asarray([shard not in lost for shard in index["shard"].to_pylist()], bool)
    return index.filter(pa.array(whole)), manifest


def _recovered(
    uri: str, index: pa.Table, manifest: dict[str, Any]
) -> tuple[pa.Table, dict[str, Any]]:
    """With the shards of a build that did not come to its end, whatever it was asked for."""
    records = _read_records(uri, _records_in(uri))
    shards = {record["shard"]: record["facts"] for record in records if "shard" in record}
    lost = set(storage.faults(uri, {"files": shards}))
    rows = {row["uri"]: row for row in index.to_pylist()}
    found = 0
    for record in records:
        if record.get("shard", "") not in lost:
            rows |= {row["uri"]: row for row in _rows(record)}
            found += len(record["images"])
            manifest = manifest | {name: record[name] for name in _SHAPE if name in record}
    if found:
        print(f"[embed] {found:,} images were encoded by an earlier attempt", flush=True)
    files = manifest["files"] | {name: facts for name, facts in shards.items() if name not in lost}
    return pa.Table.from_pylist(list(rows.values()), INDEX_SCHEMA), manifest | {"files": files}


def _rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Index rows of a record's images."""
    return [
        image | {"shard": record["shard"], "row": row} for row, image in enumerate(record["images"])
    ]


def _read_records(uri: str, names: list[str]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(storage.read_json, [storage.join(uri, name) for name in names]))


def _refreshed(index: pa.Table, images: dict[str, str], stamps: dict[str, str]) -> pa.Table:
    """The index without images that changed, with new names for content that it has already.

    An image is read again only if its file looks different from when it was encoded.
    """
    if not index.num_rows:
        return index
    rows = index.to_pylist()
    stamp_of = {row["uri"]: row["stamp"] for row in rows}
    suspects = {
        image: name
        for name, image in images.items()
        if image in stamps and stamps[image] != stamp_of.get(image)
    }
    digests = image_digests(suspects)
    place_of = {row["sha256"]: row for row in rows}
    gone = {image for image in images.values() if image not in stamps}
    kept = [row for row in rows if row["uri"] not in suspects and row["uri"] not in gone]
    kept += [
        place_of[digests[image]] | {"image_id": name, "uri": image, "stamp": stamps[image]}
        for image, name in suspects.items()
        if digests.get(image) in place_of
    ]
    return pa.Table.from_pylist(kept, INDEX_SCHEMA)


def _pieces(wanted: list[dict[str, str]], size: int) -> dict[str, list[dict[str, str]]]:
    """Images to encode, cut into shards that are named by what is to be in them."""
    pieces = {}
    for start in range(0, len(wanted), size):
        part = wanted[start : start + size]
        pieces[hashlib.sha256(repr(part).encode()).hexdigest()[:16]] = part
    return pieces


def _record_name(piece: str) -> str:
    return f"record-{piece}.json"


def _records_in(uri: str) -> list[str]:
    return [n for n in storage.list_names(uri) if re.fullmatch(r"record-[0-9a-f]{16}\.json", n)]


_PIECE = pa.schema(
    [
        ("piece", pa.string()),
        ("image_id", pa.list_(pa.string())),
        ("uri", pa.list_(pa.string())),
        ("stamp", pa.list_(pa.string())),
    ]
)
_DECODED = pa.schema(
    [
        *_PIECE,
        ("sha256", pa.list_(pa.string())),
        ("fault", pa.list_(pa.string())),  # empty for an image that was decoded
        ("pixels", pa.large_binary()),  # uint8 [n, 3, S, S] of those
    ]
)


def _outcome(work: Callable[..., bytes], *arguments: Any) -> bytes | Exception:
    """What ``work`` gave, or why it did not: one image of many."""
    try:
        return work(*arguments)
    except Exception as error:
        return error


def _decode_piece(table: pa.Table, image_size: int, pixels: Pixels, max_pixels: int) -> pa.Table:
    """Task: read, hash, decode and preprocess the images of a piece."""
    (row,) = table.to_pylist()
    digests, faults = [], []
    decoded = io.BytesIO()
    reads = [partial(_outcome, read_image_bytes, uri, max_pixels) for uri in row["uri"]]
    read = prefetched(reads, _AHEAD, _AHEAD)
    for uri, data in zip(row["uri"], read, strict=True):
        digest = fault = ""
        try:
            if isinstance(data, Exception):
                raise data
            digest = hashlib.sha256(data).hexdigest()
            image = decode(data, uri, max_pixels, pixels)
            decoded.write(preprocess_to_bytes(image, image_size).tobytes())
        except InputError as error:
            fault = str(error)
        except Exception as error:  # of one file, or of a decoder that met nonsense
            if storage.is_away(error):
                raise  # it says nothing of the image
            fault = f"{uri}: cannot be read ({type(error).__name__}: {error})"
        digests.append(digest)
        faults.append(fault)
    row |= {"sha256": digests, "fault": faults, "pixels": decoded.getvalue()}
    return pa.Table.from_pylist([row], _DECODED)


class _Encoder:
    """Actor: encodes decoded pieces and writes a shard and a record of each.

    Two calls run at once, so that one writes while the other encodes.
    """

    def __init__(self, source: EncoderSource, key: FeatureKey, uri: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.source, self.key, self.uri = source, key, uri
        self.encoding = threading.Lock()

    # When it is first needed: what an actor raises before its first call reaches nobody as it is.
    @cached_property
    def encoder(self) -> Encoder:
        return self.source.load(granted_device(), self.key.precision)

    def __call__(self, table: pa.Table) -> pa.Table:
        (row,) = table.to_pylist()
        if not storage.list_names(self.uri):  # the driver holds its lease there
            raise InputError(
                f"feature_store.dir: {self.uri} is not the same directory on all nodes; give a "
                "path or URI that they share, e.g. --feature_store.dir s3://bucket/features"
            )
        good = [i for i, fault in enumerate(row["fault"]) if not fault]
        with self.encoding:
            features = self._encode(row["pixels"], len(good)) if good else None
        with _writing(self.uri):
            self._write(row, good, features)
        return pa.table({"images": [len(row["uri"])]})

    def _encode(self, data: bytes, count: int) -> np.ndarray:
        size = self.encoder.processor.image_size
        pixels_BCHW = np.frombuffer(data, np.uint8).reshape(count, 3, size, size)
        # A part at a time: normalised pixels are four times the size.
        parts = [
            self.encoder.features(pixel_values(part)).cpu()
            for part in np.array_split(pixels_BCHW, math.ceil(count / 64))
        ]
        features: np.ndarray = torch.cat(parts).numpy()
        return features

    def _write(self, row: dict[str, Any], good: list[int], features: np.ndarray | None) -> None:
        record: dict[str, Any] = {
            "images": [
                {name: row[name][i] for name in ("image_id", "uri", "stamp", "sha256")}
                for i in good
            ],
            "quarantined": {
                row["uri"][i]: {"image_id": row["image_id"][i], "fault": fault}
                for i, fault in enumerate(row["fault"])
                if fault
            },
        }
        if features is not None:
            if not np.isfinite(features).all():
                raise InputError(
                    f"model.vision_precision: features of images between {row['uri'][0]} and "
                    f"{row['uri'][-1]} exceed {self.key.precision}; use fp32"
                )
            ids = pa.array([row["image_id"][i] for i in good])
            column = pa.FixedShapeTensorArray.from_numpy_ndarray(features)
            data = arrow_bytes(pa.table({"image_id": ids, "features": column}))
            facts = storage.file_facts(data)
            shard = f"shard-{str(facts['sha256'])[:32]}.arrow"
            storage.write_bytes(storage.join(self.uri, shard), data)
            tokens, width = features.shape[1:]
            record |= {"shard": shard, "facts": facts, "tokens": tokens, "width": width}
        storage.write_json(storage.join(self.uri, _record_name(row["piece"])), record)


def _encode(
    settings: Settings,
    plan: Plan,
    source: EncoderSource,
    key: FeatureKey,
    uri: str,
    pieces: dict[str, list[dict[str, str]]],
) -> list[dict[str, Any]]:
    """Encode the pieces; return their records."""
    if pieces:
        total = sum(map(len, pieces.values()))
        progress = Progress("embed", total, "images")
        tables = [
            pa.table(
                {"piece": [piece]}
                | {name: [[row[name] for row in rows]] for name in ("image_id", "uri", "stamp")},
                schema=_PIECE,
            )
            for piece, rows in pieces.items()
        ]
        with bad_input_of_workers():
            for row in _run(settings, plan, source, key, uri, tables):
                progress.advance(int(row["images"]))
    return _read_records(uri, [_record_name(piece) for piece in pieces])


def _run(
    settings: Settings,
    plan: Plan,
    source: EncoderSource,
    key: FeatureKey,
    uri: str,
    tables: list[pa.Table],
) -> Iterator[dict[str, Any]]:
    cluster = settings.cluster
    task = partial(
        _decode_piece,
        image_size=key.image_size,
        pixels=key.pixels,
        max_pixels=settings.data.max_image_pixels,
    )
    if device_here() is not None:
        encoder = _Encoder(source, key, uri, cluster.cpus_per_embed_actor)
        return (encoder(task(table)).to_pylist()[0] for table in tables)
    # A decoded piece and its copies. Asking for it also keeps Ray from running both steps in the
    # actor, one after the other, as it does with steps that ask for the same.
    memory = 4 * settings.feature_store.shard_images * 3 * key.image_size**2
    return iter(
        ray.data.from_arrow(tables)
        .map_batches(task, batch_size=1, batch_format="pyarrow", num_cpus=1, memory=memory)
        .map_batches(
            _Encoder,
            fn_constructor_args=(source, key, uri, cluster.cpus_per_embed_actor),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=min(cluster.embed_actors, len(tables)),
                max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,
            ),
            **(plan.embed | {"num_cpus": _actor_cpus(cluster)}),
        )
        .iter_rows()
    )


def _actor_cpus(cluster: ClusterSettings) -> float:
    """CPUs that an actor asks Ray for, so that one is left for the tasks that decode.

    Actors that hold every CPU would wait for ever for work that cannot start.
    """
    total = int(ray.cluster_resources().get("CPU", 0))
    each = cluster.cpus_per_embed_actor
    if each * cluster.embed_actors < total or not total:
        return each  # with no CPU at all, an autoscaler still has to start nodes
    share = (total - 1) / cluster.embed_actors
    return math.floor(share) if share >= 1 else share  # Ray takes fractions below one only


def _commit(
    uri: str,
    key: FeatureKey,
    index: pa.Table,
    manifest: dict[str, Any],
    records: list[dict[str, Any]],
    missing: dict[str, dict[str, str]],
    seconds: float,
) -> dict[str, Any]:
    """Write the new index and then the manifest; remove what only an unfinished build needs."""
    quarantined: dict[str, Any] = dict(missing)
    rows: list[dict[str, Any]] = []
    facts_of: dict[str, dict[str, Any]] = dict(manifest["files"])
    shape = {name: manifest[name] for name in _SHAPE if name in manifest}
    for record in records:
        quarantined |= record["quarantined"]
        if "shard" in record:
            rows += _rows(record)
            facts_of[record["shard"]] = record["facts"]
            shape = {name: record[name] for name in _SHAPE}
    table = pa.concat_tables([index, pa.Table.from_pylist(rows, INDEX_SCHEMA)]).sort_by("uri")
    held = set(table["uri"].to_pylist())
    for image, facts in manifest["quarantined"].items():
        if image not in held:
            quarantined.setdefault(image, facts)
    data = parquet_bytes(table)
    facts = storage.file_facts(data)
    name = f"index-{str(facts['sha256'])[:16]}.parquet"
    storage.write_bytes(storage.join(uri, name), data)
    files = {shard: facts_of[shard] for shard in sorted(set(table["shard"].to_pylist()))}
    total = sum(facts["bytes"] for facts in files.values())
    files[name] = facts
    description = (
        key.facts()
        | shape
        | {
            "index": name,
            "images": table.num_rows,
            "encoded": len(rows),
            "shards": len(files) - 1,
            "shard_bytes": total,
            "quarantined": quarantined,
            "seconds": round(seconds, 3),  # of the last build
        }
    )
    storage.commit(uri, FEATURES_KIND, description, files)
    storage.remove_files(uri, _records_in(uri))
    return storage.read_manifest(uri, FEATURES_KIND)


def prune_store(uri: str) -> int:
    """Remove what the manifest does not name; no job may be reading the store. Returns a count."""
    with hold(uri, "embedding"):
        manifest = storage.read_manifest(uri, FEATURES_KIND)
        left = [
            name
            for name in storage.list_names(uri)
            if re.fullmatch(FEATURES_KIND.files, name) and name not in manifest["files"]
        ]
        storage.remove_files(uri, left)
    return len(left)
