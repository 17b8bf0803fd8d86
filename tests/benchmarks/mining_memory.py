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

from synthetic import make_split, write_embeddings

from qure_core.mining.rules.steep_drops import DropRule
from qure_core.mining.tasks import RoundTask, mine_by_sorting
from qure_core.ranking.blocks import make_blocks

MEMORY_MB = 256
TOKENS, WIDTH, SHARD = 8, 64, 2048
SIZES = [(1_000, 5_000), (4_000, 5_000), (4_000, 20_000), (16_000, 20_000)]


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(queries: int, images: int) -> None:
    split = make_split(queries, images)
    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder) / "embeddings")
        write_embeddings(uri, split, tokens=TOKENS, width=WIDTH, shard=SHARD)
        memory = MEMORY_MB * 2**20
        task = RoundTask(uri, folder, folder, 0, 0, True, DropRule(), None, "fp32", memory)
        before, started = peak_mb(), time.monotonic()
        for block in make_blocks(split.triplets, split.galleries, MEMORY_MB):
            mine_by_sorting(block, task)
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
