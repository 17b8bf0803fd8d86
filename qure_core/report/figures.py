"""Figures of the report, as PNG data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from qure_core.data.thumbnails import thumbnail_bytes

THUMBNAIL = 112


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def thumbnail(image: Image.Image) -> str:
    """A small copy of ``image`` as a data URI."""
    return data_uri(thumbnail_bytes(image, THUMBNAIL), "jpeg")


def _finish(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return data_uri(buffer.getvalue(), "png")


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height))
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _mark_minings(axes: Axes, minings: Sequence[int]) -> None:
    for epoch in minings:
        axes.axvline(epoch, color="tab:red", alpha=0.4, linestyle="--", linewidth=1)
    axes.set_xlabel("epoch" + (" (dashed: mining)" if minings else ""))


def loss_curve(epochs: list[dict[str, Any]], minings: Sequence[int], label: str) -> str:
    """Mean loss per epoch, with the epochs at which negatives were mined."""
    figure, axes = _axes(5.2, 3.0)
    axes.plot([row["epoch"] for row in epochs], [row["loss"] for row in epochs], marker=".")
    _mark_minings(axes, minings)
    axes.set_ylabel(label)
    return _finish(figure)


def step_curves(epochs: list[dict[str, Any]], minings: Sequence[int]) -> str:
    """Pairwise accuracy, margin and gradient norm per epoch, each on a scale of its own."""
    figure, axes = plt.subplots(3, 1, figsize=(5.2, 4.4), sharex=True)
    places = [row["epoch"] for row in epochs]
    for part, (name, label) in zip(
        axes,
        (("accuracy", "accuracy"), ("margin", "margin"), ("gradient_norm", "gradient")),
        strict=True,
    ):
        part.plot(places, [row[name] for row in epochs], marker=".")
        part.set_ylabel(label)
        _plain(part)
        _mark_minings(part, minings)
    for part in axes[:-1]:
        part.set_xlabel("")
    return _finish(figure)


def metric_curves(points: dict[str, list[tuple[int, float]]], minings: Sequence[int]) -> str:
    """Metrics in percent by name, each of (epoch, value)."""
    figure, axes = _axes(5.2, 3.0)
    for name, values in points.items():
        if values:
            axes.plot(*zip(*values, strict=True), marker="o", label=name)
    _mark_minings(axes, minings)
    axes.set_ylim(0, 100)
    axes.set_ylabel("val, percent")
    axes.legend(frameon=False)
    return _finish(figure)


def recall_curves(curves: dict[str, list[list[tuple[int, float]]]], metric: str) -> str:
    """A metric against samples seen: each line's mean over seeds, and each seed faintly."""
    figure, axes = _axes(7.0, 4.2)
    for number, (name, seeds) in enumerate(curves.items()):
        color = plt.get_cmap("tab20")(number % 20)
        for points in seeds:
            axes.plot(*zip(*points, strict=True), color=color, alpha=0.25, linewidth=1)
        places = [samples for samples, _ in seeds[0]]
        means = [
            sum(values) / len(values)
            for values in zip(*([value for _, value in points] for points in seeds), strict=True)
        ]
        axes.plot(places, means, color=color, marker=".", label=name)
    axes.set_xlabel("triplets seen after the warm-up")
    axes.set_ylabel(f"{metric}, percent")
    axes.legend(frameon=False, fontsize=7)
    return _finish(figure)


def share_against_margin(points: dict[str, list[tuple[float, float]]]) -> str:
    """Of every mining round, the share of false negatives in percent against the median margin
    between targets and negatives: the smaller, the harder."""
    figure, axes = _axes(5.2, 4.2)
    for name, own in points.items():
        axes.plot(*zip(*own, strict=True), marker="o", linestyle="none", label=name)
    axes.set_xlabel("median margin, target less negatives")
    axes.set_ylabel("false negatives, percent")
    axes.legend(frameon=False, fontsize=7)
    return _finish(figure)


def draw_score_curve(row: dict[str, Any]) -> Figure:
    """One query's sorted scores: the target, both drops, and the hard negatives shaded; of a rule
    that looks at likeness to the target, its candidates' sorted likeness beside them.

    ``row`` is the query's row of the mined set, with the kept points of its curve.
    """
    likeness = row["details"].get("likeness")
    if not likeness:
        figure, axes = _axes(5.2, 3.0)
        _draw_scores(axes, row)
        _draw_negatives(axes, row)
    else:
        figure, both = plt.subplots(1, 2, figsize=(9.4, 3.0))
        _draw_scores(both[0], row)
        _draw_likeness(both[1], row, likeness)
        for axes in both:
            _plain(axes)
    return figure


def _draw_scores(axes: Axes, row: dict[str, Any]) -> None:
    axes.plot(row["curve_ranks"], row["curve_scores"], color="black", linewidth=1)
    target = row["target_rank"]
    axes.plot(
        target,
        row["target_score"],
        marker="*",
        color="tab:green",
        markersize=12,
        linestyle="none",
        label=f"target, rank {target}",
    )
    axes.set_xlabel("rank")
    axes.set_ylabel("relevance score")
    axes.legend(frameon=False, fontsize=7)


def _draw_negatives(axes: Axes, row: dict[str, Any]) -> None:
    target = row["target_rank"]
    # Of the steep-drop rule; other rules have other details.
    upper, lower = (row["details"].get(f"{name}_drop") for name in ("upper", "lower"))
    if upper and lower:
        first, last = upper["rank"] + 1, lower["rank"]
        for drop, name in ((upper, "upper"), (lower, "lower")):
            axes.plot(
                [drop["rank"], drop["rank"] + 1],
                [drop["score_above"], drop["score_below"]],
                color="tab:red",
                linewidth=2.5,
                label=f"{name} drop, {drop['height']:.4f} after rank {drop['rank']}",
            )
    else:
        first = target + 1 if target < row["curve_ranks"][-1] else 0
        last = first + row["num_negatives"] - 1
    axes.axvspan(
        first - 0.5,
        last + 0.5,
        color="tab:orange",
        alpha=0.2,
        label=f"{row['num_negatives']} hard negatives ({row['status']})",
    )
    axes.legend(frameon=False, fontsize=7)


def _draw_likeness(axes: Axes, row: dict[str, Any], likeness: Sequence[float]) -> None:
    left = row["details"]["left_alone"]
    axes.plot(range(len(likeness)), likeness, color="black", linewidth=1, marker=".", markersize=3)
    if 0 < left < len(likeness):
        axes.plot(
            [left - 1, left],
            likeness[left - 1 : left + 1],
            color="tab:red",
            linewidth=2.5,
            label=f"drop of {likeness[left - 1] - likeness[left]:.4f}",
        )
        axes.axvspan(
            -0.5, left - 0.5, color="tab:green", alpha=0.15, label=f"{left} may fit, left alone"
        )
    axes.axvspan(
        left - 0.5,
        len(likeness) - 0.5,
        color="tab:orange",
        alpha=0.2,
        label=f"{row['num_negatives']} hard negatives of these ({row['status']})",
    )
    axes.set_xlabel("candidates, the most alike first")
    axes.set_ylabel("likeness to the target")
    axes.legend(frameon=False, fontsize=7)


def score_curve(row: dict[str, Any]) -> str:
    """`draw_score_curve` as a data URI."""
    return _finish(draw_score_curve(row))
