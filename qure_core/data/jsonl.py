"""A plain layout for users' own data: ``triplets.jsonl`` beside an ``images/`` folder.

One JSON object a line: ``{"reference": "a", "text": "in red", "target": "b"}``, and optionally
``"split"`` (train if absent), ``"category"``, ``"query_id"`` and ``"relevant"`` (a list of images
that satisfy the query; the target is one of them without being named). Images are named by their
path below ``images/`` without the suffix. A category's gallery is ``images/{category}/`` where
that folder exists, else every image. Images that only rows of other splits name are left out of
the training gallery: what a model is judged with must not be mined from.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qure_core import storage
from qure_core.base.errors import InputError, Problem
from qure_core.data.layout import ImageFolder, check_row, relevant_of
from qure_core.data.schema import Split, Triplet

DEFAULT_CATEGORY = "all"
_KEYS = {"reference", "text", "target", "split", "category", "query_id", "relevant"}


@dataclass(frozen=True)
class _Row:
    """A row whose fields have the right types, and the number of its line."""

    line: int
    value: dict[str, Any]

    @property
    def where(self) -> str:
        return f"line {self.line}"

    @property
    def split(self) -> str:
        return str(self.value.get("split", "train"))

    @property
    def category(self) -> str:
        return str(self.value.get("category", DEFAULT_CATEGORY))

    def names(self) -> set[str]:
        """Every image that the row names."""
        listed = self.value.get("relevant")
        listed = listed if isinstance(listed, list) else []
        named = [self.value["reference"], self.value["target"], *listed]
        return {name for name in named if isinstance(name, str)}


def _lines(file: str) -> list[str]:
    try:
        text = storage.read_bytes(file).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(
            f"{file}: no such file; set data.root to the directory that has it"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error})") from None
    # Rows end at line feeds alone: other separators may stand inside a JSON string.
    return text.split("\n")


def _rows(file: str, problems: list[Problem]) -> list[_Row]:
    rows = []
    for number, line in enumerate(_lines(file), start=1):
        where = f"line {number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(Problem(file, where, f"not valid JSON ({error})"))
            continue
        fields: dict[str, type | tuple[type, ...]] = {"reference": str, "text": str, "target": str}
        optional = ("split", "category")
        if isinstance(value, dict):
            fields |= {name: str for name in optional if name in value}
            if "query_id" in value:
                fields["query_id"] = (str, int)
        if not check_row(value, fields, file, where, problems):
            continue
        for name in set(value) - _KEYS:
            if near := difflib.get_close_matches(name, _KEYS, 1, 0.8):
                text = f"key {name!r} is not read; is {near[0]!r} meant?"
                problems.append(Problem(file, where, text))
        rows.append(_Row(number, value))
    return rows


def has_rows(root: str, split: str, categories: Sequence[str] | None = None) -> bool:
    """Whether any row is of ``split``, and of one of the ``categories`` if they are given."""
    rows = _rows(storage.join(root, "triplets.jsonl"), [])
    return any(r.split == split and (not categories or r.category in categories) for r in rows)


def _unread(file: str, rows: Sequence[_Row], split: str) -> list[str]:
    """Notes of what nothing reads, and of rows that say nothing."""
    notes = []
    counts = Counter(row.split for row in rows if row.split not in {"train", "val", split})
    if counts:
        notes.append(f"{file}: splits that are not read: {_listed(counts)}; 'train' and 'val' are")
    if keys := Counter(name for row in rows for name in row.value if name not in _KEYS):
        notes.append(f"{file}: keys that are not read: {_listed(keys)}")
    same = sum(r.value["reference"] == r.value["target"] for r in rows if r.split == split)
    if same:
        notes.append(f"{file}: {same:,} row(s) of {split!r} have their target as reference")
    if empty := sum(not r.value["text"].strip() for r in rows if r.split == split):
        notes.append(f"{file}: {empty:,} row(s) of {split!r} have an empty text")
    return notes


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name!r} ({count:,} rows)" for name, count in sorted(counts.items()))


def read_jsonl(
    root: str, split: str, categories: Sequence[str] | None = None
) -> tuple[Split, list[Problem]]:
    """Read the rows of one split; faults become problems, not exceptions.

    ``categories`` limits it to some of the rows' categories.
    """
    file = storage.join(root, "triplets.jsonl")
    problems: list[Problem] = []
    rows = _rows(file, problems)
    folder = ImageFolder(storage.join(root, "images"))
    names = folder.names()
    known = set(names)
    notes = _unread(file, rows, split)
    if categories is not None:
        found = {row.category for row in rows}
        if absent := sorted(set(categories) - found):
            raise InputError(
                f"data.categories: {file} has no rows of {', '.join(absent)} "
                f"(found: {', '.join(sorted(found)) or 'none'})"
            )
        rows = [row for row in rows if row.category in categories]

    triplets: list[Triplet] = []
    seen: dict[str, int] = {}
    for row in (row for row in rows if row.split == split):
        query_id = str(row.value.get("query_id", f"{split}.{row.line:06d}"))
        if query_id in seen:
            text = f"query_id {query_id!r} is also on line {seen[query_id]}"
            problems.append(Problem(file, row.where, text))
            continue
        seen[query_id] = row.line
        for role in ("reference", "target"):
            if (name := row.value[role]) not in known:
                problems.append(Problem(file, row.where, f"{role} {folder.missing(name)}"))
        relevant: tuple[str, ...] = ()
        if "relevant" in row.value:
            target = row.value["target"]
            relevant = relevant_of(row.value["relevant"], target, known, file, row.where, problems)
        triplets.append(
            Triplet(
                query_id=query_id,
                reference_id=row.value["reference"],
                text=row.value["text"],
                target_id=row.value["target"],
                category=row.category,
                relevant_ids=relevant,
            )
        )
    if not triplets:
        text = f'no usable row of split {split!r}; add rows with "split": "{split}"'
        problems.append(Problem(file, "", text))
    galleries, note = _galleries(triplets, rows, split, names)
    notes += note
    members = {category: set(gallery) for category, gallery in galleries.items()}
    for triplet in triplets:
        if triplet.target_id in known and triplet.target_id not in members[triplet.category]:
            text = f"target {triplet.target_id!r} is outside images/{triplet.category}/"
            problems.append(Problem(file, triplet.query_id, text))
        outside = [name for name in triplet.relevant_ids if name not in members[triplet.category]]
        if outside and triplet.target_id in members[triplet.category]:
            text = f"relevant {outside[0]!r} is outside images/{triplet.category}/"
            problems.append(Problem(file, triplet.query_id, text))
    images = {name: uri for name in names if (uri := folder.find(name))}
    return Split(split, tuple(triplets), images, galleries, tuple(notes)), problems


def _galleries(
    triplets: Sequence[Triplet], rows: Sequence[_Row], split: str, names: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The images that each category's queries are ranked against, and a note of what is left out.

    The training gallery is without the images that only other splits name.
    """
    held_out: set[str] = set()
    if split == "train":
        named = {name for row in rows if row.split == split for name in row.names()}
        held_out = {name for row in rows if row.split != split for name in row.names()} - named
    galleries: dict[str, tuple[str, ...]] = {}
    for category in sorted({triplet.category for triplet in triplets}):
        own = [name for name in names if name.startswith(f"{category}/")] or names
        galleries[category] = tuple(name for name in own if name not in held_out)
    if left := held_out & set(names):
        text = f"{len(left):,} image(s) that only other splits name are not in the training corpus"
        return galleries, [text]
    return galleries, []
