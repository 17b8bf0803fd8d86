"""CIRR: recalls on val without the reference image, and the test server's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from qure_core.base.errors import InputError
from qure_core.data.cirr import read_cirr
from qure_core.data.schema import Split
from qure_core.evaluation.metrics import CIRR_RECALLS, CIRR_SUBSET_RECALLS, cirr_summary
from qure_core.evaluation.protocols.protocol import Protocol, Request, Rows, benchmark_split
from qure_core.evaluation.protocols.submissions import Submission
from qure_core.storage import compact_json

MAX_SUBMISSION_BYTES = 5 * 1024 * 1024  # the server's limit per file


def cirr_submission(metric: str, ranked: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A test-server file: ``metric`` "recall" (50 names) or "recall_subset" (3 names) per pair."""
    length = {"recall": 50, "recall_subset": 3}[metric]
    rows = {pair: list(names[:length]) for pair, names in ranked.items()}
    return {"version": "rc2", "metric": metric, **rows}


def check_cirr_submission(
    value: Mapping[str, Any],
    pair_ids: Sequence[str],
    gallery: Sequence[str],
    references: Mapping[str, str],
) -> None:
    """Raise `InputError` unless a submission keeps the server's rules.

    Every pair once, the metric's number of distinct names of the gallery, never the reference,
    and at most 5 MB.
    """
    faults = []
    metric = value.get("metric")
    if value.get("version") != "rc2" or metric not in ("recall", "recall_subset"):
        faults.append(f"version {value.get('version')!r}, metric {metric!r}")
    length = 50 if metric == "recall" else 3
    rows = {key: names for key, names in value.items() if key not in ("version", "metric")}
    if missing := sorted(set(pair_ids) - set(rows)):
        faults.append(f"{len(missing)} pairs are missing, first {missing[0]}")
    if extra := sorted(set(rows) - set(pair_ids)):
        faults.append(f"{len(extra)} unknown pairs, first {extra[0]}")
    known = set(gallery)
    for pair, names in rows.items():
        if len(names) != length or len(set(names)) != length:
            faults.append(f"pair {pair}: {len(set(names))} distinct names of {length}")
        elif not set(names) <= known:
            faults.append(f"pair {pair}: {sorted(set(names) - known)[0]} is not in the gallery")
        elif references.get(pair) in names:
            faults.append(f"pair {pair}: holds its own reference")
    size = len(compact_json(value))
    if size > MAX_SUBMISSION_BYTES:
        faults.append(f"{size:,} bytes exceed the server's {MAX_SUBMISSION_BYTES:,}")
    if faults:
        raise InputError("CIRR submission: " + "; ".join(faults[:10]))


class CIRR(Protocol):
    """CIRR's val split: R@k without the reference, R_s@k within the image set."""

    name: ClassVar[str] = "cirr"
    described: ClassVar[str] = "CIRR's protocol, R_s within the image set"
    columns: ClassVar[tuple[str, ...]] = (
        *(f"R@{k}" for k in CIRR_RECALLS),
        *(f"R_s@{k}" for k in CIRR_SUBSET_RECALLS),
        "mean(R@5, R_s@1)",
    )
    drawn: ClassVar[tuple[str, ...]] = ("R@1", "R@5", "R@10", "R_s@1")
    top_k: ClassVar[int] = 1
    drop_reference: ClassVar[bool] = True

    def load(self, request: Request) -> Split:
        """The val split."""
        return benchmark_split(read_cirr, request, "val", self.name)

    def metrics(self, rows: Rows, split: Split) -> dict[str, Any]:
        """The recalls, as "recall"."""
        del split
        summary = cirr_summary(
            [row["target_rank"] for row in rows],
            [row["subset_ids"].index(row["target_id"]) for row in rows],
        )
        return {"recall": summary}

    def headline(self, metrics: dict[str, Any]) -> dict[str, float]:
        """All of them."""
        return dict(metrics["recall"])


class CIRRTest(Submission):
    """CIRR's test1 split: the server's two files."""

    name: ClassVar[str] = "cirr-test"
    drop_reference: ClassVar[bool] = True

    def load(self, request: Request) -> Split:
        """The test1 split."""
        return benchmark_split(read_cirr, request, "test1", self.name)

    def files(self, rows: Rows, split: Split) -> dict[str, Any]:
        """recall.json and recall_subset.json."""
        references = {t.query_id: t.reference_id for t in split.triplets}
        (gallery,) = split.galleries.values()
        files = {}
        for metric, column in (("recall", "top_ids"), ("recall_subset", "subset_ids")):
            value = cirr_submission(metric, {row["query_id"]: row[column] for row in rows})
            check_cirr_submission(value, list(references), gallery, references)
            files[f"{metric}.json"] = value
        return files
