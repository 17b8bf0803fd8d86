"""The one schema every dataset becomes, and its Parquet form.

A `Split` holds triplets, the URI of every image they or the galleries name, and the galleries: per
category, the distinct images that a query of the category is ranked against.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from qure_core import storage
from qure_core.storage.parquet import read_committed_parquet

_VERSION = 2  # from 2 on a training gallery is without the images that only other splits name
SPLIT_KIND = storage.Kind(
    "dataset split",
    r"(triplets|images|galleries)\.parquet",
    version=_VERSION,
    version_key="version",
)

_TRIPLETS = pa.schema(
    [
        ("query_id", pa.string()),
        ("reference_id", pa.string()),
        ("text", pa.string()),
        ("target_id", pa.string()),
        ("category", pa.string()),
        ("group", pa.list_(pa.string())),
        ("relevant_ids", pa.list_(pa.string())),
        ("positive_ids", pa.list_(pa.string())),
        ("captions", pa.list_(pa.string())),
    ]
)
_LISTS = ("group", "relevant_ids", "positive_ids", "captions")  # the last two were not always there


@dataclass(frozen=True)
class Triplet:
    """A query (reference image and modification text) and what answers it.

    ``text`` is the text as the dataset's protocol joins it, before the model's clean-up.
    ``target_id`` is None in test splits. ``category`` names the gallery. ``group`` is CIRR's image
    set (the reference included). ``relevant_ids`` is every image known to satisfy the query, the
    target first; empty where unknown. ``positive_ids`` is every other image than the target that
    is labelled as an answer, or known to be one (`data.positives`); never a negative. ``captions``
    are FashionIQ's two, of which ``text`` is made.
    """

    query_id: str
    reference_id: str
    text: str
    target_id: str | None
    category: str
    group: tuple[str, ...] = ()
    relevant_ids: tuple[str, ...] = ()
    # What is known by a digest of triplets was known before there was this.
    positive_ids: tuple[str, ...] = field(default=(), repr=False)
    captions: tuple[str, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Split:
    """Triplets, image URIs by id, and the gallery (sorted distinct image ids) of each category.

    ``notes`` tell, for people, what a reader left out of it; they are not stored.
    """

    name: str
    triplets: tuple[Triplet, ...]
    images: dict[str, str]
    galleries: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=(), compare=False)


def write_split(uri: str, split: Split, older: bool = False) -> None:
    """Commit ``split`` to directory ``uri`` as three Parquet files and a manifest.

    ``older``: its galleries are those of an older version (`is_older_split`).
    """
    with storage.committed_directory(uri, SPLIT_KIND) as (directory, description):
        rows = [asdict(triplet) for triplet in split.triplets]
        pq.write_table(pa.Table.from_pylist(rows, _TRIPLETS), directory / "triplets.parquet")
        images = {"image_id": list(split.images), "uri": list(split.images.values())}
        pq.write_table(pa.table(images), directory / "images.parquet")
        galleries = pa.table(
            {"category": list(split.galleries), "image_ids": list(split.galleries.values())},
            schema=pa.schema([("category", pa.string()), ("image_ids", pa.list_(pa.string()))]),
        )
        pq.write_table(galleries, directory / "galleries.parquet")
        description |= {
            "name": split.name,
            "triplets": len(split.triplets),
            "images": len(split.images),
        }
        if older:
            description[SPLIT_KIND.version_key] = _VERSION - 1


def is_older_split(uri: str) -> bool:
    """Whether a split was written when a gallery could hold images that only other splits name."""
    return int(storage.read_manifest(uri, SPLIT_KIND).get("version", 1)) < _VERSION


def holds(whole: Split, part: Split) -> bool:
    """Whether the galleries of ``whole`` are larger than those of ``part``, and hold them."""
    return whole.galleries != part.galleries and all(
        set(ids) <= set(whole.galleries.get(category, ()))
        for category, ids in part.galleries.items()
    )


def read_split(uri: str) -> Split:
    """Read what `write_split` committed."""
    manifest = storage.read_manifest(uri, SPLIT_KIND)

    def table(name: str) -> pa.Table:
        return read_committed_parquet(uri, name, manifest)

    triplets = tuple(
        Triplet(**row | {key: tuple(row.get(key, ())) for key in _LISTS})
        for row in table("triplets.parquet").to_pylist()
    )
    images = table("images.parquet").to_pydict()
    galleries = table("galleries.parquet").to_pydict()
    return Split(
        name=manifest["name"],
        triplets=triplets,
        images=dict(zip(images["image_id"], images["uri"], strict=True)),
        galleries={
            category: tuple(ids)
            for category, ids in zip(galleries["category"], galleries["image_ids"], strict=True)
        },
    )
