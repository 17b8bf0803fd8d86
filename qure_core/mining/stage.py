"""One mining round on Ray: a checkpoint and a corpus in, a committed mined set out.

Embed corpus and queries in actors, score query blocks against the corpus in tasks, sort each
query's scores, cut between the two steep drops, write a Parquet part per block, then the manifest.
"""

from __future__ import annotations

import hashlib
import resource
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from qure_core import storage
from qure_core.config import Settings
from qure_core.data.schema import Split
from qure_core.embedding import EmbedJob, embed_splits
from qure_core.embedding_shards import EMBEDDINGS_KIND, EmbeddingShards, checkpoint_digest
from qure_core.errors import InputError
from qure_core.mining.mined_set import MINED_KIND, MINED_SCHEMA, SCHEMA_VERSION
from qure_core.mining.steep_drops import STATUSES, SteepDrops, steep_drop_negatives
from qure_core.parquet import write_parquet
from qure_core.resources import Plan
from qure_core.scoring import QueryBlock, make_blocks, map_blocks, score_block

# Sorting a row keeps its scores, keys, order, drops and masks: about this many bytes a score.
_SORT_BYTES = 64


def mine_round(
    settings: Settings,
    plan: Plan,
    checkpoint: str,
    split: Split,
    corpora: dict[str, tuple[str, ...]],
    output: str,
    epoch: int,
    curves: set[str] | None = None,
) -> dict[str, Any]:
    """Mine the hard negatives of every triplet of ``split`` and commit them to ``output``.

    ``corpora`` holds each category's images to mine among. Returns the manifest; a round already
    committed from the same checkpoint and settings is kept. ``curves`` names queries whose whole
    sorted score curve is written too, for inspection. Embeddings go to
    ``output`` + "-embeddings" and are removed once the round is committed.
    """
    facts = {
        "epoch": epoch,
        "schema_version": SCHEMA_VERSION,
        "checkpoint": checkpoint_digest(checkpoint),
        "corpus": corpus_digest(corpora),
        "settings": {
            "exclude_reference": settings.mining.exclude_reference,
            "rule": "walk over neighbouring drops from the steepest; first pair more than 1 apart",
        },
    }
    if storage.is_committed(output):
        manifest = storage.read_manifest(output, MINED_KIND)
        if all(manifest[name] == value for name, value in facts.items()):
            return manifest
    check_corpora(split, corpora)
    storage.remove(output)
    job = mining_job(split, corpora, output)
    embeddings_uri = job.output
    embed_splits(
        checkpoint,
        [job],
        settings.cluster,
        plan,
        settings.data.max_image_pixels,
        settings.mining.corpus_shards,
    )
    # The pass may have been made, for this and other stages together, before this call.
    embed_seconds = storage.read_manifest(embeddings_uri, EMBEDDINGS_KIND)["seconds"]
    embedded = time.monotonic()
    blocks = make_blocks(
        split.triplets, corpora, settings.mining.memory_mb, settings.mining.query_block
    )
    rows = map_blocks(
        f"mine epoch {epoch}",
        blocks,
        _mine_block,
        arguments={
            "embeddings_uri": embeddings_uri,
            "output": output,
            "exclude_reference": settings.mining.exclude_reference,
            "memory_bytes": settings.mining.memory_mb * 2**20,
            "curves": curves or set(),
        },
    )
    mined = time.monotonic()
    seconds = {
        "embed": embed_seconds,
        "score": round(sum(float(row["score_seconds"]) for row in rows), 3),
        "sort and cut": round(sum(float(row["cut_seconds"]) for row in rows), 3),
        "write": round(sum(float(row["write_seconds"]) for row in rows), 3),
        "score to write, wall": round(mined - embedded, 3),
    }
    description = facts | {
        "queries": len(split.triplets),
        "corpus_images": {category: len(ids) for category, ids in corpora.items()},
        "seconds": seconds,
        "peak_task_memory_mb": round(max(float(row["peak_mb"]) for row in rows), 1),
        "statistics": summarise(rows),
    }
    names = [f"part-{block.number:05d}.parquet" for block in blocks]
    names += [f"curves-{int(row['block']):05d}.parquet" for row in rows if row["has_curves"]]
    storage.write_manifest(output, MINED_KIND, description, names)
    storage.remove(embeddings_uri)
    return storage.read_manifest(output, MINED_KIND)


def mining_job(split: Split, corpora: dict[str, tuple[str, ...]], output: str) -> EmbedJob:
    """The embeddings that a round at ``output`` needs."""
    return EmbedJob(split, frozenset().union(*corpora.values()), f"{output}-embeddings")


def corpus_digest(corpora: dict[str, tuple[str, ...]]) -> str:
    """A short digest of which images each category mines among."""
    digest = hashlib.sha256()
    for category in sorted(corpora):
        digest.update("\x1f".join([category, *corpora[category], ""]).encode())
    return digest.hexdigest()[:16]


def check_corpora(split: Split, corpora: dict[str, tuple[str, ...]]) -> None:
    """Raise one `InputError` if a query could not be mined."""
    members = {category: set(ids) for category, ids in corpora.items()}
    small = sorted(category for category, ids in members.items() if len(ids) < 3)
    if small:
        raise InputError(
            f"mining corpus of category {', '.join(small)} has fewer than 3 images; a query needs "
            "a target, a reference and at least one other image. Drop the category "
            "(data.categories) or set data.mining_corpus to 'split'"
        )
    outside = [t for t in split.triplets if t.target_id not in members[t.category]]
    if outside:
        first = outside[0]
        raise InputError(
            f"{len(outside)} target(s) are absent from their mining corpus, first "
            f"{first.target_id!r} of query {first.query_id}; set data.mining_corpus to 'targets'"
        )


def _mine_block(
    block: QueryBlock,
    embeddings_uri: str,
    output: str,
    exclude_reference: bool,
    memory_bytes: int,
    curves: set[str],
) -> dict[str, Any]:
    started = time.monotonic()
    scores_QM = score_block(EmbeddingShards.open(embeddings_uri), block)
    scored = time.monotonic()
    column = {image_id: i for i, image_id in enumerate(block.corpus)}
    target_Q = np.asarray([column[str(t.target_id)] for t in block.triplets])
    reference_Q = np.full(len(block.triplets), -1)
    if exclude_reference:
        reference_Q = np.asarray([column.get(t.reference_id, -1) for t in block.triplets])
    ids = pa.array(block.corpus, pa.string())
    tables = []
    kept: dict[str, np.ndarray] = {}
    rows = max(1, memory_bytes // 2 // (_SORT_BYTES * len(block.corpus)))
    for first in range(0, len(block.triplets), rows):
        part = slice(first, first + rows)
        drops = steep_drop_negatives(
            scores_QM[part], torch.from_numpy(target_Q[part]), torch.from_numpy(reference_Q[part])
        )
        tables.append(_to_table(block, first, drops, ids))
        for q, triplet in enumerate(block.triplets[part]):
            if triplet.query_id in curves:
                kept[triplet.query_id] = drops.scores_QM[q, : drops.length_Q[q]].numpy()
    table = pa.concat_tables(tables)
    cut = time.monotonic()
    write_parquet(storage.join(output, f"part-{block.number:05d}.parquet"), table)
    if kept:
        curve_table = pa.table({"query_id": list(kept), "scores": list(kept.values())})
        write_parquet(storage.join(output, f"curves-{block.number:05d}.parquet"), curve_table)
    return _block_statistics(table) | {
        "score_seconds": scored - started,
        "cut_seconds": cut - scored,
        "write_seconds": time.monotonic() - cut,
        "has_curves": bool(kept),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _to_table(block: QueryBlock, first: int, drops: SteepDrops, ids: pa.Array) -> pa.Table:
    count = len(drops.status_Q)
    triplets = block.triplets[first : first + count]
    start, stop = drops.start_Q.numpy(), drops.stop_Q.numpy()
    order, scores = drops.order_QM.numpy(), drops.scores_QM.numpy()
    target_rank = drops.target_rank_Q.numpy()
    status = [STATUSES[code] for code in drops.status_Q.tolist()]
    offsets = np.concatenate([[0], np.cumsum(stop - start)])
    codes = np.concatenate([order[q, start[q] : stop[q]] for q in range(count)])
    values = np.concatenate([scores[q, start[q] : stop[q]] for q in range(count)])
    names = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), ids)

    def drop_column(rank_Q: np.ndarray) -> list[dict[str, Any] | None]:
        return [
            {
                "rank": int(rank),
                "height": scores[q, rank] - scores[q, rank + 1],
                "score_above": scores[q, rank],
                "score_below": scores[q, rank + 1],
            }
            if rank >= 0
            else None
            for q, rank in enumerate(rank_Q)
        ]

    columns = {
        "query_id": [t.query_id for t in triplets],
        "category": [t.category for t in triplets],
        "target_id": [t.target_id for t in triplets],
        "target_score": scores[np.arange(count), target_rank],
        "target_rank": target_rank,
        "upper_drop": drop_column(drops.upper_Q.numpy()),
        "lower_drop": drop_column(drops.lower_Q.numpy()),
        "num_negatives": stop - start,
        "negative_ids": pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), names),
        "negative_scores": pa.LargeListArray.from_arrays(
            pa.array(offsets, pa.int64()), pa.array(values, pa.float32())
        ),
        "status": status,
    }
    return pa.table(columns, schema=MINED_SCHEMA)


def _block_statistics(table: pa.Table) -> dict[str, Any]:
    """Small per-query numbers that the driver merges: sizes, margins, ranks, statuses."""
    means = [float(np.mean(scores.values.to_numpy())) for scores in table["negative_scores"]]
    margin = table["target_score"].to_numpy() - np.asarray(means, np.float32)
    codes = [STATUSES.index(name) for name in table["status"].to_pylist()]
    return {
        "sizes": table["num_negatives"].to_numpy().astype(np.int64),
        "margins": margin.astype(np.float32),
        "ranks": table["target_rank"].to_numpy().astype(np.int64),
        "codes": np.asarray(codes, np.int64),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    points = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
    return {name: round(float(np.quantile(values, q)), 6) for name, q in points.items()}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of a round from its blocks' results, independent of how it was cut."""
    sizes, margins, ranks, codes = (
        np.concatenate([np.asarray(row[name]) for row in rows])
        for name in ("sizes", "margins", "ranks", "codes")
    )
    statuses = {name: int((codes == i).sum()) for i, name in enumerate(STATUSES)}
    return {
        "statuses": statuses,
        "steep_share": round(statuses["steep"] / len(codes), 6),
        "set_size": _quantiles(sizes),
        "margin_to_target": _quantiles(margins),
        "target_rank": _quantiles(ranks),
    }


def round_table(manifest: dict[str, Any]) -> str:
    """The end-of-round table of a mined set, for people."""
    statistics = manifest["statistics"]
    lines = [
        f"mined set of epoch {manifest['epoch']}",
        f"  queries                  {manifest['queries']:>12,}",
        f"  corpus images            {sum(manifest['corpus_images'].values()):>12,}",
        f"  between two steep drops  {statistics['steep_share']:>12.1%}",
    ]
    for name, count in statistics["statuses"].items():
        if name != "steep":
            lines.append(f"  fallback {name:<15} {count:>12,}")
    for key, label, form in (
        ("set_size", "negatives per query", ",.0f"),
        ("margin_to_target", "target - negatives", ".4f"),
        ("target_rank", "rank of the target", ",.0f"),
    ):
        values = "  ".join(f"{name} {value:{form}}" for name, value in statistics[key].items())
        lines.append(f"  {label:<24} {values}")
    times = "  ".join(f"{name} {value:.1f} s" for name, value in manifest["seconds"].items())
    lines.append(f"  time                     {times}")
    lines.append(f"  peak memory of a task    {manifest['peak_task_memory_mb']:,.0f} MB")
    return "\n".join(lines)
