"""What a protocol is: which data it ranks, how, and what figures it makes of the rankings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qure_core.base.config import DataSettings
from qure_core.base.errors import Problem, raise_problems
from qure_core.data.layout import Files
from qure_core.data.schema import Split
from qure_core.data.sources import files_of
from qure_core.evaluation.published import comparison_table

Rows = Sequence[dict[str, Any]]
"""Ranking rows, as `evaluation.rows` makes them."""
Galleries = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Request:
    """What is asked to be evaluated: the data, a split of them, and judgements where needed."""

    data: DataSettings
    split: str = "val"
    judged: str | None = None


@dataclass(frozen=True)
class Asked:
    """What a protocol makes its result of.

    split: as it loaded it for the request. rank: ranks galleries of it, under a name. embeddings:
    their URI.
    """

    request: Request
    split: Split
    rank: Callable[[str, Galleries], Rows]
    embeddings: str


Result = tuple[dict[str, Any], dict[str, Any]]
"""Figures, and contents of files by name."""


def benchmark_split(
    read: Callable[[Files, str], tuple[Split, list[Problem]]],
    request: Request,
    split: str,
    name: str,
) -> Split:
    """A benchmark's split, read from the data's root; `InputError` that lists what is wrong."""
    found, problems = read(files_of(request.data), split)
    raise_problems(problems, f"{request.data.root} ({name})")
    return found


class Protocol(ABC):
    """One protocol; the same in training's evaluations, ``evaluate.py``, tables and curves.

    name: what it is called in settings and results. described: what its figures are.
    columns: the names of its headline's figures, as tables show them. drawn: those that curves
    show. drop_reference: whether the reference image is left out of a query's ranking. top_k: how
    many of a ranking's best images its figures or files need.
    """

    name: ClassVar[str]
    described: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    drawn: ClassVar[tuple[str, ...]] = ()
    drop_reference: ClassVar[bool] = False
    top_k: ClassVar[int] = 50

    @abstractmethod
    def load(self, request: Request) -> Split:
        """The split that it ranks; `InputError` that lists what is wrong with it."""

    def judgements(self, request: Request) -> list[Any]:
        """What a result depends on besides the split."""
        del request
        return []

    @abstractmethod
    def metrics(self, rows: Rows, split: Split) -> dict[str, Any]:
        """All figures of a split's rankings, in percent."""

    @abstractmethod
    def headline(self, metrics: dict[str, Any]) -> dict[str, float]:
        """The figures that tables and curves show, those of `columns` that there are."""

    def by_category(self, metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Figures of each category, where the protocol has them."""
        del metrics
        return {}

    def result(self, asked: Asked) -> Result:
        """What ``evaluate.py`` keeps, and submission files by name."""
        rows = asked.rank(self.name, asked.split.galleries)
        return self.metrics(rows, asked.split) | {"queries": len(rows), "tied": ties(rows)}, {}

    def lines(self, result: dict[str, Any], dataset: str | None) -> list[str]:
        """A result for people, beside published figures if the data are ``dataset``'s."""
        figures = self.headline(result)
        return [comparison_table(dataset, figures, "val"), f"{result['tied']} tied targets"]


def ties(rows: Rows) -> int:
    """How many queries' targets share their score with another image."""
    return sum(row["target_ties"] > 0 for row in rows)
