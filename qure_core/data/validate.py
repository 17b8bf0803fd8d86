"""Checking a whole dataset up front: every row, and every image decoded, on Ray."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from qure_core.base.config import DataSettings
from qure_core.base.errors import InputError, Problem
from qure_core.data.images import load_image
from qure_core.data.schema import Split
from qure_core.data.sources import read_source
from qure_core.runtime.progress import Progress

_BATCH = 256


def _check_images(batch: Any, max_pixels: int) -> Any:
    faults: list[str] = []
    for uri in batch["uri"]:
        try:
            load_image(str(uri), max_pixels).convert("RGB")
        except InputError as error:
            faults.append(str(error))
    return {"faults": np.asarray(["\n".join(faults)]), "checked": np.asarray([len(batch["uri"])])}


def undecodable_images(uris: list[str], max_pixels: int) -> list[Problem]:
    """Decode every image in parallel; a problem for each that cannot be."""
    if not uris:
        return []
    blocks = [pa.table({"uri": uris[i : i + _BATCH]}) for i in range(0, len(uris), _BATCH)]
    check = partial(_check_images, max_pixels=max_pixels)
    checked = ray.data.from_arrow(blocks).map_batches(check, batch_size=None)
    progress = Progress("validate", len(uris), "images")
    problems = []
    for row in checked.iter_rows():
        for line in filter(None, str(row["faults"]).split("\n")):
            file, _, message = line.partition(": ")
            problems.append(Problem(file, "", message))
        progress.advance(int(row["checked"]))
    return sorted(problems, key=str)


def validate_dataset(
    data: DataSettings, splits: list[str]
) -> tuple[dict[str, Split], list[Problem]]:
    """Read ``splits`` and decode their images: what was read, and everything wrong with it."""
    found: dict[str, Split] = {}
    problems: list[Problem] = []
    images: dict[str, str] = {}
    for name in splits:
        split, faults = read_source(data, name)
        found[name] = split
        problems += faults
        images |= {uri: uri for uri in split.images.values()}
    problems += undecodable_images(sorted(images), data.max_image_pixels)
    # What is wrong with a file that several splits share is said once.
    return found, list(dict.fromkeys(problems))
