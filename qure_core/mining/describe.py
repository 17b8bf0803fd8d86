"""A mined set for people: the round's statistics, and one query's cut and best negatives."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qure_core.base.errors import InputError
from qure_core.mining.mined_set import read_mined_set, read_round
from qure_core.mining.rules import rule_named


def round_table(manifest: dict[str, Any]) -> str:
    """The end-of-round table of a mined set, for people."""
    statistics, rule = manifest["statistics"], rule_named(manifest["rule"]["name"])
    lines = [
        f"mined set of epoch {manifest['epoch']} ({manifest['engine']} engine)",
        f"  queries                  {manifest['queries']:>12,}",
        f"  corpus images            {sum(manifest['corpus_images'].values()):>12,}",
        f"  {rule.found:<24} {statistics['found_share']:>12.1%}",
    ]
    for name, count in statistics["statuses"].items():
        if name != rule.statuses[0]:
            lines.append(f"  fallback {name:<15} {count:>12,}")
    if (known := statistics["known_positives"])["images"]:
        lines.append(
            f"  known answers left out   {known['images']:>12,}  of {known['queries']:,} queries"
        )
    if (vetoed := statistics["vetoed"])["images"]:
        lines.append(
            f"  vetoed by a second model {vetoed['images']:>12,}  of {vetoed['queries']:,} queries"
        )
    for key, label, form in (
        ("set_size", "negatives per query", ",.0f"),
        ("margin_to_target", "target - negatives", ".4f"),
        ("target_rank", "rank of the target", ",.0f"),
        *((name, label, ",.1f") for name, label in rule.figures.items()),
    ):
        values = "  ".join(f"{name} {value:{form}}" for name, value in statistics[key].items())
        lines.append(f"  {label:<24} {values}")
    times = "  ".join(f"{name} {value:.1f} s" for name, value in manifest["seconds"].items())
    lines.append(f"  time                     {times}")
    if check := manifest.get("precision_check"):
        precision = manifest["settings"]["precision"]
        lines.append(
            f"  {precision} against fp32          {check['changed']:,} of {check['sampled']:,} "
            "sampled queries are cut elsewhere"
        )
    lines.append(f"  peak memory of a task    {manifest['peak_task_memory_mb']:,.0f} MB")
    return "\n".join(lines)


def describe_round(uri: str) -> str:
    """The table of a committed round and the settings it was mined with."""
    manifest = read_round(uri)
    facts = manifest["rule"] | manifest["settings"]
    settings = "  ".join(f"{name}={value}" for name, value in facts.items() if value is not None)
    return f"{round_table(manifest)}\n  settings                 {settings}"


def query_row(uri: str, query_id: str) -> dict[str, Any]:
    """One query's row of a committed round; `InputError` if it has none."""
    table = read_mined_set(uri).table
    found = table.filter(pc.equal(table["query_id"], pa.scalar(query_id)))
    if not len(found):
        some = ", ".join(table["query_id"][:3].to_pylist())
        raise InputError(f"--query: {uri} has no query {query_id!r}; it has, for example, {some}")
    row: dict[str, Any] = found.to_pylist()[0]
    return row


def describe_query(uri: str, query_id: str, top: int) -> str:
    """One query's target, drops and best negatives."""
    row = query_row(uri, query_id)
    rule = rule_named(read_round(uri)["rule"]["name"])
    lines = [
        f"query {query_id} (category {row['category']}): {row['status']}",
        f"  target {row['target_id']}: score {row['target_score']:.5f}, "
        f"rank {row['target_rank']:,}",
    ]
    lines += [f"  {line}" for line in rule.describe(row["details"])]
    if left_alone := row["left_alone_ids"]:
        lines.append(f"  may fit, left alone: {', '.join(left_alone[:top])}")
    if row["known_positives"]:
        lines.append(f"  {row['known_positives']:,} other known answers, left out")
    listed = len(row["negative_ids"])
    lines.append(f"  {row['num_negatives']:,} hard negatives, {listed:,} listed; the best:")
    pairs = zip(row["negative_ids"][:top], row["negative_scores"][:top], strict=True)
    lines += [f"    {score:.5f}  {image_id}" for image_id, score in pairs]
    return "\n".join(lines)
