"""The images that an index holds: of the configured data, a folder, or packed shards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from qure_core import storage
from qure_core.base.config import DataSettings
from qure_core.base.errors import InputError, raise_problems
from qure_core.data.packed_index import image_source
from qure_core.data.schema import Triplet
from qure_core.data.sources import Dataset, all_images


@dataclass(frozen=True)
class Corpus:
    """Images by id.

    categories: of those that have one; none of the others. metadata: of images that have some, its
    columns as texts. queries: some that people ask of such images; none where none are known.
    """

    images: dict[str, str]
    categories: dict[str, str]
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    queries: tuple[Triplet, ...] = ()


def read_corpus(data: DataSettings, uri: str | None, metadata: str | None = None) -> Corpus:
    """The images at ``uri``, or of all splits of the configured data; what is known of them besides
    from the file ``metadata``.

    Raises `InputError` if there are none, or naming what cannot be taken.
    """
    corpus = _configured(data) if uri is None else _given(data, uri)
    return replace(corpus, metadata=read_metadata(metadata, corpus.images)) if metadata else corpus


def _configured(data: DataSettings) -> Corpus:
    dataset = Dataset(data)
    splits = [dataset.load(name) for name in ("train", "val") if dataset.has(name)]
    if not splits:
        raise InputError(f"data.root: {data.root} has no split; give --corpus, or other data")
    return Corpus(*all_images(splits), queries=splits[-1].triplets)


def _given(data: DataSettings, uri: str) -> Corpus:
    found = image_source(uri, data.index_dir, "corpus")
    for note in found.notes:
        print(f"[data] {note}", flush=True)
    names = found.sorted()
    images = {name: place for name in names if (place := found.find(name))}
    raise_problems(found.problems, f"corpus: {uri}")
    if not images:
        raise InputError(f"corpus: there are no images in {uri}")
    return Corpus(images, found.categories())


_READERS = {
    ".parquet": pq.read_table,
    ".csv": pyarrow.csv.read_csv,
    ".jsonl": pyarrow.json.read_json,
}


def read_metadata(uri: str, images: dict[str, str]) -> dict[str, dict[str, str]]:
    """Columns of a Parquet, CSV or JSONL file as texts, by its column ``image_id``; of ``images``
    alone, and how many of them it does not have is said.

    Raises `InputError` if it cannot be read, has no such column, or has an image twice.
    """
    reader = _READERS.get(uri[uri.rfind(".") :].lower())
    if reader is None:
        raise InputError(f"--metadata: {uri} is none of {', '.join(_READERS)}")
    if not storage.is_file(uri):
        raise InputError(f"--metadata: {uri} is no file")
    try:
        table = reader(pa.BufferReader(storage.read_bytes(uri)))
        columns = {name: table[name].cast(pa.string()).to_pylist() for name in table.column_names}
    except pa.ArrowException as error:
        raise InputError(f"--metadata: {uri}: {error}") from None
    if "image_id" not in columns:
        raise InputError(f"--metadata: {uri} has no column image_id")
    names = columns.pop("image_id")
    found: dict[str, dict[str, str]] = {}
    for row, name in enumerate(names):
        if name in found:
            raise InputError(f"--metadata: {uri} [row {row}]: image {name!r} for the second time")
        if name in images:
            own = ((column, values[row]) for column, values in columns.items())
            found[name] = {column: value for column, value in own if value is not None}
    print(
        f"[data] metadata of {len(found):,} of {len(images):,} images: {', '.join(columns)}",
        flush=True,
    )
    return found
