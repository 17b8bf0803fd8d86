"""Listing shards of packed images on Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray.data

from qure_core.base.errors import bad_input_of_workers
from qure_core.data.packed import LISTED, entries
from qure_core.runtime.progress import Progress
from qure_core.runtime.resources import connect


def listed(shards: list[str]) -> Iterator[tuple[str, pa.Table, int]]:
    """Each shard with its rows (`LISTED`) and how many files were passed over; a task a shard."""
    connect()  # reading the data may be the first thing that needs Ray
    tasks = ray.data.from_arrow([pa.table({"shard": [shard]}) for shard in shards])
    rows = tasks.map_batches(_list_shard, batch_size=None, batch_format="pyarrow")
    progress = Progress("index", len(shards), "shards")
    with bad_input_of_workers():
        for row in rows.iter_rows():
            part: pa.Table = pa.ipc.open_stream(row["rows"]).read_all()
            progress.advance(1)
            yield row["shard"], part, row["skipped"]


def _list_shard(table: pa.Table) -> pa.Table:
    """Task: list the shards of a block."""
    rows: list[dict[str, Any]] = []
    for shard in table["shard"].to_pylist():
        parts, skipped = [], 0
        for part in entries(shard):
            skipped += int((part.schema.metadata or {}).get(b"skipped", b"0"))
            own = pa.array([shard] * part.num_rows, pa.string())
            parts.append(part.replace_schema_metadata().append_column("shard", own))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, LISTED) as writer:
            writer.write_table(pa.concat_tables([LISTED.empty_table(), *parts]))
        rows.append({"shard": shard, "rows": sink.getvalue().to_pybytes(), "skipped": skipped})
    schema = pa.schema(
        [("shard", pa.string()), ("rows", pa.large_binary()), ("skipped", pa.int64())]
    )
    return pa.Table.from_pylist(rows, schema)
