"""Compare objectives, rules, query encoders and settings on the same data, from the same starts.

    python pipelines/compare.py --config configs/quickstart.yaml --grid configs/grids/field.yaml \\
        --output runs/compare

Warm-ups and lines are Ray tasks; killed at any point, the same command goes on line by line.
"""

from __future__ import annotations

import argparse
import sys

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.runtime.command import run_job
from qure_core.runtime.settings import load_settings


def read() -> tuple[Settings, argparse.Namespace]:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--grid", required=True, help="YAML file of what is compared")
    options.add_argument("--output", required=True, help="directory to write: a path or URI")
    return load_settings(sys.argv[1:], "pipelines/compare.py", "Compare settings.", options)


def work(arguments: tuple[Settings, argparse.Namespace]) -> None:
    from qure_core.job.comparison import compare
    from qure_core.job.grid import plan_lines, read_grid
    from qure_core.job.place import check_apart
    from qure_core.report.comparison import told

    settings, chosen = arguments
    output = storage.resolve(chosen.output).rstrip("/")
    check_apart(output, settings.data.root)
    grid = read_grid(chosen.grid)
    lines = plan_lines(grid, settings, output)
    summary = compare(grid, lines, output, settings.data.format)
    print(f"\n{told(summary)}")
    print(f"results: {output}/results.json\nreport:  {summary['report']}", flush=True)


if __name__ == "__main__":
    run_job("compare", read, work)
