"""A plain layout for users' own data: ``triplets.jsonl`` beside an ``images/`` folder.

One JSON object a line: ``{"reference": "a", "text": "in red", "target": "b"}``, and optionally
``"split"`` (train if absent), ``"category"``, ``"query_id"`` and ``"relevant"`` (a list of images).
Images are named by their path below ``images/`` without the suffix. A category's gallery is
``images/{category}/`` where that folder exists, else every image.
"""

from __future__ import annotations

import json

from qure_core import storage
from qure_core.data.layout import ImageFolder, check_row
from qure_core.data.schema import Split, Triplet
from qure_core.errors import InputError, Problem

DEFAULT_CATEGORY = "all"


def read_jsonl(root: str, split: str) -> tuple[Split, list[Problem]]:
    """Read the rows of one split; faults become problems, not exceptions."""
    file = storage.join(root, "triplets.jsonl")
    try:
        lines = storage.read_bytes(file).decode("utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(
            f"{file}: no such file; set data.root to the directory that has it"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error})") from None
    folder = ImageFolder(storage.join(root, "images"))
    names = folder.names()
    known = set(names)
    problems: list[Problem] = []
    triplets: list[Triplet] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        where = f"line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(Problem(file, where, f"not valid JSON ({error})"))
            continue
        fields: dict[str, type | tuple[type, ...]] = {"reference": str, "text": str, "target": str}
        if not check_row(row, fields, file, where, problems):
            continue
        if row.get("split", "train") != split:
            continue
        query_id = str(row.get("query_id", f"{split}.{number:06d}"))
        if query_id in seen:
            problems.append(
                Problem(file, where, f"query_id {query_id!r} is also on line {seen[query_id]}")
            )
            continue
        seen[query_id] = number
        relevant = [str(name) for name in row.get("relevant", [])]
        for role, name in [("reference", row["reference"]), ("target", row["target"])] + [
            ("relevant", name) for name in relevant
        ]:
            if name not in known:
                problems.append(
                    Problem(file, where, f"{role} image {name!r} is missing in {folder.uri}")
                )
        triplets.append(
            Triplet(
                query_id=query_id,
                reference_id=row["reference"],
                text=row["text"],
                target_id=row["target"],
                category=str(row.get("category", DEFAULT_CATEGORY)),
                relevant_ids=tuple(relevant),
            )
        )
    if not triplets:
        problems.append(
            Problem(file, "", f'no usable row of split {split!r}; add rows with "split": "{split}"')
        )
    galleries: dict[str, tuple[str, ...]] = {}
    for category in sorted({triplet.category for triplet in triplets}):
        own = tuple(name for name in names if name.startswith(f"{category}/"))
        galleries[category] = own or tuple(names)
    members = {category: set(gallery) for category, gallery in galleries.items()}
    for triplet in triplets:
        if triplet.target_id in known and triplet.target_id not in members[triplet.category]:
            problems.append(
                Problem(
                    file,
                    triplet.query_id,
                    f"target {triplet.target_id!r} is outside images/{triplet.category}/",
                )
            )
    images = {name: uri for name in names if (uri := folder.find(name))}
    return Split(split, tuple(triplets), images, galleries), problems
