"""What reduced precision costs: a sample of a round's queries mined again in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qure_core import storage
from qure_core.base.seeds import derive
from qure_core.mining.rules.drop_rule import STATUSES
from qure_core.mining.tasks import RoundTask, fp32_rows, part_name
from qure_core.ranking.blocks import QueryBlock, map_blocks
from qure_core.runtime.resources import Plan
from qure_core.storage.parquet import read_parquet

SAMPLED = 256


def precision_check(task: RoundTask, blocks: Sequence[QueryBlock], plan: Plan) -> dict[str, int]:
    """How many of up to `SAMPLED` queries have other drops in fp32: "sampled" and "changed".

    Drops are the same if status and both positions below the target are.
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
    columns = ["query_id", "status", "target_rank", "upper_drop", "lower_drop"]
    table = read_parquet(storage.join(task.output, part_name(block.number)), columns)
    mined = {row["query_id"]: row for row in table.to_pylist()}

    changed = 0
    for triplet, row in zip(block.triplets, fp32_rows(block, task), strict=True):
        there = mined[triplet.query_id]
        places = [drop and drop["rank"] for drop in (there["upper_drop"], there["lower_drop"])]
        before = (there["status"], *_below(places, there["target_rank"]))
        places = [drop and drop.rank for drop in (row.upper, row.lower)]
        changed += before != (STATUSES[row.status], *_below(places, row.target_rank))
    return {"sampled": len(block.triplets), "changed": changed}


def _below(ranks: Sequence[int | None], target_rank: int) -> list[int | None]:
    return [None if rank is None else rank - target_rank for rank in ranks]
