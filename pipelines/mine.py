"""Mine the hard negatives of one checkpoint, alone, or look at a mined set.

    python pipelines/mine.py --config CONFIG --checkpoint RUN/checkpoints/train-0009
    python pipelines/mine.py --config CONFIG --run.dir RUN --if-newer      # for a scheduler
    python pipelines/mine.py inspect RUN/rounds/epoch-0009 [--query ID]
    python pipelines/mine.py export RUN/rounds/epoch-0009 --format tevatron --output DIR

The mined set goes to ``--output``; by default, to the round of the checkpoint's epoch in
``run.dir``. Exit status: 0 done, or nothing to do; 2 bad input; 75 another process is mining there.
A round that was killed is finished by the same command.
"""

from __future__ import annotations

import argparse
import sys

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.runtime.command import run_job, run_main
from qure_core.runtime.settings import load_settings


def read() -> tuple[Settings, argparse.Namespace]:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--checkpoint", help="checkpoint directory: a path or URI (default: run.dir's newest)"
    )
    options.add_argument("--output", help="where the mined set goes (default: run.dir's rounds)")
    options.add_argument(
        "--if-newer", action="store_true", help="do nothing if this checkpoint is already mined"
    )
    return load_settings(
        sys.argv[1:], "pipelines/mine.py", "Mine hard negatives with one checkpoint.", options
    )


def mine(arguments: tuple[Settings, argparse.Namespace]) -> None:
    from qure_core.job.data import mining_data
    from qure_core.job.layout import round_uri
    from qure_core.job.place import claim_run
    from qure_core.job.resume import check_settings
    from qure_core.mining.describe import round_table
    from qure_core.mining.mined_set import MINED_KIND, upgraded
    from qure_core.mining.stage import (
        check_mining,
        check_round_place,
        hold_round,
        mine_round,
        round_facts,
    )
    from qure_core.model.checkpoint_files import CHECKPOINT_KIND, newest_checkpoint
    from qure_core.runtime.monitor import monitored
    from qure_core.runtime.resources import connect, plan_resources

    settings, chosen = arguments
    check_mining(settings)
    given = chosen.checkpoint
    checkpoint = storage.resolve(given) if given else newest_checkpoint(settings.run.dir)
    epoch = int(storage.read_manifest(checkpoint, CHECKPOINT_KIND)["epoch"])
    if chosen.output:
        output = storage.resolve(chosen.output).rstrip("/")
    else:
        output = round_uri(settings.run.dir, epoch)
        claim_run(settings.run.dir)
        # The run's own training reads this round.
        check_settings(settings, ["run", "data", "model", "mining", "cluster"])
    setting = "output" if chosen.output else "run.dir"
    check_round_place(output, setting)
    storage.check_writable(output.rsplit("/", 1)[0], setting)
    split, corpora = mining_data(settings)
    facts = round_facts(settings, checkpoint, split, corpora, epoch)
    if chosen.if_newer and storage.kept(output, MINED_KIND, facts, upgraded):
        print(f"nothing to do: {checkpoint} is mined already\nmined set: {output}", flush=True)
        return
    connect()
    events = f"{output}.events.jsonl"
    with hold_round(output) as lease, monitored(events, "mining", settings.resolved()) as monitor:
        plan = plan_resources(settings.cluster)
        manifest = mine_round(settings, plan, checkpoint, split, corpora, output, epoch, lease)
        monitor.event("mined", epoch=epoch, uri=output, **manifest["statistics"])
    print(round_table(manifest))
    print(f"mined set: {output}", flush=True)


def inspect() -> None:
    # matplotlib is needed here alone.
    from qure_core.mining.describe import describe_query, describe_round
    from qure_core.report.inspect import check_picture, draw_query

    parser = argparse.ArgumentParser(
        prog="pipelines/mine.py inspect", description="Show what a mining round found."
    )
    parser.add_argument("round", help="a mined set's directory: a path or URI")
    parser.add_argument("--query", help="also show this query: its drops, curve and negatives")
    parser.add_argument(
        "--picture", help="where the curve's PNG goes (default: QUERY.png in this directory)"
    )
    parser.add_argument("--top", type=int, default=20, help="negatives listed (default: 20)")
    chosen = parser.parse_args(sys.argv[2:])
    if chosen.top < 0:
        raise InputError(f"--top: {chosen.top} is less than 0")
    uri = storage.resolve(chosen.round)
    if chosen.query:
        picture = storage.resolve(chosen.picture or f"{chosen.query.replace('/', '_')}.png")
        check_picture(picture)
    query = describe_query(uri, chosen.query, chosen.top) if chosen.query else ""
    print(describe_round(uri))
    if chosen.query:
        print(query)
        draw_query(uri, chosen.query, picture)
        print(f"curve: {picture}", flush=True)


def export() -> None:
    from qure_core.data.schema import read_split
    from qure_core.mining.export import FORMATS, export_round

    parser = argparse.ArgumentParser(
        prog="pipelines/mine.py export", description="Write a mining round for other programs."
    )
    parser.add_argument("round", help="a mined set's directory: a path or URI")
    parser.add_argument("--format", choices=FORMATS, required=True, help="of which program")
    parser.add_argument("--output", required=True, help="directory to write: a path or URI")
    parser.add_argument(
        "--negatives", type=int, default=10, help="of each query, the best-scored (%(default)s)"
    )
    parser.add_argument(
        "--split", help="the training split it was mined for (default: its run's data/train)"
    )
    chosen = parser.parse_args(sys.argv[2:])
    if chosen.negatives < 1:
        raise InputError(f"--negatives: {chosen.negatives} is less than 1")
    uri = storage.resolve(chosen.round).rstrip("/")
    run = uri.rsplit("/", 2)[0]
    split = storage.resolve(chosen.split) if chosen.split else storage.join(run, "data", "train")
    output = storage.resolve(chosen.output).rstrip("/")
    counts = export_round(uri, read_split(split), output, chosen.format, chosen.negatives)
    print(f"exported {counts['queries']:,} queries as {chosen.format}: {output}")
    if counts["short"]:
        print(f"{counts['short']:,} queries with fewer than {chosen.negatives} negatives left out")


if __name__ == "__main__":
    if sys.argv[1:2] == ["inspect"]:
        run_main(inspect)
    elif sys.argv[1:2] == ["export"]:
        run_main(export)
    else:
        run_job("mine", read, mine)
