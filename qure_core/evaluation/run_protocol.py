"""A checkpoint on a benchmark's protocol: embed, rank, measure, and write what its server takes.

Results are kept under a digest of everything they depend on (weights, annotations, image bytes,
protocol), so nothing stale is ever reused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import torch

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError, Problem, raise_problems
from qure_core.data.circo import read_circo
from qure_core.data.cirr import read_cirr
from qure_core.data.fashioniq import read_fashioniq
from qure_core.data.hashing import image_digests
from qure_core.data.layout import ImageFolder
from qure_core.data.schema import Split, Triplet
from qure_core.data.sources import has_split, load_split
from qure_core.embeddings.shards import EMBEDDINGS_KIND, EmbeddingShards
from qure_core.embeddings.stage import EmbedJob, embed_splits
from qure_core.evaluation.metrics import fashioniq_summary
from qure_core.evaluation.protocols import (
    JudgedPair,
    check_circo_submission,
    check_cirr_submission,
    circo_submission,
    circo_summary,
    cirr_submission,
    cirr_summary,
    parse_hp_fashioniq,
    preference_summary,
)
from qure_core.evaluation.published import known_dataset
from qure_core.evaluation.stage import galleries_of, rank_queries, read_rows, summarise
from qure_core.model.checkpoint_files import checkpoint_digest
from qure_core.model.relevance import refuse_bad_scores, relevance_scores
from qure_core.runtime.resources import Plan

RESULT_KIND = storage.Kind("protocol result", r"(recall|recall_subset|submission)\.json")
_RANKINGS_KIND = storage.Kind("unfinished ranking", r"part-\d{5}\.parquet")


def _load(settings: Settings, protocol: str, name: str) -> Split:
    data = settings.data
    if protocol == "own":
        if not has_split(data, name):
            raise InputError(
                f"--split: {data.root} ({data.format} layout) has no {name!r} split; name one that "
                "is there, or set data.format and data.root to your data's"
            )
        split = load_split(data, name)
        if any(triplet.target_id is None for triplet in split.triplets):
            raise InputError(
                f"--split: the {name!r} split of {data.root} has no targets to measure by; name "
                "another, or write a benchmark's submission with its -test protocol"
            )
        return split
    if protocol == "fashioniq":
        split, problems = read_fashioniq(data.root, "val", data.categories)
    elif protocol.startswith("cirr"):
        split, problems = read_cirr(data.root, "val" if protocol == "cirr" else "test1")
    else:
        split, problems = read_circo(data.root, "val" if protocol == "circo" else "test")
    raise_problems(problems, f"{data.root} ({protocol})")
    return split


def _load_judged(settings: Settings, file: str) -> tuple[Split, list[JudgedPair]]:
    pairs = parse_hp_fashioniq(storage.read_json(file), file)
    folder = ImageFolder(storage.join(settings.data.root, "images"))
    by_name = {name.rsplit("/", 1)[-1]: name for name in folder.names()}
    images: dict[str, str] = {}
    problems = []
    for name in sorted({i for p in pairs for i in (p.reference_id, *p.set1, *p.set2)}):
        uri = folder.find(by_name.get(name, name))
        if uri is None:
            problems.append(Problem(file, name, f"image is missing in {folder.uri}"))
        else:
            images[name] = uri
    raise_problems(problems, f"{file} (hp-fashioniq)")
    queries = tuple(
        Triplet(f"{number:06d}", pair.reference_id, pair.text, None, "hp")
        for number, pair in enumerate(pairs)
    )
    return Split("hp", queries, images, {"hp": tuple(images)}), pairs


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
    pairs: list[JudgedPair] = []
    if protocol == "hp-fashioniq":
        if judged is None:
            raise InputError("--judged: the hp-fashioniq protocol needs the path of hpfiq.json")
        split, pairs = _load_judged(settings, judged)
    else:
        split = _load(settings, protocol, split_name)
    facts = {
        "protocol": protocol,
        "checkpoint": checkpoint_digest(checkpoint),
        "data": content_digest(split),
        "embed_batch": settings.cluster.embed_batch,
        "vision_precision": settings.model.vision_precision,
        "judgements": [astuple(pair) for pair in pairs],
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
    uri = storage.join(output, f"{protocol}-{key}")
    embeddings, rankings = f"{uri}-embeddings", f"{uri}-rankings"
    places = ((uri, RESULT_KIND), (embeddings, EMBEDDINGS_KIND), (rankings, _RANKINGS_KIND))
    for place, kind in places:
        storage.check_place(place, kind, "output")
    if not storage.is_committed(uri):
        corpus = frozenset().union(*split.galleries.values())
        job = EmbedJob(split, corpus, embeddings)
        embed_splits(checkpoint, [job], settings, plan)
        files: dict[str, Any] = {}
        if protocol == "hp-fashioniq":
            result = _judge(embeddings, pairs)
        else:
            result, files = _measure(
                settings, plan, checkpoint, protocol, split, embeddings, rankings
            )
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


def _measure(
    settings: Settings,
    plan: Plan,
    checkpoint: str,
    protocol: str,
    split: Split,
    embeddings: str,
    scratch: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rank under the protocol; return its figures and its submission files by name."""

    def rank(name: str, galleries: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
        storage.clear(scratch, _RANKINGS_KIND)
        storage.begin(scratch, _RANKINGS_KIND)
        names = rank_queries(
            name,
            split,
            galleries,
            embeddings,
            scratch,
            memory_mb=settings.mining.memory_mb,
            top_k=50,
            drop_reference=protocol.startswith("cirr")
            or (protocol == "own" and settings.data.format == "cirr"),
            resources=plan.score,
            checkpoint=checkpoint,
        )
        rows = read_rows(scratch, names)
        return rows

    if protocol == "own":
        rows = rank(f"{protocol} {split.name}", split.galleries)
        sizes = {category: len(ids) for category, ids in split.galleries.items()}
        facts = {"split": split.name, "queries": len(rows), "gallery_images": sizes}
        return summarise(rows) | facts | {"tied": _ties(rows)}, {}
    if protocol == "fashioniq":
        return {
            gallery: _fashioniq(rank(f"{protocol} {gallery}", galleries_of(split, gallery)))
            for gallery in ("split", "union")
        }, {}
    rows = rank(protocol, split.galleries)
    measure: dict[str, Callable[..., tuple[dict[str, Any], dict[str, Any]]]] = {
        "cirr": _cirr,
        "cirr-test": _cirr_test,
        "circo": _circo,
        "circo-test": _circo_test,
    }
    return measure[protocol](rows, split)


def _ties(rows: Sequence[dict[str, Any]]) -> int:
    return sum(row["target_ties"] > 0 for row in rows)


def _fashioniq(rows: list[dict[str, Any]]) -> dict[str, Any]:
    ranks: dict[str, list[int]] = {}
    for row in rows:
        ranks.setdefault(row["category"], []).append(row["target_rank"])
    return {"recall": fashioniq_summary(ranks), "queries": len(rows), "tied": _ties(rows)}


def _cirr(rows: list[dict[str, Any]], split: Split) -> tuple[dict[str, Any], dict[str, Any]]:
    summary = cirr_summary(
        [row["target_rank"] for row in rows],
        [row["subset_ids"].index(row["target_id"]) for row in rows],
    )
    return {"recall": summary, "queries": len(rows), "tied": _ties(rows)}, {}


def _cirr_test(rows: list[dict[str, Any]], split: Split) -> tuple[dict[str, Any], dict[str, Any]]:
    references = {t.query_id: t.reference_id for t in split.triplets}
    (gallery,) = split.galleries.values()
    files = {}
    for metric, column in (("recall", "top_ids"), ("recall_subset", "subset_ids")):
        value = cirr_submission(metric, {row["query_id"]: row[column] for row in rows})
        check_cirr_submission(value, list(references), gallery, references)
        files[f"{metric}.json"] = value
    return {"queries": len(rows)}, files


def _circo(rows: list[dict[str, Any]], split: Split) -> tuple[dict[str, Any], dict[str, Any]]:
    summary = circo_summary(
        {row["query_id"]: row["top_ids"] for row in rows},
        {t.query_id: t.relevant_ids for t in split.triplets},
        {t.query_id: str(t.target_id) for t in split.triplets},
    )
    return {"map": summary, "queries": len(rows), "tied": _ties(rows)}, {}


def _circo_test(rows: list[dict[str, Any]], split: Split) -> tuple[dict[str, Any], dict[str, Any]]:
    (gallery,) = split.galleries.values()
    value = circo_submission({row["query_id"]: row["top_ids"] for row in rows})
    check_circo_submission(value, [t.query_id for t in split.triplets], gallery)
    return {"queries": len(rows)}, {"submission.json": value}


def _judge(embeddings: str, pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Mean relevance of both sets of every judged pair, and how people preferred them."""
    shards = EmbeddingShards.open(embeddings)
    images: dict[str, np.ndarray] = {}
    queries: dict[str, np.ndarray] = {}
    for number in range(shards.shards):
        ids, image_MTD = shards.images(number)
        images |= dict(zip(ids, image_MTD, strict=True))
        ids, query_QD = shards.queries(number)
        queries |= dict(zip(ids, query_QD, strict=True))

    def mean_relevance(number: int, names: Sequence[str]) -> float:
        query_QD = torch.from_numpy(queries[f"{number:06d}"])[None]
        image_MTD = torch.from_numpy(np.stack([images[name] for name in names]))
        scores_QM = relevance_scores(query_QD, image_MTD)
        refuse_bad_scores(scores_QM)
        return float(scores_QM.mean())

    score1, score2 = (
        np.asarray([mean_relevance(number, sets) for number, sets in enumerate(column)])
        for column in ([pair.set1 for pair in pairs], [pair.set2 for pair in pairs])
    )
    return preference_summary(
        score1,
        score2,
        np.asarray([pair.preferred for pair in pairs]),
        [pair.participant for pair in pairs],
    )
