"""What starting workers costs: a whole run with its stages in one process, and with workers.

    python tests/benchmarks/in_process.py OUT             # a run of 90 triplets
    python tests/benchmarks/in_process.py OUT quickstart  # configs/quickstart.yaml

Prints seconds of each, their ratio, whether weights, mined sets and rankings are the same bytes,
and the fixed cost of a training segment and of a pass (embedding with the ranking or mining that
follows): the seconds until its workers work.
"""

from __future__ import annotations

import hashlib
import json
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


def fixed_costs(run: Path) -> tuple[float, float]:
    """Seconds a training segment and a pass wait for their workers, on average."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    spent = next(event["rows"] for event in events if event["event"] == "where the time went")
    rows = {row["what"]: row for row in spent}
    passes = sum(rows[name]["starting"] for name in ("embedding", "ranking", "mining"))
    training = rows["training"]
    return training["starting"] / training["stages"], passes / rows["embedding"]["stages"]


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    chosen = JOB
    if sys.argv[2:] == ["quickstart"]:
        chosen = ["--config", str(ROOT / "configs/quickstart.yaml"), "--features=off"]
    seconds, digests = {}, {}
    for name in ("prepare", "workers", "one process"):  # the first draws the world
        run = out / name.replace(" ", "-")
        command = [sys.executable, str(ROOT / "pipelines/train.py"), *chosen]
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
    for name in ("workers", "one process"):
        segment, one_pass = fixed_costs(out / name.replace(" ", "-"))
        print(
            f"{name:<12} {segment:5.1f} s fixed a training segment (target 3), {one_pass:.1f} s a "
            "pass (target 2)"
        )


if __name__ == "__main__":
    main()
