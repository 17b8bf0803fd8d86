"""Scores of query blocks against a corpus, tile by tile, as Ray Data tasks.

A block's scores [Qb, M] are filled in tiles cut from a fixed grid over the sorted queries and the
sorted corpus, so a score has the same bits under any number of shards and any block size, and
nothing larger than tile x tokens exists besides the block itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from torch import Tensor

from qure_core.data.schema import Triplet
from qure_core.embedding_shards import EmbeddingShards
from qure_core.progress import Progress
from qure_core.relevance import relevance_scores

QUERY_TILE = 128
IMAGE_TILE = 1024
BYTES_PER_SCORE = 4


@dataclass(frozen=True)
class QueryBlock:
    """Queries of one category that are scored together, and the category's sorted corpus."""

    number: int
    category: str
    triplets: tuple[Triplet, ...]
    corpus: tuple[str, ...]


def block_rows(images: int, memory_bytes: int, query_block: int | None) -> int:
    """Queries scored together: a multiple of the tile, at least one tile.

    A quarter of the memory holds the block's scores; the rest is for sorting parts of it.
    """
    wanted = query_block or memory_bytes // 4 // (BYTES_PER_SCORE * max(images, 1))
    tiles = math.ceil(wanted / QUERY_TILE) if query_block else wanted // QUERY_TILE
    return max(1, tiles) * QUERY_TILE


def make_blocks(
    triplets: Sequence[Triplet],
    galleries: dict[str, tuple[str, ...]],
    memory_mb: int,
    query_block: int | None = None,
) -> list[QueryBlock]:
    """Cut each category's queries, sorted by id, into blocks."""
    blocks: list[QueryBlock] = []
    for category in sorted(galleries):
        own = sorted((t for t in triplets if t.category == category), key=lambda t: t.query_id)
        rows = block_rows(len(galleries[category]), memory_mb * 2**20, query_block)
        for start in range(0, len(own), rows):
            part = tuple(own[start : start + rows])
            blocks.append(QueryBlock(len(blocks), category, part, galleries[category]))
    return blocks


def query_embeddings(embeddings: EmbeddingShards, query_ids: Sequence[str]) -> Tensor:
    """Embeddings of the named queries, in that order: [Q, D]."""
    place = {query_id: row for row, query_id in enumerate(query_ids)}
    result_QD = np.empty((len(query_ids), embeddings.width), np.float32)
    found = 0
    for shard in range(embeddings.shards):
        ids, values = embeddings.queries(shard)
        rows = [(place[query_id], i) for i, query_id in enumerate(ids) if query_id in place]
        if rows:
            into, out_of = zip(*rows, strict=True)
            result_QD[list(into)] = values[list(out_of)]
            found += len(rows)
    assert found == len(query_ids), f"{len(query_ids) - found} queries have no embedding"
    return torch.from_numpy(result_QD)


def corpus_tiles(
    embeddings: EmbeddingShards, corpus: Sequence[str]
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first column, embeddings [m, T, D]) of ``IMAGE_TILE`` consecutive corpus images."""
    column = {image_id: i for i, image_id in enumerate(corpus)}
    shape = (embeddings.tokens, embeddings.width)
    tile = np.empty((IMAGE_TILE, *shape), np.float32)
    start = filled = 0
    for shard in range(embeddings.shards):
        ids, values = embeddings.images(shard)
        rows = np.asarray([i for i, image_id in enumerate(ids) if image_id in column], np.int64)
        while len(rows):
            take, rows = rows[: IMAGE_TILE - filled], rows[IMAGE_TILE - filled :]
            tile[filled : filled + len(take)] = values[take]
            filled += len(take)
            if filled == IMAGE_TILE:
                yield start, torch.from_numpy(tile)
                start, filled = start + IMAGE_TILE, 0
                tile = np.empty((IMAGE_TILE, *shape), np.float32)
    if filled:
        yield start, torch.from_numpy(tile[:filled])
        start += filled
    assert start == len(corpus), f"{len(corpus) - start} corpus images have no embedding"


def score_block(embeddings: EmbeddingShards, block: QueryBlock) -> Tensor:
    """Relevance scores of a block's queries over its whole corpus: [Qb, M], no temperature."""
    query_QD = query_embeddings(embeddings, [t.query_id for t in block.triplets])
    scores_QM = torch.empty(len(block.triplets), len(block.corpus))
    for start, image_MTD in corpus_tiles(embeddings, block.corpus):
        image_TMD = image_MTD.transpose(0, 1).contiguous()
        stop = start + image_TMD.shape[1]
        for first in range(0, len(query_QD), QUERY_TILE):
            rows = slice(first, first + QUERY_TILE)
            scores_QM[rows, start:stop] = relevance_scores(
                query_QD[rows], image_TMD.transpose(0, 1)
            )
    return scores_QM


def map_blocks(
    stage: str,
    blocks: Sequence[QueryBlock],
    work: Callable[..., dict[str, Any]],
    *,
    arguments: dict[str, Any],
) -> list[dict[str, Any]]:
    """Run ``work(block, **arguments)`` for every block as one-CPU tasks; results by block number.

    Blocks travel through the object store, their corpus once per category; ``work`` returns a
    small dict of numbers and strings.
    """
    corpora = {block.category: block.corpus for block in blocks}
    references = {category: ray.put(corpus) for category, corpus in corpora.items()}
    queries = [ray.put(block.triplets) for block in blocks]

    def run(rows: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(1)
        assert len(rows["block"]) == 1, "one block a task"
        number = int(rows["block"][0])
        category = str(rows["category"][0])
        block = QueryBlock(
            number, category, ray.get(queries[number]), ray.get(references[category])
        )
        result = work(block, **arguments) | {"block": number, "queries": len(block.triplets)}
        return {name: np.asarray([value]) for name, value in result.items()}

    tables = [pa.table({"block": [b.number], "category": [b.category]}) for b in blocks]
    progress = Progress(stage, sum(len(block.triplets) for block in blocks), "queries")
    results = []
    for row in ray.data.from_arrow(tables).map_batches(run, batch_size=1, num_cpus=1).iter_rows():
        results.append(row)
        progress.advance(int(row["queries"]))
    return sorted(results, key=lambda row: row["block"])
