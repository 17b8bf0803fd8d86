"""A mined set for other training programs: queries with their targets and hard negatives.

Formats: "jsonl", a line a query, by ids; "sentence-transformers", a table of (anchor, positive,
negative_1, ...) with as many negatives in every row; "tevatron", its queries and corpus tables.
Images in tables are columns that `datasets` decodes: the path of a file on a disk, the bytes of any
other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.data.images import read_stored
from qure_core.data.packed import shard_of
from qure_core.data.schema import Split, Triplet
from qure_core.mining.mined_set import read_mined_set
from qure_core.storage.parquet import write_row_groups

Format = Literal["jsonl", "sentence-transformers", "tevatron"]
FORMATS: tuple[Format, ...] = ("jsonl", "sentence-transformers", "tevatron")
EXPORT_KIND = storage.Kind("exported mined set", storage.LISTED)
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_ROWS = 256  # written at a time


def export_round(
    uri: str, split: Split, output: str, form: Format, negatives: int
) -> dict[str, int]:
    """Write the round at ``uri`` to ``output``; return counts: "queries" written, "short" left out.

    ``split`` is the training split that it was mined for. ``negatives`` is how many of each query
    are written, the best-scored; a "sentence-transformers" row needs all of them, so queries with
    fewer are left out there. Raises `InputError` if the round is of other queries.
    """
    mined = read_mined_set(uri, ["query_id", "negative_ids", "negative_scores"])
    chosen = mined.negatives()
    triplets = [triplet for triplet in split.triplets if triplet.query_id in chosen]
    if len(triplets) != len(chosen):
        raise InputError(
            f"{uri}: {len(chosen) - len(triplets):,} of its {len(chosen):,} queries are not of the "
            "split given; give the one that it was mined for (--split)"
        )
    best = {query: [str(name) for name in ids[:negatives]] for query, ids in chosen.items()}
    if lacking := sorted(set().union(*best.values()) - set(split.images)):
        raise InputError(
            f"{uri}: {len(lacking):,} of its negatives are not images of the split given, first "
            f"{lacking[0]!r}; give the data/train of the run that mined it (--split)"
        )
    short = 0
    if form == "sentence-transformers":
        short = sum(len(ids) < negatives for ids in best.values())
        triplets = [t for t in triplets if len(best[t.query_id]) == negatives]
    if not triplets:
        raise InputError(f"--negatives: no query has {negatives:,} hard negatives; ask for fewer")
    with storage.committed_directory(output, EXPORT_KIND) as (folder, description):
        if form == "jsonl":
            _write_lines(folder / "train.jsonl", triplets, best, _scores(mined.table, negatives))
        elif form == "sentence-transformers":
            _write_tuples(folder / "train.parquet", triplets, best, split.images, negatives)
        else:
            _write_tevatron(folder, triplets, best, split.images)
        description |= {"format": form, "round": uri, "queries": len(triplets), "short": short}
    return {"queries": len(triplets), "short": short}


def _scores(table: pa.Table, negatives: int) -> dict[str, list[float]]:
    lists = table["negative_scores"].combine_chunks()
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
    return {
        query: values[offsets[row] : offsets[row + 1]][:negatives].astype(np.float64).tolist()
        for row, query in enumerate(table["query_id"].to_pylist())
    }


def _write_lines(
    file: Path,
    triplets: Sequence[Triplet],
    best: dict[str, list[str]],
    scores: dict[str, list[float]],
) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for triplet in triplets:
            row = {
                "query_id": triplet.query_id,
                "reference": triplet.reference_id,
                "text": triplet.text,
                "target": triplet.target_id,
                "category": triplet.category,
                "negatives": best[triplet.query_id],
                "scores": scores[triplet.query_id],
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def picture(uri: str) -> dict[str, Any]:
    """An image as `datasets` stores one."""
    if shard_of(uri) is None and storage.is_local(uri):
        return {"bytes": None, "path": uri}
    return {"bytes": read_stored(uri), "path": None}


def _hugging_face(schema: pa.Schema, features: dict[str, Any]) -> pa.Schema:
    """``schema`` with what tells `datasets` which columns are images."""
    facts = {"info": {"features": features}}
    return schema.with_metadata({"huggingface": json.dumps(facts)})


def _write_rows(file: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> None:
    parts = iter(lambda: list(islice(rows, _ROWS)), [])
    write_row_groups(file, (pa.Table.from_pylist(some, schema) for some in parts), schema)


_IMAGE = {"_type": "Image"}


def _write_tuples(
    file: Path,
    triplets: Sequence[Triplet],
    best: dict[str, list[str]],
    images: dict[str, str],
    negatives: int,
) -> None:
    columns = ["positive", *(f"negative_{number + 1}" for number in range(negatives))]
    anchor = pa.struct([("image", _PICTURE), ("text", pa.string())])
    schema = pa.schema([("anchor", anchor), *((name, _PICTURE) for name in columns)])
    asked = {"image": _IMAGE, "text": {"dtype": "string", "_type": "Value"}}
    schema = _hugging_face(schema, {"anchor": asked} | dict.fromkeys(columns, _IMAGE))

    def rows() -> Iterator[dict[str, Any]]:
        for triplet in triplets:
            names = [str(triplet.target_id), *best[triplet.query_id]]
            own = {c: picture(images[n]) for c, n in zip(columns, names, strict=True)}
            reference = picture(images[triplet.reference_id])
            yield {"anchor": {"image": reference, "text": triplet.text}, **own}

    _write_rows(file, schema, rows())


def _write_tevatron(
    folder: Path,
    triplets: Sequence[Triplet],
    best: dict[str, list[str]],
    images: dict[str, str],
) -> None:
    ids = pa.list_(pa.string())
    queries = pa.schema(
        [
            ("query_id", pa.string()),
            ("query_text", pa.string()),
            ("query_image", _PICTURE),
            ("positive_document_ids", ids),
            ("negative_document_ids", ids),
        ]
    )
    corpus = pa.schema([("docid", pa.string()), ("text", pa.string()), ("image", _PICTURE)])

    def query_rows() -> Iterator[dict[str, Any]]:
        for triplet in triplets:
            yield {
                "query_id": triplet.query_id,
                "query_text": triplet.text,
                "query_image": picture(images[triplet.reference_id]),
                "positive_document_ids": [triplet.target_id],
                "negative_document_ids": best[triplet.query_id],
            }

    named = {str(t.target_id) for t in triplets}.union(*(best[t.query_id] for t in triplets))
    documents = ({"docid": n, "text": "", "image": picture(images[n])} for n in sorted(named))
    image = {"query_image": _IMAGE}
    _write_rows(folder / "queries.parquet", _hugging_face(queries, image), query_rows())
    _write_rows(folder / "corpus.parquet", _hugging_face(corpus, {"image": _IMAGE}), documents)
