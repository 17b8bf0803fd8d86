"""Test splits, whose targets a benchmark's server keeps: rankings become files to submit."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from qure_core.data.schema import Split
from qure_core.evaluation.protocols.protocol import Asked, Protocol, Result, Rows


class Submission(Protocol):
    """A protocol without figures: its result is files that were checked by the server's rules."""

    @abstractmethod
    def files(self, rows: Rows, split: Split) -> dict[str, Any]:
        """The files' contents by name; `InputError` if one breaks a rule."""

    def metrics(self, rows: Rows, split: Split) -> dict[str, Any]:
        """None are known."""
        del rows, split
        return {}

    def headline(self, metrics: dict[str, Any]) -> dict[str, float]:
        """None are known."""
        del metrics
        return {}

    def result(self, asked: Asked) -> Result:
        """How many queries the files answer, and the files."""
        rows = asked.rank(self.name, asked.split.galleries)
        return {"queries": len(rows)}, self.files(rows, asked.split)

    def lines(self, result: dict[str, Any], dataset: str | None) -> list[str]:
        """What was written."""
        del dataset
        queries = result["queries"]
        return [f"submission for {queries:,} queries, checked against the server's rules"]
