"""Building a run's report from what the run has committed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jinja2
import numpy as np

from qure_core import storage
from qure_core.base.config import DataSettings, Settings
from qure_core.base.seeds import generator
from qure_core.data.images import load_image
from qure_core.data.schema import Split, Triplet
from qure_core.evaluation.protocols import of_format, of_manifest
from qure_core.evaluation.stage import read_rankings
from qure_core.mining.mined_set import MinedSet, read_mined_set
from qure_core.report.figures import (
    loss_curve,
    metric_curves,
    score_curve,
    step_curves,
    thumbnail,
)
from qure_core.training.schedule import mining_epochs

TOP = 10


def example_queries(split: Split, count: int, seed: int) -> list[Triplet]:
    """The queries that a report shows, the same in every round."""
    rng = generator(seed, "report examples", split.name)
    chosen = rng.permutation(len(split.triplets))[:count]
    return [split.triplets[i] for i in sorted(chosen)]


def build_report(
    settings: Settings,
    train: Split,
    val: Split | None,
    evaluations: Sequence[dict[str, Any]],
    rounds: Sequence[dict[str, Any]],
    lines: Sequence[dict[str, Any]],
    control: Sequence[dict[str, Any]] = (),
) -> str:
    """Write report/index.html, one file with everything inside; return its URI.

    ``evaluations`` and ``rounds`` are manifests with their "epoch" and "uri", by epoch; ``lines``
    those of the run's metrics; ``control`` evaluations of training without mining.
    """
    run_dir = settings.run.dir
    protocol = of_format(settings.data.format)
    known = {name for row in evaluations for name in protocol.headline(row["metrics"])}
    columns = [name for name in protocol.columns if name in known]
    minings = [row["epoch"] for row in rounds]
    mined = {row["epoch"]: read_mined_set(row["uri"]) for row in rounds}
    show_train = _shower(train, settings.data)
    last = mined[minings[-1]] if minings else None
    schedule = mining_epochs(settings.train)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qure_core.report", ""), autoescape=True
    )
    page = environment.get_template("report.html.j2").render(
        run_dir=run_dir,
        facts={
            "triplets": f"{len(train.triplets):,}",
            "images": f"{len(train.images):,}",
            "queries": f"{len(val.triplets):,}" if val else "no",
            "model": settings.model.pretrained or settings.model.preset,
            "epochs": settings.train.epochs,
            "warmup": schedule[0] if schedule else settings.train.epochs,
            "seed": settings.run.seed,
            "gallery": settings.evaluation.gallery,
        },
        protocol=protocol.described,
        columns=columns,
        metrics=_metric_rows([*evaluations, *control], columns),
        categories=_category_rows(evaluations[-1]) if evaluations else {},
        curves=_curves(settings, lines, evaluations, minings),
        rounds=[_round_row(row, mined[row["epoch"]], train) for row in rounds],
        mined=_mined_examples(settings, train, last, show_train) if last else [],
        ranked=_ranked_examples(settings, val, evaluations) if val else [],
    )
    uri = storage.join(run_dir, "report", "index.html")
    storage.write_bytes(uri, page.encode())
    return uri


def _metric_rows(evaluations: Sequence[dict[str, Any]], columns: list[str]) -> list[dict[str, Any]]:
    rows = []
    for row in evaluations:
        values = of_manifest(row).headline(row["metrics"])
        shown = [f"{values[name]:.2f}" if name in values else "" for name in columns]
        rows.append({"name": row["name"], "epoch": row["epoch"], "values": shown})
    return rows


def _category_rows(evaluation: dict[str, Any]) -> dict[str, Any]:
    """A table of the categories' figures, empty where the protocol has none of them."""
    figures = of_manifest(evaluation).by_category(evaluation["metrics"])
    images = evaluation["gallery_images"]
    return {
        "columns": list(next(iter(figures.values()), {})),
        "rows": [
            [category, f"{images[category]:,}", *(f"{value:.2f}" for value in row.values())]
            for category, row in figures.items()
        ],
    }


def _curves(
    settings: Settings,
    lines: Sequence[dict[str, Any]],
    evaluations: Sequence[dict[str, Any]],
    minings: list[int],
) -> list[dict[str, str]]:
    epochs = {
        stage: [row for row in lines if row["kind"] == "epoch" and row["stage"] == stage]
        for stage in ("pretrain", "train")
    }
    loss = f"{settings.objective.name} loss".replace("_", " ")
    figures = [{"src": loss_curve(epochs["train"], minings, loss), "alt": "training loss"}]
    told = [row for row in epochs["train"] if "accuracy" in row]  # older runs did not tell it
    if told:
        figures.append({"src": step_curves(told, minings), "alt": "accuracy, margin, gradient"})
    if evaluations:
        protocol = of_format(settings.data.format)
        points: dict[str, list[tuple[int, float]]] = {name: [] for name in protocol.drawn}
        for row in evaluations:
            for name, value in protocol.headline(row["metrics"]).items():
                if name in points:
                    points[name].append((row["epoch"], value))
        figures.append({"src": metric_curves(points, minings), "alt": "val metrics"})
    if epochs["pretrain"]:
        src = loss_curve(epochs["pretrain"], [], "pretraining contrastive loss")
        figures.append({"src": src, "alt": "pretraining loss"})
    return figures


def _round_row(manifest: dict[str, Any], mined: MinedSet, train: Split) -> list[str]:
    statistics, seconds = manifest["statistics"], manifest["seconds"]
    fallbacks = list(statistics["statuses"].items())[1:]
    relevant = false_negative_share(mined, train)
    found = left_alone_relevance(mined, train)
    return [
        str(manifest["epoch"]),
        f"{manifest['queries']:,}",
        f"{statistics['found_share']:.1%}",
        ", ".join(f"{name} {count:,}" for name, count in fallbacks if count) or "none",
        f"{statistics['target_rank']['median']:,.0f}",
        f"{statistics['set_size']['median']:,.0f}",
        f"{statistics['margin_to_target']['median']:.4f}",
        "unknown" if relevant is None else f"{relevant:.2%}",
        _rightly_left(found, mined.leaves_alone),
        f"{seconds['embed'] + seconds['score to write, wall']:.1f}",
    ]


def false_negative_share(mined: MinedSet, train: Split) -> float | None:
    """Mean share of a query's hard negatives that are relevant, each as likely as it is drawn; None
    where relevance is unknown."""
    negatives, weights = mined.negatives(), mined.weights()
    shares = [
        float(
            np.average(
                np.isin(negatives[t.query_id], t.relevant_ids), weights=weights.get(t.query_id)
            )
        )
        for t in train.triplets
        if t.relevant_ids
    ]
    return float(np.mean(shares)) if shares else None


def _rightly_left(found: float | None, looks: bool) -> str:
    if not looks:
        return "none left alone"
    return "unknown" if found is None else f"{found:.1%}"


def left_alone_relevance(mined: MinedSet, train: Split) -> float | None:
    """Of all images that a rule left alone, because they may fit, the share that are relevant; None
    where it looks for none, or relevance is unknown."""
    left_alone = mined.left_alone()
    known = [
        (left_alone[t.query_id], t.relevant_ids)
        for t in train.triplets
        if t.relevant_ids and t.query_id in left_alone
    ]
    images = sum(len(own) for own, _ in known)
    if not images:
        return None
    return sum(int(np.isin(own, relevant).sum()) for own, relevant in known) / images


def _shower(split: Split, data: DataSettings) -> Callable[[str, Triplet], dict[str, str]]:
    @cache
    def source(image_id: str) -> str:
        return thumbnail(load_image(split.images[image_id], data.max_image_pixels, data.pixels))

    def show(image_id: str, query: Triplet) -> dict[str, str]:
        mark = "target" if image_id == query.target_id else ""
        if not mark and image_id in query.relevant_ids:
            mark = "relevant"
        return {"id": image_id, "src": source(image_id), "mark": mark}

    return show


def _mined_examples(
    settings: Settings, train: Split, mined: MinedSet, show: Callable[..., dict[str, str]]
) -> list[dict[str, Any]]:
    shown = example_queries(train, settings.report.examples, settings.run.seed)
    rows = mined.rows([query.query_id for query in shown])
    negatives, left_alone = mined.negatives(), mined.left_alone()
    examples = []
    for query in shown:
        chosen = negatives[query.query_id]
        examples.append(
            {
                "id": query.query_id,
                "category": query.category,
                "text": query.text,
                "curve": score_curve(rows[query.query_id]),
                "reference": show(query.reference_id, query),
                "target": show(str(query.target_id), query),
                "count": f"{len(chosen):,}",
                "negatives": [show(image_id, query) for image_id in chosen[:TOP]],
                "left_alone": [
                    show(image_id, query) for image_id in left_alone.get(query.query_id, ())[:TOP]
                ],
            }
        )
    return examples


def _ranked_examples(
    settings: Settings,
    val: Split,
    evaluations: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    show = _shower(val, settings.data)
    before, after = (
        {row["query_id"]: row for row in read_rankings(evaluation["uri"]).to_pylist()}
        for evaluation in (evaluations[0], evaluations[-1])
    )
    examples = []
    for query in example_queries(val, settings.report.examples, settings.run.seed):
        first, last = before[query.query_id], after[query.query_id]
        examples.append(
            {
                "category": query.category,
                "text": query.text,
                "reference": show(query.reference_id, query),
                "target": show(str(query.target_id), query),
                "before_rank": first["target_rank"],
                "after_rank": last["target_rank"],
                "before": [show(image_id, query) for image_id in first["top_ids"][:TOP]],
                "after": [show(image_id, query) for image_id in last["top_ids"][:TOP]],
            }
        )
    return examples
