"""A small whole run with its stages in one process, against the same with workers.

    python tests/benchmarks/in_process.py OUT

Prints seconds of each, their ratio, and whether weights, mined sets and rankings are the same
bytes.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
JOB = [
    *("--data.world.images=180", "--data.world.images_per_combination=3"),
    *("--data.world.train_triplets=90", "--data.world.val_triplets=24"),
    *("--data.world.image_size=32", "--pretrain.epochs=1", "--pretrain.batch_size=32"),
    *("--train.epochs=3", "--train.warmup_epochs=2", "--train.mining_definitions=3"),
    *("--train.lr=1e-3", "--train.batch_size=16", "--cluster.gpus=none", "--features=off"),
]


def digest(run: Path) -> str:
    """Of all that a run made which does not tell the time."""
    whole = hashlib.sha256()
    for pattern in (
        "checkpoints/*/model.safetensors",
        "rounds/*/*.parquet",
        "evaluations/*/*.parquet",
    ):
        for path in sorted(run.glob(pattern)):
            whole.update(path.read_bytes())
    return whole.hexdigest()


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    seconds, digests = {}, {}
    for name in ("prepare", "workers", "one process"):  # the first draws the world
        run = out / name.replace(" ", "-")
        command = [sys.executable, str(ROOT / "pipelines/train.py"), *JOB]
        command += [f"--data.root={out}/world", f"--run.dir={run}"]
        command += [f"--cluster.in_process={name != 'workers'}"]
        started = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        seconds[name], digests[name] = time.monotonic() - started, digest(run)
    same = digests["workers"] == digests["one process"]
    print(f"workers      {seconds['workers']:6.1f} s")
    print(f"one process  {seconds['one process']:6.1f} s")
    print(f"ratio        {seconds['workers'] / seconds['one process']:6.1f} x; ", end="")
    print("the same bytes" if same else "OTHER BYTES")


if __name__ == "__main__":
    main()
