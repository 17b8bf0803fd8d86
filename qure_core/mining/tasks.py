"""The tasks of a mining round: each reads committed embeddings and writes one file.

A task whose file is already there reads it instead of computing it again, so a round that was
killed goes on from the files it has.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from qure_core import storage
from qure_core.embeddings.shards import EmbeddingShards
from qure_core.mining.engines.ranked import LOOKED_AT
from qure_core.mining.engines.sketch import (
    BUCKETS,
    ENDS,
    Anchors,
    Summary,
    merged,
    tensors_from_bytes,
    tensors_to_bytes,
)
from qure_core.mining.engines.sort import rank_queries
from qure_core.mining.engines.streaming import settle_all, settle_ends, summarise_chunks
from qure_core.mining.mined_set import mined_schema
from qure_core.mining.rows import MinedRow, rows_of, to_table, whole_curve
from qure_core.mining.rules import IMAGE_TOKENS, Rule
from qure_core.mining.rules.rule import EndsRule
from qure_core.mining.rules.steep_drops import DropRule
from qure_core.mining.sampling import image_words, query_words, threshold_for
from qure_core.model.relevance import refuse_bad_scores
from qure_core.ranking.blocks import QueryBlock, score_block
from qure_core.ranking.tiles import IMAGE_TILE, QUERY_TILE, Scorer, query_embeddings, score_chunks
from qure_core.storage.parquet import read_parquet_parts, write_parquet_parts

# Sorting a row keeps its scores, keys, drops and masks: about this many bytes a score. A negative
# costs so much while a table is made of it.
SORT_BYTES = 40
TABLE_BYTES = 64
CHUNK_COLUMNS = 32_768  # images whose scores a streaming task holds at a time
RANGE_COLUMNS = 262_144  # images of a corpus that one task summarises
MERGED_AT_ONCE = 8
_LISTED = LOOKED_AT  # left alone of a query, and the likeness of all candidates, at most
_SAMPLED_PER_WANTED = 32  # keys kept by priority for each negative wanted
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RoundTask:
    """What every task of a round must know."""

    embeddings_uri: str
    output: str
    scratch: str
    seed: int
    epoch: int
    exclude_reference: bool
    rule: Rule
    max_negatives: int | None
    precision: str
    memory_bytes: int
    veto_uri: str | None = None  # embeddings of the second model (``mining.veto``)

    def words(
        self, block: QueryBlock, first: int = 0, last: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Sampling words of the block's queries and of its corpus; none unless sets are sampled.

        The corpus's are 0 outside of the columns ``first`` to ``last``.
        """
        queries = query_words([t.query_id for t in block.triplets], self.seed, self.epoch)
        if not self.max_negatives:
            return queries, None
        corpus = torch.zeros(len(block.corpus), dtype=torch.int32)
        corpus[first:last] = image_words(block.corpus[first:last])
        return queries, corpus

    def columns(self, block: QueryBlock) -> tuple[Tensor, Tensor]:
        """Columns of the block's targets [Q], and of what is left out of each ranking [Q, E], or
        -1: the reference if the settings say so, and known positives."""
        left_out = [
            {*t.positive_ids, *([t.reference_id] if self.exclude_reference else [])}
            for t in block.triplets
        ]
        names = {str(t.target_id) for t in block.triplets}.union(*left_out)
        column = {image_id: i for i, image_id in enumerate(block.corpus) if image_id in names}
        target_Q = torch.tensor([column[str(t.target_id)] for t in block.triplets])
        own = [[column[name] for name in sorted(some) if name in column] for some in left_out]
        left_out_QE = torch.full((len(own), max(map(len, own))), -1)
        for row, columns in enumerate(own):
            left_out_QE[row, : len(columns)] = torch.tensor(columns, dtype=torch.int64)
        return target_Q, left_out_QE


def part_name(block: int) -> str:
    return f"part-{block:05d}.parquet"


def mine_by_sorting(block: QueryBlock, task: RoundTask) -> dict[str, Any]:
    """Score a block against its whole corpus, sort, cut, and write its part."""
    return _write_part(block, task, lambda: _sorted_rows(block, task, DTYPES[task.precision]))


def _sorted_rows(block: QueryBlock, task: RoundTask, dtype: torch.dtype) -> Iterator[MinedRow]:
    embeddings = EmbeddingShards.open(task.embeddings_uri)
    scores_QM = score_block(embeddings, block, dtype)
    target_Q, left_out_QE = task.columns(block)
    query_word_Q, image_word_M = task.words(block)
    held = task.memory_bytes // 2 // (SORT_BYTES * len(block.corpus))
    step = min(max(1, held), QUERY_TILE)
    tokens = _image_tokens(embeddings, block) if IMAGE_TOKENS in task.rule.needs else None
    at_once = _images_at_once(embeddings, task)
    vetoed_QM = None
    if task.veto_uri:
        theirs_QM = score_block(EmbeddingShards.open(task.veto_uri), block, dtype)
        refuse_bad_scores(theirs_QM)
        vetoed_QM = theirs_QM > theirs_QM.gather(1, target_Q[:, None].to(theirs_QM.device))
    for first in range(0, len(block.triplets), step):
        part = slice(first, first + step)
        theirs = None if vetoed_QM is None else vetoed_QM[part]
        ranked = rank_queries(scores_QM[part], target_Q[part], left_out_QE[part], tokens, theirs)
        ranked = replace(ranked, images_at_once=at_once)
        selection = task.rule.select(ranked)
        statuses, words, most = task.rule.statuses, query_word_Q[part], task.max_negatives
        curve = whole_curve(ranked)
        yield from rows_of(ranked, selection, statuses, words, image_word_M, most, curve)


def _image_tokens(embeddings: EmbeddingShards, block: QueryBlock) -> Callable[[Tensor], Tensor]:
    """Gives the embeddings [n, T, D] of corpus columns [n]."""

    def tokens(columns: Tensor) -> Tensor:
        names = [block.corpus[column] for column in columns.tolist()]
        return torch.from_numpy(embeddings.rows(names).astype(np.float32))

    return tokens


def _images_at_once(embeddings: EmbeddingShards, task: RoundTask) -> int:
    """So many embeddings, in float32 and as they are stored, take a quarter of a task's memory."""
    return max(1, task.memory_bytes // 4 // (12 * embeddings.tokens * embeddings.width))


def _write_part(
    block: QueryBlock, task: RoundTask, mine: Callable[[], Iterator[MinedRow]]
) -> dict[str, Any]:
    """Write a block's rows as they come, unless the part is there; return its statistics."""
    uri = storage.join(task.output, part_name(block.number))
    started = time.monotonic()
    if not storage.exists(uri):
        write_parquet_parts(uri, _tables(block, task, mine()), mined_schema(task.rule.details))
    seconds = time.monotonic() - started
    columns = [*STATISTICS_COLUMNS, *(f"details.{name}" for name in task.rule.figures)]
    batches = [block_statistics(batch, task.rule) for batch in read_parquet_parts(uri, columns)]
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return whole | {"seconds": seconds, "peak_mb": _peak_mb()}


def _tables(block: QueryBlock, task: RoundTask, rows: Iterator[MinedRow]) -> Iterator[pa.Table]:
    """Tables of consecutive rows, each of as many negatives as a quarter of the memory holds."""
    schema = mined_schema(task.rule.details)
    most = task.memory_bytes // 4 // TABLE_BYTES
    first, held = 0, 0
    waiting: list[MinedRow] = []
    for row in rows:
        waiting.append(row)
        held += len(row.negative_keys) + (0 if row.left_alone_keys is None else _LISTED)
        if held >= most:
            some = block.triplets[first : first + len(waiting)]
            yield to_table(some, block.corpus, waiting, schema)
            first, held, waiting = first + len(waiting), 0, []
    if waiting:
        yield to_table(block.triplets[first:], block.corpus, waiting, schema)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


STATISTICS_COLUMNS = [
    *("target_score", "target_rank", "num_negatives", "negative_scores", "negative_weights"),
    "status",
    *("known_positives", "vetoed"),
]


def block_statistics(rows: pa.RecordBatch, rule: Rule) -> dict[str, np.ndarray]:
    """Small per-query numbers that the driver merges: sizes, margins, ranks, statuses, figures."""
    means = [
        float(
            np.average(scores.values.to_numpy(), weights=weights.values)
            if weights.is_valid
            else np.mean(scores.values.to_numpy())
        )
        for scores, weights in zip(rows["negative_scores"], rows["negative_weights"], strict=True)
    ]
    margin = rows["target_score"].to_numpy() - np.asarray(means, np.float32)
    codes = [rule.statuses.index(name) for name in rows["status"].to_pylist()]
    statistics = {
        "sizes": rows["num_negatives"].to_numpy().astype(np.int64),
        "margins": margin.astype(np.float32),
        "ranks": rows["target_rank"].to_numpy().astype(np.int64),
        "codes": np.asarray(codes, np.int64),
        "known_positives": rows["known_positives"].to_numpy().astype(np.int64),
        "vetoed": rows["vetoed"].fill_null(0).to_numpy().astype(np.int64),
    }
    for name in rule.figures:
        values = rows["details"].field(name)
        statistics[f"figure_{name}"] = values.to_numpy(zero_copy_only=False).astype(np.float64)
    return statistics


# The streaming engine: anchors of a block, a summary of each range of its corpus, then merging.


def ranges_of(block: QueryBlock, columns: int) -> list[tuple[int, int]]:
    """The corpus of a block in even ranges of at most ``columns`` images, on the grid of tiles."""
    images = len(block.corpus)
    count = -(-images // columns)
    size = -(-images // count // IMAGE_TILE) * IMAGE_TILE
    return [(first, min(first + size, images)) for first in range(0, images, size)]


def anchors_name(block: int) -> str:
    return f"anchors-{block:05d}.npz"


def summary_name(block: int, level: int, number: int) -> str:
    return f"summary-{block:05d}-{level}-{number:05d}.npz"


def write_anchors(block: QueryBlock, task: RoundTask) -> dict[str, Any]:
    """Score each query's target and a few images, and write what streaming must know first."""
    uri = storage.join(task.scratch, anchors_name(block.number))
    if not storage.exists(uri):
        embeddings = EmbeddingShards.open(task.embeddings_uri)
        target_Q, left_out_QE = task.columns(block)
        query_QD = query_embeddings(embeddings, [t.query_id for t in block.triplets])
        few = np.unique(np.linspace(0, len(block.corpus) - 1, IMAGE_TILE).astype(np.int64)).tolist()
        wanted = {block.corpus[i] for i in [*target_Q.tolist(), *few]}
        image_of = embeddings.some_images(wanted)
        few_MTD = _tile([image_of[block.corpus[i]] for i in few])
        scores, lows = [], []
        for first in range(0, len(query_QD), IMAGE_TILE):
            part = slice(first, first + IMAGE_TILE)
            scorer = Scorer(query_QD[part], DTYPES[task.precision])
            # A whole tile of targets, so that their scores have the bits of any other tile's.
            own = [block.corpus[i] for i in target_Q[part].tolist()]
            own += [own[0]] * (IMAGE_TILE - len(own))
            tile_QM = torch.empty(scorer.queries, IMAGE_TILE, device=scorer.device)
            scorer(_tile([image_of[name] for name in own]), tile_QM)
            scores.append(tile_QM.diagonal().cpu())
            few_QM = torch.empty(scorer.queries, len(few), device=scorer.device)
            scorer(few_MTD, few_QM)
            # A hundred images reach 2.6 deviations below their mean, a million about 4.9.
            low, mean = few_QM.amin(dim=1), few_QM.mean(dim=1)
            lows.append((low - 0.9 * (mean - low)).cpu())
        known = {
            "target_score": torch.cat(scores),
            "low": torch.cat(lows),
            "target": target_Q,
            "left_out": left_out_QE,
        }
        storage.write_bytes(uri, tensors_to_bytes(known))
    return {"peak_mb": _peak_mb()}


def _tile(images: Sequence[np.ndarray]) -> Tensor:
    """Images [T, D] as a tile [m, T, D], float32."""
    return torch.from_numpy(np.stack(images).astype(np.float32))


def _read_anchors(
    block: QueryBlock, task: RoundTask, first: int = 0, last: int | None = None
) -> tuple[Anchors, Tensor | None]:
    uri = storage.join(task.scratch, anchors_name(block.number))
    known = tensors_from_bytes(storage.read_bytes(uri))
    query_word_Q, image_word_M = task.words(block, first, last)
    threshold, top = 0, 0
    if not isinstance(task.rule, DropRule):
        top = ENDS
    elif task.max_negatives:
        threshold = threshold_for(task.max_negatives * _SAMPLED_PER_WANTED, len(block.corpus))
    anchors = Anchors.of(
        known["target_score"],
        known["target"],
        known["left_out"],
        known["low"],
        query_word_Q,
        threshold,
        top,
    )
    return anchors, image_word_M


def summary_bytes(rule: Rule, max_negatives: int | None) -> int:
    """About how many bytes a query's summary takes."""
    if not isinstance(rule, DropRule):
        return 24 * BUCKETS + 24 * ENDS
    kept = 24 * (max_negatives or 0) * _SAMPLED_PER_WANTED
    return 24 * BUCKETS + 16 * ENDS + kept


def write_summary(block: QueryBlock, part: int, task: RoundTask, columns: int) -> dict[str, Any]:
    """Score a block against one range of its corpus and write the summary."""
    uri = storage.join(task.scratch, summary_name(block.number, 0, part))
    started = time.monotonic()
    if not storage.exists(uri):
        embeddings = EmbeddingShards.open(task.embeddings_uri)
        first, last = ranges_of(block, columns)[part]
        anchors, image_word_M = _read_anchors(block, task, first, last)
        query_QD = query_embeddings(embeddings, [t.query_id for t in block.triplets])
        scorer = Scorer(query_QD, DTYPES[task.precision])
        summary = summarise_chunks(
            score_chunks(scorer, embeddings, block.corpus, CHUNK_COLUMNS, first, last),
            anchors.to(scorer.device),
            None if image_word_M is None else image_word_M.to(scorer.device),
        )
        storage.write_bytes(uri, summary.to_bytes())
    return {"seconds": time.monotonic() - started, "peak_mb": _peak_mb()}


def _read_summaries(task: RoundTask, names: Sequence[str]) -> Iterator[Summary]:
    for name in names:
        yield Summary.from_bytes(storage.read_bytes(storage.join(task.scratch, name)))


def merge_summaries(
    block: QueryBlock, part: int, task: RoundTask, level: int, count: int
) -> dict[str, Any]:
    """Merge up to `MERGED_AT_ONCE` of a level's ``count`` summaries into one of the next level."""
    uri = storage.join(task.scratch, summary_name(block.number, level + 1, part))
    if not storage.exists(uri):
        first = part * MERGED_AT_ONCE
        numbers = range(first, min(first + MERGED_AT_ONCE, count))
        names = [summary_name(block.number, level, number) for number in numbers]
        storage.write_bytes(uri, merged(_read_summaries(task, names)).to_bytes())
    return {"peak_mb": _peak_mb()}


def mine_by_streaming(
    block: QueryBlock, task: RoundTask, left: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Settle a block's queries from its last few summaries and write its part.

    ``left`` tells, per block, which level of merging was the last and how many summaries it has.
    """
    looked: list[bool] = []

    def mine() -> Iterator[MinedRow]:
        level, count = left[block.number]
        names = [summary_name(block.number, level, number) for number in range(count)]
        summary = merged(_read_summaries(task, names))
        anchors, image_word_M = _read_anchors(block, task)
        embeddings = EmbeddingShards.open(task.embeddings_uri)
        if not isinstance(task.rule, DropRule):
            rule = cast(EndsRule, task.rule)  # what else streams
            tokens, at_once = _image_tokens(embeddings, block), _images_at_once(embeddings, task)
            for row in settle_ends(
                summary, anchors, rule, task.max_negatives, image_word_M, tokens, at_once
            ):
                looked.append(False)
                yield row
            return
        query_QD = query_embeddings(embeddings, [t.query_id for t in block.triplets])

        def chunks(rows: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
            scorer = Scorer(query_QD[list(rows)], DTYPES[task.precision])
            for first, scores in score_chunks(scorer, embeddings, block.corpus, CHUNK_COLUMNS):
                yield first, scores.cpu()

        def rows_at_once(asked: Sequence[int]) -> int:
            # A key is held twice while its range is sorted; a row's chunk is scored and keyed.
            used = np.cumsum([24 * keys + 24 * CHUNK_COLUMNS for keys in asked])
            return max(1, int((used <= task.memory_bytes // 2).sum()))

        for row, again in settle_all(
            summary, anchors, task.rule, task.max_negatives, chunks, image_word_M, rows_at_once
        ):
            looked.append(again)
            yield row

    return _write_part(block, task, mine) | {"second_looks": sum(looked)}


def fp32_rows(block: QueryBlock, task: RoundTask) -> Iterator[MinedRow]:
    """A block's rows by sorting in fp32, in passes that fit the memory."""
    step = max(1, task.memory_bytes // 4 // (4 * len(block.corpus)))
    for first in range(0, len(block.triplets), step):
        part = replace(block, triplets=block.triplets[first : first + step])
        yield from _sorted_rows(part, task, torch.float32)
