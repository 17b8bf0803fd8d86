"""Blocks of queries against their category's corpus, worked on as Ray Data tasks."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from torch import Tensor

from qure_core.base.errors import bad_input_of_workers
from qure_core.data.schema import Triplet
from qure_core.embeddings.shards import EmbeddingShards
from qure_core.ranking.tiles import QUERY_TILE, Scorer, query_embeddings, score_chunks
from qure_core.runtime.in_process import device_here
from qure_core.runtime.progress import Progress

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
    columns: int | None = None,
) -> list[QueryBlock]:
    """Cut each category's queries, sorted by id, into blocks.

    ``columns`` is how many scores of a query are held at a time, if not its whole corpus.
    """
    blocks: list[QueryBlock] = []
    for category in sorted(galleries):
        own = sorted((t for t in triplets if t.category == category), key=lambda t: t.query_id)
        held = min(columns or len(galleries[category]), len(galleries[category]))
        rows = block_rows(held, memory_mb * 2**20, query_block)
        for start in range(0, len(own), rows):
            part = tuple(own[start : start + rows])
            blocks.append(QueryBlock(len(blocks), category, part, galleries[category]))
    return blocks


def score_block(
    embeddings: EmbeddingShards, block: QueryBlock, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Relevance scores of a block's queries over its whole corpus: [Qb, M], no temperature."""
    query_QD = query_embeddings(embeddings, [t.query_id for t in block.triplets])
    chunks = score_chunks(Scorer(query_QD, dtype), embeddings, block.corpus, len(block.corpus))
    return next(chunks)[1]


def prepare_worker() -> None:
    """Make this process a worker of one CPU; a task before may have had more."""
    torch.set_num_threads(1)
    _freeze()


@cache
def _freeze() -> None:
    """Once, for later objects must stay collectable. The loaded libraries' objects stay: looking
    at them again and again costs a sixth of the time."""
    gc.freeze()


def map_blocks(
    stage: str,
    blocks: Sequence[QueryBlock],
    work: Callable[..., dict[str, Any]],
    *,
    arguments: dict[str, Any],
    resources: dict[str, Any] | None = None,
    parts: Sequence[tuple[int, int]] | None = None,
    scores: Callable[[QueryBlock, int], int] | None = None,
    blame: str = "",
) -> list[dict[str, Any]]:
    """Run ``work(block, **arguments)`` for every block as one-CPU tasks; results by block number.

    ``parts`` lists (block number, part) instead, for ``work(block, part, **arguments)``; progress
    then counts ``scores(block, part)``. Blocks travel through the object store, their corpus once
    per category; ``work`` returns a small dict of numbers and strings. An `InputError` of ``work``
    is raised here, after the name of what is to ``blame``, such as the checkpoint.
    """
    split = parts is not None
    wanted = [(block.number, 0) for block in blocks] if parts is None else list(parts)
    if not wanted:
        return []

    def size(number: int, part: int) -> int:
        return scores(blocks[number], part) if scores else len(blocks[number].triplets)

    def worked(block: QueryBlock, part: int) -> dict[str, Any]:
        started = time.monotonic()
        result = work(block, part, **arguments) if split else work(block, **arguments)
        took = time.monotonic() - started
        return result | {"block": block.number, "part": part, "took": took}

    progress = Progress(
        stage, sum(size(*item) for item in wanted), "scores" if scores else "queries"
    )
    rows = (
        _on_cluster(blocks, wanted, worked, resources or {"num_cpus": 1})
        if device_here() is None
        else _here(blocks, wanted, worked)
    )
    results = []
    with bad_input_of_workers(blame):
        for row in rows:
            progress.advance(size(int(row["block"]), int(row["part"])), float(row.pop("took")))
            results.append(row)
    return sorted(results, key=lambda row: (row["block"], row["part"]))


_Work = Callable[[QueryBlock, int], dict[str, Any]]


def _here(
    blocks: Sequence[QueryBlock], wanted: Sequence[tuple[int, int]], worked: _Work
) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)  # as a task has
    for number, part in wanted:
        yield worked(blocks[number], part)


def _on_cluster(
    blocks: Sequence[QueryBlock],
    wanted: Sequence[tuple[int, int]],
    worked: _Work,
    resources: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    corpora = {block.category: block.corpus for block in blocks}
    references = {category: ray.put(corpus) for category, corpus in corpora.items()}
    queries = [ray.put(block.triplets) for block in blocks]

    def run(rows: dict[str, Any]) -> dict[str, Any]:
        prepare_worker()
        assert len(rows["block"]) == 1, "one block a task"
        number, part = int(rows["block"][0]), int(rows["part"][0])
        category = str(rows["category"][0])
        block = QueryBlock(
            number, category, ray.get(queries[number]), ray.get(references[category])
        )
        return {name: np.asarray([value]) for name, value in worked(block, part).items()}

    tables = [
        pa.table({"block": [n], "part": [part], "category": [blocks[n].category]})
        for n, part in wanted
    ]
    tasks = ray.data.from_arrow(tables).map_batches(run, batch_size=1, **resources)
    yield from tasks.iter_rows()
