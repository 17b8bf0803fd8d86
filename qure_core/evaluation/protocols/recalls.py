"""Recalls per category: any layout's own split, and FashionIQ's val with both its galleries."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from qure_core.base.errors import InputError, raise_problems
from qure_core.data.fashioniq import read_fashioniq
from qure_core.data.schema import Split
from qure_core.data.sources import files_of, has_split, load_split
from qure_core.evaluation.metrics import fashioniq_summary, found_in_top, r_precision
from qure_core.evaluation.protocols.protocol import (
    Asked,
    Galleries,
    Protocol,
    Request,
    Result,
    Rows,
    ties,
)
from qure_core.evaluation.published import comparison_table


def galleries_of(split: Split, kind: str) -> Galleries:
    """The images ranked per category: the whole split, or the union of references and targets."""
    if kind == "split":
        return split.galleries
    union: dict[str, set[str]] = {category: set() for category in split.galleries}
    for triplet in split.triplets:
        union[triplet.category] |= {triplet.reference_id, str(triplet.target_id)}
    return {category: tuple(sorted(ids)) for category, ids in union.items()}


def own_split(request: Request) -> Split:
    """A split of the configured data with targets; `InputError` if there is none."""
    data = request.data
    if not has_split(data, request.split):
        raise InputError(
            f"--split: {data.root} ({data.format} layout) has no {request.split!r} split; name one "
            "that is there, or set data.format and data.root to your data's"
        )
    split = load_split(data, request.split)
    if any(triplet.target_id is None for triplet in split.triplets):
        raise InputError(
            f"--split: the {request.split!r} split of {data.root} has no targets to measure by; "
            "name another, or write a benchmark's submission with its -test protocol"
        )
    return split


class Own(Protocol):
    """Recalls per category as FashionIQ has them, and measures of relevance where it is known."""

    name: ClassVar[str] = "own"
    described: ClassVar[str] = "FashionIQ's protocol, average over categories"
    columns: ClassVar[tuple[str, ...]] = (
        *("R@10", "R@50", "mean", "R-precision", "relevant in top 10"),
    )
    drawn: ClassVar[tuple[str, ...]] = ("R@10", "R@50", "R-precision")
    top_k: ClassVar[int] = 1

    def load(self, request: Request) -> Split:
        """A split of the configured data."""
        return own_split(request)

    def metrics(self, rows: Rows, split: Split) -> dict[str, Any]:
        """Recalls by category and their average; R-precision and found-in-top-10 likewise."""
        del split
        ranks: dict[str, list[int]] = {}
        for row in rows:
            ranks.setdefault(row["category"], []).append(row["target_rank"])
        metrics: dict[str, Any] = {"recall": fashioniq_summary(ranks)}
        judged = [row["relevant_ranks"] for row in rows if row["relevant_ranks"]]
        if judged:
            metrics["relevance"] = {
                "queries": len(judged),
                "R-precision": float(np.mean([r_precision(r, len(r)) for r in judged]) * 100),
                "relevant in top 10": float(
                    np.mean([found_in_top(r, len(r), 10) for r in judged]) * 100
                ),
            }
        return metrics

    def headline(self, metrics: dict[str, Any]) -> dict[str, float]:
        """The average over categories, and the measures of relevance."""
        figures = metrics["recall"]["average"] | metrics.get("relevance", {})
        return {name: figures[name] for name in self.columns if name in figures}

    def by_category(self, metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Recalls of each category."""
        recall = metrics["recall"]
        return {category: row for category, row in recall.items() if category != "average"}

    def result(self, asked: Asked) -> Result:
        """The metrics, and what was ranked."""
        result, files = super().result(asked)
        sizes = {category: len(ids) for category, ids in asked.split.galleries.items()}
        return result | {"split": asked.split.name, "gallery_images": sizes}, files

    def lines(self, result: dict[str, Any], dataset: str | None) -> list[str]:
        """Recalls by category, and the measures of relevance."""
        del dataset
        lines = [
            f"split {result['split']}: {result['queries']:,} queries; "
            f"{result['tied']} have a tied target",
            *_recall_lines(result["recall"]),
        ]
        if relevance := result.get("relevance"):
            cells = "  ".join(
                f"{name} {value:.2f}" for name, value in relevance.items() if name != "queries"
            )
            lines.append(f"  relevance    {cells}  ({relevance['queries']:,} queries)")
        return lines


def _recall_lines(recall: dict[str, dict[str, float]]) -> list[str]:
    lines = []
    for category, row in recall.items():
        cells = "  ".join(f"{name} {value:6.2f}" for name, value in row.items())
        lines.append(f"  {category:<12} {cells}")
    return lines


class FashionIQ(Own):
    """FashionIQ's val split, ranked against both galleries that papers use."""

    name: ClassVar[str] = "fashioniq"

    def load(self, request: Request) -> Split:
        """FashionIQ's val split."""
        data = request.data
        split, problems = read_fashioniq(files_of(data), "val", data.categories, data.texts)
        raise_problems(problems, f"{request.data.root} ({self.name})")
        return split

    def result(self, asked: Asked) -> Result:
        """Recalls by gallery, "split" and "union"."""
        result = {}
        for gallery in ("split", "union"):
            rows = asked.rank(f"{self.name} {gallery}", galleries_of(asked.split, gallery))
            recall = self.metrics(rows, asked.split)["recall"]
            result[gallery] = {"recall": recall, "queries": len(rows), "tied": ties(rows)}
        return result, {}

    def lines(self, result: dict[str, Any], dataset: str | None) -> list[str]:
        """Both galleries, each average beside published ones."""
        lines = []
        for gallery, part in result.items():
            lines.append(f"gallery: {gallery}; {part['tied']} queries have a tied target")
            lines += _recall_lines(part["recall"])
            average = part["recall"]["average"]
            lines.append(comparison_table(dataset, average, f"{gallery} gallery"))
        return lines
