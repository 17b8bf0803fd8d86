"""Images inside larger files: Parquet and Arrow tables, and WebDataset tars, read one by one.

An image in a shard has a URI of its own, the shard's and where it lies in it:

    s3://bucket/images-00003.parquet#12.7      row 7 of row group 12
    /data/part-00000.arrow#0.4711              row 4711 of record batch 0
    s3://bucket/shard-000017.tar#1536+48213    48,213 bytes from byte 1,536

`entries` lists a shard once, `read` fetches one image: of a tar exactly its bytes, of a table the
row group it is in, the latest of which are kept.
"""

from __future__ import annotations

import json
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.data.layout import IMAGE_SUFFIXES, is_text, without_suffix

SHARD_SUFFIXES = (".parquet", ".arrow", ".tar")
_LOCATED = re.compile(r"(.*\.(?:parquet|arrow))#(\d+)\.(\d+)|(.*\.tar)#(\d+)\+(\d+)", re.DOTALL)
_GROUPS = 8  # row groups kept by a process
_SHARDS = 64  # files kept open
_TAR_AHEAD = 2**20  # bytes read at a time of a tar whose images are read in order
_TAR_GAP = 2**16
_READ_AHEAD = 8 * 2**20  # bytes asked for at a time where a tar is read through

Entry = dict[str, Any]
"""image_id, and "first", "second": its place in the shard; category where it is known."""
ENTRIES = pa.schema(
    [
        ("image_id", pa.string()),
        ("category", pa.string()),
        ("first", pa.int64()),
        ("second", pa.int64()),
    ]
)
LISTED = pa.schema([*ENTRIES, ("shard", pa.string())])
"""`ENTRIES` of several shards."""


def shard_of(uri: str) -> str | None:
    """The shard that holds the image at ``uri``; None if it is a file of its own."""
    match = _LOCATED.fullmatch(uri)
    return match and (match[1] or match[4])


def located(shard: str, first: int, second: int) -> str:
    """The URI of an image in a shard."""
    return f"{shard}#{first}{'+' if shard.endswith('.tar') else '.'}{second}"


def order_of(uri: str) -> tuple[str, int, int]:
    """Sorts images of shards in the order in which they are read best."""
    match = _LOCATED.fullmatch(uri)
    if match is None:
        return uri, 0, 0
    return str(match[1] or match[4]), int(match[2] or match[5]), int(match[3] or match[6])


def read(uri: str, limit: int | None = None) -> bytes:
    """The bytes of one image in a shard, or its first ``limit``.

    Raises `FileNotFoundError` if the shard is gone, `InputError` if it has no such image.
    """
    match = _LOCATED.fullmatch(uri)
    assert match is not None, uri
    if match[4]:
        first, size = int(match[5]), int(match[6])
        return _tar(match[4]).read(first, size if limit is None else min(size, limit))
    shard, group, row = match[1], int(match[2]), int(match[3])
    try:
        value = _images_of(shard, group)[row].as_py()
    except IndexError:
        raise InputError(f"{uri}: the file has no such row; it has changed") from None
    except (pa.ArrowException, OSError) as error:
        raise _damage(error, uri) from None
    if value is None:
        raise InputError(f"{uri}: the row has no bytes of an image; write them into the shard")
    return bytes(value[:limit])


class _Tar:
    """Reads parts of a remote tar: ahead where they follow one another, else just what is asked."""

    def __init__(self, uri: str) -> None:
        self.uri, self.ahead = uri, 0 if storage.is_local(uri) else _TAR_AHEAD
        self.lock = threading.Lock()
        self.start, self.held, self.end = 0, b"", -1  # what is held, and where the last part ended

    def read(self, first: int, size: int) -> bytes:
        if not self.ahead:
            return storage.read_range(self.uri, first, size)
        with self.lock:
            place = first - self.start
            if not 0 <= place <= len(self.held) - size:
                # Between two images lie headers and what else a sample has.
                follows = 0 <= first - self.end <= _TAR_GAP
                self.end = first + size
                if not follows:
                    return storage.read_range(self.uri, first, size)
                length = max(size, self.ahead)
                self.start, self.held = first, storage.read_range(self.uri, first, length)
                place = 0
            self.end = max(self.end, first + size)
            return self.held[place : place + size]


_tar = lru_cache(maxsize=_SHARDS)(_Tar)


def _damage(error: Exception, uri: str) -> Exception:
    """What is said of a shard that is none; an error of the storage itself stays what it is."""
    # Arrow's own, of nonsense within a file, have no number.
    if isinstance(error, FileNotFoundError) or (
        isinstance(error, OSError) and (error.errno is not None or storage.is_away(error))
    ):
        return error
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(f"{uri}: cannot be read ({first}); make the shard again")


_reading = threading.Lock()


def _images_of(shard: str, group: int) -> pa.Array:
    """The image column of one row group or record batch."""
    with _reading:  # so that threads do not fetch the same one
        return _cached(shard, group)


@lru_cache(maxsize=_GROUPS)
def _cached(shard: str, group: int) -> pa.Array:
    return _opened(shard)(group)


@lru_cache(maxsize=_SHARDS)
def _opened(shard: str) -> Callable[[int], pa.Array]:
    """Gives the image column of one of a table's parts, by number."""
    if shard.endswith(".parquet"):
        fs, path = storage.filesystem(shard)
        if not fs.exists(path):
            raise FileNotFoundError(shard)
        # No cache of its own: a row group's columns are asked for as one range.
        file = pq.ParquetFile(fs.open(path, "rb", cache_type="none"), pre_buffer=True)
        column = _image_column(file.schema_arrow, shard)
        return lambda group: _image_bytes(
            file.read_row_group(group, columns=[column]).combine_chunks(), shard
        )
    batches = _record_batches(shard)
    return lambda group: _image_bytes(pa.Table.from_batches([batches[group]]), shard)


def _record_batches(shard: str) -> list[pa.RecordBatch]:
    """An Arrow file's batches: mapped into memory from a disk, fetched whole from elsewhere."""
    if storage.is_local(shard):
        source = pa.memory_map(storage.filesystem(shard)[1])
    else:
        source = pa.BufferReader(storage.read_bytes(shard))
    try:
        reader = pa.ipc.open_file(source)
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except pa.ArrowInvalid:
        source.seek(0)
        return list(pa.ipc.open_stream(source))  # as `datasets` saves them


def _image_column(schema: pa.Schema, shard: str) -> str:
    if "image" not in schema.names:
        raise InputError(
            f"{shard}: has no column 'image' (it has {', '.join(schema.names)}); name the column "
            "of encoded images so"
        )
    kind = schema.field("image").type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return "image.bytes"
    if not _is_binary(kind):
        raise InputError(f"{shard}: its column 'image' is {kind}, not the bytes of image files")
    return "image"


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_bytes(table: pa.Table, shard: str) -> pa.Array:
    """The bytes of a table's images; Hugging Face's have them in a struct."""
    _image_column(table.schema, shard)
    column = table["image"].combine_chunks()
    return column.field("bytes") if pa.types.is_struct(column.type) else column


def entries(shard: str) -> Iterator[pa.Table]:
    """Where each image of a shard is, some at a time (`ENTRIES`), and in the metadata what was
    passed over ("skipped"). Raises `InputError` if the shard is not such a file."""
    try:
        if shard.endswith(".tar"):
            yield _tar_entries(shard)
        elif shard.endswith(".parquet"):
            yield from _parquet_entries(shard)
        else:
            for number, batch in enumerate(_record_batches(shard)):
                yield _table_entries(pa.Table.from_batches([batch]), number, shard)
    except (pa.ArrowException, tarfile.TarError, EOFError, OSError) as error:
        raise _damage(error, shard) from None


def _parquet_entries(shard: str) -> Iterator[pa.Table]:
    fs, path = storage.filesystem(shard)
    with fs.open(path, "rb", cache_type="none") as opened:
        file = pq.ParquetFile(opened, pre_buffer=True)
        schema = file.schema_arrow
        column = _image_column(schema, shard)
        wanted = [name for name in ("image_id", "category") if name in schema.names]
        if "image_id" not in wanted and column == "image.bytes":
            wanted.append("image.path")
        for group in range(file.num_row_groups):
            yield _table_entries(file.read_row_group(group, columns=wanted), group, shard)


def _table_entries(table: pa.Table, group: int, shard: str) -> pa.Table:
    rows = table.num_rows
    if "image_id" in table.column_names:
        names = table["image_id"].cast(pa.string()).to_pylist()
    elif "image" in table.column_names and pa.types.is_struct(table["image"].type):
        names = table["image"].combine_chunks().field("path").to_pylist()
    else:
        raise InputError(
            f"{shard}: has no column 'image_id', by which its images are named (it has "
            f"{', '.join(table.column_names) or 'only images'}); add one"
        )
    if None in names:
        raise InputError(f"{shard}: row {names.index(None)} of group {group} has no image_id")
    categories = pa.nulls(rows, pa.string())
    if "category" in table.column_names:
        categories = table["category"].cast(pa.string()).combine_chunks()
    columns = {
        "image_id": [without_suffix(name) for name in names],
        "category": categories,
        "first": pa.array([group] * rows, pa.int64()),
        "second": pa.array(range(rows), pa.int64()),
    }
    return pa.table(columns, schema=ENTRIES)


def _tar_entries(shard: str) -> pa.Table:
    """A tar's images by WebDataset's rule: a sample's name ends at the first dot of the file's."""
    fs, path = storage.filesystem(shard)
    rows: list[Entry] = []
    category_of: dict[str, str] = {}
    skipped = 0
    with (
        fs.open(path, "rb", block_size=_READ_AHEAD, cache_type="readahead") as opened,
        tarfile.open(fileobj=opened, mode="r|") as tar,
    ):
        for member in tar:
            folder, _, file = member.name.rpartition("/")
            stem, dot, suffix = file.partition(".")
            name = without_suffix(f"{folder.removeprefix('.')}/{stem}".strip("/"))
            if not member.isfile() or not stem or folder.startswith("__MACOSX"):
                continue
            if not is_text(name):
                skipped += 1
                continue
            if f"{dot}{suffix.lower()}" in IMAGE_SUFFIXES:
                place = {"first": member.offset_data, "second": member.size}
                rows.append({"image_id": name, "category": None} | place)
            elif suffix == "json":
                data = tar.extractfile(member)
                if data and (category := _category(data.read())):
                    category_of[name] = category
            elif suffix.lower().endswith(IMAGE_SUFFIXES):
                skipped += 1  # another part of a sample, such as a mask
    for row in rows:
        row["category"] = category_of.get(row["image_id"])
    table = pa.Table.from_pylist(rows, ENTRIES)
    return table.replace_schema_metadata({"skipped": str(skipped)})


def _category(data: bytes) -> str | None:
    """The category that a sample's JSON names, if any."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    category = value.get("category") if isinstance(value, dict) else None
    return category if isinstance(category, str) else None
