"""CIRCO's file layout: an evaluation set over COCO 2017's unlabeled images.

``annotations/{split}.json``, ``COCO2017_unlabeled/annotations/image_info_unlabeled2017.json`` and
``COCO2017_unlabeled/unlabeled2017/{id:012d}.jpg``. Image ids are COCO's integers as text.
"""

from __future__ import annotations

from qure_core import storage
from qure_core.base.errors import Problem
from qure_core.data.layout import Files, Names, check_row, is_again, read_rows, relevant_of
from qure_core.data.schema import Split, Triplet
from qure_core.data.text import circo_prompt

CATEGORY = "circo"


def read_circo(root: str | Files, split: str) -> tuple[Split, list[Problem]]:
    """Read one split (val or test); faults become problems, not exceptions."""
    problems: list[Problem] = []
    files = Files.of(root)
    root = files.root
    coco = storage.join(root, "COCO2017_unlabeled")
    info_file = storage.join(coco, "annotations", "image_info_unlabeled2017.json")
    info = read_rows(info_file, dict, problems)
    folder = files.folder("COCO2017_unlabeled", "unlabeled2017")
    images: dict[str, str] = {}
    gallery = []
    listed = info.get("images")
    if not isinstance(listed, list) or not listed:
        if not problems:  # else the file itself could not be read
            problems.append(Problem(info_file, "images", "is no list of images, or an empty one"))
        listed = []
    for index, row in enumerate(listed):
        if not check_row(row, {"id": int}, info_file, str(index), problems):
            continue
        gallery.append(str(row["id"]))
        uri = folder.find(f"{row['id']:012d}", str(row["id"]))
        if uri is None:
            problems.append(Problem(info_file, str(index), folder.missing(f"{row['id']:012d}")))
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
    problems += folder.problems
    known = Names(gallery, f"in {info_file}")
    triplets = []
    seen: dict[int, str] = {}
    for index, row in enumerate(rows):
        if not check_row(row, fields, annotation_file, str(index), problems):
            continue
        places = (str(index), f"row {index}")
        if is_again(seen, "id", row["id"], places, annotation_file, problems):
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
                text = f"image {image} is not in {info_file}{known.nearest(image)}"
                problems.append(Problem(annotation_file, str(index), text))
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
    return Split(split, tuple(triplets), images, {CATEGORY: tuple(known.sorted())}), problems
