"""Packing images into Parquet shards, which are read with fewer requests than files are.

Images are taken in the order of their ids, so many to a shard; a row has the image file's own
bytes, unchanged. A task writes a shard, and a killed packing goes on from those that are there.
What is packed is known by the ids and by what each file looked like: a changed one begins anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data

from qure_core import storage
from qure_core.base.errors import InputError, bad_input_of_workers
from qure_core.data.hashing import image_stamps
from qure_core.data.images import read_image_bytes
from qure_core.data.packed import shard_of
from qure_core.runtime.progress import Progress
from qure_core.storage.parquet import write_row_groups

PACKED_KIND = storage.Kind("packed images", r"images-\d{5}\.parquet")
_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("category", pa.string()),
        ("sha256", pa.string()),
        ("image", pa.binary()),
    ]
)
_GROUP_BYTES = 2**20  # of images in a row group: what is read for one
_TASK = pa.schema(
    [
        ("number", pa.int64()),
        *((name, pa.list_(pa.string())) for name in ("image_id", "category", "uri")),
    ]
)


def pack_images(
    output: str,
    images: Mapping[str, str],
    category_of: Mapping[str, str],
    shard_images: int,
    max_pixels: int,
) -> dict[str, Any]:
    """Pack ``images`` (URIs by id) into ``output``; return the manifest.

    Raises `InputError` if an image is missing, or if something else is at ``output``.
    """
    if any((shard_of(uri) or uri).startswith(f"{output}/") for uri in images.values()):
        raise InputError(f"--output: {output} holds images that are to be packed; choose another")
    stamps = image_stamps(images.values())
    if missing := sorted(set(images.values()) - set(stamps)):
        raise InputError(f"{len(missing):,} image(s) are missing, first {missing[0]}")
    names = sorted(images)
    pieces = [names[first : first + shard_images] for first in range(0, len(names), shard_images)]
    whole = hashlib.sha256()
    for name in names:
        what = (name, images[name], stamps[images[name]], category_of.get(name))
        whole.update(json.dumps(what).encode())
    facts = {
        "contents": whole.hexdigest(),
        "images": len(names),
        "shard_images": shard_images,
    }
    if manifest := storage.kept(output, PACKED_KIND, facts):
        return manifest
    done = storage.resume(output, PACKED_KIND, facts)
    files = [f"images-{number:05d}.parquet" for number in range(len(pieces))]
    tables = [
        pa.table(
            {
                "number": [number],
                "image_id": [piece],
                "category": [[category_of.get(name) for name in piece]],
                "uri": [[images[name] for name in piece]],
            },
            schema=_TASK,
        )
        for number, piece in enumerate(pieces)
        if files[number] not in done
    ]
    written: dict[str, dict[str, Any]] = {}
    progress = Progress("pack", len(names), "images")
    progress.advance(len(names) - sum(len(table["uri"][0]) for table in tables))
    if tables:
        pack = partial(_pack, output=output, max_pixels=max_pixels)
        packed = ray.data.from_arrow(tables).map_batches(pack, batch_size=1, batch_format="pyarrow")
        with bad_input_of_workers():
            for row in packed.iter_rows():
                written[row["file"]] = {"bytes": row["bytes"], "sha256": row["sha256"]}
                progress.advance(row["images"])
    storage.write_manifest(output, PACKED_KIND, facts, files, written)
    return storage.read_manifest(output, PACKED_KIND)


def _pack(table: pa.Table, output: str, max_pixels: int) -> pa.Table:
    """Task: read a shard's images and write it."""
    (task,) = table.to_pylist()
    name = f"images-{task['number']:05d}.parquet"
    # Image files are compressed already, and all different.
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with storage.temporary_folder("pack") as folder:
        file = f"{folder}/{name}"
        write_row_groups(file, _groups(task, max_pixels), _SCHEMA, **plain)
        facts = storage.facts_of_file(file)
        storage.put_file(file, storage.join(output, name))
    count = {"file": name, "images": len(task["uri"])}
    return pa.Table.from_pylist([count | facts])


def _groups(task: dict[str, Any], max_pixels: int) -> Iterator[pa.Table]:
    """A shard's rows, as many at a time as a row group holds."""
    group: list[dict[str, Any]] = []
    held = 0
    for image_id, category, uri in zip(
        task["image_id"], task["category"], task["uri"], strict=True
    ):
        data = read_image_bytes(uri, max_pixels)
        row = {"image_id": image_id, "category": category, "image": data}
        group.append(row | {"sha256": hashlib.sha256(data).hexdigest()})
        held += len(data)
        if held >= _GROUP_BYTES:
            yield pa.Table.from_pylist(group, _SCHEMA)
            group, held = [], 0
    if group:
        yield pa.Table.from_pylist(group, _SCHEMA)
