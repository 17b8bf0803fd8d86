"""Scores of queries against a corpus, tile by tile.

Scores are computed in tiles cut from a fixed grid over the sorted queries and the sorted corpus,
so a score has the same bits under any number of shards and any block size, and of the products of
queries with image tokens only a tile's ever exist.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from qure_core.embeddings.shards import EmbeddingShards
from qure_core.model.relevance import relevance_scores
from qure_core.runtime.resources import granted_device

QUERY_TILE = 256
IMAGE_TILE = 128


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
    embeddings: EmbeddingShards, corpus: Sequence[str], first: int = 0, last: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first column, embeddings [m, T, D]) of consecutive corpus images of the grid.

    ``first`` and ``last`` limit the columns; ``first`` is a multiple of ``IMAGE_TILE``. A tile is
    valid until the next one is asked for.
    """
    assert first % IMAGE_TILE == 0
    last = len(corpus) if last is None else last
    wanted = set(corpus[first:last])
    tile_MTD = torch.empty(IMAGE_TILE, embeddings.tokens, embeddings.width)
    start, filled = first, 0
    shards = embeddings.shards_between(corpus[first], corpus[last - 1])
    for shard in shards:
        if shard + 1 in shards:
            embeddings.read_ahead(shard + 1)
        ids, values = embeddings.images(shard)
        rows = np.asarray([i for i, image_id in enumerate(ids) if image_id in wanted], np.int64)
        while len(rows):
            take, rows = rows[: IMAGE_TILE - filled], rows[IMAGE_TILE - filled :]
            # Neighbours, as in a corpus of every image, need no copy of their own.
            together = take[-1] - take[0] + 1 == len(take)
            part = values[take[0] : take[-1] + 1] if together else values[take]
            tile_MTD[filled : filled + len(take)] = read_only(part)
            filled += len(take)
            if filled == IMAGE_TILE:
                yield start, tile_MTD
                start, filled = start + IMAGE_TILE, 0
    if filled:
        yield start, tile_MTD[:filled]
        start += filled
    assert start == last, f"{last - start} corpus images have no embedding"


def read_only(values: np.ndarray) -> Tensor:
    """A tensor over a memory map, which torch warns may not be written; here it is not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


class Scorer:
    """Scores tiles of `QUERY_TILE` queries on one device, in one precision.

    ``dtype`` is that of the products and of the maximum over tokens; scores are float32. ``tile``
    is how many queries are scored at once, where that is another number: few are asked at a time.
    """

    def __init__(
        self, query_QD: Tensor, dtype: torch.dtype = torch.float32, tile: int = QUERY_TILE
    ) -> None:
        self.device = granted_device()
        self.dtype = dtype
        self.queries = len(query_QD)
        self.tile = tile
        whole = torch.zeros(-(-self.queries // tile) * tile, query_QD.shape[1])
        whole[: self.queries] = query_QD
        # Every tile is whole, of images too: products of one shape give the same bits anywhere.
        self.tiles = whole.to(self.device, dtype).split(tile)

    def __call__(self, image_MTD: Tensor, out_QM: Tensor) -> None:
        """Relevance of a tile of images to every query, no temperature, into ``out_QM``."""
        filled = image_MTD.shape[0]
        image_MTD = image_MTD.to(self.device, self.dtype)
        if filled < IMAGE_TILE:
            image_MTD = torch.nn.functional.pad(image_MTD, (0, 0, 0, 0, 0, IMAGE_TILE - filled))
        for number, tile_QD in enumerate(self.tiles):
            scores_QM = relevance_scores(tile_QD, image_MTD)
            first = number * self.tile
            rows = out_QM[first : first + self.tile]
            rows.copy_(scores_QM[: len(rows), :filled])


def score_chunks(
    scorer: Scorer,
    embeddings: EmbeddingShards,
    corpus: Sequence[str],
    columns: int,
    first: int = 0,
    last: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first column, scores [Q, C]) of up to ``columns`` images; valid until the next."""
    last = len(corpus) if last is None else last
    columns = min(-(-columns // IMAGE_TILE) * IMAGE_TILE, last - first)
    buffer_QC = torch.empty(scorer.queries, columns, device=scorer.device)
    start, filled = first, 0
    for tile_start, image_MTD in corpus_tiles(embeddings, corpus, first, last):
        stop = tile_start + len(image_MTD)
        scorer(image_MTD, buffer_QC[:, filled : filled + stop - tile_start])
        filled = stop - start
        if filled == columns or stop == last:
            yield start, buffer_QC[:, :filled]
            start, filled = stop, 0
