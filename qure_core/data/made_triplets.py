"""Triplets made from a catalogue's attributes, for those who have none yet.

A reference and a target differ in a few attributes and share the others; two captions say what
changes, from templates in the style of FashionIQ's. The result has FashionIQ's layout, with
relevance files: every image of the attributes asked for answers the query.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from qure_core import storage
from qure_core.base.errors import InputError, raise_problems
from qure_core.base.seeds import generator
from qure_core.data.attributes import Catalogue, read_catalogue
from qure_core.data.layout import Images
from qure_core.data.packed_index import image_source
from qure_core.data.templates import Templates

MADE_KIND = storage.Kind("made triplets", storage.LISTED)
EVERYTHING = "all"  # the category where no column gives one
_TRIES = 50  # draws for each triplet wanted before it is said that there are no more
Attributes = tuple[str, ...]


@dataclass(frozen=True)
class MadeTriplet:
    """One triplet, with which attributes change."""

    reference: str
    target: str
    captions: tuple[str, str]
    changed: tuple[str, ...]


@dataclass(frozen=True)
class MadeSplit:
    """One category's part of a split: its images, triplets and what answers each."""

    category: str
    name: str
    images: tuple[str, ...]
    triplets: tuple[MadeTriplet, ...]
    relevant: tuple[tuple[str, ...], ...]


def split_images(
    catalogue: Catalogue, by: Literal["image", "combination"], val_fraction: float, seed: int
) -> dict[str, list[str]]:
    """Images of train and val: drawn one by one, or all of some combinations of attributes, whose
    combination is then new to a model that was trained on the others."""
    names = list(catalogue.values_of)
    units: Sequence[Any] = names if by == "image" else sorted(set(catalogue.values_of.values()))
    order = generator(seed, "made split", by).permutation(len(units))
    held_out = {units[i] for i in order[: round(val_fraction * len(units))]}
    unit_of = {name: name if by == "image" else catalogue.values_of[name] for name in names}
    return {
        "train": [name for name in names if unit_of[name] not in held_out],
        "val": [name for name in names if unit_of[name] in held_out],
    }


def make_split(
    catalogue: Catalogue,
    templates: Templates,
    category: str,
    name: str,
    images: Iterable[str],
    wanted: int,
    seed: int,
) -> MadeSplit:
    """Up to ``wanted`` different triplets among ``images``; fewer if there are no more to find.

    Depends on nothing but its arguments: images are taken in the order of their ids.
    """
    images = sorted(images)
    members: dict[Attributes, list[str]] = defaultdict(list)
    for image in images:
        members[catalogue.values_of[image]].append(image)
    subsets = [
        subset
        for count in sorted(set(templates.changes))
        for subset in combinations(range(len(catalogue.attributes)), count)
    ]
    near = _neighbours(sorted(members), subsets)
    rng = generator(seed, "made triplets", category, name)
    made: dict[tuple[str, str, tuple[str, str]], MadeTriplet] = {}
    starts = [image for image in images if near[catalogue.values_of[image]]]
    for _ in range(_TRIES * wanted if starts else 0):
        if len(made) == wanted:
            break
        reference = starts[rng.integers(len(starts))]
        old = catalogue.values_of[reference]
        ways = near[old]
        subset = list(ways)[rng.integers(len(ways))]
        new = ways[subset][rng.integers(len(ways[subset]))]
        target = members[new][rng.integers(len(members[new]))]
        triplet = MadeTriplet(
            reference,
            target,
            _captions(catalogue.attributes, templates, old, new, subset, rng),
            tuple(catalogue.attributes[place] for place in subset),
        )
        made.setdefault((reference, target, triplet.captions), triplet)
    triplets = tuple(made.values())
    relevant = tuple(tuple(members[catalogue.values_of[t.target]]) for t in triplets)
    return MadeSplit(category, name, tuple(images), triplets, relevant)


Ways = dict[tuple[int, ...], list[Attributes]]
"""By the places of attributes that change: the combinations that change in just these."""


def _neighbours(
    found: Sequence[Attributes], subsets: Sequence[tuple[int, ...]]
) -> dict[Attributes, Ways]:
    """For each combination, the others that differ from it in exactly one of the ``subsets``."""
    near: dict[Attributes, Ways] = {combination: {} for combination in found}
    for subset in subsets:
        groups: dict[Attributes, list[Attributes]] = defaultdict(list)
        for combination in found:
            rest = tuple(v for place, v in enumerate(combination) if place not in subset)
            groups[rest].append(combination)
        for group in groups.values():
            for one in group:
                others = [o for o in group if all(o[place] != one[place] for place in subset)]
                if others:
                    near[one][subset] = others
    return near


def _captions(
    attributes: Sequence[str],
    templates: Templates,
    old: Attributes,
    new: Attributes,
    subset: Sequence[int],
    rng: np.random.Generator,
) -> tuple[str, str]:
    def caption(which: Literal["first", "second"]) -> str:
        parts = []
        for place in subset:
            texts: list[str] = getattr(templates.attributes[attributes[place]], which)
            text = texts[rng.integers(len(texts))]
            parts.append(text.format(new=new[place], old=old[place]))
        return templates.joined.join(parts)

    return caption("first"), caption("second")


def descriptions_of(catalogue: Catalogue, templates: Templates, seed: int) -> dict[str, str]:
    """A caption for every image, for pretraining; none without templates for them."""
    texts = templates.descriptions
    if not texts:
        return {}
    rng = generator(seed, "made descriptions")
    return {
        image: texts[rng.integers(len(texts))].format(
            **dict(zip(catalogue.attributes, values, strict=True))
        )
        for image, values in catalogue.values_of.items()
    }


def report_of(catalogue: Catalogue, splits: Sequence[MadeSplit], wanted: dict[str, int]) -> Any:
    """What was made, in figures."""
    parts = {}
    for name in wanted:
        own = [split for split in splits if split.name == name]
        triplets = [triplet for split in own for triplet in split.triplets]
        answers = [len(ids) for split in own for ids in split.relevant]
        parts[name] = {
            "images": sum(len(split.images) for split in own),
            "triplets": len(triplets),
            "wanted": wanted[name],
            "changed": dict(sorted(Counter(" and ".join(t.changed) for t in triplets).items())),
            "images_that_answer": {
                "mean": round(float(np.mean(answers)), 2) if answers else 0,
                "most": max(answers, default=0),
            },
        }
    return {
        "images": len(catalogue.values_of),
        "combinations": len(set(catalogue.values_of.values())),
        "left_out": dict(catalogue.incomplete),
        "splits": parts,
    }


def describe_made(report: Any) -> str:
    """The report in a few lines, for people."""
    lines = [f"  images with all attributes {report['images']:>10,}"]
    for why, count in report["left_out"].items():
        lines.append(f"  left out, no {why:<13} {count:>10,}")
    lines.append(f"  combinations               {report['combinations']:>10,}")
    for name, part in report["splits"].items():
        changed = ", ".join(f"{what} {count:,}" for what, count in part["changed"].items())
        answers = part["images_that_answer"]
        lines.append(
            f"  {name:<5} {part['triplets']:,} triplets, {part['images']:,} images ({changed}); "
            f"{answers['mean']:,} images answer one, at most {answers['most']:,}"
        )
        if part["triplets"] < part["wanted"]:
            lines.append(
                f"        {part['wanted']:,} were wanted: there are no more pairs that differ so"
            )
    return "\n".join(lines)


def make_triplets(
    output: str,
    attributes: str,
    templates: Templates,
    *,
    images: str | None,
    index_dir: str,
    wanted: dict[str, int],
    by: Literal["image", "combination"],
    val_fraction: float,
    seed: int,
) -> Any:
    """Make train and val triplets from the table at ``attributes``; return the report.

    ``images``: where the images are (``data.images``): rows without one are left out and counted.
    Raises `InputError` if no triplet can be made, or if something else is at ``output``.
    """
    storage.check_place(output, MADE_KIND, "--output")
    catalogue = read_catalogue(attributes, list(templates.attributes), templates.category)
    if images is not None:
        catalogue = _with_images(catalogue, image_source(images, index_dir, "data.images"))
    made = []
    for name, own in split_images(catalogue, by, val_fraction, seed).items():
        groups: dict[str, list[str]] = defaultdict(list)
        for image in own:
            groups[catalogue.category_of.get(image, EVERYTHING)].append(image)
        done = 0
        for category, members in sorted(groups.items()):
            if "/" in category or not category.strip("."):
                raise InputError(f"{attributes}: {category!r} is no category: it names a file")
            # By its share of the images, so that all together are as many as are wanted.
            before, done = done, done + len(members)
            count = wanted[name] * done // len(own) - wanted[name] * before // len(own)
            split = make_split(catalogue, templates, category, name, members, count, seed)
            if split.triplets:
                made.append(split)
    report = report_of(catalogue, made, wanted)
    if not report["splits"]["train"]["triplets"]:
        raise InputError(
            f"{attributes}: no two of {len(catalogue.values_of):,} images differ in "
            f"{' or '.join(map(str, templates.changes))} of {', '.join(templates.attributes)} and "
            "agree in the rest; choose other attributes or changes in the templates"
        )
    write_made(output, made, descriptions_of(catalogue, templates, seed), report)
    return report


def _with_images(catalogue: Catalogue, images: Images) -> Catalogue:
    """The rows whose image is there, under the name that it has there."""
    raise_problems(images.problems, f"data.images: {images.uri}")
    values_of = {images.canonical(name): values for name, values in catalogue.values_of.items()}
    there = {name: values for name, values in sorted(values_of.items()) if name in images}
    category_of = {images.canonical(name): own for name, own in catalogue.category_of.items()}
    incomplete = Counter(catalogue.incomplete)
    if absent := len(catalogue.values_of) - len(there):
        incomplete["image there"] = absent
    return replace(catalogue, values_of=there, category_of=category_of, incomplete=incomplete)


def write_made(
    output: str, splits: Sequence[MadeSplit], descriptions: dict[str, str], report: Any
) -> None:
    """Commit the triplets to ``output`` in FashionIQ's layout; the manifest has the report."""
    with storage.committed_directory(output, MADE_KIND) as (directory, description):
        for split in splits:
            end = f"{split.category}.{split.name}.json"
            for name, value in (
                (
                    f"captions/cap.{end}",
                    [
                        {
                            "candidate": t.reference,
                            "target": t.target,
                            "captions": list(t.captions),
                        }
                        for t in split.triplets
                    ],
                ),
                (f"image_splits/split.{end}", split.images),
                (f"relevance/rel.{end}", split.relevant),
            ):
                (directory / name).parent.mkdir(exist_ok=True)
                (directory / name).write_text(json.dumps(value, indent=1) + "\n")
        if descriptions:
            (directory / "descriptions.json").write_text(json.dumps(descriptions, indent=1) + "\n")
        description |= {"report": report}
