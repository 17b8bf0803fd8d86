"""Making an index that grew and shrank as one that was built at once: few segments, no dead rows.

Embeddings are copied as they are, so that answers keep every bit.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qure_core import storage
from qure_core.base.config import SearchSettings
from qure_core.embeddings.shards import EMBEDDINGS_KIND, EmbeddingShards, shard_files
from qure_core.embeddings.stage import IMAGES_PER_SHARD, write_shard
from qure_core.runtime.progress import Progress
from qure_core.search.approximate_build import make_faiss
from qure_core.search.build import MADE_WITH, version_rows
from qure_core.search.index import CACHE, FAISS_KIND, INDEX_KIND
from qure_core.search.questions import open_questions
from qure_core.search.version import Version

SMALL_ROWS = 8192  # a segment of fewer images is merged with others
_FILE = re.compile(r"(images-[0-9a-f]{16}\.parquet)|(trained-[0-9a-f]{16}\.faiss)")
_FOLDERS = {
    re.compile(r"(segment|questions)-[0-9a-f]{16}"): EMBEDDINGS_KIND,
    re.compile(r"faiss-[0-9a-f]{16}"): FAISS_KIND,
}


def compacted(output: str, check: Callable[[], None] = lambda: None) -> tuple[int, int]:
    """Merge small segments, and those of which half is in use no more, into one, and remove what
    the newest version does not need; return how many were merged and how many parts removed.

    For when nobody reads an older version. ``check`` raises if another process took its place.
    Killed, the same call goes on. Raises `InputError` if a segment is not whole.
    """
    merged = _merge(output, check)
    check()
    return merged, _without_old_parts(output)


def _to_merge(rows: dict[str, dict[str, Any]], stored: dict[str, int]) -> list[str]:
    used = dict.fromkeys(stored, 0)
    for row in rows.values():
        used[row["segment"]] += 1
    dead = [name for name, count in used.items() if 2 * count < stored[name]]
    small = [name for name, count in used.items() if count < SMALL_ROWS]
    return sorted({*dead, *small}) if dead or len(small) > 1 else []


def _merge(output: str, check: Callable[[], None]) -> int:
    started = time.monotonic()
    manifest = storage.read_manifest(output, INDEX_KIND)
    rows = version_rows(output, manifest, needed=True)
    names = _to_merge(rows, manifest["rows"])
    if not names:
        return 0
    own = {name: rows[name] for name in sorted(rows) if rows[name]["segment"] in names}
    sources = [(row["segment"], row["row"]) for row in own.values()]
    segment = f"segment-{hashlib.sha256(repr((sources, [*own])).encode()).hexdigest()[:16]}"
    _copy(output, segment, own)
    check()
    rows |= {
        name: row | {"segment": segment, "row": number}
        for number, (name, row) in enumerate(own.items())
    }
    version = Version(output, {name: manifest[name] for name in MADE_WITH}, rows, 0)
    description = version.description()
    files: dict[str, dict[str, Any]] = {}
    if made := manifest.get("faiss"):
        # As the index has it, whatever the settings of today are.
        search = SearchSettings(
            kind="faiss",
            factory=made["factory"],
            tokens=len(made["positions"]),
            recall=made["recall_target"],
        )
        index = version.opened(description)
        description["questions"] = manifest["questions"]
        questions = open_questions(index, manifest["questions"])
        description["faiss"], files = make_faiss(index, questions, search, made, cpus=1)
        check()
    version.commit(description, time.monotonic() - started, files)
    return len(names)


def _copy(output: str, segment: str, own: dict[str, dict[str, Any]]) -> None:
    """Commit the embeddings of images, by id their rows, as a segment of their own."""
    uri, plan = storage.join(output, segment), {"images": len(own)}
    if storage.kept(uri, EMBEDDINGS_KIND, plan):
        return
    there = storage.resume(uri, EMBEDDINGS_KIND, plan)
    # Of a remote index copies are read: its segments' images are strewn among one another.
    shards = {
        name: EmbeddingShards.open(
            storage.kept_copy(storage.join(output, name), EMBEDDINGS_KIND, CACHE)
        )
        for name in sorted({row["segment"] for row in own.values()})
    }
    any_of = next(iter(shards.values()))
    ids = list(own)
    starts = range(0, len(ids), IMAGES_PER_SHARD)
    progress = Progress("merge segments", len(ids), "images")
    files, facts = [], {}
    for number, start in enumerate(starts):
        some = ids[start : start + IMAGES_PER_SHARD]
        (image_file, query_file) = shard_files(number)
        files += [image_file, query_file]
        if not {image_file, query_file} <= there:
            facts[image_file] = write_shard(uri, image_file, some, _embeddings(shards, own, some))
            nobody = np.empty((0, any_of.width), np.float32)
            facts[query_file] = write_shard(uri, query_file, [], nobody)
        progress.advance(len(some))
    shapes = {"tokens": any_of.tokens, "width": any_of.width}
    described = {"shards": len(starts), "first_ids": [ids[start] for start in starts], **shapes}
    storage.write_manifest(uri, EMBEDDINGS_KIND, plan | {"queries": 0} | described, files, facts)


def _embeddings(
    shards: dict[str, EmbeddingShards], own: dict[str, dict[str, Any]], ids: Sequence[str]
) -> np.ndarray:
    """Embeddings [n, T, D] of images that several segments hold, as they are stored."""
    parts = [
        (places, shards[name].rows([ids[place] for place in places]))
        for name in shards
        if (places := [p for p, image in enumerate(ids) if own[image]["segment"] == name])
    ]
    values = np.empty((len(ids), *parts[0][1].shape[1:]), parts[0][1].dtype)
    for places, some in parts:
        values[places] = some
    return values


def _without_old_parts(output: str) -> int:
    manifest = storage.read_manifest(output, INDEX_KIND)
    made = manifest.get("faiss") or {"parts": {}}
    needed = {
        *manifest["files"],
        *manifest["segments"],
        *made["parts"].values(),
        manifest.get("questions"),
    }
    removed = 0
    for name in set(storage.list_names(output)) - needed:
        uri = storage.join(output, name)
        if _FILE.fullmatch(name):
            storage.remove_file(uri)
            removed += 1
        for pattern, kind in _FOLDERS.items():
            if pattern.fullmatch(name):
                storage.discard(uri, kind)
                removed += 1
    return removed
