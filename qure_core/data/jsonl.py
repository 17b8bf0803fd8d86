"""A plain layout for users' own data: ``triplets.jsonl`` beside an ``images/`` folder.

One JSON object a line, or a JSON list of them: ``{"reference": "a", "text": "in red", "target":
"b"}``, and optionally ``"split"`` (train if absent), ``"category"``, ``"query_id"`` and
``"relevant"`` (a list of images that satisfy the query; the target is one of them without being
named). Rows of other splits than train and val need no target. Images are named by their path
below ``images/``, with or without the suffix. A category's gallery is ``images/{category}/``, or
every image where no category has a folder. Images that only rows of other splits name are left out
of the training gallery: what a model is judged with must not be mined from.
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
from qure_core.data.layout import Files, Images, check_row, is_again, relevant_of
from qure_core.data.schema import Split, Triplet

DEFAULT_CATEGORY = "all"
_KEYS = {"reference", "text", "target", "split", "category", "query_id", "relevant"}


@dataclass(frozen=True)
class _Row:
    """A row whose fields have the right types, and where it is: its line, or place in a list."""

    line: int
    value: dict[str, Any]
    unit: str = "line"

    @property
    def where(self) -> str:
        return f"{self.unit} {self.line}"

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
        named = [self.value["reference"], self.value.get("target"), *listed]
        return {name for name in named if isinstance(name, str)}


def _text(file: str) -> str:
    try:
        return storage.read_bytes(file).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(
            f"{file}: no such file; set data.root to the directory that has it"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error})") from None


def _values(file: str, problems: list[Problem]) -> list[_Row]:
    """What stands in the file, of whatever kind, a row a line or all in one list."""
    text = _text(file)
    if text.lstrip()[:1] == "[":
        try:
            listed = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            problems.append(Problem(file, "", f"a JSON list that cannot be read ({error})"))
            return []
        return [_Row(number, value, "row") for number, value in enumerate(listed)]
    rows, faults = [], []
    # Rows end at line feeds alone: other separators may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_Row(number, json.loads(line)))
        except (json.JSONDecodeError, RecursionError) as error:
            faults.append(Problem(file, f"line {number}", f"not valid JSON ({error})"))
    if len(faults) > 1 and not any(isinstance(row.value, dict) for row in rows):
        text = f"no line is a JSON object; write one triplet a line ({faults[0].message})"
        faults, rows = [Problem(file, "", text)], []
    problems += faults
    return rows


def _rows(file: str, problems: list[Problem]) -> list[_Row]:
    rows = []
    for row in _values(file, problems):
        value, where = row.value, row.where
        fields: dict[str, type | tuple[type, ...]] = {"reference": str, "text": str}
        if isinstance(value, dict):
            # Only those that are asked without an answer being known need none.
            if "target" in value or value.get("split", "train") in ("train", "val"):
                fields["target"] = str
            fields |= {name: str for name in ("split", "category") if name in value}
            if "query_id" in value:
                fields["query_id"] = (str, int)
        if not check_row(value, fields, file, where, problems):
            continue
        for name in set(value) - _KEYS:
            if near := difflib.get_close_matches(name, _KEYS, 1, 0.8):
                text = f"key {name!r} is not read; is {near[0]!r} meant?"
                problems.append(Problem(file, where, text))
        rows.append(row)
    return rows


def _read(files: Files) -> tuple[list[_Row], list[Problem]]:
    def read() -> tuple[list[_Row], list[Problem]]:
        problems: list[Problem] = []
        return _rows(files.uri("triplets.jsonl"), problems), problems

    return files.once("rows", read)


def has_rows(root: str | Files, split: str, categories: Sequence[str] | None = None) -> bool:
    """Whether any row is of ``split``, and of one of the ``categories`` if they are given."""
    rows, _ = _read(Files.of(root))
    return any(r.split == split and (not categories or r.category in categories) for r in rows)


def _unread(file: str, rows: Sequence[_Row], split: str) -> list[str]:
    """Notes of what nothing reads, and of rows that say nothing."""
    notes = []
    counts = Counter(row.split for row in rows if row.split not in {"train", "val", split})
    if counts:
        notes.append(f"{file}: splits that are not read: {_listed(counts)}; 'train' and 'val' are")
    if keys := Counter(name for row in rows for name in row.value if name not in _KEYS):
        notes.append(f"{file}: keys that are not read: {_listed(keys)}")
    return notes


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name!r} ({count:,} rows)" for name, count in sorted(counts.items()))


def read_jsonl(
    root: str | Files,
    split: str,
    categories: Sequence[str] | None = None,
) -> tuple[Split, list[Problem]]:
    """Read the rows of one split; faults become problems, not exceptions.

    ``categories`` limits it to some of the rows' categories.
    """
    files = Files.of(root)
    file = files.uri("triplets.jsonl")
    rows, faults = _read(files)
    problems = list(faults)
    folder = files.folder("images")
    names = folder.sorted()
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
    seen: dict[str, str] = {}
    for row in (row for row in rows if row.split == split):
        query_id = str(row.value.get("query_id", f"{split}.{row.line:06d}"))
        if is_again(seen, "query_id", query_id, (row.where, row.where), file, problems):
            continue
        reference = folder.canonical(row.value["reference"])
        target = folder.canonical(row.value["target"]) if "target" in row.value else None
        for role, name in (("reference", reference), ("target", target)):
            if name is not None and name not in folder:
                missing = folder.missing(row.value[role])
                problems.append(Problem(file, row.where, f"{role} {missing}"))
        relevant: tuple[str, ...] = ()
        if "relevant" in row.value:
            relevant = relevant_of(row.value["relevant"], target, folder, file, row.where, problems)
        triplets.append(
            Triplet(
                query_id=query_id,
                reference_id=reference,
                text=row.value["text"],
                target_id=target,
                category=row.category,
                relevant_ids=relevant,
                positive_ids=tuple(sorted(set(relevant) - {target})),
            )
        )
    if not triplets:
        text = f'no usable row of split {split!r}; add rows with "split": "{split}"'
        problems.append(Problem(file, "", text))
    galleries, said = _galleries(triplets, rows, split, folder)
    notes += said
    for category, gallery in galleries.items():
        if not gallery:
            place = next(row.where for row in rows if row.category == category)
            text = (
                f"category {category!r} has no images: there is no {folder.uri}/{category}/, "
                "though other categories have theirs; move its images there, or correct the name"
            )
            problems.append(Problem(file, place, text))
    members = {category: set(gallery) for category, gallery in galleries.items()}
    for triplet in triplets:
        if not members[triplet.category]:
            continue
        if triplet.target_id in folder and triplet.target_id not in members[triplet.category]:
            text = f"target {triplet.target_id!r} is outside images/{triplet.category}/"
            problems.append(Problem(file, triplet.query_id, text))
        outside = [name for name in triplet.relevant_ids if name not in members[triplet.category]]
        if outside and triplet.target_id in members[triplet.category]:
            text = f"relevant {outside[0]!r} is outside images/{triplet.category}/"
            problems.append(Problem(file, triplet.query_id, text))
    uris = {name: uri for name in names if (uri := folder.find(name))}
    problems += folder.problems
    return Split(split, tuple(triplets), uris, galleries, tuple(notes)), problems


def _galleries(
    triplets: Sequence[Triplet], rows: Sequence[_Row], split: str, folder: Images
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The images that each category's queries are ranked against, and notes of what was chosen.

    The training gallery is without the images that only other splits name. A category has none
    where others have images of their own, and it has not.
    """
    held_out: set[str] = set()
    if split == "train":
        named = {name for row in rows if row.split == split for name in row.names()}
        others = {name for row in rows if row.split != split for name in row.names()}
        held_out = set(map(folder.canonical, others)) - set(map(folder.canonical, named))
    notes = []
    names = folder.sorted()
    categories = sorted({row.category for row in rows})
    own = {category: folder.of_category(category) for category in categories}
    if not any(own.values()):
        if categories != [DEFAULT_CATEGORY] and categories:
            notes.append(
                f"no category has images of its own in {folder.uri}: queries of every category are "
                f"ranked against all {len(names):,} images"
            )
        own = dict.fromkeys(categories, names)
    galleries = {
        category: tuple(name for name in own[category] if name not in held_out)
        for category in sorted({triplet.category for triplet in triplets})
    }
    if left := sum(name in folder for name in held_out):
        notes.append(
            f"{left:,} image(s) that only other splits name are not in the training corpus"
        )
    return galleries, notes
