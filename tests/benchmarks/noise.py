"""A copy of a data set in FashionIQ's layout with wrong targets in its training triplets.

    python tests/benchmarks/noise.py DATA --share 0.2 --output NOISY

Of a share of them, drawn by ``--seed``, the targets are exchanged among one another, within their
category; pictures are linked, val stays as it is. What each line of a grid loses by it:

    python pipelines/compare.py --data.format=fashioniq --data.root NOISY \\
        --grid configs/grids/noise.yaml --config configs/quickstart.yaml --output OUT
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np


def exchanged(rows: list[dict[str, str]], share: float, seed: int) -> list[dict[str, str]]:
    """``rows`` of which a share have the target of the next one drawn."""
    chosen = np.random.default_rng(seed).permutation(len(rows))[: round(share * len(rows))]
    changed = list(rows)
    for one, other in zip(chosen, np.roll(chosen, 1), strict=True):
        changed[one] = rows[one] | {"target": rows[other]["target"]}
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--share", type=float, required=True, help="of the training triplets")
    parser.add_argument("--output", type=Path, required=True, help="a directory that is not there")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    shutil.copytree(chosen.data / "captions", chosen.output / "captions")
    shutil.copytree(chosen.data / "image_splits", chosen.output / "image_splits")
    (chosen.output / "images").symlink_to((chosen.data / "images").resolve())
    # What fits a training query is known of the right target alone.
    (chosen.output / "relevance").mkdir()
    for path in (chosen.data / "relevance").glob("*.val.json"):
        shutil.copy(path, chosen.output / "relevance")
    if (descriptions := chosen.data / "descriptions.json").exists():
        shutil.copy(descriptions, chosen.output)
    changed = total = 0
    for path in sorted((chosen.output / "captions").glob("*.train.json")):
        rows = json.loads(path.read_text())
        now = exchanged(rows, chosen.share, chosen.seed)
        changed += sum(one != other for one, other in zip(rows, now, strict=True))
        total += len(rows)
        path.write_text(json.dumps(now))
    print(f"{changed:,} of {total:,} training triplets have another target; {chosen.output}")


if __name__ == "__main__":
    main()
