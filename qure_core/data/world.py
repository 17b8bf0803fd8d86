"""A built-in world of garments: composed-retrieval data whose every relevant image is known.

Garments have a category, colour, pattern, sleeves and length; about ten images share each
combination and differ in shade, position, size and background. A triplet changes one or two
attributes of its reference. The world is written in FashionIQ's layout with a relevance file and
descriptions, and is a function of its settings alone.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from PIL import Image, ImageDraw

from qure_core import storage
from qure_core.base.config import WorldSettings
from qure_core.base.errors import InputError
from qure_core.base.seeds import generator

RENDER_BATCH = 250

CATEGORIES = ("coat", "dress", "shirt")
COLOURS = {
    "red": (200, 40, 45),
    "orange": (235, 140, 40),
    "yellow": (235, 215, 70),
    "green": (55, 150, 75),
    "blue": (50, 85, 190),
    "purple": (125, 65, 160),
    "black": (40, 40, 45),
    "grey": (140, 140, 145),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
SLEEVES = ("sleeveless", "short-sleeved", "long-sleeved")
LENGTHS = ("short", "long")
WORLD_KIND = storage.Kind(
    "world",
    r"images/W\d{7}\.png|descriptions\.json|"
    rf"(captions/cap|image_splits/split|relevance/rel)\.({'|'.join(CATEGORIES)})\.(train|val)\.json",
)


@dataclass(frozen=True, order=True)
class Garment:
    """The attributes that modification texts speak of."""

    category: str
    colour: str
    pattern: str
    sleeves: str
    length: str

    def describe(self) -> str:
        return f"a {self.length} {self.sleeves} {self.pattern} {self.colour} {self.category}"


ATTRIBUTES = {
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "sleeves": SLEEVES,
    "length": LENGTHS,
}


def draw(garment: Garment, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw one image of ``garment``, ``size`` x ``size`` RGB; ``rng`` varies everything else."""
    scale = 2 * size / 128  # drawn at twice the size on a 128-unit canvas, then reduced
    background = tuple(int(c) for c in 205 + rng.integers(-30, 40, 3))
    canvas = Image.new("RGB", (2 * size, 2 * size), background)
    shift = rng.uniform(-7, 7, 2)
    zoom = rng.uniform(0.85, 1.1)
    shade = rng.uniform(0.85, 1.12) + rng.uniform(-0.05, 0.05, 3)
    colour = tuple(
        int(np.clip(c * s, 0, 255)) for c, s in zip(COLOURS[garment.colour], shade, strict=True)
    )
    accent = tuple(min(255, c + 75) if sum(colour) < 450 else max(0, c - 95) for c in colour)

    def place(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [
            ((64 + (x - 64) * zoom + shift[0]) * scale, (64 + (y - 64) * zoom + shift[1]) * scale)
            for x, y in points
        ]

    shoulder, waist = rng.uniform(21, 25), rng.uniform(15, 19)
    long = garment.length == "long"
    if garment.category == "dress":
        hem, flare = (114 if long else 86), rng.uniform(26, 34)
    elif garment.category == "shirt":
        hem, flare = (88 if long else 68), waist + rng.uniform(1, 4)
    else:
        shoulder, waist = shoulder + 5, waist + 8
        hem, flare = (112 if long else 82), waist + rng.uniform(3, 7)

    shape = Image.new("L", canvas.size, 0)
    pen = ImageDraw.Draw(shape)
    body = [(64 - shoulder, 24), (64 - 9, 18), (64, 24), (64 + 9, 18), (64 + shoulder, 24)]
    body += [(64 + waist, 54), (64 + flare, hem), (64 - flare, hem), (64 - waist, 54)]
    pen.polygon(place(body), fill=255)
    reach = {"sleeveless": 0, "short-sleeved": 16, "long-sleeved": 46}[garment.sleeves]
    if reach:
        spread = rng.uniform(0.25, 0.5) * reach
        for side in (-1, 1):
            top = 64 + side * shoulder
            cuff = 64 + side * (shoulder + 4 + spread)
            arm = [(top, 24), (cuff + side * 4, 24 + reach), (cuff - side * 6, 26 + reach)]
            pen.polygon(place([*arm, (64 + side * (shoulder - 6), 40)]), fill=255)

    fabric = Image.new("RGB", canvas.size, colour)
    ink = ImageDraw.Draw(fabric)
    step = int(rng.uniform(9, 13) * scale)
    thick = max(1, int(3.5 * scale))
    extent = 2 * size
    if garment.pattern in ("striped", "checked"):
        for y in range(int(rng.integers(0, step)), extent, step):
            ink.rectangle([0, y, extent, y + thick], fill=accent)
    if garment.pattern == "checked":
        for x in range(int(rng.integers(0, step)), extent, step):
            ink.rectangle([x, 0, x + thick, extent], fill=accent)
    if garment.pattern == "dotted":
        for row, y in enumerate(range(0, extent, step)):
            for x in range((row % 2) * step // 2, extent, step):
                ink.ellipse([x, y, x + 1.4 * thick, y + 1.4 * thick], fill=accent)
    canvas.paste(fabric, mask=shape)
    if garment.category == "coat":
        line = ImageDraw.Draw(canvas)
        line.line(place([(64, 24), (64, hem)]), fill=accent, width=max(1, int(2 * scale)))
    noise = rng.normal(0, 5, (size, size, 1))
    small = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32)
    return Image.fromarray(np.clip(small + noise, 0, 255).astype(np.uint8))


def _captions(before: Garment, after: Garment, rng: np.random.Generator) -> list[str]:
    """Two modification texts for one change, in the manner of FashionIQ's annotators."""
    changed = [name for name in ATTRIBUTES if getattr(before, name) != getattr(after, name)]
    texts = []
    for _ in range(2):
        parts = []
        for name in rng.permutation(changed):
            old, new = getattr(before, name), getattr(after, name)
            forms = {
                "colour": [f"is {new}", f"is {new} instead of {old}", f"has a {new} color"],
                "pattern": [f"is {new}", f"is {new} rather than {old}", f"has a {new} pattern"],
                "sleeves": {
                    "sleeveless": ["is sleeveless", "has no sleeves"],
                    "short-sleeved": ["has short sleeves", "is short-sleeved"],
                    "long-sleeved": ["has long sleeves", "is long-sleeved"],
                }[after.sleeves],
                "length": [f"is {new}er", f"is {new} and not {old}", f"has a {new}er hem"],
            }[str(name)]
            parts.append(forms[int(rng.integers(len(forms)))])
        texts.append(" and ".join(parts))
    return texts


@dataclass(frozen=True)
class Plan:
    """What a world contains, before any image is drawn."""

    garments: dict[str, Garment]  # image id -> attributes
    splits: dict[str, list[Garment]]  # split -> its combinations


def plan_world(world: WorldSettings) -> Plan:
    """Choose the combinations, which split holds each, and name their images."""
    rng = generator(world.seed, "world", "plan")
    everything = [
        Garment(category, *values)
        for category in CATEGORIES
        for values in itertools.product(*ATTRIBUTES.values())
    ]
    count = round(world.images / world.images_per_combination)
    if count > len(everything):
        raise InputError(
            f"data.world.images={world.images} needs {count} attribute combinations of "
            f"{world.images_per_combination} images, but there are {len(everything)}; "
            "raise data.world.images_per_combination"
        )
    splits: dict[str, list[Garment]] = {"train": [], "val": []}
    for category in CATEGORIES:
        own = [garment for garment in everything if garment.category == category]
        share = count // len(CATEGORIES) + (CATEGORIES.index(category) < count % len(CATEGORIES))
        chosen = [own[i] for i in rng.permutation(len(own))[:share]]
        held_out = max(2, round(len(chosen) * world.val_fraction))
        splits["val"] += sorted(chosen[:held_out])
        splits["train"] += sorted(chosen[held_out:])
    garments = {}
    # Names say nothing about attributes, so that no tie-break by name can help a ranking.
    names = iter(rng.permutation(count * world.images_per_combination))
    for split in splits.values():
        for garment in split:
            for _ in range(world.images_per_combination):
                garments[f"W{int(next(names)):07d}"] = garment
    return Plan(garments, splits)


def _triplets(
    plan: Plan, split: str, count: int, seed: int
) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Yield (category, FashionIQ caption row, relevant images) ``count`` times."""
    rng = generator(seed, "world", "triplets", split)
    images: dict[Garment, list[str]] = {}
    for image_id, garment in plan.garments.items():
        images.setdefault(garment, []).append(image_id)
    combinations = plan.splits[split]
    neighbours = {
        garment: [
            other
            for other in combinations
            if other.category == garment.category
            and 1 <= sum(getattr(other, a) != getattr(garment, a) for a in ATTRIBUTES) <= 2
        ]
        for garment in combinations
    }
    starts = [garment for garment in combinations if neighbours[garment]]
    if {garment.category for garment in starts} != set(CATEGORIES):
        raise InputError(
            f"data.world: {len(combinations)} combinations in the {split} split leave a category "
            "without two that differ in one or two attributes; raise data.world.images"
        )
    for _ in range(count):
        before = starts[int(rng.integers(len(starts)))]
        after = neighbours[before][int(rng.integers(len(neighbours[before])))]
        candidate = images[before][int(rng.integers(len(images[before])))]
        target = images[after][int(rng.integers(len(images[after])))]
        row = {
            "target": target,
            "candidate": candidate,
            "captions": _captions(before, after, rng),
        }
        others = [image for image in sorted(images[after]) if image != target]
        yield before.category, row, [target, *others]


def _render(batch: Any, root: str, size: int, seed: int) -> Any:
    for image_id, *attributes in zip(
        batch["image_id"], *(batch[name] for name in Garment.__dataclass_fields__), strict=True
    ):
        image = draw(Garment(*map(str, attributes)), size, generator(seed, "world", str(image_id)))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        storage.write_bytes(storage.join(root, "images", f"{image_id}.png"), buffer.getvalue())
    return {"drawn": np.asarray([len(batch["image_id"])])}


def make_world(root: str, world: WorldSettings) -> bool:
    """Draw the world at ``root`` on Ray; False if the same world is already there, whole.

    Raises `InputError` if ``root`` holds something else.
    """
    facts = {"settings": world.model_dump()}
    if storage.is_committed(root):
        manifest = storage.read_manifest(root, WORLD_KIND)
        if manifest["settings"] == facts["settings"]:
            return False
        raise InputError(
            f"data.root: {root} holds a world of other settings {manifest['settings']}; "
            "remove it or choose another data.root"
        )
    if storage.strangers(root, WORLD_KIND):
        raise InputError(
            f"data.root: {root} holds files of another dataset, where the built-in world would be "
            "drawn; set data.format to its layout, or choose another data.root"
        )
    plan = plan_world(world)
    storage.resume(root, WORLD_KIND, facts)
    for split, count in (("train", world.train_triplets), ("val", world.val_triplets)):
        _write_annotations(root, plan, split, count, world.seed)
    descriptions = {
        image_id: plan.garments[image_id].describe() for image_id in sorted(plan.garments)
    }
    storage.write_json(storage.join(root, "descriptions.json"), descriptions)

    rows = [{"image_id": image_id, **vars(garment)} for image_id, garment in plan.garments.items()]
    blocks = [
        pa.Table.from_pylist(rows[start : start + RENDER_BATCH])
        for start in range(0, len(rows), RENDER_BATCH)
    ]
    drawn = (
        ray.data.from_arrow(blocks)
        .map_batches(
            partial(_render, root=root, size=world.image_size, seed=world.seed), batch_size=None
        )
        .sum("drawn")
    )
    assert drawn == len(rows), (drawn, len(rows))
    storage.write_manifest(root, WORLD_KIND, facts, ["descriptions.json"])
    return True


def _write_annotations(root: str, plan: Plan, split: str, count: int, seed: int) -> None:
    captions: dict[str, list[dict[str, Any]]] = {category: [] for category in CATEGORIES}
    relevance: dict[str, list[list[str]]] = {category: [] for category in CATEGORIES}
    for category, row, relevant in _triplets(plan, split, count, seed):
        captions[category].append(row)
        relevance[category].append(relevant)
    combinations = set(plan.splits[split])
    for category in CATEGORIES:
        names = [
            image_id
            for image_id, garment in sorted(plan.garments.items())
            if garment in combinations and garment.category == category
        ]
        for folder, stem, value in (
            ("captions", "cap", captions[category]),
            ("image_splits", "split", names),
            ("relevance", "rel", relevance[category]),
        ):
            storage.write_json(storage.join(root, folder, f"{stem}.{category}.{split}.json"), value)
