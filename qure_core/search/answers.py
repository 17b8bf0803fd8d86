"""Answers of many questions as a Parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa

from qure_core.search.retriever import Answer
from qure_core.storage.parquet import write_parquet

ANSWERS = pa.schema(
    [
        ("question", pa.string()),
        ("rank", pa.int64()),
        ("image_id", pa.string()),
        ("score", pa.float32()),
        ("uri", pa.string()),
        ("category", pa.string()),
    ]
)


def write_answers(uri: str, names: Sequence[str], answers: Sequence[Sequence[Answer]]) -> None:
    """A row for each answer of each question, in order."""
    rows = [
        {"question": name} | asdict(answer)
        for name, own in zip(names, answers, strict=True)
        for answer in own
    ]
    write_parquet(uri, pa.Table.from_pylist(rows, ANSWERS))
