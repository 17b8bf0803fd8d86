"""What each way of choosing hard negatives gives, where true relevance is known.

    python tests/benchmarks/negatives.py configs/quickstart.yaml OUT
    python tests/benchmarks/negatives.py configs/emoji.yaml OUT --data.root /path/to/emoji-cir

One run is trained to the end of its warm-up; from that checkpoint on, each setting below mines and
fine-tunes alone. A line per setting: share of false negatives among the mined (relevant, but not
the labelled target), hardness (target's score less the negatives' mean, the smaller the harder),
size of a set, stability (mean overlap of a query's sets of consecutive rounds: intersection over
union), and recall at the end.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from qure_core.data import read_split
from qure_core.job.layout import committed, round_uri
from qure_core.job.place import MARK, claim_run
from qure_core.mining import read_mined_set
from qure_core.report.build import false_negative_share
from qure_core.runtime.settings import load_settings
from qure_core.training.schedule import mining_epochs

ROOT = Path(__file__).parents[2]
CHOICES = {
    "released rule": ["--mining.window_ranks=None"],
    "window 200": ["--mining.window_ranks=200"],
    "window 50": ["--mining.window_ranks=50"],
    "window 50, steepness 4": ["--mining.window_ranks=50", "--mining.min_steepness=4"],
    "random": ["--train.negatives=random"],
}


def train(config: str, run: Path, arguments: list[str]) -> None:
    command = [sys.executable, str(ROOT / "pipelines/train.py"), "--config", config]
    command += [f"--run.dir={run}", *arguments]
    with open(f"{run}.log", "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, cwd=ROOT)


def warmed_up(config: str, out: Path, arguments: list[str]) -> tuple[Path, int]:
    """A run trained with random negatives to its end, and the epoch at which mining begins."""
    settings, _ = load_settings(["--config", config, *arguments], "negatives", "")
    run = out / "random"
    train(config, run, [*arguments, "--train.negatives=random"])
    return run, mining_epochs(settings.train)[0]


def branch(source: Path, target: Path, epoch: int) -> None:
    """Copy what a run had done when the warm-up ended."""
    if target.exists():
        claim_run(str(target))  # refuses what is no run
        shutil.rmtree(target)
    (target / "metrics").mkdir(parents=True)
    shutil.copy(source / MARK, target)
    shutil.copytree(source / "data", target / "data")
    for folder, names in (
        ("checkpoints", ["pretrain-*", "train-0000", f"train-{epoch:04d}"]),
        ("evaluations", ["epoch-0000", f"epoch-{epoch:04d}"]),
    ):
        for name in names:
            for path in (source / folder).glob(name):
                shutil.copytree(path, target / folder / path.name)
    for path in (source / "metrics").iterdir():
        stage, _, number = path.stem.partition("-")
        if stage == "pretrain" or int(number) <= epoch:
            shutil.copy(path, target / "metrics")


def overlap(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    shares = []
    for query, before in one.items():
        both = len(np.intersect1d(before, other[query]))
        shares.append(both / (len(before) + len(other[query]) - both))
    return float(np.mean(shares))


def figures(run: Path) -> dict[str, Any]:
    train_split = read_split(str(run / "data/train"))
    rounds = [
        read_mined_set(round_uri(str(run), m["epoch"])) for m in committed(str(run), "rounds")
    ]
    last = committed(str(run), "evaluations")[-1]["metrics"]
    row: dict[str, Any] = {
        "R@10": last["recall"]["average"]["R@10"],
        "R@50": last["recall"]["average"]["R@50"],
        "R-precision": last["relevance"]["R-precision"],
    }
    if rounds:
        statistics = rounds[-1].manifest["statistics"]
        negatives = [mined.negatives() for mined in rounds]
        row |= {
            "false negatives %": 100 * (false_negative_share(rounds[-1], train_split) or 0),
            "margin": statistics["margin_to_target"]["median"],
            "set size": statistics["set_size"]["median"],
            "fallback %": 100 * (1 - statistics["found_share"]),
            "stability": float(np.mean([overlap(*pair) for pair in itertools.pairwise(negatives)])),
        }
    return row


def main() -> None:
    config, out, arguments = sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3:]
    out.mkdir(parents=True, exist_ok=True)
    source, epoch = warmed_up(config, out, arguments)
    table = {"random": figures(source)}
    print("random", json.dumps(table["random"]), flush=True)
    for name, more in CHOICES.items():
        if name == "random":
            continue
        run = out / name.replace(" ", "-").replace(",", "")
        if not (run / "summary.json").exists():  # a finished one is kept
            branch(source, run, epoch)
        train(config, run, [*arguments, *more])
        table[name] = figures(run)
        print(name, json.dumps(table[name]), flush=True)
    columns = list(next(row for row in table.values() if "margin" in row))
    print("| negatives | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, row in table.items():
        cells = [f"{row[c]:.3g}" if c in row else "" for c in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
