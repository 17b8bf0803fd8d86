"""Making an index and changing it: what is there already is not embedded again.

Images that are new, or whose files have changed, become a segment of their own; images that are
taken out are no longer listed. Both are a new version, which the manifest's replacement makes the
one that readers open; what no version needs any more goes with `compacted` alone, for a reader may
still be at it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.data.hashing import image_digests, image_stamps
from qure_core.data.schema import Split
from qure_core.embeddings.shards import EMBEDDINGS_KIND
from qure_core.embeddings.stage import EmbedJob, embed_splits
from qure_core.model.checkpoint_files import checkpoint_digest, checkpoint_pixels
from qure_core.runtime.resources import Plan
from qure_core.search.approximate_build import make_faiss, wanted
from qure_core.search.corpus import Corpus
from qure_core.search.index import INDEX_KIND, Index
from qure_core.search.questions import embedded_questions, open_questions
from qure_core.search.version import Version

MADE_WITH = (
    *("checkpoint", "checkpoint_digest", "pixels", "vision_precision", "stored"),
    "max_image_pixels",
)
DTYPES = {"fp16": "float16", "fp32": "float32"}


def version_rows(output: str, manifest: dict[str, Any], needed: bool) -> dict[str, dict[str, Any]]:
    """Rows by id of a version's images whose segments are whole.

    Raises `InputError` if one is not and all are ``needed``; else they are to be made again.
    """
    rows = Index.version(output, manifest).images.to_pylist()
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
        return version_rows(output, manifest, needed=False) if manifest else {}
    manifest = storage.read_manifest(output, INDEX_KIND)
    for name, value in facts.items():
        if manifest[name] != value:
            raise InputError(
                f"output: {output} was made with {name} {manifest[name]}, not {value}; give its "
                f"own (checkpoint {manifest['checkpoint']}, --stored {manifest['stored']}), or "
                "build it anew"
            )
    return version_rows(output, manifest, needed=True)


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
    rows: dict[str, dict[str, Any]] = dict(known) if keep_others else {}
    new: dict[str, dict[str, Any]] = {}
    for row in _described(corpus, known):
        name, before = row["image_id"], known.get(row["image_id"])
        if before is not None and before["sha256"] == row["sha256"]:
            rows[name] = row | {"segment": before["segment"], "row": before["row"]}
        else:
            new[name] = row
    if not new and rows == known and storage.is_committed(output):
        manifest = storage.read_manifest(output, INDEX_KIND)
        if _settled(manifest, settings):
            print(f"[index] nothing is new: {output}", flush=True)
            return manifest | {"embedded": 0, "seconds": round(time.monotonic() - started, 3)}
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
        rows |= {
            name: new[name] | {"segment": segment, "row": row}
            for row, name in enumerate(sorted(new))
        }
    check()
    facts |= {"checkpoint": checkpoint, "max_image_pixels": settings.data.max_image_pixels}
    version = Version(output, facts, rows, len(new))
    description = version.description()
    if wanted(settings.search, len(rows) * description["tokens"]):
        index = version.opened(description)
        # Lists of another model's embeddings would find little, and its queries mean nothing.
        same = {name: facts[name] for name in ("checkpoint_digest", "pixels", "vision_precision")}
        before = storage.kept(output, INDEX_KIND, same) or {}
        description["questions"] = embedded_questions(
            settings, plan, checkpoint, corpus, index, before.get("questions")
        )
        questions = open_questions(index, description["questions"])
        cpus = max(settings.cluster.cpus_per_embed_actor, settings.cluster.cpus_per_train_worker)
        description["faiss"], files = make_faiss(
            index, questions, settings.search, before.get("faiss"), cpus
        )
        check()
        return version.commit(description, time.monotonic() - started, files)
    return version.commit(description, time.monotonic() - started)


def _settled(manifest: dict[str, Any], settings: Settings) -> bool:
    """Whether an index is as ``settings.search`` wants it to be."""
    made = manifest.get("faiss")
    if not wanted(settings.search, manifest["images"] * manifest["tokens"]):
        return made is None
    search = settings.search
    return made is not None and (
        search.factory in (None, made["factory"])
        and search.tokens in (None, len(made["positions"]))
        and search.recall == made["recall_target"]
    )


def _described(corpus: Corpus, known: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of a corpus's images but for where they are held. A file with the stamp that it had
    before is not read."""
    stamps = image_stamps(corpus.images.values())
    digests = {
        uri: known[name]["sha256"]
        for name, uri in corpus.images.items()
        if name in known
        and known[name]["uri"] == uri
        and stamps.get(uri) is not None
        and known[name]["stamp"] == stamps[uri]
    }
    digests |= image_digests([uri for uri in corpus.images.values() if uri not in digests])
    if unread := [name for name, uri in corpus.images.items() if uri not in digests]:
        raise InputError(
            f"{corpus.images[unread[0]]}: cannot be read ({len(unread):,} image(s) of the corpus); "
            "mend or remove them"
        )
    for name, uri in corpus.images.items():
        yield {
            "image_id": name,
            "uri": uri,
            "category": corpus.categories.get(name),
            "metadata": sorted(corpus.metadata.get(name, {}).items()),
            "sha256": digests[uri],
            "stamp": stamps.get(uri),
        }


def without_images(
    output: str, image_ids: Collection[str], check: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Take images out of the index at ``output``; `InputError` naming one that it has not."""
    started = time.monotonic()
    manifest = storage.read_manifest(output, INDEX_KIND)
    rows = version_rows(output, manifest, needed=True)
    if unknown := sorted(set(image_ids) - set(rows)):
        raise InputError(
            f"{output}: holds no image {unknown[0]!r} ({len(unknown):,} of {len(image_ids):,} are "
            "not there); nothing was removed"
        )
    gone = set(image_ids)
    left = {name: row for name, row in rows.items() if name not in gone}
    if not left:
        raise InputError(f"{output}: nothing would be left; remove the directory instead")
    facts = {name: manifest[name] for name in MADE_WITH}
    version = Version(output, facts, left, 0)
    description, files = version.description(), {}
    if made := manifest.get("faiss"):
        parts = {name: made["parts"][name] for name in description["segments"]}
        description |= {"faiss": made | {"parts": parts}, "questions": manifest.get("questions")}
        files = {made["trained"]: manifest["files"][made["trained"]]}
    check()
    return version.commit(description, time.monotonic() - started, files)
