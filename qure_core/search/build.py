"""Making an index and changing it: what is there already is not embedded again.

Images that are new, or whose files have changed, become a segment of their own; images that are
taken out are no longer listed. Both are a new version, which the manifest's replacement makes the
one that readers open; what no version needs any more goes with `compacted` alone, for a reader may
still be at it.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Collection
from typing import Any

import pyarrow as pa

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.data.hashing import image_digests
from qure_core.data.schema import Split
from qure_core.embeddings.shards import EMBEDDINGS_KIND, EmbeddingShards
from qure_core.embeddings.stage import EmbedJob, embed_splits
from qure_core.model.checkpoint_files import checkpoint_digest, checkpoint_pixels
from qure_core.runtime.resources import Plan
from qure_core.search.corpus import Corpus
from qure_core.search.index import IMAGES, INDEX_KIND
from qure_core.storage.kinds import PLAN
from qure_core.storage.parquet import parquet_bytes, read_committed_parquet

_LIST, _SEGMENT = re.compile(r"images-[0-9a-f]{16}\.parquet"), re.compile(r"segment-[0-9a-f]{16}")
_MADE_WITH = (
    *("checkpoint", "checkpoint_digest", "pixels", "vision_precision", "stored"),
    "max_image_pixels",
)
DTYPES = {"fp16": "float16", "fp32": "float32"}


def _rows(output: str, manifest: dict[str, Any], needed: bool) -> dict[str, dict[str, Any]]:
    """Rows by id of a version's images whose segments are whole.

    Raises `InputError` if one is not and all are ``needed``; else they are to be made again.
    """
    rows = read_committed_parquet(output, manifest["images_file"], manifest).to_pylist()
    lost = {
        name
        for name in manifest["segments"]
        if not storage.kept(storage.join(output, name), EMBEDDINGS_KIND, {})
    }
    if lost and needed:
        raise InputError(f"{output}: {min(lost)} is not whole; build the index again")
    return {row["image_id"]: row for row in rows if row["segment"] not in lost}


def _known_images(
    output: str, facts: dict[str, Any], keep_others: bool
) -> dict[str, dict[str, Any]]:
    """Rows by id of the index at ``output``, if there is one that was made with these ``facts``.

    Raises `InputError` if what it holds is to be kept, but was made with others.
    """
    if not storage.is_committed(output):
        return {}
    if not keep_others:
        manifest = storage.kept(output, INDEX_KIND, facts)
        return _rows(output, manifest, needed=False) if manifest else {}
    manifest = storage.read_manifest(output, INDEX_KIND)
    for name, value in facts.items():
        if manifest[name] != value:
            raise InputError(
                f"output: {output} was made with {name} {manifest[name]}, not {value}; give its "
                f"own (checkpoint {manifest['checkpoint']}, --stored {manifest['stored']}), or "
                "build it anew"
            )
    return _rows(output, manifest, needed=True)


def index_facts(settings: Settings, checkpoint: str, stored: str) -> dict[str, Any]:
    """What all embeddings of an index are made with."""
    return {
        "checkpoint_digest": checkpoint_digest(checkpoint),
        "pixels": checkpoint_pixels(checkpoint),
        "vision_precision": settings.model.vision_precision,
        "stored": stored,
    }


def build_index(
    settings: Settings,
    plan: Plan,
    checkpoint: str,
    corpus: Corpus,
    output: str,
    *,
    stored: str = "fp16",
    keep_others: bool = False,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Make the index at ``output`` hold ``corpus``, and besides it what it held if
    ``keep_others``; return its manifest. ``check`` raises if another process took its place.

    The same images give the same answers, however the index came about, but for the last bits of
    a score: images that are embedded beside others may round otherwise. Raises `InputError` naming
    an image that cannot be read.
    """
    started = time.monotonic()
    storage.check_place(output, INDEX_KIND, "output")
    facts = index_facts(settings, checkpoint, stored)
    known = _known_images(output, facts, keep_others)
    if not storage.is_committed(output):
        storage.begin(output, INDEX_KIND)  # what a kill leaves is known as ours
    digests = image_digests(corpus.images.values())
    if unread := [name for name, uri in corpus.images.items() if uri not in digests]:
        raise InputError(
            f"{corpus.images[unread[0]]}: cannot be read ({len(unread):,} image(s) of the corpus); "
            "mend or remove them"
        )
    rows: dict[str, dict[str, Any]] = dict(known) if keep_others else {}
    new: dict[str, dict[str, Any]] = {}
    for name, uri in corpus.images.items():
        row = {
            "image_id": name,
            "uri": uri,
            "category": corpus.categories.get(name),
            "sha256": digests[uri],
        }
        before = known.get(name)
        if before is not None and before["sha256"] == row["sha256"]:
            rows[name] = row | {"segment": before["segment"]}
        else:
            new[name] = row
    if new:
        whole = hashlib.sha256(repr((facts, [(n, new[n]["sha256"]) for n in sorted(new)])).encode())
        segment = f"segment-{whole.hexdigest()[:16]}"
        images = {name: row["uri"] for name, row in new.items()}
        job = EmbedJob(
            Split("corpus", (), images),
            frozenset(images),
            storage.join(output, segment),
            DTYPES[stored],
        )
        embed_splits(checkpoint, [job], settings, plan)
        rows |= {name: row | {"segment": segment} for name, row in new.items()}
    check()
    made = {"checkpoint": checkpoint, "max_image_pixels": settings.data.max_image_pixels}
    return _commit_version(output, facts | made, rows, time.monotonic() - started, len(new))


def without_images(
    output: str, image_ids: Collection[str], check: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Take images out of the index at ``output``; `InputError` naming one that it has not."""
    started = time.monotonic()
    manifest = storage.read_manifest(output, INDEX_KIND)
    rows = _rows(output, manifest, needed=True)
    if unknown := sorted(set(image_ids) - set(rows)):
        raise InputError(
            f"{output}: holds no image {unknown[0]!r} ({len(unknown):,} of {len(image_ids):,} are "
            "not there); nothing was removed"
        )
    left = {name: row for name, row in rows.items() if name not in set(image_ids)}
    if not left:
        raise InputError(f"{output}: nothing would be left; remove the directory instead")
    facts = {name: manifest[name] for name in _MADE_WITH}
    check()
    return _commit_version(output, facts, left, time.monotonic() - started, 0)


def _commit_version(
    output: str,
    facts: dict[str, Any],
    rows: dict[str, dict[str, Any]],
    seconds: float,
    embedded: int,
) -> dict[str, Any]:
    """Write a version's images, then the manifest that makes it the one to open."""
    table = pa.Table.from_pylist([rows[name] for name in sorted(rows)], IMAGES)
    data = parquet_bytes(table)
    name = f"images-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    segments = sorted({row["segment"] for row in rows.values()})
    shapes = EmbeddingShards.open(storage.join(output, segments[0]))
    storage.write_bytes(storage.join(output, name), data)
    description = facts | {
        "images": len(rows),
        "images_file": name,
        "segments": segments,
        "tokens": shapes.tokens,
        "width": shapes.width,
        "embedded": embedded,
        "seconds": round(seconds, 3),
    }
    storage.write_manifest(output, INDEX_KIND, description, [name])
    storage.remove_file(storage.join(output, PLAN))
    return storage.read_manifest(output, INDEX_KIND)


def compacted(output: str) -> int:
    """Remove segments and lists that the newest version does not need; return how many.

    For when nobody reads an older version.
    """
    manifest = storage.read_manifest(output, INDEX_KIND)
    removed = 0
    for name in storage.list_names(output):
        if _SEGMENT.fullmatch(name) and name not in manifest["segments"]:
            storage.discard(storage.join(output, name), EMBEDDINGS_KIND)
            removed += 1
        elif _LIST.fullmatch(name) and name != manifest["images_file"]:
            storage.remove_file(storage.join(output, name))
            removed += 1
    return removed
