"""The main job: warm-up, (mine, fine-tune) x n, evaluate, report.

    python pipelines/train.py --config configs/quickstart.yaml
    ray job submit --working-dir . -- python pipelines/train.py --config configs/quickstart.yaml

Killed at any point, the same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from typing import Any

from qure_core.config import load_settings
from qure_core.errors import run_main
from qure_core.training.run import run


def summary_table(evaluations: dict[str, Any]) -> str:
    """Start, end of warm-up and end side by side."""
    lines = [f"{'':<24}{'R@10':>9}{'R@50':>9}{'mean':>9}{'R-prec.':>9}{'in top 10':>11}"]
    for name, metrics in evaluations.items():
        average = metrics["recall"]["average"]
        values = [average["R@10"], average["R@50"], average["mean"]]
        cells = "".join(f"{value:>9.2f}" for value in values)
        if relevance := metrics.get("relevance"):
            cells += f"{relevance['R-precision']:>9.2f}{relevance['relevant in top 10']:>11.2f}"
        lines.append(f"{name:<24}{cells}")
    return "\n".join(lines)


def main() -> None:
    settings, _ = load_settings(sys.argv[1:], "pipelines/train.py", "Train QuRe from end to end.")
    summary = run(settings)
    print("\nval, average over categories (percent)")
    print(summary_table(summary["evaluations"]))
    print(f"\nmining rounds: {summary['rounds']}")
    print(f"run directory: {settings.run.dir}")
    print(f"report:        {summary['report']}", flush=True)


if __name__ == "__main__":
    run_main(main)
