"""A version of an index that is being made: its list of images, then its manifest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from qure_core import storage
from qure_core.embeddings.shards import EMBEDDINGS_KIND
from qure_core.search.index import IMAGES, INDEX_KIND, Index
from qure_core.storage.kinds import PLAN
from qure_core.storage.parquet import parquet_bytes

PART_ROWS = 65_536  # of a segment: FAISS' files and a service's replicas hold whole parts


@dataclass(frozen=True)
class Version:
    """A version to be: its directory, what all of it is made with, and its images' rows by id."""

    output: str
    facts: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    embedded: int

    @cached_property
    def images(self) -> pa.Table:
        return pa.Table.from_pylist([self.rows[name] for name in sorted(self.rows)], IMAGES)

    @cached_property
    def _file(self) -> tuple[str, dict[str, Any]]:
        """The name and the facts of the list of its images, which is written."""
        data = parquet_bytes(self.images)
        name = f"images-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
        storage.write_bytes(storage.join(self.output, name), data)
        return name, storage.file_facts(data)

    def description(self) -> dict[str, Any]:
        """What its manifest says, but for what it takes to search it."""
        segments = sorted({row["segment"] for row in self.rows.values()})
        made = {
            name: storage.read_manifest(storage.join(self.output, name), EMBEDDINGS_KIND)
            for name in segments
        }
        return self.facts | {
            "images": len(self.rows),
            "images_file": self._file[0],
            "segments": segments,
            "part_rows": PART_ROWS,
            "rows": {name: made[name]["images"] for name in segments},
            "tokens": made[segments[0]]["tokens"],
            "width": made[segments[0]]["width"],
            "embedded": self.embedded,
        }

    def opened(self, description: dict[str, Any]) -> Index:
        """It, as its ``description`` has it, to be searched exactly."""
        return Index(self.output, description, self.images)

    def commit(
        self,
        description: dict[str, Any],
        seconds: float,
        files: dict[str, dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Write the manifest that makes it the version to open."""
        name, facts = self._file
        whole = description | {"seconds": round(seconds, 3)}
        storage.commit(self.output, INDEX_KIND, whole, {name: facts} | (files or {}))
        storage.remove_file(storage.join(self.output, PLAN))
        return storage.read_manifest(self.output, INDEX_KIND)
