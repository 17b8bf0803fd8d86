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
from qure_core.embedding_shards import CHECKPOINT_KIND, EMBEDDINGS_KIND, checkpoint_digest
from qure_core.errors import InputError
from qure_core.progress import Progress
from qure_core.resources import Plan

IMAGES_PER_SHARD = 2048


class _Embedder:
    """Actor: embeds whole shards and writes them."""

    def __init__(
        self, checkpoint: str, batch: int, threads: int, cpus: int, max_pixels: int
    ) -> None:
        # Here, so that tasks which only read embeddings need not import transformers.
        from qure_core.model import encoder_autocast, load_model

        torch.set_num_threads(cpus)
        self.autocast = encoder_autocast
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        directory = storage.local_directory(checkpoint, CHECKPOINT_KIND, verify=True)
        model, self.processor = load_model(str(directory))
        self.model = model.eval().to(self.device)
        self.batch, self.max_pixels = batch, max_pixels
        self.pool = ThreadPoolExecutor(threads)

    def _pixels(self, uri: str) -> np.ndarray:
        return self.processor.image_bytes(load_image(uri, self.max_pixels))

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        assert len(rows["shard"]) == 1, "one shard a call"
        shard = {key: value[0] for key, value in rows.items()}
        try:
            result = self._embed(shard) | {"fault": ""}
        except InputError as error:
            # As data: an exception would reach the driver as Ray's own, its cause as text.
            counts = dict.fromkeys(("images", "queries", "tokens", "width"), 0)
            result = {"output": str(shard["output"]), **counts, "fault": str(error)}
        return {name: np.asarray([value]) for name, value in result.items()}

    @torch.inference_mode()
    def _embed(self, shard: dict[str, Any]) -> dict[str, Any]:
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
            with self.autocast(self.device):
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
        number, output = int(shard["shard"]), str(shard["output"])
        _write(
            output,
            f"images-{number:05d}.arrow",
            kept_ids,
            _concatenate(image_parts, (config.query_tokens, config.embed_dim)),
        )
        _write(
            output,
            f"queries-{number:05d}.arrow",
            query_ids,
            _concatenate(query_parts, (config.embed_dim,)),
        )
        return {
            "output": output,
            "images": len(image_ids),
            "queries": len(query_ids),
            "tokens": config.query_tokens,
            "width": config.embed_dim,
        }

    def _decode(self, uris: Sequence[str], start: int) -> Iterator[np.ndarray]:
        return self.pool.map(self._pixels, [str(u) for u in uris[start : start + self.batch]])


def _write(output: str, name: str, ids: list[str], values: np.ndarray) -> None:
    flat = pa.array(values.reshape(-1), pa.float32())
    width = int(np.prod(values.shape[1:]))
    table = pa.table({"id": ids, "embedding": pa.FixedSizeListArray.from_arrays(flat, width)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    storage.write_bytes(storage.join(output, name), sink.getvalue().to_pybytes())


def _concatenate(parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty((0, *shape), np.float32)


def _shards(job: EmbedJob, batch: int, shards: int | None) -> list[dict[str, list[Any]]]:
    """Cut the sorted images that are needed into shards of whole batches."""
    split, corpus = job.split, job.corpus
    queries_of: dict[str, list[Triplet]] = {}
    for triplet in sorted(split.triplets, key=lambda t: t.query_id):
        queries_of.setdefault(triplet.reference_id, []).append(triplet)
    image_ids = sorted(corpus | set(queries_of))
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
    """What to embed, and where to: ``corpus`` and every query of ``split``."""

    split: Split
    corpus: frozenset[str]
    output: str


def embed_splits(
    checkpoint: str,
    jobs: Sequence[EmbedJob],
    cluster: ClusterSettings,
    plan: Plan,
    max_pixels: int,
    shards: int | None = None,
) -> None:
    """Embed every job with ``checkpoint`` in one pool of actors and commit each to its output.

    An output already made from the same checkpoint and inputs is kept.
    """
    digest = checkpoint_digest(checkpoint)
    keys = {
        job.output: {
            "checkpoint": digest,
            "split": job.split.name,
            "corpus_images": len(job.corpus),
            "batch": cluster.embed_batch,
        }
        for job in jobs
    }
    rows: list[dict[str, list[Any]]] = []
    shards_of: dict[str, int] = {}
    for job in jobs:
        if storage.is_committed(job.output):
            manifest = storage.read_manifest(job.output, EMBEDDINGS_KIND)
            if all(manifest[name] == value for name, value in keys[job.output].items()):
                continue
        storage.remove(job.output)
        own = _shards(job, cluster.embed_batch, shards)
        shards_of[job.output] = len(own)
        rows += own
    if not rows:
        return
    started = time.monotonic()
    names = " and ".join(job.split.name for job in jobs if job.output in shards_of)
    progress = Progress(f"embed {names}", sum(len(row["image_id"][0]) for row in rows), "images")
    results = (
        ray.data.from_arrow([pa.table(row, schema=_SHARD_SCHEMA) for row in rows])
        .map_batches(
            _Embedder,
            fn_constructor_args=(
                checkpoint,
                cluster.embed_batch,
                cluster.decode_threads,
                cluster.cpus_per_embed_actor,
                max_pixels,
            ),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(cluster.embed_actors, len(rows))),
            **plan.embed,
        )
        .iter_rows()
    )
    made: dict[str, list[dict[str, Any]]] = {output: [] for output in shards_of}
    for row in results:
        if row["fault"]:
            raise InputError(str(row["fault"]))
        made[str(row["output"])].append(row)
        progress.advance(int(row["images"]))
    for output, shard_rows in made.items():
        files = [
            f"{kind}-{number:05d}.arrow"
            for number in range(shards_of[output])
            for kind in ("images", "queries")
        ]
        description = keys[output] | {
            "images": sum(int(row["images"]) for row in shard_rows),
            "queries": sum(int(row["queries"]) for row in shard_rows),
            "tokens": int(shard_rows[0]["tokens"]),
            "width": int(shard_rows[0]["width"]),
            "shards": shards_of[output],
            "seconds": round(time.monotonic() - started, 3),  # of the whole pass
        }
        storage.write_manifest(output, EMBEDDINGS_KIND, description, files)
