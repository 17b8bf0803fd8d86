"""Evaluation of a checkpoint on Ray: rank each query's gallery, keep what metrics need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.data.schema import Split
from qure_core.embeddings.shards import EMBEDDINGS_KIND, EmbeddingShards
from qure_core.embeddings.stage import EmbedJob, embed_splits
from qure_core.evaluation.protocols import Protocol, galleries_of, of_format
from qure_core.evaluation.rows import ranking_row
from qure_core.model.checkpoint_files import checkpoint_digest, checkpoint_pixels
from qure_core.model.relevance import refuse_bad_scores
from qure_core.ranking.blocks import QueryBlock, make_blocks, map_blocks, score_block
from qure_core.runtime.resources import Plan
from qure_core.storage.parquet import read_committed_parquet, read_parquet, write_parquet

EVALUATION_KIND = storage.Kind("evaluation", r"part-\d{5}\.parquet")


_RANKINGS = pa.schema(
    [
        ("query_id", pa.string()),
        ("category", pa.string()),
        ("target_id", pa.string()),
        ("target_rank", pa.int64()),  # None without a target
        ("target_ties", pa.int64()),  # other images with the target's score
        ("top_ids", pa.list_(pa.string())),
        ("top_scores", pa.list_(pa.float32())),
        ("relevant_ranks", pa.list_(pa.int64())),
        ("subset_ids", pa.list_(pa.string())),  # CIRR's image set, in ranking order
    ]
)


def _rank_block(
    block: QueryBlock, embeddings_uri: str, output: str, top_k: int, drop_reference: bool
) -> dict[str, Any]:
    scores_QM = score_block(EmbeddingShards.open(embeddings_uri), block).cpu()
    refuse_bad_scores(scores_QM)
    column = {image_id: i for i, image_id in enumerate(block.corpus)}
    rows = [
        ranking_row(
            triplet, scores_M, block.corpus, column, top_k=top_k, drop_reference=drop_reference
        )
        for triplet, scores_M in zip(block.triplets, scores_QM, strict=True)
    ]
    table = pa.Table.from_pylist(rows, _RANKINGS)
    write_parquet(storage.join(output, f"part-{block.number:05d}.parquet"), table)
    return {}


def rank_queries(
    name: str,
    split: Split,
    galleries: dict[str, tuple[str, ...]],
    embeddings_uri: str,
    output: str,
    *,
    memory_mb: int,
    top_k: int,
    drop_reference: bool,
    resources: dict[str, Any],
    checkpoint: str,
) -> list[str]:
    """Rank each query's gallery and write the rows to ``output``; return the files' names.

    ``checkpoint`` is named by an error if its scores cannot be ranked.
    """
    blocks = make_blocks(split.triplets, galleries, memory_mb)
    map_blocks(
        f"rank {name}",
        blocks,
        _rank_block,
        arguments={
            "embeddings_uri": embeddings_uri,
            "output": output,
            "top_k": top_k,
            "drop_reference": drop_reference,
        },
        resources=resources,
        blame=checkpoint,
    )
    return [f"part-{block.number:05d}.parquet" for block in blocks]


def evaluation_job(settings: Settings, split: Split, output: str) -> EmbedJob:
    """The embeddings that an evaluation at ``output`` needs."""
    galleries = galleries_of(split, settings.evaluation.gallery)
    return EmbedJob(split, frozenset().union(*galleries.values()), f"{output}-embeddings")


def evaluate_checkpoint(
    settings: Settings, plan: Plan, checkpoint: str, split: Split, output: str, name: str
) -> dict[str, Any]:
    """Rank every query of ``split`` with ``checkpoint``; commit rankings and metrics to ``output``.

    Returns the manifest, whose "metrics" are those of the data's protocol (`protocols.of_format`).
    """
    protocol = of_format(settings.data.format)
    facts = {
        "name": name,
        "protocol": protocol.name,
        "checkpoint": checkpoint_digest(checkpoint),
        "gallery": settings.evaluation.gallery,
        "split": split.name,
        "vision_precision": settings.model.vision_precision,
        "pixels": checkpoint_pixels(checkpoint),
    }

    def upgrade(manifest: dict[str, Any]) -> dict[str, Any]:
        # Until it was said how, images were taken as stored.
        return {"pixels": "released"} | _upgraded(output, manifest, protocol, split)

    job = evaluation_job(settings, split, output)
    if manifest := storage.kept(output, EVALUATION_KIND, facts, upgrade):
        # Left by a process killed right after it committed.
        storage.discard(job.output, EMBEDDINGS_KIND)
        return manifest
    storage.check_place(job.output, EMBEDDINGS_KIND)
    storage.clear(output, EVALUATION_KIND)
    storage.begin(output, EVALUATION_KIND)
    galleries = galleries_of(split, settings.evaluation.gallery)
    embed_splits(checkpoint, [job], settings, plan)
    names = rank_queries(
        name,
        split,
        galleries,
        job.output,
        output,
        memory_mb=settings.mining.memory_mb,
        top_k=max(settings.evaluation.top_k, protocol.top_k),
        drop_reference=protocol.drop_reference,
        resources=plan.score,
        checkpoint=checkpoint,
    )
    rows = read_rows(output, names)
    description = facts | {
        "queries": len(rows),
        "gallery_images": {category: len(ids) for category, ids in galleries.items()},
        "metrics": protocol.metrics(rows, split),
    }
    storage.write_manifest(output, EVALUATION_KIND, description, names)
    storage.discard(job.output, EMBEDDINGS_KIND)
    return storage.read_manifest(output, EVALUATION_KIND)


def _upgraded(
    uri: str, manifest: dict[str, Any], protocol: Protocol, split: Split
) -> dict[str, Any]:
    """An older version's evaluation in the terms of today's: its rankings are the same, but it
    measured all data as `protocols.Own` does."""
    if "protocol" in manifest:
        return manifest
    rows = _committed_rows(uri, manifest).to_pylist()
    today = manifest | {"protocol": protocol.name, "metrics": protocol.metrics(rows, split)}
    storage.write_json(storage.join(uri, EVALUATION_KIND.manifest), today)
    return today


def read_rows(uri: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """The ranking rows that `rank_queries` wrote."""
    tables = [read_parquet(storage.join(uri, name)) for name in names]
    return pa.concat_tables(tables).to_pylist()


def read_evaluation(uri: str) -> dict[str, Any]:
    """The manifest of a committed evaluation."""
    return storage.read_manifest(uri, EVALUATION_KIND)


def read_rankings(uri: str) -> pa.Table:
    """The ranking rows of a committed evaluation."""
    return _committed_rows(uri, read_evaluation(uri))


def target_ranks(uri: str) -> dict[str, tuple[str, int | None]]:
    """Of each query of a committed evaluation its category and its target's rank
    (`paired.Ranks`)."""
    rows = read_rankings(uri).select(["query_id", "category", "target_rank"]).to_pylist()
    return {row["query_id"]: (row["category"], row["target_rank"]) for row in rows}


def _committed_rows(uri: str, manifest: dict[str, Any]) -> pa.Table:
    names = sorted(manifest["files"])
    return pa.concat_tables(read_committed_parquet(uri, name, manifest) for name in names)
