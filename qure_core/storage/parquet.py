"""Parquet tables at URIs."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qure_core import storage


def parquet_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def write_parquet(uri: str, table: pa.Table) -> None:
    storage.write_bytes(uri, parquet_bytes(table))


def write_row_groups(
    file: str | Path, tables: Iterable[pa.Table], schema: pa.Schema, **options: Any
) -> None:
    """Write tables of one schema as one local file, a row group each, holding one at a time.

    ``options`` are the writer's.
    """
    with pq.ParquetWriter(file, schema, **{"compression": "zstd"} | options) as writer:
        for table in tables:
            writer.write_table(table)


def write_parquet_parts(uri: str, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """`write_row_groups` at a URI, where the file appears whole."""
    with storage.temporary_folder("parquet") as folder:
        file = f"{folder}/part.parquet"
        write_row_groups(file, tables, schema)
        storage.put_file(file, uri)


def read_committed_parquet(
    uri: str, name: str, manifest: dict[str, Any], columns: list[str] | None = None
) -> pa.Table:
    """A table of a committed directory; `InputError` if its bytes are not those committed."""
    data = storage.read_committed(uri, name, manifest)
    return pq.read_table(io.BytesIO(data), columns=columns)


def read_parquet(uri: str, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(io.BytesIO(storage.read_bytes(uri)), columns=columns)


def read_parquet_parts(uri: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a file, a few rows at a time."""
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        yield from pq.ParquetFile(file).iter_batches(1024, columns=columns)
