"""The mined set of one round on disk: a Parquet row per query, committed by its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qure_core import storage
from qure_core.storage.parquet import read_committed_parquet

# The names beside the parts begin with an underscore, which readers of Parquet directories skip.
MINED_KIND = storage.Kind("mined set", r"part-\d{5}\.parquet", "_manifest.json")
SCHEMA_VERSION = 2

_DROP = pa.struct(
    [
        ("rank", pa.int64()),  # of the last image above the drop, 0 the best
        ("height", pa.float32()),
        ("score_above", pa.float32()),
        ("score_below", pa.float32()),
    ]
)

MINED_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("category", pa.string()),
        ("target_id", pa.string()),
        ("target_score", pa.float32()),
        ("target_rank", pa.int64()),
        ("upper_drop", _DROP),
        ("lower_drop", _DROP),
        ("steepness", pa.float64()),  # None where no pair of drops qualifies
        ("num_negatives", pa.int64()),  # in the set, of which max_negatives are listed
        ("negative_ids", pa.large_list(pa.dictionary(pa.int32(), pa.string()))),
        ("negative_scores", pa.large_list(pa.float32())),
        ("status", pa.string()),
        ("curve_ranks", pa.list_(pa.int64())),  # points of the query's whole sorted curve
        ("curve_scores", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class MinedSet:
    """One committed round: its manifest and its rows."""

    uri: str
    manifest: dict[str, Any]
    table: pa.Table

    def negatives(self) -> dict[str, np.ndarray]:
        """Hard negatives of every query: {query id: array of image ids}, best first."""
        ids = self.table["query_id"].to_pylist()
        column = self.table["negative_ids"].combine_chunks()
        offsets = column.offsets.to_numpy()
        # One string per image, not per negative.
        names = np.asarray(column.values.dictionary.to_pylist(), dtype=object)
        values = names[column.values.indices.to_numpy()]
        return {
            query_id: values[offsets[row] : offsets[row + 1]] for row, query_id in enumerate(ids)
        }

    def rows(self, query_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The named queries' rows, without their negatives: {query id: row}."""
        names = [name for name in self.table.column_names if not name.startswith("negative_")]
        wanted = pc.is_in(self.table["query_id"], pa.array(query_ids, pa.string()))
        rows = self.table.select(names).filter(wanted).to_pylist()
        return {row["query_id"]: row for row in rows}


def read_mined_set(uri: str, columns: list[str] | None = None) -> MinedSet:
    """Read a committed round; `InputError` if it is not finished or damaged.

    ``columns`` limits what is read, e.g. to leave out the negatives.
    """
    manifest = storage.read_manifest(uri, MINED_KIND)
    parts = sorted(name for name in manifest["files"] if name.startswith("part-"))
    tables = [read_committed_parquet(uri, name, manifest, columns) for name in parts]
    return MinedSet(uri, manifest, pa.concat_tables(tables).unify_dictionaries())
