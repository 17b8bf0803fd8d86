"""The main job: prepare, pretrain, (mine, fine-tune) x n, evaluate, report.

Everything a run has done is a committed directory below its run directory, so the same command
goes on where the last one stopped:

    config.yaml     settings as resolved            data/         the triplets and images used
    checkpoints/    after every epoch kept          rounds/       mined sets
    evaluations/    rankings and metrics            metrics.jsonl steps, epochs, rounds, evaluations
    events.jsonl    what happened, and when
    tensorboard/    the same as event files         report/       index.html
    control/        the same epochs without mining (train.control)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.embeddings.feature_use import usable_store
from qure_core.embeddings.stage import embed_splits
from qure_core.evaluation.protocols import of_manifest
from qure_core.evaluation.stage import evaluate_checkpoint, evaluation_job
from qure_core.job.control import CONTROL, has_control, run_control, what_mining_added
from qure_core.job.data import prepare_data, training_images, used_images
from qure_core.job.layout import committed, evaluation_uri, round_uri
from qure_core.job.metrics_log import read_metrics, write_metrics
from qure_core.job.place import check_apart, check_places, claim_run
from qure_core.job.resume import begin, save_config
from qure_core.job.tracking import check_tracker, track
from qure_core.job.weights import first_checkpoint, pretrain
from qure_core.mining.describe import round_table
from qure_core.mining.stage import check_mining, hold_round, mine_round, mining_job
from qure_core.model.checkpoint_files import checkpoint_uri, latest_epoch
from qure_core.objectives import make_objective
from qure_core.report.build import build_report
from qure_core.runtime.account import account_table
from qure_core.runtime.in_process import stages_in_process
from qure_core.runtime.monitor import monitored
from qure_core.runtime.resources import connect, plan_resources
from qure_core.storage.lease import hold
from qure_core.training.schedule import evaluation_epochs, mining_epochs, stage_boundaries
from qure_core.training.segment import Segment
from qure_core.training.trainer import remove_scratch, run_segment


def run(settings: Settings) -> dict[str, Any]:
    """Run the job to its end and return its summary; what is already done is not done again."""
    run_dir, train_settings = settings.run.dir, settings.train
    check_apart(run_dir, settings.data.root)
    check_tracker(settings)
    make_objective(settings.objective.name, settings.objective.options)
    check_mining(settings)
    claim_run(run_dir)
    connect()
    events = storage.join(run_dir, "events.jsonl")
    with (
        hold(run_dir, "training") as run_lease,
        monitored(events, "training", settings.resolved()) as monitor,
        stages_in_process(settings.cluster),
    ):
        begin(settings)
        for folder in (run_dir, storage.join(run_dir, CONTROL)):
            check_places(folder)
        plan = plan_resources(settings.cluster)
        train, val, corpora = prepare_data(settings)
        if train_settings.captions == "random" and not all(t.captions for t in train.triplets):
            raise InputError(
                "train.captions: random needs two captions of every triplet, as FashionIQ has; "
                "set it to joined"
            )
        first_checkpoint(settings, train)
        # Only now: settings that fail a check so far may be corrected.
        save_config(settings)
        pretrain(settings, plan)
        start = checkpoint_uri(run_dir, "train", 0)
        if settings.features == "build":
            # Once for all that the run will read; each stage then finds its own images there.
            usable_store(settings, plan, start, used_images(settings, train, val, corpora))

        minings = set(mining_epochs(train_settings))
        evaluations = evaluation_epochs(train_settings) if val else {}
        stops = stage_boundaries(train_settings)
        keep = tuple(stops)
        mined_at: int | None = None
        done = latest_epoch(run_dir, "train") or 0
        for stop, following in zip(stops, [*stops[1:], None], strict=True):
            run_lease.check()
            checkpoint = checkpoint_uri(run_dir, "train", stop)
            evaluation = evaluation_uri(run_dir, stop) if stop in evaluations else None
            mines = stop in minings and train_settings.negatives == "mined"
            mined = round_uri(run_dir, stop) if mines else None
            with hold_round(mined, wait=True) if mined else nullcontext() as lease:
                jobs = []
                if val and evaluation and not storage.is_committed(evaluation):
                    jobs.append(evaluation_job(settings, val, evaluation))
                if mined and not storage.is_committed(mined):
                    jobs.append(mining_job(train, corpora, mined, settings.mining.stored))
                # Both at once: starting the actors is most of the cost on small data.
                if jobs:
                    embed_splits(checkpoint, jobs, settings, plan, settings.mining.corpus_shards)
                if val and evaluation:
                    manifest = evaluate_checkpoint(
                        settings, plan, checkpoint, val, evaluation, evaluations[stop]
                    )
                    print(describe_evaluation(manifest), flush=True)
                    figures = of_manifest(manifest).headline(manifest["metrics"])
                    monitor.event("evaluated", epoch=stop, uri=evaluation, **figures)
                if mined:
                    mined_at = stop
                    assert lease is not None
                    manifest = mine_round(
                        settings, plan, checkpoint, train, corpora, mined, stop, lease
                    )
                    print(round_table(manifest) + f"\n  written to {mined}", flush=True)
                    monitor.event("mined", epoch=stop, uri=mined, **manifest["statistics"])
            if following is not None and done < following:
                segment = Segment(
                    stage="train",
                    run_dir=run_dir,
                    settings=settings.resolved(),
                    last_epoch=following,
                    mined_uri=None if mined_at is None else round_uri(run_dir, mined_at),
                    mined_at=mined_at,
                    keep=keep,
                    features=usable_store(settings, plan, start, training_images(train, corpora)),
                )
                run_lease.check()
                run_segment(segment, settings.cluster, plan)
            lines = read_metrics(run_dir)
            track(settings, write_metrics(run_dir, lines))
        measured, rounds = committed(run_dir, "evaluations"), committed(run_dir, "rounds")
        run_lease.check()
        remove_scratch(run_dir)

        def finish(mining: str = "", control: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
            summary = {
                "evaluations": {row["name"]: row["metrics"] for row in [*measured, *control]},
                "mining": mining,
                "rounds": len(rounds),
                "report": build_report(settings, train, val, measured, rounds, lines, control),
            }
            storage.write_json(storage.join(run_dir, "summary.json"), summary)
            return summary

        summary = finish()
        if val and has_control(settings):
            # After all else: whatever becomes of it, the run is whole.
            features = usable_store(settings, plan, start, training_images(train, corpora))
            control = run_control(settings, plan, val, features)
            run_lease.check()
            remove_scratch(run_dir)
            summary = finish(what_mining_added(settings, measured[-1], control), [control])
        spent = monitor.account.rows()
        monitor.event("where the time went", rows=spent)
        print("\n" + account_table(spent), flush=True)
        return summary


def describe_evaluation(manifest: dict[str, Any]) -> str:
    """One evaluation in a line, for people."""
    figures = of_manifest(manifest).headline(manifest["metrics"])
    cells = "  ".join(f"{name} {value:.2f}" for name, value in figures.items())
    return f"evaluation at {manifest['name']} (gallery: {manifest['gallery']}): {cells}"


def summary_table(evaluations: Sequence[dict[str, Any]]) -> str:
    """The evaluations of a run side by side: start, end of warm-up, end."""
    protocol = of_manifest(evaluations[0])
    figures = [protocol.headline(row["metrics"]) for row in evaluations]
    columns = [name for name in protocol.columns if any(name in row for row in figures)]
    widths = [max(9, len(name) + 2) for name in columns]
    header = "".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))
    lines = [f"{'':<24}{header}"]
    for row, values in zip(evaluations, figures, strict=True):
        cells = [
            f"{values[name]:>{width}.2f}" if name in values else " " * width
            for name, width in zip(columns, widths, strict=True)
        ]
        lines.append(f"{row['name']:<24}{''.join(cells)}")
    return "\n".join(lines)
