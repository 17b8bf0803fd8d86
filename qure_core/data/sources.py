"""The configured dataset, whichever layout it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from qure_core import storage
from qure_core.base.config import DataSettings
from qure_core.base.errors import InputError, Problem, raise_problems
from qure_core.data.circo import read_circo
from qure_core.data.cirr import read_cirr
from qure_core.data.fashioniq import find_categories, read_fashioniq
from qure_core.data.jsonl import has_rows, read_jsonl
from qure_core.data.layout import Files, Images
from qure_core.data.packed_index import image_source
from qure_core.data.positives import rows_said
from qure_core.data.schema import Split


def files_of(data: DataSettings) -> Files:
    """The dataset's directory, with the images that ``data.images`` names in its folders' place."""
    if data.images is None:
        return Files(data.root)
    images = image_source(data.images, data.index_dir, "data.images")
    for note in images.notes:
        print(f"[data] {note}", flush=True)
    return Files(data.root, images)


class Dataset:
    """The configured dataset; its rows and listings are read once for all its splits."""

    def __init__(self, data: DataSettings) -> None:
        self.data = data

    @cached_property
    def _files(self) -> Files:
        return files_of(self.data)

    def read(self, split: str) -> tuple[Split, list[Problem]]:
        """``split`` with everything that is wrong with it, and notes of what is only odd."""
        found, problems = self._read(split)
        return replace(found, notes=(*found.notes, *rows_said(found.triplets, split))), problems

    def _read(self, split: str) -> tuple[Split, list[Problem]]:
        data = self.data
        if not storage.exists(data.root):
            raise InputError(f"data.root: {data.root} does not exist")
        if data.format in ("cirr", "circo"):
            if data.categories is not None:
                raise InputError(
                    f"data.categories: the {data.format} layout has no categories; leave it out"
                )
            return (read_cirr if data.format == "cirr" else read_circo)(self._files, split)
        if data.format == "jsonl":
            return read_jsonl(self._files, split, data.categories)
        return read_fashioniq(self._files, split, data.categories, data.texts)

    def has(self, split: str) -> bool:
        """Whether there are rows of ``split`` at all."""
        data = self.data
        if data.format == "cirr":
            return storage.exists(storage.join(data.root, "cirr/captions", f"cap.rc2.{split}.json"))
        if data.format == "circo":
            return storage.exists(storage.join(data.root, "annotations", f"{split}.json"))
        if data.format == "jsonl":
            return has_rows(self._files, split, data.categories)
        return bool(find_categories(data.root, split))

    def load(self, split: str) -> Split:
        """Read ``split``, or raise one `InputError` that lists what is wrong with it."""
        loaded, problems = self.read(split)
        raise_problems(problems, f"{self.data.root} ({self.data.format} layout, {split} split)")
        for note in loaded.notes:
            print(f"[data] {note}", flush=True)
        return loaded


def read_source(data: DataSettings, split: str) -> tuple[Split, list[Problem]]:
    """`Dataset.read` of one split."""
    return Dataset(data).read(split)


def has_split(data: DataSettings, split: str) -> bool:
    """`Dataset.has`."""
    return Dataset(data).has(split)


def load_split(data: DataSettings, split: str) -> Split:
    """`Dataset.load` of one split."""
    return Dataset(data).load(split)


def all_images(splits: Sequence[Split]) -> tuple[dict[str, str], dict[str, str]]:
    """URIs of the images of several splits, and the category of each that is of one alone.

    No categories, if any image is of several or of none: then the galleries are not told apart by
    the images themselves.
    """
    images: dict[str, str] = {}
    categories: dict[str, set[str]] = {}
    for split in splits:
        for image, uri in split.images.items():
            if images.setdefault(image, uri) != uri:
                raise InputError(
                    f"image {image!r} of the {split.name} split is {uri}, of another one "
                    f"{images[image]}; take one split at a time"
                )
        for category, ids in split.galleries.items():
            for image in ids:
                categories.setdefault(image, set()).add(category)
    if any(len(categories.get(image, ())) != 1 for image in images):
        return images, {}
    return images, {image: min(own) for image, own in categories.items()}


def mining_galleries(data: DataSettings, split: Split) -> dict[str, tuple[str, ...]]:
    """The corpus each category mines among: its training targets, or its whole split.

    FashionIQ mines among the targets of the category, CIRR among all images (QuRe, section 4).
    """
    default = "targets" if data.format in ("world", "fashioniq") else "split"
    if (data.mining_corpus or default) == "split":
        return split.galleries
    targets: dict[str, set[str]] = {category: set() for category in split.galleries}
    for triplet in split.triplets:
        if triplet.target_id is not None:
            targets[triplet.category].add(triplet.target_id)
    return {category: tuple(sorted(ids)) for category, ids in targets.items()}


def with_more_images(
    split: Split, corpora: dict[str, tuple[str, ...]], more: Images
) -> tuple[Split, dict[str, tuple[str, ...]]]:
    """``split`` and its mining ``corpora`` with more images, that no triplet names.

    A category gets its own of them where they have categories (a folder or a column), else all.
    Raises `InputError` if one has the id of an image that is there.
    """
    names = more.sorted()
    uris = {name: uri for name in names if (uri := more.find(name))}
    raise_problems(more.problems, f"mining.corpus: {more.uri}")
    if not names:
        raise InputError(f"mining.corpus: there are no images in {more.uri}")
    if double := [name for name in names if name in split.images]:
        raise InputError(
            f"mining.corpus: {len(double):,} of its images have the ids of images of the data, "
            f"first {double[0]!r}; name them otherwise, or leave out what is there already"
        )
    own = {category: more.of_category(category) for category in corpora}
    whole = own if any(own.values()) else dict.fromkeys(corpora, names)
    return replace(split, images=split.images | uris), {
        category: tuple(sorted({*ids, *whole[category]})) for category, ids in corpora.items()
    }


def load_descriptions(data: DataSettings, split: Split) -> dict[str, str]:
    """Captions of ``split``'s images for pretraining: {image id: caption}, sorted by id.

    Of those alone that its rows name or its galleries hold.
    """
    if data.descriptions is None:
        return {}
    uri = storage.join(data.root, data.descriptions)
    if not storage.exists(uri):
        return {}
    value = storage.read_json(uri)
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InputError(f"{uri}: must map image ids to captions (text)")
    own = {name for ids in split.galleries.values() for name in ids}
    own |= {name for t in split.triplets for name in (t.reference_id, str(t.target_id))}
    return {name: value[name] for name in sorted(own & set(split.images)) if name in value}
