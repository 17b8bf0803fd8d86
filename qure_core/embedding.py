"""Embeddings of one checkpoint: images [M, T, D] and queries [Q, D], made on Ray Data.

Work goes image by image: an image is decoded and encoded once, and gives its own embedding and
that of every query that starts from it. Images are taken in sorted order in batches cut from the
whole list, so an embedding does not depend on shards or actors. Each shard is written by the actor
that made it, as Arrow IPC files that are read by memory map.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy

from qure_core import storage
from qure_core.config import ClusterSettings
from qure_core.data.images import load_image
from qure_core.data.schema import Split, Triplet
from qure_core.model import QuReProcessor, encoder_autocast, load_model
from qure_core.progress import Progress
from qure_core.resources import Plan

EMBEDDINGS_KIND = "embeddings"
CHECKPOINT_KIND = "checkpoint"
IMAGES_PER_SHARD = 2048


class _Embedder:
    """Actor: embeds whole shards and writes them."""

    def __init__(
        self, checkpoint: str, output: str, batch: int, threads: int, cpus: int, max_pixels: int
    ) -> None:
        torch.set_num_threads(cpus)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        directory = storage.local_directory(checkpoint, CHECKPOINT_KIND, verify=True)
        model, self.processor = load_model(str(directory))
        self.model = model.eval().to(self.device)
        self.output, self.batch, self.max_pixels = output, batch, max_pixels
        self.pool = ThreadPoolExecutor(threads)

    def _pixels(self, uri: str) -> np.ndarray:
        return self.processor.image_bytes(load_image(uri, self.max_pixels))

    @torch.inference_mode()
    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        assert len(rows["shard"]) == 1, "one shard a call"
        started = time.monotonic()
        shard = {key: value[0] for key, value in rows.items()}
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
        starts = range(0, len(image_ids), self.batch)
        pending = self._decode(uris, 0)
        for start in starts:
            pixels = np.stack(list(pending))
            pending = self._decode(uris, start + self.batch)
            batch_ids = image_ids[start : start + self.batch]
            with encoder_autocast(self.device):
                vision_BPW = self.model.encode_vision(
                    self.processor.pixel_values(pixels).to(self.device)
                )
            vision_BPW = vision_BPW.float()
            chosen = [i for i in range(len(batch_ids)) if wanted[start + i]]
            if chosen:
                kept_ids += [str(batch_ids[i]) for i in chosen]
                image_parts.append(self.model.embed_images(vision_BPW[chosen]).cpu().numpy())
            queries = [
                (i, *query)
                for i, image_id in enumerate(batch_ids)
                for query in queries_of.get(str(image_id), [])
            ]
            for first in range(0, len(queries), self.batch):
                some = queries[first : first + self.batch]
                input_ids, mask = self.processor.texts([text for _, _, text in some])
                embedded = self.model.embed_queries(
                    vision_BPW[[i for i, _, _ in some]],
                    input_ids.to(self.device),
                    mask.to(self.device),
                )
                query_ids += [query_id for _, query_id, _ in some]
                query_parts.append(embedded.cpu().numpy())

        config = self.model.config
        number = int(shard["shard"])
        self._write(
            f"images-{number:05d}.arrow",
            kept_ids,
            _concatenate(image_parts, (config.query_tokens, config.embed_dim)),
        )
        self._write(
            f"queries-{number:05d}.arrow",
            query_ids,
            _concatenate(query_parts, (config.embed_dim,)),
        )
        return {
            "shard": np.asarray([number]),
            "images": np.asarray([len(image_ids)]),
            "queries": np.asarray([len(query_ids)]),
            "seconds": np.asarray([time.monotonic() - started]),
            "tokens": np.asarray([config.query_tokens]),
            "width": np.asarray([config.embed_dim]),
        }

    def _decode(self, uris: Sequence[str], start: int) -> Iterator[np.ndarray]:
        return self.pool.map(self._pixels, [str(u) for u in uris[start : start + self.batch]])

    def _write(self, name: str, ids: list[str], values: np.ndarray) -> None:
        flat = pa.array(values.reshape(-1), pa.float32())
        width = int(np.prod(values.shape[1:]))
        table = pa.table({"id": ids, "embedding": pa.FixedSizeListArray.from_arrays(flat, width)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        storage.write_bytes(storage.join(self.output, name), sink.getvalue().to_pybytes())


def _concatenate(parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty((0, *shape), np.float32)


def _shards(
    split: Split, corpus: set[str], batch: int, shards: int | None
) -> list[dict[str, list[Any]]]:
    """Cut the sorted images that are needed into shards of whole batches."""
    queries_of: dict[str, list[Triplet]] = {}
    for triplet in sorted(split.triplets, key=lambda t: t.query_id):
        queries_of.setdefault(triplet.reference_id, []).append(triplet)
    image_ids = sorted(corpus | set(queries_of))
    batches = [image_ids[start : start + batch] for start in range(0, len(image_ids), batch)]
    count = min(shards or -(-len(image_ids) // IMAGES_PER_SHARD), len(batches))
    rows = []
    for number in range(count):
        first, last = number * len(batches) // count, (number + 1) * len(batches) // count
        ids = [image_id for part in batches[first:last] for image_id in part]
        queries = [triplet for image_id in ids for triplet in queries_of.get(image_id, [])]
        rows.append(
            {
                "shard": [number],
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
        ("shard", pa.int64()),
        ("image_id", pa.list_(pa.string())),
        ("uri", pa.list_(pa.string())),
        ("in_corpus", pa.list_(pa.bool_())),
        ("query_id", pa.list_(pa.string())),
        ("reference_id", pa.list_(pa.string())),
        ("text", pa.list_(pa.string())),
    ]
)


def embed_split(
    checkpoint: str,
    split: Split,
    corpus: set[str],
    output: str,
    cluster: ClusterSettings,
    plan: Plan,
    max_pixels: int,
    shards: int | None = None,
) -> dict[str, Any]:
    """Embed ``corpus`` and every query of ``split`` with ``checkpoint``; commit to ``output``.

    Returns the manifest; an output already made from the same checkpoint and inputs is kept.
    """
    key = {
        "checkpoint": checkpoint_digest(checkpoint),
        "split": split.name,
        "corpus_images": len(corpus),
        "batch": cluster.embed_batch,
    }
    if storage.is_committed(output):
        manifest = storage.read_manifest(output, EMBEDDINGS_KIND)
        if all(manifest[name] == value for name, value in key.items()):
            return manifest
    storage.remove(output)
    started = time.monotonic()
    rows = _shards(split, corpus, cluster.embed_batch, shards)
    progress = Progress(
        f"embed {split.name}", sum(len(row["image_id"][0]) for row in rows), "images"
    )
    actors = min(cluster.embed_actors, len(rows))
    results = (
        ray.data.from_arrow([pa.table(row, schema=_SHARD_SCHEMA) for row in rows])
        .map_batches(
            _Embedder,
            fn_constructor_args=(
                checkpoint,
                output,
                cluster.embed_batch,
                cluster.decode_threads,
                cluster.cpus_per_embed_actor,
                max_pixels,
            ),
            batch_size=1,
            compute=ActorPoolStrategy(size=actors),
            **plan.embed,
        )
        .iter_rows()
    )
    totals = {"images": 0, "queries": 0}
    tokens = width = 0
    for row in results:
        totals = {name: value + int(row[name]) for name, value in totals.items()}
        tokens, width = int(row["tokens"]), int(row["width"])
        progress.advance(int(row["images"]))
    names = [f"{kind}-{row['shard'][0]:05d}.arrow" for row in rows for kind in ("images", "queries")]
    description = key | totals | {"tokens": tokens, "width": width, "shards": len(rows)}
    description["seconds"] = round(time.monotonic() - started, 3)
    storage.write_manifest(output, EMBEDDINGS_KIND, description, names)
    return storage.read_manifest(output, EMBEDDINGS_KIND)


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
            column.chunk(0).flatten().to_numpy()
            if column.num_chunks
            else np.empty(0, np.float32)
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


def processor_of(checkpoint: str) -> QuReProcessor:
    directory = storage.local_directory(checkpoint, CHECKPOINT_KIND)
    return QuReProcessor.from_pretrained(directory)
