"""Peak memory of a mining task as queries and images grow.

    python tests/benchmarks/mining_memory.py

For each size a fresh process writes random embeddings, then scores, sorts, cuts and writes every
query block as a mining task does; its peak resident memory above that of the loaded libraries is
set against ``mining.memory_mb``, and against the whole score matrix, which never exists.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from qure_core import storage
from qure_core.data.schema import Triplet
from qure_core.embedding import write_shard
from qure_core.embedding_shards import EMBEDDINGS_KIND
from qure_core.mining.stage import _mine_block
from qure_core.scoring import make_blocks

MEMORY_MB = 256
TOKENS, WIDTH, SHARD = 8, 64, 2048
SIZES = [(1_000, 5_000), (4_000, 5_000), (4_000, 20_000), (16_000, 20_000)]


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_embeddings(uri: str, images: list[str], triplets: list[Triplet]) -> None:
    rng = np.random.default_rng(0)
    names = []
    shards = -(-len(images) // SHARD)
    for shard in range(shards):
        ids = images[shard * SHARD : (shard + 1) * SHARD]
        first, last = len(triplets) * shard // shards, len(triplets) * (shard + 1) // shards
        queries = [t.query_id for t in triplets[first:last]]
        values = rng.standard_normal((len(ids), TOKENS, WIDTH), np.float32)
        write_shard(uri, f"images-{shard:05d}.arrow", ids, values)
        vectors = rng.standard_normal((len(queries), WIDTH), np.float32)
        write_shard(uri, f"queries-{shard:05d}.arrow", queries, vectors)
        names += [f"{kind}-{shard:05d}.arrow" for kind in ("images", "queries")]
    facts = {"shards": shards, "tokens": TOKENS, "width": WIDTH}
    storage.write_manifest(uri, EMBEDDINGS_KIND, facts, names)


def measure(queries: int, images: int) -> None:
    ids = [f"i{n:07d}" for n in range(images)]
    rng = np.random.default_rng(1)
    triplets = [
        Triplet(f"q{n:07d}", ids[rng.integers(images)], "t", ids[rng.integers(images)], "all")
        for n in range(queries)
    ]
    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder) / "embeddings")
        write_embeddings(uri, ids, triplets)
        before, started = peak_mb(), time.monotonic()
        for block in make_blocks(triplets, {"all": tuple(ids)}, MEMORY_MB):
            _mine_block(block, uri, folder, True, MEMORY_MB * 2**20, set())
        seconds, peak = time.monotonic() - started, peak_mb() - before
    matrix = queries * images * 4 / 2**20
    print(
        f"{queries:>8,} {images:>8,} {matrix:>14,.0f} {peak:>10,.0f} "
        f"{peak / MEMORY_MB:>14.2f} {seconds:>9.1f}",
        flush=True,
    )


def main() -> None:
    if len(sys.argv) == 3:
        measure(int(sys.argv[1]), int(sys.argv[2]))
        return
    print(
        f"mining.memory_mb = {MEMORY_MB}; peak is above the loaded libraries and embeddings' writer"
    )
    print("queries   images  score matrix MB   peak MB  peak / setting   seconds")
    for queries, images in SIZES:
        subprocess.run([sys.executable, __file__, str(queries), str(images)], check=True)


if __name__ == "__main__":
    main()
