"""Embeddings of one checkpoint: images [M, T, D] and queries [Q, D], made on Ray Data.

Work goes image by image: an image is decoded and encoded once, and gives its own embedding and
that of every query that starts from it. Images are taken in sorted order in batches cut from the
whole list, so an embedding does not depend on shards or actors. Each shard is written by the actor
that made it, as Arrow IPC files that are read by memory map.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError, bad_input_of_workers
from qure_core.data.loader import ImageLoader, VisionLoader
from qure_core.data.schema import Split, Triplet
from qure_core.embeddings.feature_use import usable_store
from qure_core.embeddings.shards import EMBEDDINGS_KIND, shard_files
from qure_core.features.store import StoredFeatures
from qure_core.model.checkpoint_files import CHECKPOINT_KIND, checkpoint_digest, checkpoint_pixels
from qure_core.runtime.in_process import device_here
from qure_core.runtime.progress import Progress
from qure_core.runtime.resources import Plan, granted_device
from qure_core.storage.arrow import write_arrow

if TYPE_CHECKING:
    from qure_core.embeddings.encoder import Encoder

IMAGES_PER_SHARD = 2048
SHAPES = "shapes.json"  # of one embedding, the same from every shard


class _Embedder:
    """Embeds whole shards and writes them: an actor on a GPU, of one task without."""

    def __init__(self, checkpoint: str, settings: dict[str, Any], store: str | None) -> None:
        self.checkpoint, self.store = checkpoint, store
        self.settings = Settings(**settings)
        self.batch = self.settings.cluster.embed_batch
        torch.set_num_threads(self.settings.cluster.cpus_per_embed_actor)

    # When it is first needed: what an actor raises before its first call reaches nobody as it is.
    @cached_property
    def encoder(self) -> Encoder:
        # Here, so that tasks which only read embeddings need not import transformers.
        from qure_core.embeddings.encoder import Encoder

        storage.read_manifest(self.checkpoint, CHECKPOINT_KIND)  # it is one, and finished
        precision = self.settings.model.vision_precision
        return Encoder.load(self.checkpoint, granted_device(), precision=precision)

    def _loader(self, images: dict[str, str]) -> VisionLoader:
        """Of stored features of the images (URIs by id), or of their pixels."""
        settings = self.settings
        if self.store:
            return StoredFeatures(self.store, images, settings.feature_store.cache_dir)
        limit, threads = settings.data.max_image_pixels, settings.cluster.decode_threads
        processor = self.encoder.processor
        return ImageLoader(images, processor.image_size, processor.pixels, limit, threads)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        assert len(rows["shard"]) == 1, "one shard a call"
        result = self.embed({key: value[0] for key, value in rows.items()})
        return {name: np.asarray([value]) for name, value in result.items()}

    @torch.inference_mode()
    def embed(self, shard: dict[str, Any]) -> dict[str, Any]:
        """Write a shard's embeddings, and tell of its files."""
        started = time.monotonic()
        image_ids, uris, wanted = list(shard["image_id"]), list(shard["uri"]), shard["in_corpus"]
        queries_of: dict[str, list[tuple[str, str]]] = {}
        for query_id, reference, text in zip(
            shard["query_id"], shard["reference_id"], shard["text"], strict=True
        ):
            queries_of.setdefault(str(reference), []).append((str(query_id), str(text)))

        kept_ids: list[str] = []
        image_parts: list[np.ndarray] = []
        query_ids: list[str] = []
        query_parts: list[np.ndarray] = []
        uri_of = dict(zip(map(str, image_ids), map(str, uris), strict=True))
        batches = [
            [str(name) for name in image_ids[start : start + self.batch]]
            for start in range(0, len(image_ids), self.batch)
        ]
        features = self.encoder.vision_batches(self._loader(uri_of), batches)
        for number, (batch_ids, vision_BPW) in enumerate(zip(batches, features, strict=True)):
            start = number * self.batch
            chosen = [i for i in range(len(batch_ids)) if wanted[start + i]]
            if chosen:
                kept_ids += [batch_ids[i] for i in chosen]
                image_parts.append(self.encoder.images(vision_BPW[chosen]).cpu().numpy())
            queries = [
                (i, *query)
                for i, image_id in enumerate(batch_ids)
                for query in queries_of.get(image_id, [])
            ]
            for first in range(0, len(queries), self.batch):
                some = queries[first : first + self.batch]
                embedded = self.encoder.queries(
                    vision_BPW[[i for i, _, _ in some]], [text for _, _, text in some]
                )
                query_ids += [query_id for _, query_id, _ in some]
                query_parts.append(embedded.cpu().numpy())

        self._check_finite(image_parts, kept_ids, "image")
        self._check_finite(query_parts, query_ids, "query")
        config = self.encoder.model.config
        number, output = int(shard["shard"]), str(shard["output"])
        images = _concatenate(image_parts, (config.query_tokens, config.embed_dim))
        vectors = _concatenate(query_parts, (config.embed_dim,))
        shapes = {"tokens": config.query_tokens, "width": config.embed_dim}
        storage.write_json(storage.join(output, SHAPES), shapes)
        image_file, query_file = shard_files(number)
        images = images.astype(str(shard["dtype"]))
        files = {
            image_file: write_shard(output, image_file, kept_ids, images),
            query_file: write_shard(output, query_file, query_ids, vectors),
        }
        seconds = time.monotonic() - started
        told = {"images": len(image_ids), "seconds": seconds}
        return told | {"output": output, "files": json.dumps(files)}

    def _check_finite(self, parts: list[np.ndarray], ids: list[str], what: str) -> None:
        bad = [~np.isfinite(part).reshape(len(part), -1).all(axis=1) for part in parts]
        places = np.flatnonzero(np.concatenate(bad or [np.zeros(0, bool)]))
        if len(places):
            raise InputError(
                f"{self.checkpoint}: its embedding of {what} {ids[places[0]]!r} (and of "
                f"{len(places) - 1:,} more) is not finite; take another checkpoint"
            )


def write_shard(output: str, name: str, ids: list[str], values: np.ndarray) -> dict[str, Any]:
    """Write ids and their embeddings [n, ...] as one Arrow IPC file, to be read by memory map.

    Returns its manifest entry (bytes, sha256).
    """
    flat = pa.array(values.reshape(-1))
    width = int(np.prod(values.shape[1:]))
    table = pa.table({"id": ids, "embedding": pa.FixedSizeListArray.from_arrays(flat, width)})
    return write_arrow(storage.join(output, name), table)


def _concatenate(parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty((0, *shape), np.float32)


def _shards(job: EmbedJob, batch: int, shards: int | None) -> list[dict[str, list[Any]]]:
    """Cut the sorted images that are needed into shards of whole batches."""
    split, corpus = job.split, job.corpus
    queries_of: dict[str, list[Triplet]] = {}
    for triplet in sorted(split.triplets, key=lambda t: t.query_id):
        queries_of.setdefault(triplet.reference_id, []).append(triplet)
    image_ids = list(job.images())
    batches = [image_ids[start : start + batch] for start in range(0, len(image_ids), batch)]
    count = min(shards or -(-len(image_ids) // IMAGES_PER_SHARD), len(batches))
    rows: list[dict[str, list[Any]]] = []
    for number in range(count):
        first, last = number * len(batches) // count, (number + 1) * len(batches) // count
        ids = [image_id for part in batches[first:last] for image_id in part]
        queries = [triplet for image_id in ids for triplet in queries_of.get(image_id, [])]
        rows.append(
            {
                "output": [job.output],
                "shard": [number],
                "dtype": [job.dtype],
                "image_id": [ids],
                "uri": [[split.images[image_id] for image_id in ids]],
                "in_corpus": [[image_id in corpus for image_id in ids]],
                "query_id": [[triplet.query_id for triplet in queries]],
                "reference_id": [[triplet.reference_id for triplet in queries]],
                "text": [[triplet.text for triplet in queries]],
            }
        )
    return rows


_SHARD_SCHEMA = pa.schema(
    [
        ("output", pa.string()),
        ("shard", pa.int64()),
        ("dtype", pa.string()),
        ("image_id", pa.list_(pa.string())),
        ("uri", pa.list_(pa.string())),
        ("in_corpus", pa.list_(pa.bool_())),
        ("query_id", pa.list_(pa.string())),
        ("reference_id", pa.list_(pa.string())),
        ("text", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class EmbedJob:
    """What to embed, and where to: ``corpus`` and every query of ``split``.

    ``dtype`` is what the images' embeddings are stored in; queries are always float32.
    """

    split: Split
    corpus: frozenset[str]
    output: str
    dtype: str = "float32"

    def images(self) -> dict[str, str]:
        """URIs of the images that it takes, by id, sorted."""
        wanted = self.corpus | {triplet.reference_id for triplet in self.split.triplets}
        return {image_id: self.split.images[image_id] for image_id in sorted(wanted)}

    def digest(self) -> str:
        """A digest of what is embedded, by name."""
        whole = hashlib.sha256(
            repr((self.split.triplets, sorted(self.corpus), self.dtype)).encode()
        )
        return whole.hexdigest()[:16]


def embed_splits(
    checkpoint: str,
    jobs: Sequence[EmbedJob],
    settings: Settings,
    plan: Plan,
    shards: int | None = None,
) -> None:
    """Embed every job with ``checkpoint`` in one pool of workers and commit each to its output.

    An output already made from the same checkpoint and inputs is kept. Features come from the
    feature store if ``settings.features`` lets them, with the same result.
    """
    digest, pixels = checkpoint_digest(checkpoint), checkpoint_pixels(checkpoint)
    cluster = settings.cluster
    keys = {
        job.output: {
            "checkpoint": digest,
            "split": job.split.name,
            "inputs": job.digest(),
            "batch": cluster.embed_batch,
            "vision_precision": settings.model.vision_precision,
            "pixels": pixels,
        }
        for job in jobs
    }
    rows: list[dict[str, list[Any]]] = []
    shards_of: dict[str, list[str]] = {}
    for job in jobs:
        if storage.kept(job.output, EMBEDDINGS_KIND, keys[job.output]):
            continue
        own = _shards(job, cluster.embed_batch, shards)
        done = storage.resume(job.output, EMBEDDINGS_KIND, keys[job.output] | {"shards": len(own)})
        shards_of[job.output] = [row["image_id"][0][0] for row in own]
        rows += [row for row in own if not set(shard_files(row["shard"][0])) <= done]
    if not shards_of:
        return
    images: dict[str, str] = {}
    for job in jobs:
        if job.output in shards_of:
            images |= job.images()
    store = usable_store(settings, plan, checkpoint, images)
    started = time.monotonic()
    names = " and ".join(job.split.name for job in jobs if job.output in shards_of)
    progress = Progress(f"embed {names}", sum(len(row["image_id"][0]) for row in rows), "images")
    results: Any = []
    if rows:
        results = _embed_rows(checkpoint, rows, settings, plan, store)
    written: dict[str, dict[str, Any]] = {output: {} for output in shards_of}
    with bad_input_of_workers():
        for row in results:
            written[row["output"]] |= json.loads(row["files"])
            progress.advance(int(row["images"]), float(row["seconds"]))
    seconds = time.monotonic() - started
    for job in jobs:
        if job.output in shards_of:
            output = job.output
            _commit(job, keys[output], shards_of[output], seconds, written[output])


def _embed_rows(
    checkpoint: str,
    rows: list[dict[str, list[Any]]],
    settings: Settings,
    plan: Plan,
    store: str | None,
) -> Iterator[dict[str, Any]]:
    if device_here() is not None:
        embedder = _Embedder(checkpoint, settings.resolved(), store)
        return (embedder.embed({name: value[0] for name, value in row.items()}) for row in rows)
    tables = [pa.table(row, schema=_SHARD_SCHEMA) for row in rows]
    most = min(settings.cluster.embed_actors, len(rows))
    arguments = (checkpoint, settings.resolved(), store)
    shards = ray.data.from_arrow(tables)
    if plan.gpus:
        # Ray ends a task's process that had a GPU, and with it all that was loaded.
        embedded = shards.map_batches(
            _Embedder,
            fn_constructor_args=arguments,
            batch_size=1,
            compute=ActorPoolStrategy(size=most),
            **plan.embed,
        )
    else:
        # Processes of tasks stay for the tasks of other stages, and have imported what takes most
        # of a small pass; to load a checkpoint is little beside a shard.
        embedded = shards.map_batches(
            partial(_embed_shard, arguments),
            batch_size=1,
            compute=TaskPoolStrategy(size=most),
            **plan.embed,
        )
    return iter(embedded.iter_rows())


def _embed_shard(
    arguments: tuple[str, dict[str, Any], str | None], rows: dict[str, Any]
) -> dict[str, Any]:
    return _Embedder(*arguments)(rows)


def _commit(
    job: EmbedJob,
    key: dict[str, Any],
    first_ids: list[str],
    seconds: float,
    written: dict[str, dict[str, Any]],
) -> None:
    """Write the manifest of shards that are all there, whichever attempt made them.

    Those of earlier attempts, which are not in ``written``, are read for it.
    """
    numbers = range(len(first_ids))
    files = [name for number in numbers for name in shard_files(number)]
    shapes = storage.read_json(storage.join(job.output, SHAPES))
    description = key | {
        "images": len(job.corpus),
        "queries": len(job.split.triplets),
        **shapes,
        "shards": len(first_ids),
        "first_ids": first_ids,
        "seconds": round(seconds, 3),  # of the whole pass, or of its last attempt
    }
    storage.write_manifest(job.output, EMBEDDINGS_KIND, description, files, written)
