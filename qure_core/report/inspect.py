"""A mined set for people: the round's statistics, one query's drops, curve and negatives."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.mining.mined_set import MINED_KIND, read_mined_set
from qure_core.mining.stage import round_table
from qure_core.report.figures import draw_score_curve

_SIGNATURE = {"Software": "qure-core"}  # by which a picture of ours is known


def describe_round(uri: str) -> str:
    """The table of a committed round and the settings it was mined with."""
    manifest = storage.read_manifest(uri, MINED_KIND)
    settings = "  ".join(
        f"{name}={value}" for name, value in manifest["settings"].items() if value is not None
    )
    return f"{round_table(manifest)}\n  settings                 {settings}"


def _query(uri: str, query_id: str) -> dict[str, Any]:
    table = read_mined_set(uri).table
    found = table.filter(pc.equal(table["query_id"], pa.scalar(query_id)))
    if not len(found):
        some = ", ".join(table["query_id"][:3].to_pylist())
        raise InputError(f"--query: {uri} has no query {query_id!r}; it has, for example, {some}")
    row: dict[str, Any] = found.to_pylist()[0]
    return row


def describe_query(uri: str, query_id: str, top: int) -> str:
    """One query's target, drops and best negatives."""
    row = _query(uri, query_id)
    lines = [
        f"query {query_id} (category {row['category']}): {row['status']}",
        f"  target {row['target_id']}: score {row['target_score']:.5f}, "
        f"rank {row['target_rank']:,}",
    ]
    for name in ("upper", "lower"):
        if drop := row[f"{name}_drop"]:
            lines.append(
                f"  {name} drop after rank {drop['rank']:,}: {drop['score_above']:.5f} to "
                f"{drop['score_below']:.5f} ({drop['height']:.5f})"
            )
    if row["steepness"] is not None:
        lines.append(f"  steepness {row['steepness']:.2f} x the typical gap beside the drops")
    listed = len(row["negative_ids"])
    lines.append(f"  {row['num_negatives']:,} hard negatives, {listed:,} listed; the best:")
    pairs = zip(row["negative_ids"][:top], row["negative_scores"][:top], strict=True)
    lines += [f"    {score:.5f}  {image_id}" for image_id, score in pairs]
    return "\n".join(lines)


def check_picture(picture: str) -> None:
    """Raise `InputError` if a file that is no curve drawn here would be written over."""
    if not storage.exists(picture):
        return
    try:
        with Image.open(io.BytesIO(storage.read_bytes(picture))) as found:
            ours = found.info.get("Software") == _SIGNATURE["Software"]
    except OSError:
        ours = False
    if not ours:
        raise InputError(f"--picture: {picture} exists already; choose another name")


def draw_query(uri: str, query_id: str, picture: str) -> None:
    """Write one query's sorted curve with both drops as a PNG file."""
    check_picture(picture)
    buffer = io.BytesIO()
    figure = draw_score_curve(_query(uri, query_id))
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=130, metadata=_SIGNATURE)
    storage.write_bytes(picture, buffer.getvalue())
