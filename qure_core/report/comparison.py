"""A comparison's results: a table, figures, JSON and one page.

Shapes: S seeds, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jinja2
import numpy as np

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.evaluation.paired import (
    Difference,
    Ranks,
    figure_difference,
    reached_at,
    samples_to_reach,
)
from qure_core.evaluation.published import PUBLISHED
from qure_core.report.figures import recall_curves, share_against_margin


class Compared(Protocol):
    """What of a grid its page needs (`job.grid.Grid`)."""

    seeds: list[int]
    lines: dict[str, dict[str, Any]]
    baseline: str | None
    metric: str
    recall: list[float]
    reach: str | None


@dataclass(frozen=True)
class Point:
    """Figures in percent, by name, after so many triplets were seen in so many seconds of epochs
    and rounds."""

    samples: int
    figures: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class RoundFacts:
    """Of a mining round: the share of its negatives that are relevant, None where that is not
    known; the median margin between a target and its negatives; the median size of a set; the share
    of queries that the rule served as it means it; and the mean overlap (intersection over union)
    of a query's set with that of the round before, None of the first."""

    epoch: int
    false_negatives: float | None
    margin: float
    size: float
    found: float
    overlap: float | None


@dataclass(frozen=True)
class LineResult:
    """What one line under one seed measured.

    seconds: of its epochs and rounds. ranks: each query's category and its target's rank at the
    end, 0 the best, None without a target.
    """

    name: str
    seed: int
    points: tuple[Point, ...]
    rounds: tuple[RoundFacts, ...]
    seconds: float
    ranks: Ranks


def _difference(own: Sequence[LineResult], base: Sequence[LineResult], metric: str) -> Difference:
    if lacking := [r for r in (*own, *base) if metric not in r.points[-1].figures]:
        raise InputError(
            f"--grid: metric: {metric} was not measured by {lacking[0].name}: the data do not say "
            "what it needs; take another figure"
        )
    by_seed = [
        one.points[-1].figures[metric] - other.points[-1].figures[metric]
        for one, other in zip(own, base, strict=True)
    ]
    return figure_difference(metric, by_seed, [r.ranks for r in own], [r.ranks for r in base])


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def summarise_lines(grid: Compared, results: Sequence[LineResult]) -> dict[str, Any]:
    """All figures of a comparison as plain data: lines by the mean of the metric, best first."""
    by_name = {name: [result for result in results if result.name == name] for name in grid.lines}
    baseline = grid.baseline or next(iter(grid.lines))
    rows: list[dict[str, Any]] = []
    for name, own in by_name.items():
        last = [result.points[-1].figures for result in own]
        figures = {
            key: {
                "mean": float(np.mean([row[key] for row in last])),
                "spread": _spread([row[key] for row in last]),
            }
            for key in last[0]
        }
        difference = _difference(own, by_name[baseline], grid.metric)
        curves = [[(p.samples, p.figures[grid.metric]) for p in r.points] for r in own]
        reached = {
            f"{level:g}": [samples_to_reach(curve, level) for curve in curves]
            for level in grid.recall
        }
        to_reach = None
        if grid.reach is not None:
            to_reach = _to_reach(own, by_name[grid.reach], grid.metric)
        ends = [result.rounds[-1] for result in own if result.rounds]
        known = [r.false_negatives for r in ends if r.false_negatives is not None]
        overlaps = [r.overlap for result in own for r in result.rounds if r.overlap is not None]
        rows.append(
            {
                "name": name,
                "seeds": [result.seed for result in own],
                "figures": figures,
                "start": float(np.mean([c[0][1] for c in curves])),
                "difference": {
                    "mean": difference.mean,
                    "by_seed": list(difference.by_seed),
                    "low": difference.low,
                    "high": difference.high,
                    "verdict": "baseline" if name == baseline else difference.verdict,
                },
                "seconds": float(np.mean([result.seconds for result in own])),
                "samples_to_reach": reached,
                "to_reach": to_reach,
                "false_negatives": float(np.mean(known)) if known else None,
                "mined": {
                    "margin": float(np.mean([r.margin for r in ends])),
                    "size": float(np.mean([r.size for r in ends])),
                    "fallback": 1 - float(np.mean([r.found for r in ends])),
                    "stability": float(np.mean(overlaps)) if overlaps else None,
                }
                if ends
                else None,
                "rounds": [
                    [(r.margin, r.false_negatives) for r in result.rounds] for result in own
                ],
                "curves": curves,
            }
        )
    rows.sort(key=lambda row: -row["figures"][grid.metric]["mean"])
    whole = {"metric": grid.metric, "baseline": baseline, "reach": grid.reach}
    return whole | {"seeds": grid.seeds, "lines": rows}


def _to_reach(
    own: Sequence[LineResult], other: Sequence[LineResult], metric: str
) -> dict[str, list[float | None]]:
    """Samples and seconds until a line first has the figure with which ``other`` ends under the
    same seed, and the share of the other's samples that these are."""
    found: dict[str, list[float | None]] = {"samples": [], "seconds": [], "share": []}
    for result, goal in zip(own, other, strict=True):
        level, whole = goal.points[-1].figures[metric], goal.points[-1].samples
        samples, seconds = (
            reached_at([(at(p), p.figures[metric]) for p in result.points], level)
            for at in (lambda p: p.samples, lambda p: p.seconds)
        )
        found["samples"].append(None if samples is None else round(samples))
        found["seconds"].append(seconds)
        found["share"].append(None if samples is None else samples / whole)
    return found


def _number(figure: Mapping[str, float | None]) -> str:
    spread = figure["spread"]
    return f"{figure['mean']:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")


def table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The summary's columns and rows, for people."""
    names = list(summary["lines"][0]["figures"])
    levels = list(summary["lines"][0]["samples_to_reach"])
    metric = summary["metric"]
    columns = ["line", *names, f"{metric} less {summary['baseline']}'s", ""]
    columns += [f"samples to {metric} {level}" for level in levels]
    if summary["reach"]:
        columns += [f"to {summary['reach']}'s end: samples", "share of its samples", "seconds"]
    columns += ["seconds in all"]
    rows = []
    for line in summary["lines"]:
        difference, reached = line["difference"], line["samples_to_reach"]
        cells = [_number(line["figures"][name]) for name in names]
        interval = ""
        if difference["low"] is not None and difference["verdict"] != "baseline":
            interval = f" [{difference['low']:+.2f}, {difference['high']:+.2f}]"
        rows.append(
            [
                line["name"],
                *cells,
                ""
                if difference["verdict"] == "baseline"
                else f"{difference['mean']:+.2f}{interval}",
                difference["verdict"],
                *(_reached(reached[level]) for level in levels),
                *_told_reach(line["to_reach"]),
                f"{line['seconds']:.0f}",
            ]
        )
    return columns, rows


MINED = ("line", "false negatives", "margin", "negatives", "fallback", "stability")


def mined_table(summary: dict[str, Any]) -> list[list[str]]:
    """Rows of what the lines mined, by the columns `MINED`; none where nothing was."""
    rows = []
    for line in summary["lines"]:
        if mined := line["mined"]:
            share, stability = line["false_negatives"], mined["stability"]
            rows.append(
                [
                    line["name"],
                    "" if share is None else f"{share:.2%}",
                    f"{mined['margin']:.4f}",
                    f"{mined['size']:,.0f}",
                    f"{mined['fallback']:.1%}",
                    "" if stability is None else f"{stability:.2f}",
                ]
            )
    return rows


def _reached(values: Sequence[float | None], form: str = ",.0f") -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "not"
    return f"{np.mean(known):{form}}" + ("" if len(known) == len(values) else " (some)")


def _told_reach(to_reach: dict[str, list[float | None]] | None) -> list[str]:
    if to_reach is None:
        return []
    forms = {"samples": ",.0f", "share": ".1%", "seconds": ",.1f"}
    return [_reached(to_reach[name], form) for name, form in forms.items()]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns), *map(" | ".join, rows)]
    return "".join(f"| {line} |\n" for line in lines)


def told(summary: dict[str, Any]) -> str:
    """A comparison for people, as Markdown."""
    parts = [markdown(*table(summary))]
    if mined := mined_table(summary):
        parts.append(markdown(MINED, mined))
    return "\n".join([*parts, *conclusion(summary)])


def conclusion(summary: dict[str, Any]) -> list[str]:
    """What can and cannot be said, plainly."""
    baseline, metric = summary["baseline"], summary["metric"]
    said = []
    for verdict, words in (
        ("ahead", f"ahead of {baseline} in {metric}"),
        ("behind", f"behind {baseline} in {metric}"),
        ("within noise", f"not told apart from {baseline} in {metric}: within noise"),
    ):
        names = [row["name"] for row in summary["lines"] if row["difference"]["verdict"] == verdict]
        if names:
            said.append(f"{words[0].upper()}{words[1:]}: {', '.join(names)}.")
    if len(summary["seeds"]) < 3:
        said.append(
            f"{len(summary['seeds'])} seed(s): how much training differs by chance is hardly known."
        )
    return said


def write_comparison(
    output: str, grid: Compared, results: Sequence[LineResult], protocol: str
) -> dict[str, Any]:
    """Write results.json, table.md and report/index.html; return the summary with its page's URI.

    ``protocol`` names the benchmark whose published figures are shown beside, if it has some.
    """
    summary = summarise_lines(grid, results)
    columns, rows = table(summary)
    said = conclusion(summary)  # plainly, above the table
    published = {
        name: {key: f"{value:.2f}" for key, value in row.items()}
        for name, row in PUBLISHED.get(protocol, {}).items()
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qure_core.report", ""), autoescape=True
    )
    figures = [
        {
            "src": recall_curves({r["name"]: r["curves"] for r in summary["lines"]}, grid.metric),
            "alt": f"{grid.metric} against samples",
        }
    ]
    points = {
        row["name"]: [
            (margin, 100 * share)
            for own in row["rounds"]
            for margin, share in own
            if share is not None
        ]
        for row in summary["lines"]
    }
    if any(points.values()):
        src = share_against_margin({name: own for name, own in points.items() if own})
        figures.append({"src": src, "alt": "false negatives against margin"})
    page = environment.get_template("comparison.html.j2").render(
        output=output,
        seeds=", ".join(map(str, grid.seeds)),
        columns=columns,
        rows=rows,
        said=said,
        mined_columns=MINED,
        mined=mined_table(summary),
        figures=figures,
        published=published,
        metric=grid.metric,
        baseline=summary["baseline"],
        settings={
            name: ", ".join(f"{key} {value}" for key, value in own.items()) or "the config's own"
            for name, own in grid.lines.items()
        },
    )
    uri = storage.join(output, "report", "index.html")
    storage.write_bytes(uri, page.encode())
    text = told(summary) + "\n"
    storage.write_bytes(storage.join(output, "table.md"), text.encode())
    summary |= {"report": uri, "said": said}
    storage.write_json(storage.join(output, "results.json"), summary)
    return summary
