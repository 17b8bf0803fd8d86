"""The queries on which an index's recall is measured: Q of them, embedded once, D wide."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.data.schema import Split, Triplet
from qure_core.embeddings.shards import EMBEDDINGS_KIND, EmbeddingShards
from qure_core.embeddings.stage import EmbedJob, embed_splits
from qure_core.runtime.resources import Plan
from qure_core.search.corpus import Corpus
from qure_core.search.index import Index

_SEED = 20_250_711


@dataclass(frozen=True)
class Questions:
    """Queries [Q, D], and the place of each one's reference, which it is not to find; -1 if that is
    not in the index."""

    query_QD: Tensor
    place_Q: np.ndarray

    @property
    def excluded(self) -> list[list[int]]:
        return [[place] if place >= 0 else [] for place in self.place_Q.tolist()]

    def __getitem__(self, part: slice) -> Questions:
        return Questions(self.query_QD[part], self.place_Q[part])


def embedded_questions(
    settings: Settings,
    plan: Plan,
    checkpoint: str,
    corpus: Corpus,
    index: Index,
    before: str | None,
) -> str:
    """Embed `search.questions` queries; return the name of their directory, which is that of the
    version ``before`` if it is whole. They are the corpus's own, or some of its images with no
    text."""
    if before and storage.kept(storage.join(index.uri, before), EMBEDDINGS_KIND, {}):
        return before
    asked = {t.reference_id: t.text for t in corpus.queries if t.reference_id in corpus.images}
    names = sorted(asked or corpus.images)
    count = min(settings.search.questions, len(names))
    drawn = np.sort(np.random.default_rng(_SEED).choice(len(names), count, replace=False))
    chosen = [names[place] for place in drawn.tolist()]
    triplets = tuple(Triplet(name, name, asked.get(name, ""), None, "") for name in chosen)
    whole = repr((index.manifest["checkpoint_digest"], triplets)).encode()
    folder = f"questions-{hashlib.sha256(whole).hexdigest()[:16]}"
    images = {name: corpus.images[name] for name in chosen}
    output = storage.join(index.uri, folder)
    job = EmbedJob(Split("questions", triplets, images), frozenset(), output)
    embed_splits(checkpoint, [job], settings, plan)
    return folder


def open_questions(index: Index, folder: str) -> Questions:
    """What `embedded_questions` made."""
    shards = EmbeddingShards.open(storage.join(index.uri, folder))
    read = [shards.queries(number) for number in range(shards.shards)]
    ids = [query for own, _ in read for query in own]
    places = [index.places([query])[0] if index.holds(query) else -1 for query in ids]
    vectors = np.concatenate([values for _, values in read])
    return Questions(torch.from_numpy(vectors), np.asarray(places, np.int64))
