"""A catalogue's attributes: a table with a row an image, from Parquet, CSV or JSON lines."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.data.layout import plain

IMAGE_ID = "image_id"


@dataclass(frozen=True)
class Catalogue:
    """Attributes of images: values by image id, in the order of ``attributes``; sorted by id.

    category_of: an image's category, where a column gives it. incomplete: images left out because
    a value is missing, by the attribute that is.
    """

    attributes: tuple[str, ...]
    values_of: dict[str, tuple[str, ...]]
    category_of: dict[str, str]
    incomplete: Counter[str]


def _table(uri: str) -> pa.Table:
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        raise InputError(f"--attributes: {uri} does not exist") from None
    try:
        if uri.endswith(".parquet"):
            return pq.read_table(io.BytesIO(data))
        if uri.endswith(".csv"):
            lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
            header = pyarrow.csv.open_csv(io.BytesIO(data), parse_options=lines).schema.names
            # As text, or an id such as 007 would be a number.
            text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()))
            return pyarrow.csv.read_csv(io.BytesIO(data), parse_options=lines, convert_options=text)
        if uri.endswith((".jsonl", ".json", ".ndjson")):
            return pyarrow.json.read_json(io.BytesIO(data.removeprefix(b"\xef\xbb\xbf")))
    except pa.ArrowInvalid as error:
        raise InputError(f"--attributes: {uri} cannot be read as a table ({error})") from None
    raise InputError(f"--attributes: {uri} is no .parquet, .csv or .jsonl file")


def read_catalogue(uri: str, attributes: Sequence[str], category: str | None) -> Catalogue:
    """Read the ``attributes`` and the ``category`` column of every image.

    Raises `InputError` if a column is not there or an image has two rows.
    """
    table = _table(uri)
    columns = [IMAGE_ID, *attributes, *([category] if category else [])]
    if lacking := [name for name in columns if name not in table.column_names]:
        raise InputError(
            f"--attributes: {uri} has no column {', '.join(map(repr, lacking))} (it has "
            f"{', '.join(table.column_names)}); 'image_id' names the images, the templates the rest"
        )
    if double := [name for name in columns if table.column_names.count(name) > 1]:
        raise InputError(f"--attributes: {uri} has several columns {double[0]!r}; keep one")
    try:
        rows = table.select(columns).cast(pa.schema([(n, pa.string()) for n in columns]))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(
            f"--attributes: {uri}: a column is not text or numbers, one value an image ({error})"
        ) from None
    values_of: dict[str, tuple[str, ...]] = {}
    category_of: dict[str, str] = {}
    incomplete: Counter[str] = Counter()
    seen: set[str] = set()
    for number, row in enumerate(rows.to_pylist()):
        values = {name: plain((row[name] or "").strip()) for name in columns}
        if not values[IMAGE_ID]:
            raise InputError(f"--attributes: {uri} [row {number}]: has no image_id")
        name = plain(values[IMAGE_ID])
        if name in seen:
            raise InputError(f"--attributes: {uri} [row {number}]: image {name!r} has a row before")
        seen.add(name)
        if absent := [column for column in columns if not values[column]]:
            incomplete.update(absent[:1])
            continue
        values_of[name] = tuple(values[attribute] for attribute in attributes)
        if category:
            category_of[name] = values[category]
    return Catalogue(tuple(attributes), dict(sorted(values_of.items())), category_of, incomplete)
