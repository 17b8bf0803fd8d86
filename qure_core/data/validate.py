"""Checking a whole dataset up front: every row, and every image decoded, on Ray."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import ray.data

from qure_core.base.config import DataSettings, Pixels
from qure_core.base.errors import InputError, Problem
from qure_core.data.images import decode_stored, read_image_bytes, taken
from qure_core.data.pixels import changes, told
from qure_core.data.positives import twins_said
from qure_core.data.schema import Split
from qure_core.data.sources import Dataset
from qure_core.runtime.progress import Progress

_BATCH = 256


@dataclass
class Checked:
    """What was found in a dataset: its splits, everything wrong, and what a person should know."""

    splits: dict[str, Split]
    problems: list[Problem]
    notes: list[str]


def _check_images(table: pa.Table, max_pixels: int, pixels: Pixels) -> pa.Table:
    """Task: read and decode images; per image its fault, digest and what `upright` changes."""
    rows = []
    for uri in table["uri"].to_pylist():
        row = {"uri": uri, "fault": "", "sha256": "", "changes": []}
        try:
            data = read_image_bytes(uri, max_pixels)
            row["sha256"] = hashlib.sha256(data).hexdigest()
            image = decode_stored(data, uri, max_pixels)
            row["changes"] = changes(image)
            taken(image, uri, pixels).convert("RGB")
        except InputError as error:
            row["fault"] = str(error).removeprefix(f"{uri}: ")
        rows.append(row)
    return pa.Table.from_pylist(rows, _CHECKED)


_CHECKED = pa.schema(
    [
        *((name, pa.string()) for name in ("uri", "fault", "sha256")),
        ("changes", pa.list_(pa.string())),
    ]
)


def check_images(
    uris: list[str], max_pixels: int, pixels: Pixels
) -> tuple[list[Problem], dict[str, str], Counter[str]]:
    """Decode every image in parallel: problems, SHA-256 by URI, and counts of `pixels.CHANGES`."""
    problems: list[Problem] = []
    digest_of: dict[str, str] = {}
    counts: Counter[str] = Counter()
    if not uris:
        return problems, digest_of, counts
    blocks = [pa.table({"uri": uris[i : i + _BATCH]}) for i in range(0, len(uris), _BATCH)]
    check = partial(_check_images, max_pixels=max_pixels, pixels=pixels)
    checked = ray.data.from_arrow(blocks).map_batches(
        check, batch_size=None, batch_format="pyarrow"
    )
    progress = Progress("validate", len(uris), "images")
    for row in checked.iter_rows():
        if row["fault"]:
            problems.append(Problem(row["uri"], "", row["fault"]))
        if row["sha256"]:
            digest_of[row["uri"]] = row["sha256"]
        counts.update(row["changes"])
        progress.advance(1)
    return sorted(problems, key=str), digest_of, counts


def validate_dataset(data: DataSettings, splits: list[str]) -> Checked:
    """Read ``splits`` and decode their images."""
    found: dict[str, Split] = {}
    problems: list[Problem] = []
    images: dict[str, str] = {}
    dataset = Dataset(data)
    for name in splits:
        found[name], faults = dataset.read(name)
        problems += faults
        images |= found[name].images
    uris = sorted(set(images.values()))
    faults, digest_of, counts = check_images(uris, data.max_image_pixels, data.pixels)
    # What is wrong with a file that several splits share is said once.
    every = list(dict.fromkeys([*problems, *faults]))
    contents = {name: digest_of[uri] for name, uri in images.items() if uri in digest_of}
    return Checked(found, every, [*told(counts, data.pixels), *twins_said(contents)])
