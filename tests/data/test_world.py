from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qure_core.base.config import DataSettings, WorldSettings
from qure_core.base.errors import InputError
from qure_core.base.seeds import generator
from qure_core.data import load_split
from qure_core.data.sources import load_descriptions
from qure_core.data.world import ATTRIBUTES, Garment, draw, make_world, plan_world

SMALL = WorldSettings(
    images=180, images_per_combination=3, train_triplets=30, val_triplets=12, image_size=24
)


def test_world_is_a_valid_dataset_with_true_relevance(world: Path) -> None:
    data = DataSettings(root=str(world))
    train, val = load_split(data, "train"), load_split(data, "val")
    assert not set(train.images) & set(val.images)
    assert len(train.images) + len(val.images) == 180
    descriptions = json.loads((world / "descriptions.json").read_text())
    for triplet in (*train.triplets, *val.triplets):
        # Everything relevant has the target's attributes, and nothing else in the gallery does.
        wanted = descriptions[str(triplet.target_id)]
        gallery = (train if triplet in train.triplets else val).galleries[triplet.category]
        fitting = {image for image in gallery if descriptions[image] == wanted}
        assert set(triplet.relevant_ids) == fitting
        assert triplet.relevant_ids[0] == triplet.target_id
        assert descriptions[triplet.reference_id] != wanted
    assert set(load_descriptions(data, train)) == set(train.images)


def test_captions_tell_the_target_apart() -> None:
    before = Garment("dress", "red", "plain", "sleeveless", "short")
    from qure_core.data.world import _captions

    for attribute, values in ATTRIBUTES.items():
        for value in values:
            if value != getattr(before, attribute):
                after = Garment(**(vars(before) | {attribute: value}))
                texts = _captions(before, after, generator(0, attribute, value))
                assert len(texts) == 2
                word = value.removesuffix("-sleeved").removesuffix("less")
                assert all(word in text or "no sleeves" in text for text in texts), texts


def test_same_settings_give_the_same_bytes(tmp_path: Path, local_ray: str) -> None:
    for name in ("a", "b"):
        make_world(str(tmp_path / name), SMALL)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 180
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert not make_world(str(tmp_path / "a"), SMALL)
    with pytest.raises(InputError, match="holds a world of other settings"):
        make_world(str(tmp_path / "a"), SMALL.model_copy(update={"seed": 1}))


def test_foreign_directory_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files of another dataset"):
        make_world(str(tmp_path), SMALL)


def test_impossible_worlds_are_refused() -> None:
    with pytest.raises(InputError, match=r"raise data\.world\.images_per_combination"):
        plan_world(WorldSettings(images=100_000, images_per_combination=10))


def test_attributes_are_visible() -> None:
    def mean(garment: Garment) -> np.ndarray:
        images = [np.asarray(draw(garment, 32, generator(0, i)), np.float32) for i in range(12)]
        return np.mean(images, axis=0)

    base = Garment("dress", "red", "plain", "sleeveless", "short")
    noise = np.abs(mean(base) - mean(base)).max()
    assert noise == 0
    for attribute, value in (
        ("category", "shirt"),
        ("colour", "blue"),
        ("pattern", "striped"),
        ("sleeves", "long-sleeved"),
        ("length", "long"),
    ):
        other = Garment(**(vars(base) | {attribute: value}))
        assert np.abs(mean(base) - mean(other)).max() > 25, attribute
    assert isinstance(draw(base, 32, generator(0)), Image.Image)
