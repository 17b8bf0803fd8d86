"""Many questions, asked on the cluster by Ray Data: each actor holds an encoder and the index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy

from qure_core.base.errors import InputError, bad_input_of_workers
from qure_core.runtime.progress import Progress
from qure_core.runtime.resources import granted_device
from qure_core.search.retriever import Question, Retriever
from qure_core.storage.parquet import write_parquet_parts

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
_AT_ONCE = 64  # questions that a task takes: always as many, so that actors are no matter


class _Asker:
    """Actor: answers some questions."""

    def __init__(self, index: str, checkpoint: str | None, cache: str, top: int) -> None:
        self._opened = (index, checkpoint), cache
        self.top = top

    # When it is first needed: what an actor raises before its first call reaches nobody as it is.
    @cached_property
    def retriever(self) -> Retriever:
        places, cache = self._opened
        return Retriever.open(*places, str(granted_device()), cache)

    def __call__(self, batch: pa.Table) -> pa.Table:
        places, rows = batch["place"].to_pylist(), batch["row"].to_pylist()
        questions = []
        for row in map(json.loads, rows):
            own = {name: row.get(name) for name in ("image", "text", "category")}
            where = tuple((row.get("where") or {}).items())
            questions.append(Question(**own, exclude=tuple(row.get("exclude", ())), where=where))
        answers = self.retriever.ask_all(questions, self.top, places)
        found = [
            {"question": name} | asdict(answer)
            for name, own in zip(batch["name"].to_pylist(), answers, strict=True)
            for answer in own
        ]
        return pa.Table.from_pylist(found, ANSWERS)


def answer_batch(
    index: str,
    questions: Sequence[tuple[str, str, dict[str, Any]]],
    output: str,
    *,
    top: int,
    checkpoint: str | None,
    cache: str,
    actors: int,
    resources: dict[str, Any],
) -> None:
    """Write the ``top`` answers of every question (its place in a file, its name, its fields) to
    one Parquet file, in order; `InputError` naming the place of one that cannot be asked."""
    if top < 1:
        raise InputError(f"--top: {top} is less than 1")
    tables = [
        pa.table(
            {
                "place": [place for place, _, _ in some],
                "name": [name for _, name, _ in some],
                "row": [json.dumps(row) for _, _, row in some],
            }
        )
        for some in (questions[i : i + _AT_ONCE] for i in range(0, len(questions), _AT_ONCE))
    ]
    context = ray.data.DataContext.get_current()
    before, context.execution_options.preserve_order = (
        context.execution_options.preserve_order,
        True,
    )
    progress = Progress("answer", len(questions), "questions")

    def answered() -> Iterator[pa.Table]:
        found = ray.data.from_arrow(tables).map_batches(
            _Asker,
            fn_constructor_args=(index, checkpoint, cache, top),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(actors, len(tables))),
            **resources,
        )
        parts: Iterable[pa.Table] = found.iter_batches(batch_size=None, batch_format="pyarrow")
        for number, table in enumerate(parts):
            yield table.cast(ANSWERS)
            if number < len(tables):
                progress.advance(len(tables[number]))

    try:
        with bad_input_of_workers():
            write_parquet_parts(output, answered(), ANSWERS)
    finally:
        context.execution_options.preserve_order = before
