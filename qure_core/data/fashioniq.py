"""FashionIQ's file layout, with any categories found on disk.

``captions/cap.{category}.{split}.json``, ``image_splits/split.{category}.{split}.json``, images
as ``images/{name}`` or ``images/{category}/{name}`` with any image suffix, and optionally
``relevance/rel.{category}.{split}.json``: per triplet, every image that satisfies it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qure_core import storage
from qure_core.base.config import Texts
from qure_core.base.errors import InputError, Problem
from qure_core.data.layout import Files, Names, check_row, is_text, read_rows, relevant_of
from qure_core.data.schema import Split, Triplet
from qure_core.data.text import join_fashioniq


def find_categories(root: str, split: str) -> list[str]:
    """Categories that have a caption file for ``split``, sorted."""
    pattern = re.compile(rf"cap\.(.+)\.{re.escape(split)}\.json")
    names = storage.list_names(storage.join(root, "captions"))
    return sorted(match[1] for name in names if (match := pattern.fullmatch(name)))


def read_fashioniq(
    root: str | Files,
    split: str,
    categories: Sequence[str] | None = None,
    texts: Texts = "tidy",
) -> tuple[Split, list[Problem]]:
    """Read one split; faulty rows and missing images become problems, not exceptions.

    ``texts``: how two captions are joined where one is blank (`join_fashioniq`).
    """
    files = Files.of(root)
    root = files.root
    found = find_categories(root, split)
    wanted = list(categories) if categories is not None else found
    absent = sorted(set(wanted) - set(found))
    if absent or not wanted:
        raise InputError(
            f"{root}: no captions/cap.CATEGORY.{split}.json"
            + (f" for {', '.join(absent)}" if absent else "")
            + f" (found: {', '.join(found) or 'none'}); set data.root to a FashionIQ-style "
            "directory and data.categories to what it holds"
        )
    folder = files.folder("images")
    problems: list[Problem] = []
    triplets: list[Triplet] = []
    notes: list[str] = []
    images: dict[str, str] = {}
    galleries: dict[str, tuple[str, ...]] = {}

    for category in wanted:
        split_file = storage.join(root, "image_splits", f"split.{category}.{split}.json")
        names = read_rows(split_file, list, problems)
        if not names:
            problems.append(Problem(split_file, "", f"category {category!r} has no images"))
        gallery = []
        for index, name in enumerate(names):
            if not is_text(name):
                problems.append(Problem(split_file, str(index), f"{name!r} is not an image name"))
                continue
            own = folder.canonical(f"{category}/{name}")
            image = own.removeprefix(f"{category}/") if own in folder else folder.canonical(name)
            gallery.append(image)
            uri = folder.find(own, image)
            if uri is None:
                problems.append(Problem(split_file, str(index), folder.missing(name)))
            elif images.setdefault(image, uri) != uri:
                text = f"image {image!r} is {uri} and, in another category, {images[image]}"
                problems.append(Problem(split_file, str(index), f"{text}; rename one of them"))
        galleries[category] = tuple(sorted(set(gallery)))
        known = Names(gallery, f"in split.{category}.{split}.json")
        rows, blank = _read_triplets(root, category, split, known, texts, problems)
        triplets += rows
        if blank:
            how = "the other is the whole text" if texts == "tidy" else "joined as released"
            notes.append(
                f"cap.{category}.{split}.json: {blank:,} row(s) with a blank caption; {how}"
            )
    problems += folder.problems
    return Split(split, tuple(triplets), images, galleries, tuple(notes)), problems


def _read_triplets(
    root: str,
    category: str,
    split: str,
    gallery: Names,
    texts: Texts,
    problems: list[Problem],
) -> tuple[list[Triplet], int]:
    """A category's triplets, and how many rows have a blank caption."""
    caption_file = storage.join(root, "captions", f"cap.{category}.{split}.json")
    rows = read_rows(caption_file, list, problems)
    if not rows:
        problems.append(Problem(caption_file, "", f"category {category!r} has no triplets"))
    relevance_file = storage.join(root, "relevance", f"rel.{category}.{split}.json")
    relevant: list[Any] = []
    if storage.exists(relevance_file):
        relevant = read_rows(relevance_file, list, problems)
        if len(relevant) != len(rows):
            problems.append(
                Problem(relevance_file, "", f"{len(relevant)} rows for {len(rows)} triplets")
            )
            relevant = []
    fields: dict[str, type | tuple[type, ...]] = {"candidate": str, "captions": list}
    if split != "test":
        fields["target"] = str
    triplets = []
    blank = 0
    for index, row in enumerate(rows):
        where = str(index)
        if not check_row(row, fields, caption_file, where, problems):
            continue
        captions = row["captions"]
        if len(captions) != 2 or not all(map(is_text, captions)):
            problems.append(Problem(caption_file, where, f"captions are not two texts: {captions}"))
            continue
        blank += not all(caption.strip(" .?,") for caption in captions)
        reference = gallery.canonical(row["candidate"])
        target = row.get("target")
        target = gallery.canonical(target) if isinstance(target, str) else None
        for role, name in (("candidate", reference), ("target", target)):
            if name is not None and name not in gallery:
                text = f"{role} {name!r} is not in split.{category}.{split}.json"
                problems.append(Problem(caption_file, where, text + gallery.nearest(name)))
        relevant_ids: tuple[str, ...] = ()
        if relevant:
            relevant_ids = relevant_of(
                relevant[index], target, gallery, relevance_file, where, problems
            )
        triplets.append(
            Triplet(
                query_id=f"{category}.{split}.{index:06d}",
                reference_id=reference,
                text=join_fashioniq(captions, texts),
                captions=tuple(captions),
                target_id=target,
                category=category,
                relevant_ids=relevant_ids,
            )
        )
    return triplets, blank
