"""A committed search index of clustered embeddings without files, for measurements and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from synthetic import clustered_vectors, write_embeddings

from qure_core import storage
from qure_core.base.config import SearchSettings
from qure_core.data.schema import Split
from qure_core.search.approximate_build import make_faiss, wanted
from qure_core.search.index import INDEX_KIND, Index
from qure_core.search.questions import Questions
from qure_core.search.version import Version


def write_segment(
    uri: str, name: str, ids: Sequence[str], tokens: int, width: int, seed: int
) -> list[dict[str, Any]]:
    """Commit fp16 clustered embeddings as a segment of an index; rows of its images."""
    split = Split("corpus", (), {}, {"all": tuple(ids)})
    write_embeddings(
        f"{uri}/{name}",
        split,
        tokens=tokens,
        width=width,
        shard=2048,
        dtype=torch.float16,
        facts={"images": len(ids)},
        seed=seed,
        draw=clustered_vectors,
    )
    facts = {"category": None, "metadata": [], "sha256": "", "stamp": None, "segment": name}
    return [{"image_id": image, "uri": "", "row": row} | facts for row, image in enumerate(ids)]


def write_index(
    uri: str, images: int, tokens: int, width: int, search: SearchSettings, queries: int = 200
) -> dict[str, Any]:
    """Commit an index of images without files, as pipelines/index.py does once they are embedded;
    return its manifest. Embeddings that are there are kept."""
    name = "segment-0000000000000000"
    ids = [f"i{n:08d}" for n in range(images)]
    if storage.is_committed(uri):
        rows = Index.open(uri).images.to_pylist()
    else:
        storage.begin(uri, INDEX_KIND)
        rows = write_segment(uri, name, ids, tokens, width, 0)
    version = Version(
        uri,
        {"checkpoint": "", "checkpoint_digest": ""},
        {row["image_id"]: row for row in rows},
        images,
    )
    description, files = version.description(), {}
    if wanted(search, images * tokens):
        vectors = clustered_vectors((queries, width), 77, torch.float32)
        questions = Questions(torch.from_numpy(vectors), np.full(queries, -1))
        description["faiss"], files = make_faiss(
            version.opened(description), questions, search, None, 2
        )
    return version.commit(description, 0.0, files)
