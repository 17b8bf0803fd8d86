"""Arrow IPC files: written whole, read by memory map where the storage is a local path."""

from __future__ import annotations

import pyarrow as pa

from qure_core import storage


def arrow_bytes(table: pa.Table) -> memoryview:
    """``table`` as one Arrow IPC file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())


def write_arrow(uri: str, table: pa.Table) -> dict[str, int | str]:
    """Write ``table`` as one Arrow IPC file; return its manifest entry (bytes, sha256)."""
    data = arrow_bytes(table)
    storage.write_bytes(uri, data)
    return storage.file_facts(data)


def read_arrow(uri: str) -> pa.Table:
    """The table in ``uri``, every column one chunk at most; zero copies from a local file."""
    if storage.is_local(uri):
        source = pa.memory_map(storage.filesystem(uri)[1])
    else:
        source = pa.BufferReader(storage.read_bytes(uri))
    return pa.ipc.open_file(source).read_all().combine_chunks()
