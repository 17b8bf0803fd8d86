"""What reduced precision costs: a sample of a round's queries mined again in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qure_core import storage
from qure_core.base.seeds import derive
from qure_core.mining.tasks import RoundTask, fp32_rows, part_name
from qure_core.ranking.blocks import QueryBlock, map_blocks
from qure_core.runtime.resources import Plan
from qure_core.storage.parquet import read_parquet

SAMPLED = 256


def precision_check(task: RoundTask, blocks: Sequence[QueryBlock], plan: Plan) -> dict[str, int]:
    """How many of up to `SAMPLED` queries are cut elsewhere in fp32: "sampled" and "changed".

    Sets are cut alike if their status is the same, and their `Rule.cut`.
    """
    names = sorted(
        (t.query_id for block in blocks for t in block.triplets),
        key=lambda name: derive(task.seed, "precision sample", task.epoch, name),
    )
    chosen = set(names[:SAMPLED])
    some = [
        replace(block, triplets=tuple(t for t in block.triplets if t.query_id in chosen))
        for block in blocks
    ]
    rows = map_blocks(
        f"mine epoch {task.epoch}: compare with fp32",
        some,
        _compare,
        arguments={"task": task},
        resources=plan.score,
        parts=[(block.number, 0) for block in some if block.triplets],
    )
    return {
        "sampled": sum(int(row["sampled"]) for row in rows),
        "changed": sum(int(row["changed"]) for row in rows),
    }


def _compare(block: QueryBlock, part: int, task: RoundTask) -> dict[str, Any]:
    columns = ["query_id", "status", "target_rank", "details"]
    table = read_parquet(storage.join(task.output, part_name(block.number)), columns)
    mined = {row["query_id"]: row for row in table.to_pylist()}
    cut = task.rule.cut
    changed = 0
    for triplet, row in zip(block.triplets, fp32_rows(block, task), strict=True):
        there = mined[triplet.query_id]
        before = (there["status"], cut(there["details"], there["target_rank"]))
        changed += before != (row.status, cut(row.details, row.target_rank))
    return {"sampled": len(block.triplets), "changed": changed}
