"""CIRCO's file layout: an evaluation set over COCO 2017's unlabeled images.

``annotations/{split}.json``, ``COCO2017_unlabeled/annotations/image_info_unlabeled2017.json`` and
``COCO2017_unlabeled/unlabeled2017/{id:012d}.jpg``. Image ids are COCO's integers as text.
"""

from __future__ import annotations

from qure_core import storage
from qure_core.base.errors import Problem
from qure_core.data.layout import ImageFolder, check_row, read_rows, relevant_of
from qure_core.data.schema import Split, Triplet
from qure_core.data.text import circo_prompt

CATEGORY = "circo"


def read_circo(root: str, split: str) -> tuple[Split, list[Problem]]:
    """Read one split (val or test); faults become problems, not exceptions."""
    problems: list[Problem] = []
    coco = storage.join(root, "COCO2017_unlabeled")
    info_file = storage.join(coco, "annotations", "image_info_unlabeled2017.json")
    info = read_rows(info_file, dict, problems)
    folder = ImageFolder(storage.join(coco, "unlabeled2017"))
    images: dict[str, str] = {}
    gallery = []
    for index, row in enumerate(info.get("images", [])):
        if not check_row(row, {"id": int}, info_file, str(index), problems):
            continue
        gallery.append(str(row["id"]))
        uri = folder.find(f"{row['id']:012d}")
        if uri is None:
            problems.append(
                Problem(
                    info_file, str(index), f"image {row['id']:012d}.jpg is missing in {folder.uri}"
                )
            )
        else:
            images[str(row["id"])] = uri

    annotation_file = storage.join(root, "annotations", f"{split}.json")
    rows = read_rows(annotation_file, list, problems)
    fields: dict[str, type | tuple[type, ...]] = {
        "id": int,
        "reference_img_id": int,
        "relative_caption": str,
    }
    if split == "val":
        fields |= {"target_img_id": int, "gt_img_ids": list}
    known = set(gallery)
    triplets = []
    for index, row in enumerate(rows):
        if not check_row(row, fields, annotation_file, str(index), problems):
            continue
        target = row.get("target_img_id")
        named = [row["reference_img_id"], *([target] if target is not None else [])]
        relevant: tuple[str, ...] = ()
        if split == "val" and known:
            relevant = relevant_of(
                [str(image) for image in row["gt_img_ids"]],
                str(target),
                known,
                annotation_file,
                str(index),
                problems,
            )
        for image in map(str, named) if known else ():
            if image not in known:
                problems.append(
                    Problem(annotation_file, str(index), f"image {image} is not in {info_file}")
                )
        triplets.append(
            Triplet(
                query_id=str(row["id"]),
                reference_id=str(row["reference_img_id"]),
                text=circo_prompt(row["relative_caption"]),
                target_id=None if target is None else str(target),
                category=CATEGORY,
                relevant_ids=relevant,
            )
        )
    return Split(split, tuple(triplets), images, {CATEGORY: tuple(sorted(known))}), problems
