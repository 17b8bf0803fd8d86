"""Mine the hard negatives of one checkpoint, alone.

    python pipelines/mine.py --config CONFIG --checkpoint RUN/checkpoints/train-0009

The mined set goes to ``--output``; by default, to the round of the checkpoint's epoch in
``run.dir``.
"""

from __future__ import annotations

import argparse
import sys

from qure_core import storage
from qure_core.config import load_settings
from qure_core.data import load_split, mining_galleries
from qure_core.embedding_shards import CHECKPOINT_KIND
from qure_core.errors import run_main
from qure_core.mining.stage import mine_round, round_table
from qure_core.report.build import example_queries
from qure_core.resources import connect, plan_resources
from qure_core.training.layout import round_uri


def main() -> None:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--checkpoint", required=True, help="checkpoint directory: a path or URI")
    options.add_argument("--output", help="where the mined set goes (default: run.dir's rounds)")
    settings, chosen = load_settings(
        sys.argv[1:], "pipelines/mine.py", "Mine hard negatives with one checkpoint.", options
    )
    checkpoint = storage.resolve(chosen.checkpoint)
    epoch = int(storage.read_manifest(checkpoint, CHECKPOINT_KIND)["epoch"])
    output = storage.resolve(chosen.output) if chosen.output else round_uri(settings.run.dir, epoch)
    storage.check_writable(output.rsplit("/", 1)[0], "output" if chosen.output else "run.dir")
    split = load_split(settings.data, "train")
    connect()
    manifest = mine_round(
        settings,
        plan_resources(settings.cluster),
        checkpoint,
        split,
        mining_galleries(settings.data, split),
        output,
        epoch,
        {t.query_id for t in example_queries(split, settings.report.examples, settings.run.seed)},
    )
    print(round_table(manifest))
    print(f"mined set: {output}", flush=True)


if __name__ == "__main__":
    run_main(main)
