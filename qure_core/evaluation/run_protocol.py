"""A checkpoint under a protocol: embed, rank, measure, and write what its server takes.

Results are kept under a digest of everything they depend on (weights, annotations, image bytes,
protocol), so nothing stale is ever reused.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.data.hashing import image_digests
from qure_core.data.schema import Split
from qure_core.embeddings.shards import EMBEDDINGS_KIND
from qure_core.embeddings.stage import EmbedJob, embed_splits
from qure_core.evaluation.protocols import PROTOCOLS, Protocol, Request, of_format
from qure_core.evaluation.protocols.protocol import Asked
from qure_core.evaluation.published import known_dataset
from qure_core.evaluation.stage import rank_queries, read_rows
from qure_core.model.checkpoint_files import checkpoint_digest, checkpoint_pixels
from qure_core.runtime.resources import Plan

RESULT_KIND = storage.Kind("protocol result", r"(recall|recall_subset|submission)\.json")
_RANKINGS_KIND = storage.Kind("unfinished ranking", r"part-\d{5}\.parquet")


def measured_by(name: str, settings: Settings) -> Protocol:
    """The protocol called ``name``; "own" measures as the data's layout is measured in training."""
    return of_format(settings.data.format) if name == "own" else PROTOCOLS[name]


def content_digest(split: Split) -> str:
    """A digest of a split: its queries, its galleries and every image's bytes, read on Ray."""
    digest_of = image_digests(split.images.values())
    if unread := sorted(set(split.images.values()) - set(digest_of)):
        raise InputError(f"{len(unread):,} image(s) cannot be read, first {unread[0]}")
    whole = hashlib.sha256(repr((split.triplets, sorted(split.galleries.items()))).encode())
    for image_id, uri in sorted(split.images.items()):
        whole.update(f"{image_id} {digest_of[uri]}\n".encode())
    return whole.hexdigest()


def evaluate_protocol(
    settings: Settings,
    plan: Plan,
    checkpoint: str,
    protocol: str,
    output: str,
    judged: str | None = None,
    split_name: str = "val",
) -> dict[str, Any]:
    """Evaluate ``checkpoint`` and return the manifest of the committed result.

    ``judged`` is the ``hpfiq.json`` of the "hp-fashioniq" protocol, ``split_name`` the split that
    "own" measures: any layout's, with recalls per category and measures of relevance. The result's
    URI is the manifest's "uri"; submission files lie in it.
    """
    request = Request(settings.data, split_name, judged)
    asked, measured = PROTOCOLS[protocol], measured_by(protocol, settings)
    split = asked.load(request)
    facts = {
        "protocol": protocol,
        "checkpoint": checkpoint_digest(checkpoint),
        "data": content_digest(split),
        "embed_batch": settings.cluster.embed_batch,
        "vision_precision": settings.model.vision_precision,
        "judgements": asked.judgements(request),
    }
    if (pixels := checkpoint_pixels(checkpoint)) != "released":
        facts["pixels"] = pixels  # not said in results from before there was a choice
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
    uri = storage.join(output, f"{protocol}-{key}")
    embeddings, rankings = f"{uri}-embeddings", f"{uri}-rankings"
    places = ((uri, RESULT_KIND), (embeddings, EMBEDDINGS_KIND), (rankings, _RANKINGS_KIND))
    for place, kind in places:
        storage.check_place(place, kind, "output")

    def rank(name: str, galleries: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
        storage.clear(rankings, _RANKINGS_KIND)
        storage.begin(rankings, _RANKINGS_KIND)
        names = rank_queries(
            name,
            split,
            galleries,
            embeddings,
            rankings,
            memory_mb=settings.mining.memory_mb,
            top_k=measured.top_k,
            drop_reference=measured.drop_reference,
            resources=plan.score,
            checkpoint=checkpoint,
        )
        return read_rows(rankings, names)

    if not storage.is_committed(uri):
        corpus = frozenset().union(*split.galleries.values())
        embed_splits(checkpoint, [EmbedJob(split, corpus, embeddings)], settings, plan)
        result, files = measured.result(Asked(request, split, rank, embeddings))
        storage.begin(uri, RESULT_KIND)
        for name, value in files.items():
            storage.write_bytes(storage.join(uri, name), storage.compact_json(value))
        del facts["judgements"]
        storage.write_manifest(uri, RESULT_KIND, facts | {"result": result}, list(files))
    # Also where a process was killed before it came here.
    storage.discard(embeddings, EMBEDDINGS_KIND)
    storage.discard(rankings, _RANKINGS_KIND)
    manifest = storage.read_manifest(uri, RESULT_KIND)
    return manifest | {"uri": uri, "dataset": known_dataset(split)}
