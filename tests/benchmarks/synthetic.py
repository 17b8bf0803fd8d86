"""Committed random embeddings of images and queries without files, for measurements and tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from qure_core import storage
from qure_core.data.schema import Split, Triplet
from qure_core.embeddings.shards import EMBEDDINGS_KIND, shard_files
from qure_core.embeddings.stage import write_shard
from qure_core.features.store import FEATURES_KIND, INDEX_SCHEMA, StoredFeatures
from qure_core.storage.arrow import write_arrow
from qure_core.storage.parquet import parquet_bytes


def make_split(queries: int, images: int, seed: int = 0) -> Split:
    """Queries with random targets and references over one category of images without files."""
    rng = np.random.default_rng(seed)
    ids = tuple(f"i{n:08d}" for n in range(images))
    triplets = tuple(
        Triplet(f"q{n:07d}", ids[rng.integers(images)], "t", ids[rng.integers(images)], "all")
        for n in range(queries)
    )
    return Split("train", triplets, dict.fromkeys(ids, ""), {"all": ids})


def unit_vectors(shape: Sequence[int], seed: int, dtype: torch.dtype) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return torch.nn.functional.normalize(values, dim=-1).to(dtype).numpy()


def clustered_vectors(shape: Sequence[int], seed: int, dtype: torch.dtype) -> np.ndarray:
    """Embeddings as a trained model's are: images lie around 2,000 concepts, and each of an image's
    vectors has a direction of its own besides. Of shape [Q, D]: queries, each near some image."""
    *rows, width = shape
    tokens = rows[1] if len(rows) == 2 else 32
    generator = torch.Generator().manual_seed(2**20)
    concepts_CD = _unit(torch.randn(2000, width, generator=generator))
    own_TD = _unit(torch.randn(tokens, width, generator=generator))
    generator.manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return _unit(torch.randn(*shape, width, generator=generator))

    images_MD = 0.8 * concepts_CD[torch.randint(2000, rows[:1], generator=generator)]
    images_MD = images_MD + 0.6 * noise(rows[0])
    if len(rows) == 2:
        values = images_MD[:, None] + 0.7 * own_TD + 0.5 * noise(*rows)
    else:
        own = own_TD[torch.randint(tokens, rows, generator=generator)]
        values = _unit(images_MD + 0.7 * own + 0.5 * noise(*rows)) + 0.8 * noise(*rows)
    return _unit(values).to(dtype).numpy()


def _unit(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(values, dim=-1)


def write_embeddings(
    uri: str,
    split: Split,
    *,
    tokens: int,
    width: int,
    shard: int,
    dtype: torch.dtype = torch.float32,
    facts: dict[str, Any] | None = None,
    seed: int = 0,
    draw: Callable[[Sequence[int], int, torch.dtype], np.ndarray] = unit_vectors,
) -> None:
    """Commit random embeddings of a split's images and queries, ``shard`` images a file."""
    ids = list(split.galleries["all"])
    names, first_ids = [], []
    shards = -(-len(ids) // shard)
    for number in range(shards):
        own = ids[number * shard : (number + 1) * shard]
        bounds = [len(split.triplets) * n // shards for n in (number, number + 1)]
        queries = [t.query_id for t in split.triplets[slice(*bounds)]]
        values = draw((len(own), tokens, width), 2 * number + 1000 * seed, dtype)
        vectors = draw((len(queries), width), 2 * number + 1 + 1000 * seed, torch.float32)
        image_file, query_file = shard_files(number)
        write_shard(uri, image_file, own, values)
        write_shard(uri, query_file, queries, vectors)
        names += [image_file, query_file]
        first_ids.append(own[0])
    shapes = {"shards": shards, "tokens": tokens, "width": width, "first_ids": first_ids}
    storage.write_manifest(uri, EMBEDDINGS_KIND, shapes | {"seconds": 0.0} | (facts or {}), names)


def write_features(
    folder: str, images: dict[str, str], shape: tuple[int, int], shard: int
) -> Callable[[dict[str, str]], StoredFeatures]:
    """Commit a store of random fp16 features [P, W] of images that need no files; its reader."""
    uri = f"{folder}/random"
    names = sorted(images)
    values = np.random.default_rng(0).standard_normal((shard, *shape), np.float32)
    rows: list[dict[str, Any]] = []
    files: dict[str, dict[str, Any]] = {}
    for start in range(0, len(names), shard):
        own = names[start : start + shard]
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(values[: len(own)].astype(np.float16))
        name = f"shard-{start:06d}.arrow"
        table = pa.table({"image_id": own, "features": column})
        files[name] = write_arrow(f"{uri}/{name}", table)
        facts = {"stamp": "", "sha256": "", "shard": name}
        rows += [
            facts | {"image_id": image, "uri": images[image], "row": row}
            for row, image in enumerate(own)
        ]
    data = parquet_bytes(pa.Table.from_pylist(rows, INDEX_SCHEMA))
    storage.write_bytes(f"{uri}/index.parquet", data)
    files["index.parquet"] = {"bytes": len(data), "sha256": ""}
    storage.commit(uri, FEATURES_KIND, {"index": "index.parquet"}, files)
    return lambda wanted: StoredFeatures(uri, wanted, folder)
