"""The index of packed images: which shard holds which image, and where.

Listing shards reads their ids (of a tar, all of it), so it is done once, on Ray, a task a shard,
and kept below ``data.index_dir``; later only shards whose size or times differ are listed again.
"""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pyarrow.compute as pc

from qure_core import storage
from qure_core.base.errors import InputError, Problem
from qure_core.data.layout import IMAGE_SUFFIXES, ImageFolder, Images, is_hidden
from qure_core.data.packed import LISTED, SHARD_SUFFIXES, located
from qure_core.storage.parquet import parquet_bytes, read_committed_parquet

INDEX_KIND = storage.Kind("index of packed images", storage.LISTED)


class PackedImages(Images):
    """The images of some shards by id; ids are unique, or each double one is a problem."""

    def __init__(self, uri: str, index: pa.Table, skipped: int) -> None:
        index = index.sort_by([("image_id", "ascending")])
        names = index["image_id"].to_pylist()
        places = [index[column].to_pylist() for column in ("shard", "first", "second")]
        super().__init__(uri, dict(zip(names, map(located, *places), strict=True)))
        self.notes = []
        if skipped:
            self.notes.append(
                f"{uri}: {skipped:,} file(s) with a dot in their sample's name, or a name "
                "that is no UTF-8, are not taken: WebDataset ends a name at its first dot"
            )
        self._categories = index["category"].combine_chunks()
        self._ids = index["image_id"].combine_chunks()
        if len(names) > len(self):
            counts = pc.value_counts(self._ids)
            double = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
            text = f"{len(double):,} image id(s) stand several times, first {double[0].as_py()!r}"
            self.problems.append(Problem(uri, "", f"{text}; give each image its own"))

    def of_category(self, category: str) -> list[str]:
        """The images that a column of the shards gives a category, or below a folder's name."""
        chosen = self._ids.filter(pc.equal(self._categories, category)).to_pylist()
        return chosen or super().of_category(category)

    def categories(self) -> dict[str, str]:
        """By the column of the shards, where it says one, else as of a folder."""
        pairs = zip(self._ids.to_pylist(), self._categories.to_pylist(), strict=True)
        said = {name: category for name, category in pairs if category}
        return said or super().categories()


def image_source(uri: str, index_dir: str, setting: str) -> Images:
    """The images at ``uri``: a folder of image files, or shards (a folder of them, or one)."""
    if not storage.exists(uri):
        raise InputError(f"{setting}: {uri} does not exist")
    single = uri.endswith(SHARD_SUFFIXES) and storage.is_file(uri)
    found = [] if single else storage.find_files(uri, uri).files
    files = [uri] if single else [storage.join(uri, file) for file in found if not is_hidden(file)]
    shards = [file for file in files if file.endswith(SHARD_SUFFIXES)]
    pictures = [file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    if shards and pictures:
        raise InputError(
            f"{setting}: {uri} holds image files ({pictures[0]}) and shards ({shards[0]}); give a "
            "folder of one kind, or the shard itself"
        )
    zipped = [file for file in files if file.endswith((".tar.gz", ".tgz", ".tar.zst"))]
    if zipped and not pictures:
        raise InputError(
            f"{setting}: {zipped[0]} is compressed, so single images cannot be read from it; "
            "unpack it to a plain .tar"
        )
    if not shards:
        return ImageFolder(uri)
    index, skipped = _index(uri, sorted(shards), index_dir)
    return PackedImages(uri, index, skipped)


def _index(uri: str, shards: list[str], index_dir: str) -> tuple[pa.Table, int]:
    """The rows of all ``shards``, of those alone listed now that are new or have changed."""
    place = storage.join(index_dir, hashlib.sha256(uri.encode()).hexdigest()[:16])
    storage.check_place(place, INDEX_KIND, "data.index_dir")
    stamps = storage.stamps(shards)
    index, known = LISTED.empty_table(), {}
    skipped_of: dict[str, int] = {}
    if storage.is_committed(place):
        manifest = storage.read_manifest(place, INDEX_KIND)
        known = {s: stamp for s, stamp in manifest["stamps"].items() if stamps.get(s) == stamp}
        skipped_of = {shard: manifest["skipped"].get(shard, 0) for shard in known}
        if known:
            index = read_committed_parquet(place, "index.parquet", manifest)
            index = index.filter(pc.is_in(index["shard"], pa.array(list(known), pa.string())))
    if asked := [shard for shard in shards if shard not in known]:
        parts = [index]
        # Here, because who reads no shards needs no Ray.
        from qure_core.data.packed_listing import listed

        for shard, part, skipped in listed(asked):
            parts.append(part)
            skipped_of[shard] = skipped
        index = pa.concat_tables(parts).combine_chunks()
        with storage.committed_directory(place, INDEX_KIND) as (directory, description):
            (directory / "index.parquet").write_bytes(parquet_bytes(index))
            description |= {"source": uri, "stamps": stamps, "skipped": skipped_of}
    return index, sum(skipped_of.values())
