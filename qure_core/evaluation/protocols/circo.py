"""CIRCO: mAP and recall on val, and the test server's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from qure_core.base.errors import InputError
from qure_core.data.circo import read_circo
from qure_core.data.schema import Split
from qure_core.evaluation.metrics import CIRCO_CUTS, circo_summary
from qure_core.evaluation.protocols.protocol import Protocol, Request, Rows, benchmark_split
from qure_core.evaluation.protocols.submissions import Submission


def circo_submission(predictions: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """The CIRCO test server's file: query id -> 50 image ids, as integers."""
    return {query: [int(name) for name in names[:50]] for query, names in predictions.items()}


def check_circo_submission(
    value: Mapping[str, Sequence[int]], query_ids: Sequence[str], gallery: Sequence[str]
) -> None:
    """Raise `InputError` unless every query has 50 distinct integer ids of the gallery."""
    faults = []
    if set(value) != set(query_ids):
        faults.append(f"{len(value)} queries where {len(query_ids)} are needed")
    known = {int(name) for name in gallery}
    for query, names in value.items():
        if len(names) != 50 or len(set(names)) != 50:
            faults.append(f"query {query}: {len(set(names))} distinct ids of 50")
        elif not all(type(name) is int for name in names):
            faults.append(f"query {query}: ids must be integers")
        elif not set(names) <= known:
            faults.append(f"query {query}: {min(set(names) - known)} is not in the gallery")
    if faults:
        raise InputError("CIRCO submission: " + "; ".join(faults[:10]))


class CIRCO(Protocol):
    """CIRCO's val split."""

    name: ClassVar[str] = "circo"
    described: ClassVar[str] = "CIRCO's protocol"
    columns: ClassVar[tuple[str, ...]] = tuple(
        f"{metric}@{k}" for metric in ("mAP", "R") for k in CIRCO_CUTS
    )
    drawn: ClassVar[tuple[str, ...]] = ("mAP@5", "mAP@10", "R@10")

    def load(self, request: Request) -> Split:
        """The val split."""
        return benchmark_split(read_circo, request, "val", self.name)

    def metrics(self, rows: Rows, split: Split) -> dict[str, Any]:
        """mAP and recall at each cut, as "map"."""
        summary = circo_summary(
            {row["query_id"]: row["top_ids"] for row in rows},
            {t.query_id: t.relevant_ids for t in split.triplets},
            {t.query_id: str(t.target_id) for t in split.triplets},
        )
        return {"map": summary}

    def headline(self, metrics: dict[str, Any]) -> dict[str, float]:
        """All of them."""
        return dict(metrics["map"])


class CIRCOTest(Submission):
    """CIRCO's test split: the server's file."""

    name: ClassVar[str] = "circo-test"

    def load(self, request: Request) -> Split:
        """The test split."""
        return benchmark_split(read_circo, request, "test", self.name)

    def files(self, rows: Rows, split: Split) -> dict[str, Any]:
        """submission.json."""
        (gallery,) = split.galleries.values()
        value = circo_submission({row["query_id"]: row["top_ids"] for row in rows})
        check_circo_submission(value, [t.query_id for t in split.triplets], gallery)
        return {"submission.json": value}
