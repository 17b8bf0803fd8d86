"""The mined set of one round on disk: a Parquet row per query, committed by its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qure_core import storage
from qure_core.mining.rules.rule import THRESHOLD
from qure_core.mining.rules.steep_drops import DropRule
from qure_core.storage.parquet import read_committed_parquet

SCHEMA_VERSION = 6
"""6: ``left_alone_ids``. 5: ``negative_weights``, ``vetoed`` and the settings of a veto.
4: ``known_positives``. 3: the rule's facts are a struct, ``details``; until 2 those of steep
drops were columns."""

# The names beside the parts begin with an underscore, which readers of Parquet directories skip.
MINED_KIND = storage.Kind(
    "mined set", r"part-\d{5}\.parquet", "_manifest.json", SCHEMA_VERSION, "schema_version"
)
_OLD_DETAILS = ("upper_drop", "lower_drop", "steepness")


def _arrow_type(kind: Any) -> pa.DataType:
    """The Arrow type of a rule's declaration of a detail (`Rule.details`)."""
    if isinstance(kind, list):
        return pa.list_(_arrow_type(kind[0]))
    if isinstance(kind, Mapping):
        return pa.struct([(name, _arrow_type(inner)) for name, inner in kind.items()])
    return pa.type_for_alias(kind)


def mined_schema(details: Mapping[str, Any]) -> pa.Schema:
    """The schema of a mined set of a rule with such ``details``."""
    return pa.schema(
        [
            ("query_id", pa.string()),
            ("category", pa.string()),
            ("target_id", pa.string()),
            ("target_score", pa.float32()),
            ("target_rank", pa.int64()),
            ("num_negatives", pa.int64()),  # in the set, of which max_negatives are listed
            ("known_positives", pa.int64()),  # of the corpus, which could not be in it
            ("negative_ids", pa.large_list(pa.dictionary(pa.int32(), pa.string()))),
            ("negative_scores", pa.large_list(pa.float32())),
            ("negative_weights", pa.large_list(pa.float32())),  # None: all are equally likely
            # Candidates that may fit, by a rule that looks for such, the likeliest first.
            ("left_alone_ids", pa.large_list(pa.dictionary(pa.int32(), pa.string()))),
            ("vetoed", pa.int64()),  # images that a second model kept out; None without one
            ("status", pa.string()),
            ("details", _arrow_type(details)),
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
        return dict(zip(ids, _lists(self.table["negative_ids"]), strict=True))

    @property
    def leaves_alone(self) -> bool:
        """Whether it lists images that may fit, as of a rule that looks for such."""
        column = self.table["left_alone_ids"]
        return bool(column.null_count < len(column))

    def left_alone(self) -> dict[str, np.ndarray]:
        """Images that may fit, found among each query's candidates: {query id: array of image ids},
        the likeliest first; empty unless it `leaves_alone` such."""
        if not self.leaves_alone:
            return {}
        ids = self.table["query_id"].to_pylist()
        return dict(zip(ids, _lists(self.table["left_alone_ids"]), strict=True))

    def weights(self) -> dict[str, np.ndarray]:
        """Weights of the negatives of those queries whose negatives are not equally likely."""
        column = self.table["negative_weights"].combine_chunks()
        if column.null_count == len(column):
            return {}
        return {name: np.asarray(own) for name, own in self._given(column).items()}

    def _given(self, column: pa.ChunkedArray) -> dict[str, Any]:
        """A column's values by query, without those that are not there."""
        pairs = zip(self.table["query_id"].to_pylist(), column.to_pylist(), strict=True)
        return {query_id: value for query_id, value in pairs if value is not None}

    def thresholds(self) -> dict[str, float]:
        """Of a rule that has such (`THRESHOLD`), the queries' likeness to the target from which an
        image may fit: {query id: likeness}, without those that have none."""
        kind = self.table.schema.field("details").type
        if kind.get_field_index(THRESHOLD) < 0 or not self.leaves_alone:
            return {}  # a version that listed no such images made no use of it in training
        return self._given(pc.struct_field(self.table["details"], THRESHOLD))

    def rows(self, query_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The named queries' rows, without their lists of images: {query id: row}."""
        lists = ("negative_", "left_alone_")
        names = [name for name in self.table.column_names if not name.startswith(lists)]
        wanted = pc.is_in(self.table["query_id"], pa.array(query_ids, pa.string()))
        rows = self.table.select(names).filter(wanted).to_pylist()
        return {row["query_id"]: row for row in rows}


def _lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """A column of lists of image ids as arrays."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    # One string per image, not per place.
    names = np.asarray(lists.values.dictionary.to_pylist(), dtype=object)
    values = names[lists.values.indices.to_numpy()]
    return [values[offsets[row] : offsets[row + 1]] for row in range(len(lists))]


def upgraded(manifest: dict[str, Any]) -> dict[str, Any]:
    """A round's manifest in the terms of today's, whichever version wrote it."""
    version = manifest.get("schema_version", SCHEMA_VERSION)
    settings, rule = dict(manifest.get("settings", {})), manifest.get("rule")
    statistics = dict(manifest.get("statistics", {}))
    if version < 3:
        del settings["rule"]  # prose: there was one rule
        options = {name: settings.pop(name) for name in DropRule().options()}
        statistics["found_share"] = statistics.pop("steep_share")
        rule = {"name": DropRule.name, "version": 1, **options}
    if version < 4:
        # As the released program: nothing but targets was known, and images were as stored.
        settings |= {"known_positives": None, "pixels": "released"}
        statistics["known_positives"] = {"queries": 0, "images": 0}
    if version < 5:
        settings["veto"] = None
        statistics["vetoed"] = {"queries": 0, "images": 0}
    today = {"schema_version": SCHEMA_VERSION, "settings": settings, "rule": rule}
    return manifest | today | {"statistics": statistics}


def read_round(uri: str) -> dict[str, Any]:
    """The manifest of a committed round, in today's terms; `InputError` if it is not finished."""
    return upgraded(storage.read_manifest(uri, MINED_KIND))


def read_mined_set(uri: str, columns: list[str] | None = None) -> MinedSet:
    """Read a committed round; `InputError` if it is not finished or damaged, or of a later version.

    ``columns`` limits what is read, e.g. to leave out the negatives.
    """
    manifest = read_round(uri)
    parts = sorted(name for name in manifest["files"] if name.startswith("part-"))
    if columns and "details" in columns:
        # Of an older version's file these are there instead; Parquet passes over what is not.
        columns = [*columns, *_OLD_DETAILS]
    version = int(storage.read_manifest(uri, MINED_KIND).get("schema_version", SCHEMA_VERSION))
    tables = [
        _today(read_committed_parquet(uri, name, manifest, columns), version) for name in parts
    ]
    return MinedSet(uri, manifest, pa.concat_tables(tables).unify_dictionaries())


def _today(table: pa.Table, version: int) -> pa.Table:
    """A part's table as today's are, whichever version wrote it."""
    if "negative_scores" in table.column_names:
        later = ["left_alone_ids"] if version < 6 else []
        later += ["negative_weights", "vetoed"] if version < 5 else []
        for name in later:
            field = mined_schema({"none": "string"}).field(name)
            table = table.append_column(field, pa.nulls(len(table), field.type))
    if "num_negatives" in table.column_names and "known_positives" not in table.column_names:
        place = table.column_names.index("num_negatives") + 1
        none = pa.array([0] * len(table), pa.int64())
        table = table.add_column(place, "known_positives", none)
    if not set(_OLD_DETAILS) <= set(table.column_names):
        return table
    facts = [table[name].combine_chunks() for name in _OLD_DETAILS]
    details = pa.StructArray.from_arrays(facts, _OLD_DETAILS)
    return table.drop_columns(list(_OLD_DETAILS)).append_column("details", details)
