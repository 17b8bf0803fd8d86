"""CIRR's file layout (release rc2).

``cirr/captions/cap.rc2.{split}.json``, ``cirr/image_splits/split.rc2.{split}.json`` (image name ->
path relative to the root), images under ``train/{0..99}/``, ``dev/`` and ``test1/``.
"""

from __future__ import annotations

from qure_core import storage
from qure_core.base.errors import Problem
from qure_core.data.layout import ImageFolder, check_row, names_of, read_rows, safe_relative
from qure_core.data.schema import Split, Triplet

CATEGORY = "cirr"


def read_cirr(root: str, split: str) -> tuple[Split, list[Problem]]:
    """Read one split (train, val or test1); faults become problems, not exceptions."""
    problems: list[Problem] = []
    split_file = storage.join(root, "cirr", "image_splits", f"split.rc2.{split}.json")
    paths = read_rows(split_file, dict, problems)
    folders: dict[str, ImageFolder] = {}
    images: dict[str, str] = {}
    for name, path in paths.items():
        relative = safe_relative(path) if isinstance(path, str) else None
        if relative is None:
            problems.append(Problem(split_file, name, f"path {path!r} is not inside the data root"))
            continue
        top, _, rest = relative.partition("/")
        if top not in folders:
            folders[top] = ImageFolder(storage.join(root, top))
        uri = folders[top].find(rest.rsplit(".", 1)[0])
        if uri is None:
            problems.append(Problem(split_file, name, f"image {relative} is missing in {root}"))
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
    triplets = []
    for index, row in enumerate(rows):
        if not check_row(row, fields, caption_file, str(index), problems):
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
            if name is not None and name not in paths:
                problems.append(
                    Problem(caption_file, str(index), f"{role} {name!r} is not in {split_file}")
                )
        triplets.append(
            Triplet(
                query_id=str(row["pairid"]),
                reference_id=row["reference"],
                text=row["caption"],
                target_id=target,
                category=CATEGORY,
                group=members,
            )
        )
    galleries = {CATEGORY: tuple(sorted(paths))}
    return Split(split, tuple(triplets), images, galleries), problems
