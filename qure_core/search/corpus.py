"""The images that an index holds: of the configured data, a folder, or packed shards."""

from __future__ import annotations

from dataclasses import dataclass

from qure_core.base.config import DataSettings
from qure_core.base.errors import InputError, raise_problems
from qure_core.data.packed_index import image_source
from qure_core.data.sources import Dataset, all_images


@dataclass(frozen=True)
class Corpus:
    """Images by id. categories: of those that have one; none of the others."""

    images: dict[str, str]
    categories: dict[str, str]


def read_corpus(data: DataSettings, uri: str | None) -> Corpus:
    """The images at ``uri``, or of all splits of the configured data.

    Raises `InputError` if there are none, or naming what cannot be taken.
    """
    if uri is None:
        dataset = Dataset(data)
        splits = [dataset.load(name) for name in ("train", "val") if dataset.has(name)]
        if not splits:
            raise InputError(f"data.root: {data.root} has no split; give --corpus, or other data")
        return Corpus(*all_images(splits))
    found = image_source(uri, data.index_dir, "corpus")
    for note in found.notes:
        print(f"[data] {note}", flush=True)
    names = found.sorted()
    images = {name: place for name in names if (place := found.find(name))}
    raise_problems(found.problems, f"corpus: {uri}")
    if not images:
        raise InputError(f"corpus: there are no images in {uri}")
    return Corpus(images, found.categories())
