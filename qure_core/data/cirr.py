"""CIRR's file layout (release rc2).

``cirr/captions/cap.rc2.{split}.json``, ``cirr/image_splits/split.rc2.{split}.json`` (image name ->
path relative to the root), images under ``train/{0..99}/``, ``dev/`` and ``test1/``.
"""

from __future__ import annotations

from typing import Any

from qure_core import storage
from qure_core.base.errors import Problem
from qure_core.data.layout import (
    Files,
    Names,
    check_row,
    is_again,
    names_of,
    read_rows,
    safe_relative,
)
from qure_core.data.schema import Split, Triplet

CATEGORY = "cirr"


def read_cirr(root: str | Files, split: str) -> tuple[Split, list[Problem]]:
    """Read one split (train, val or test1); faults become problems, not exceptions."""
    problems: list[Problem] = []
    files = Files.of(root)
    root = files.root
    split_file = storage.join(root, "cirr", "image_splits", f"split.rc2.{split}.json")
    paths = read_rows(split_file, dict, problems)
    images: dict[str, str] = {}
    tops: set[str] = set()
    for name, path in paths.items():
        relative = safe_relative(path) if isinstance(path, str) else None
        if relative is None:
            problems.append(Problem(split_file, name, f"path {path!r} is not inside the data root"))
            continue
        top, _, rest = relative.partition("/")
        tops.add(top)
        uri = files.folder(top).find(rest, name, relative)
        if uri is None:
            problems.append(Problem(split_file, name, files.folder(top).missing(rest)))
        else:
            images[name] = uri

    caption_file = storage.join(root, "cirr", "captions", f"cap.rc2.{split}.json")
    rows = read_rows(caption_file, list, problems)
    fields: dict[str, type | tuple[type, ...]] = {
        "pairid": int,
        "reference": str,
        "caption": str,
        "img_set": dict,
    }
    if split != "test1":
        fields["target_hard"] = str
    for folder in {id(folder): folder for folder in map(files.folder, sorted(tops))}.values():
        problems += folder.problems
    known = Names(paths, f"in {split_file}")
    triplets = []
    seen: dict[int, str] = {}
    for index, row in enumerate(rows):
        if not check_row(row, fields, caption_file, str(index), problems):
            continue
        places = (str(index), f"row {index}")
        if is_again(seen, "pairid", row["pairid"], places, caption_file, problems):
            continue
        members = names_of(
            row["img_set"].get("members", []),
            "img_set.members",
            caption_file,
            str(index),
            problems,
        )
        target = row.get("target_hard")
        for role, name in [("reference", row["reference"]), ("target_hard", target)] + [
            ("member", member) for member in members
        ]:
            if name is not None and name not in known:
                text = f"{role} {name!r} is not in {split_file}{known.nearest(name)}"
                problems.append(Problem(caption_file, str(index), text))
        triplets.append(
            Triplet(
                query_id=str(row["pairid"]),
                reference_id=row["reference"],
                text=row["caption"],
                target_id=target,
                category=CATEGORY,
                group=members,
                positive_ids=_soft_targets(row.get("target_soft"), target, known),
            )
        )
    galleries = {CATEGORY: tuple(sorted(paths))}
    return Split(split, tuple(triplets), images, galleries), problems


def _soft_targets(soft: Any, target: str | None, known: Names) -> tuple[str, ...]:
    """The images besides the target that the annotators called an answer as well."""
    marks = soft.items() if isinstance(soft, dict) else ()
    full = {name for name, mark in marks if mark == 1 and name in known}
    return tuple(sorted(full - {target}))
