"""One mining round on Ray: a checkpoint and a corpus in, a committed mined set out.

Embed corpus and queries in actors; then score, find the drops and write a Parquet part per query
block in tasks; then the manifest. Two engines give the same set: "sort" ranks a block's whole
corpus in one task; "streaming" summarises ranges of the corpus in parallel, merges the summaries
as a tree and looks a second time only at what they leave open. Every task leaves one file, so a
round that was killed goes on from the files it has.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.data.schema import Split, Triplet
from qure_core.embeddings.shards import EMBEDDINGS_KIND
from qure_core.embeddings.stage import EmbedJob, embed_splits
from qure_core.mining.mined_set import MINED_KIND, SCHEMA_VERSION, read_round, upgraded
from qure_core.mining.precision import precision_check
from qure_core.mining.rules import Rule, rule_named
from qure_core.mining.tasks import (
    CHUNK_COLUMNS,
    MERGED_AT_ONCE,
    RANGE_COLUMNS,
    RoundTask,
    merge_summaries,
    mine_by_sorting,
    mine_by_streaming,
    part_name,
    ranges_of,
    summary_bytes,
    write_anchors,
    write_summary,
)
from qure_core.model.checkpoint_files import checkpoint_digest, checkpoint_pixels
from qure_core.ranking.blocks import BYTES_PER_SCORE, QueryBlock, make_blocks, map_blocks
from qure_core.runtime.resources import Plan
from qure_core.storage.lease import Lease, hold

SCRATCH_KIND = storage.Kind("mining scratch", r"(anchors-\d{5}|summary-\d{5}-\d+-\d{5})\.npz")
ROUNDS = "rounds"  # the folder of a run's mined sets
STREAMING_FROM = 100_000
"""Corpus images from which "auto" streams (tests/benchmarks/mining.py measures the crossover)."""


def mine_round(
    settings: Settings,
    plan: Plan,
    checkpoint: str,
    split: Split,
    corpora: dict[str, tuple[str, ...]],
    output: str,
    epoch: int,
    lease: Lease,
) -> dict[str, Any]:
    """Mine the hard negatives of every triplet of ``split`` and commit them to ``output``.

    ``corpora`` holds each category's images to mine among. Returns the manifest; a round already
    committed from the same checkpoint, data and settings is kept, one that was begun is finished.
    Embeddings go to ``output`` + "-embeddings", summaries to ``output`` + "-scratch"; both are
    removed once the round is committed. ``lease`` is the caller's hold (`hold_round`); the round is
    not committed if it was lost. Images are taken to be the same under the same id.
    """
    facts = round_facts(settings, checkpoint, split, corpora, epoch)
    mining = settings.mining
    job = mining_job(split, corpora, output, mining.stored)
    scratch, veto = f"{output}-scratch", _veto_job(settings, split, corpora, output)
    if manifest := storage.kept(output, MINED_KIND, facts, upgraded):
        _tidy(output)  # a process that was killed between the commit and this left it
        return manifest
    check_round_place(output)
    check_corpora(split, corpora)
    embed_splits(checkpoint, [job], settings, plan, mining.corpus_shards)
    # The pass may have been made, for this and other stages together, before this call.
    embed_seconds = storage.read_manifest(job.output, EMBEDDINGS_KIND)["seconds"]
    embedded = time.monotonic()
    if veto:
        embed_splits(str(mining.veto), [veto], settings, plan, mining.corpus_shards)
    engine = choose_engine(settings, corpora)
    blocks = _blocks(settings, engine, split.triplets, corpora)
    layout = {"engine": engine, "blocks": [[b.category, len(b.triplets)] for b in blocks]}
    storage.resume(output, MINED_KIND, facts | layout)
    columns = mining.corpus_range or _range_columns(blocks, plan)
    storage.resume(scratch, SCRATCH_KIND, facts | layout | {"range": columns})
    task = RoundTask(
        embeddings_uri=job.output,
        output=output,
        scratch=scratch,
        seed=settings.run.seed,
        epoch=facts["epoch"],
        exclude_reference=mining.exclude_reference,
        rule=mining_rule(settings),
        max_negatives=mining.max_negatives,
        precision=mining.precision,
        memory_bytes=mining.memory_mb * 2**20,
        veto_uri=veto.output if veto else None,
    )
    name = f"mine epoch {facts['epoch']}"
    seconds: dict[str, float] = {}
    if engine == "sort":
        rows = map_blocks(
            name,
            blocks,
            mine_by_sorting,
            arguments={"task": task},
            resources=plan.score,
            blame=checkpoint,
        )
        peaks = rows
    else:
        rows, seconds, peaks = _stream(name, blocks, task, plan, columns, checkpoint)
    mined = time.monotonic()
    seconds = {
        "embed": embed_seconds,
        **seconds,
        "score, sort and write" if engine == "sort" else "settle and write": _total(rows),
        "score to write, wall": round(mined - embedded, 3),
    }
    description = facts | {
        "engine": engine,
        "queries": len(split.triplets),
        "corpus_images": {category: len(ids) for category, ids in corpora.items()},
        "seconds": seconds,
        "peak_task_memory_mb": round(max(float(row["peak_mb"]) for row in peaks), 1),
        "statistics": summarise(rows, task.rule),
    }
    if engine == "streaming":
        description["second_looks"] = sum(int(row["second_looks"]) for row in rows)
    if mining.precision != "fp32":
        description["precision_check"] = precision_check(task, blocks, plan)
    lease.check()
    storage.write_manifest(output, MINED_KIND, description, [part_name(b.number) for b in blocks])
    _tidy(output)
    return read_round(output)


def _beside(output: str) -> tuple[tuple[str, storage.Kind], ...]:
    """What a round keeps beside it until it is committed."""
    return (
        (f"{output}-embeddings", EMBEDDINGS_KIND),
        (f"{output}-veto-embeddings", EMBEDDINGS_KIND),
        (f"{output}-scratch", SCRATCH_KIND),
    )


def _tidy(output: str) -> None:
    for uri, kind in _beside(output):
        storage.discard(uri, kind)


def check_round_place(output: str, setting: str = "") -> None:
    """Raise `InputError` if a round made at ``output`` would meet files that are not ours."""
    for uri, kind in ((output, MINED_KIND), *_beside(output)):
        storage.check_place(uri, kind, setting)


def hold_round(output: str, *, wait: bool = False) -> AbstractContextManager[Lease]:
    """Hold the place where a round is made: all rounds of a run, or one output elsewhere."""
    folder, name = output.rsplit("/", 1)
    in_a_run = folder.rsplit("/", 1)[-1] == ROUNDS
    return hold(folder, "mining", None if in_a_run else name, wait=wait)


def round_facts(
    settings: Settings,
    checkpoint: str,
    split: Split,
    corpora: dict[str, tuple[str, ...]],
    epoch: int,
) -> dict[str, Any]:
    """Everything that a mined set depends on."""
    mining, rule = settings.mining, mining_rule(settings)
    return {
        "epoch": epoch,
        "schema_version": SCHEMA_VERSION,
        "checkpoint": checkpoint_digest(checkpoint),
        "corpus": corpus_digest(corpora),
        "triplets": hashlib.sha256(repr(split.triplets).encode()).hexdigest()[:16],
        "rule": {"name": rule.name, "version": rule.version, **rule.options()},
        "settings": {
            "exclude_reference": mining.exclude_reference,
            "max_negatives": mining.max_negatives,
            "seed": settings.run.seed if mining.max_negatives else None,
            "precision": mining.precision,
            "stored": mining.stored,
            "known_positives": _positives_digest(split) if mining.exclude_known_positives else None,
            "embed_batch": settings.cluster.embed_batch,
            "vision_precision": settings.model.vision_precision,
            "pixels": checkpoint_pixels(checkpoint),
            "veto": checkpoint_digest(mining.veto) if mining.veto else None,
        },
    }


def mining_rule(settings: Settings) -> Rule:
    """The rule that the settings name, as they have it."""
    rule: Rule = rule_named(settings.mining.rule).of(settings.mining)
    return rule


def check_mining(settings: Settings) -> None:
    """Raise `InputError` if the rule or its veto cannot be what the settings name."""
    rule = mining_rule(settings)
    if settings.mining.engine == "streaming":
        _check_streams(settings, rule)
    if veto := settings.mining.veto:
        try:
            checkpoint_digest(veto)
        except InputError as error:
            raise InputError(f"mining.veto: {error}") from None


def choose_engine(settings: Settings, corpora: dict[str, tuple[str, ...]]) -> str:
    """The engine of a round: as set, or by the size of the largest corpus."""
    rule = mining_rule(settings)
    if settings.mining.engine == "streaming":
        _check_streams(settings, rule)
    if settings.mining.engine != "auto":
        return settings.mining.engine
    largest = max(len(ids) for ids in corpora.values())
    streams = rule.streams and not settings.mining.veto
    return "streaming" if largest >= STREAMING_FROM and streams else "sort"


def _check_streams(settings: Settings, rule: Rule) -> None:
    if rule.streams and not settings.mining.veto:
        return
    what = "a veto" if rule.streams else f"the rule {rule.name}"
    raise InputError(
        f"mining.engine: {what} needs whole rankings, which 'streaming' does not make; set "
        "mining.engine to 'auto' or 'sort'"
    )


def _blocks(
    settings: Settings,
    engine: str,
    triplets: Sequence[Triplet],
    corpora: dict[str, tuple[str, ...]],
) -> list[QueryBlock]:
    mining = settings.mining
    if engine == "sort":
        memory_mb = mining.memory_mb // 2 if mining.veto else mining.memory_mb  # scores of both
        return make_blocks(triplets, corpora, memory_mb, mining.query_block)
    # A streaming task holds, per query, the scores of a chunk and a summary.
    summary = summary_bytes(mining_rule(settings), mining.max_negatives)
    held = CHUNK_COLUMNS + summary // BYTES_PER_SCORE
    return make_blocks(triplets, corpora, mining.memory_mb, mining.query_block, held)


def _total(rows: Sequence[dict[str, Any]]) -> float:
    return round(sum(float(row["seconds"]) for row in rows), 3)


def _range_columns(blocks: Sequence[QueryBlock], plan: Plan) -> int:
    """Images that one task summarises: as many as bounds its time, fewer if slots would idle."""
    images = sum(len(block.corpus) for block in blocks)
    return min(RANGE_COLUMNS, max(CHUNK_COLUMNS // 4, -(-images // (2 * plan.slots))))


def _stream(
    name: str,
    blocks: list[QueryBlock],
    task: RoundTask,
    plan: Plan,
    columns: int,
    checkpoint: str,
) -> tuple[list[dict[str, Any]], dict[str, float], list[dict[str, Any]]]:
    """The streaming engine's steps: anchors, summaries, a tree of merges, and the cut."""
    arguments = {"task": task}
    peaks = map_blocks(
        f"{name}: anchors",
        blocks,
        write_anchors,
        arguments=arguments,
        resources=plan.score,
        blame=checkpoint,
    )
    ranges = {block.number: ranges_of(block, columns) for block in blocks}

    def scores(block: QueryBlock, part: int) -> int:
        first, last = ranges[block.number][part]
        return len(block.triplets) * (last - first)

    summaries = map_blocks(
        f"{name}: summarise",
        blocks,
        write_summary,
        arguments=arguments | {"columns": columns},
        resources=plan.score,
        blame=checkpoint,
        parts=[(number, part) for number, own in ranges.items() for part in range(len(own))],
        scores=scores,
    )
    peaks += summaries
    left = [(0, len(ranges[block.number])) for block in blocks]
    while any(count > MERGED_AT_ONCE for _, count in left):
        for level, count in sorted({item for item in left if item[1] > MERGED_AT_ONCE}):
            fewer = -(-count // MERGED_AT_ONCE)
            own = [number for number, item in enumerate(left) if item == (level, count)]
            peaks += map_blocks(
                f"{name}: merge",
                blocks,
                merge_summaries,
                arguments=arguments | {"level": level, "count": count},
                parts=[(number, part) for number in own for part in range(fewer)],
            )
            for number in own:
                left[number] = (level + 1, fewer)
    rows = map_blocks(
        f"{name}: settle",
        blocks,
        mine_by_streaming,
        arguments=arguments | {"left": left},
        resources=plan.score,
        blame=checkpoint,
    )
    return rows, {"score and summarise": _total(summaries)}, peaks + rows


def mining_job(
    split: Split, corpora: dict[str, tuple[str, ...]], output: str, stored: str
) -> EmbedJob:
    """The embeddings that a round at ``output`` needs; ``stored`` is "fp32" or "fp16"."""
    dtype = {"fp32": "float32", "fp16": "float16"}[stored]
    corpus: frozenset[str] = frozenset().union(*corpora.values())
    return EmbedJob(split, corpus, f"{output}-embeddings", dtype)


def _veto_job(
    settings: Settings, split: Split, corpora: dict[str, tuple[str, ...]], output: str
) -> EmbedJob | None:
    """The embeddings of the same images and queries by the second model, if there is one."""
    if not settings.mining.veto:
        return None
    same = mining_job(split, corpora, output, settings.mining.stored)
    return replace(same, output=f"{output}-veto-embeddings")


def corpus_digest(corpora: dict[str, tuple[str, ...]]) -> str:
    """A short digest of which images each category mines among."""
    digest = hashlib.sha256()
    for category in sorted(corpora):
        digest.update("\x1f".join([category, *corpora[category], ""]).encode())
    return digest.hexdigest()[:16]


def check_corpora(split: Split, corpora: dict[str, tuple[str, ...]], negatives: int = 1) -> None:
    """Raise one `InputError` if a query could not be mined, or has not so many ``negatives``."""
    members = {category: set(ids) for category, ids in corpora.items()}
    small = sorted(category for category, ids in members.items() if len(ids) < negatives + 2)
    if small:
        others = "one other image" if negatives == 1 else f"{negatives:,} other images"
        raise InputError(
            f"mining corpus of category {', '.join(small)} has fewer than {negatives + 2} images; "
            f"a query needs a target, a reference and at least {others}. Give the category more "
            "of them, or set data.mining_corpus to 'split'"
        )
    for triplet in split.triplets if not small else ():
        own = members[triplet.category]
        left_out = own.intersection((triplet.reference_id, *triplet.positive_ids))
        left = len(own) - len(left_out | {str(triplet.target_id)})
        if triplet.positive_ids and left < negatives:
            raise InputError(
                f"query {triplet.query_id}: {left} of the {len(own):,} images of its mining corpus "
                "are neither its reference nor known answers, too few to be its negatives. Give "
                "the corpus more images (data.mining_corpus split, mining.corpus), correct what is "
                "labelled, or set mining.exclude_known_positives to false"
            )
    outside = [t for t in split.triplets if t.target_id not in members[t.category]]
    if outside:
        first = outside[0]
        raise InputError(
            f"{len(outside)} target(s) are absent from their mining corpus, first "
            f"{first.target_id!r} of query {first.query_id}; set data.mining_corpus to 'targets'"
        )


def _positives_digest(split: Split) -> str:
    known = [(t.query_id, t.positive_ids) for t in split.triplets if t.positive_ids]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


_POINTS = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {name: round(float(np.quantile(values, q)), 6) for name, q in _POINTS.items()}


def summarise(rows: list[dict[str, Any]], rule: Rule) -> dict[str, Any]:
    """Statistics of a round from its blocks' results, independent of how it was cut."""
    sizes, margins, ranks, codes, known, vetoed = (
        np.concatenate([np.asarray(row[name]) for row in rows])
        for name in ("sizes", "margins", "ranks", "codes", "known_positives", "vetoed")
    )
    statuses = {name: int((codes == i).sum()) for i, name in enumerate(rule.statuses)}
    statistics = {
        "statuses": statuses,
        "found_share": round(statuses[rule.statuses[0]] / len(codes), 6),
        "set_size": _quantiles(sizes),
        "margin_to_target": _quantiles(margins),
        "target_rank": _quantiles(ranks),
        "known_positives": {"queries": int((known > 0).sum()), "images": int(known.sum())},
        "vetoed": {"queries": int((vetoed > 0).sum()), "images": int(vetoed.sum())},
    }
    for name in rule.figures:
        values = np.concatenate([np.asarray(row[f"figure_{name}"]) for row in rows])
        finite = values[np.isfinite(values)]
        statistics[name] = _quantiles(finite if len(finite) else np.zeros(1))
    return statistics
