"""The feature store: what it holds, what it notices, and what it refuses."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.data import images as preprocessing
from qure_core.data.images import load_image
from qure_core.embeddings.feature_building import EncoderSource, build_store, prune_store
from qure_core.embeddings.feature_use import usable_store
from qure_core.features.identity import FeatureKey, feature_key, preprocessing_digest
from qure_core.features.store import FeatureStore, StoredFeatures
from qure_core.model import (
    QuReModel,
    QuReProcessor,
    build_model,
    encode_frozen,
    learn_tokenizer,
)
from qure_core.model.checkpoints import save_checkpoint
from qure_core.runtime.resources import plan_resources

IMAGES = 40


def draw(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 30, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def draw_all(folder: Path) -> dict[str, str]:
    """Forty pictures, one of them twice under another name: URIs by id."""
    folder.mkdir()
    for number in range(IMAGES):
        draw(folder / f"{number:03d}.png", number)
    shutil.copy(folder / "000.png", folder / "copy.png")
    return {path.stem: str(path) for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, QuReModel, QuReProcessor]:
    model, processor = build_model("tiny", learn_tokenizer(["a red dress"], 80), 0.1, seed=5)
    uri = str(tmp_path_factory.mktemp("checkpoint") / "train-0000")
    save_checkpoint(uri, model, processor, {"stage": "train", "epoch": 0})
    return uri, model.eval(), processor


def settings_of(tmp_path: Path, **more: Any) -> Settings:
    store = {"dir": str(tmp_path / "features"), "shard_images": 16}
    return Settings(feature_store=store, cluster={"gpus": "none"}, **more)


def build(settings: Settings, checkpoint: str, images: dict[str, str]) -> dict[str, Any]:
    key = feature_key(checkpoint, settings.model.vision_precision)
    plan = plan_resources(settings.cluster)
    return build_store(settings, plan, EncoderSource(checkpoint), key, images)


def store_uri(settings: Settings, checkpoint: str) -> str:
    return feature_key(checkpoint, settings.model.vision_precision).uri(settings.feature_store.dir)


@pytest.fixture
def images(tmp_path: Path) -> dict[str, str]:
    return draw_all(tmp_path / "images")


@pytest.fixture(scope="module")
def built(
    checkpoint: tuple[str, QuReModel, QuReProcessor],
    tmp_path_factory: pytest.TempPathFactory,
    local_ray: str,
) -> tuple[str, dict[str, str]]:
    """A store, not to be changed, and its images."""
    folder = tmp_path_factory.mktemp("built")
    settings = settings_of(folder)
    images = draw_all(folder / "images")
    manifest = build(settings, checkpoint[0], images)
    assert (manifest["images"], manifest["quarantined"]) == (len(images), {})
    assert manifest["shards"] == -(-len(images) // 16)
    return store_uri(settings, checkpoint[0]), images


def check_features(
    store: str,
    images: dict[str, str],
    checkpoint: tuple[str, QuReModel, QuReProcessor],
    precision: str,
) -> None:
    """One by one, or with any neighbours: the bits that the encoder gives on the fly."""
    _, model, processor = checkpoint
    stored = StoredFeatures(store, images, "/nonexistent")
    rng = np.random.default_rng(0)
    for size in (1, 5, 33):
        names = list(rng.choice(sorted(images), size, replace=False))
        pixels = processor.images([load_image(images[name], 10**6, "released") for name in names])
        expected = encode_frozen(model.vision_encoder, pixels, precision)
        assert torch.equal(stored(names), expected)
    exact = model.vision_encoder(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(expected.float(), exact, rtol=1e-3, atol=1e-3)


def test_holds_what_the_encoder_gives(
    built: tuple[str, dict[str, str]], checkpoint: tuple[str, QuReModel, QuReProcessor]
) -> None:
    view = StoredFeatures(*built, "/nonexistent").view("007")
    assert view.dtype == np.float16
    assert view.shape == (17, 96)
    check_features(*built, checkpoint, "fp16")


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


def test_is_read_without_copies(built: tuple[str, dict[str, str]]) -> None:
    stored = StoredFeatures(*built, "/nonexistent")
    view = stored.view("020")
    address = view.__array_interface__["data"][0]
    for line in mapped_files().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            assert line.split()[-1].endswith(".arrow")
            break
    else:
        pytest.fail("the features are in no mapped file")
    assert not view.flags.writeable


def test_only_what_changed_is_encoded_again(
    images: dict[str, str],
    checkpoint: tuple[str, QuReModel, QuReProcessor],
    tmp_path: Path,
    local_ray: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    uri = checkpoint[0]
    settings = settings_of(tmp_path)
    plan = plan_resources(settings.cluster)
    build(settings, uri, images)
    store = Path(store_uri(settings, uri))
    before = {path.name: path.stat().st_mtime_ns for path in store.glob("*.arrow")}
    assert usable_store(settings, plan, uri, images) == str(store)

    os.utime(images["003"])  # touched, its content the same
    draw(Path(images["004"]), 1004)
    draw(tmp_path / "images/new.png", 2000)
    moved = tmp_path / "images/moved.png"
    shutil.move(images["005"], moved)
    more = images | {"new": str(tmp_path / "images/new.png"), "moved": str(moved)}
    del more["005"]

    # Noticed by whoever wants to read it, and said.
    assert usable_store(settings, plan, uri, images | {"005": images["004"]}) is None
    assert "1 image(s) changed since they were encoded" in capfd.readouterr().out
    assert usable_store(settings, plan, uri, {"003": images["003"]}) == str(store)
    with pytest.raises(InputError, match=r"lacks 2 of 42 images.*embed\.py"):
        usable_store(settings.model_copy(update={"features": "required"}), plan, uri, more)

    manifest = build(settings, uri, more)
    assert manifest["encoded"] == 2  # the changed one and the new one
    assert manifest["images"] == len(more) + 1  # and 005 by its old name
    after = {path.name: path.stat().st_mtime_ns for path in store.glob("*.arrow")}
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1
    assert usable_store(settings, plan, uri, more) == str(store)
    assert usable_store(settings.model_copy(update={"features": "off"}), plan, uri, more) is None
    stored = StoredFeatures(str(store), more, str(tmp_path / "cache"))
    _, model, processor = checkpoint
    for name in ("003", "004", "new", "moved", "copy"):
        pixels = processor.images([load_image(more[name], 10**6, "released")])
        expected = encode_frozen(model.vision_encoder, pixels, "fp16")
        assert torch.equal(stored([name]), expected), name
    # Nothing is left to do, and nothing is done.
    assert build(settings, uri, more)["encoded"] == 0

    # A shard that is lost is made again, alone.
    lost = sorted(before)[0]
    (store / lost).unlink()
    assert usable_store(settings, plan, uri, more) is None
    assert f"missing or cut short, first {lost}" in capfd.readouterr().out
    assert 0 < build(settings, uri, more)["encoded"] <= 16
    (store / "record-0123456789abcdef.json").write_text("{}")
    assert prune_store(str(store)) >= 1
    assert usable_store(settings, plan, uri, more) == str(store)


def test_bad_images_matter_only_to_those_who_need_them(
    images: dict[str, str],
    checkpoint: tuple[str, QuReModel, QuReProcessor],
    tmp_path: Path,
    local_ray: str,
) -> None:
    uri = checkpoint[0]
    settings = settings_of(tmp_path, features="required", model={"vision_precision": "fp32"})
    plan = plan_resources(settings.cluster)
    Path(images["010"]).write_bytes(b"not a picture")
    Path(images["011"]).unlink()
    manifest = build(settings, uri, images)
    quarantined = {v["image_id"]: v["fault"] for v in manifest["quarantined"].values()}
    assert set(quarantined) == {"010", "011"}
    assert "cannot be decoded" in quarantined["010"]
    assert "missing" in quarantined["011"]
    good = {name: image for name, image in images.items() if name not in quarantined}
    assert usable_store(settings, plan, uri, good)
    check_features(store_uri(settings, uri), good, checkpoint, "fp32")
    with pytest.raises(InputError, match=r"010\.png: cannot be decoded"):
        usable_store(settings, plan, uri, images)
    # Mended, they leave the quarantine.
    draw(Path(images["010"]), 10)
    draw(Path(images["011"]), 11)
    manifest = build(settings, uri, images)
    assert (manifest["encoded"], manifest["quarantined"]) == (2, {})


def test_another_encoder_or_preprocessing_is_another_store(
    checkpoint: tuple[str, QuReModel, QuReProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, processor = checkpoint
    key = feature_key(checkpoint[0], "fp16")
    assert key == FeatureKey.of(
        model.encoder_digest(), processor.image_size, processor.pixels, "fp16"
    )
    assert replace(key, precision="fp32").uri("x") != key.uri("x")

    other, _ = build_model("tiny", processor.tokenizer, 0.1, seed=5)
    assert other.encoder_digest() == model.encoder_digest()
    with torch.no_grad():
        next(other.qformer.parameters()).add_(1)
        assert other.encoder_digest() == model.encoder_digest()  # trained parts do not count
        last = list(other.vision_encoder.parameters())[-1]
        last[-1] = torch.nextafter(last[-1], torch.tensor(2.0))
    assert other.encoder_digest() != model.encoder_digest()

    assert preprocessing_digest(64, "released") != preprocessing_digest(32, "released")
    digests = {preprocessing_digest(64, "released")}
    for name, value in (("TARGET_RATIO", 1.5), ("CLIP_MEAN", (0.5, 0.5, 0.5))):
        with monkeypatch.context() as patched:
            patched.setattr(preprocessing, name, value)
            if name == "TARGET_RATIO":
                patched.setattr(preprocessing.target_pad, "__defaults__", (value,))
            preprocessing_digest.cache_clear()
            digests.add(preprocessing_digest(64, "released"))
    preprocessing_digest.cache_clear()
    assert len(digests) == 3


def test_a_node_fetches_a_shard_once(
    built: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, images = built
    remote = "memory://features/" + local.rsplit("/", 1)[-1]
    for path in Path(local).iterdir():
        if path.is_file():
            storage.write_bytes(storage.join(remote, path.name), path.read_bytes())
    fetched: list[str] = []
    read = storage.read_bytes

    def counting(uri: str) -> bytes:
        fetched.append(uri)
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", counting)
    cache = str(tmp_path / "cache")
    names = sorted(images)
    expected = StoredFeatures(local, images, cache)(names)
    readers = [StoredFeatures(remote, images, cache) for _ in range(4)]
    fetched.clear()
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda reader: reader(names), readers):
            assert torch.equal(got, expected)
    assert len(fetched) == len(set(fetched)) == FeatureStore.open(remote).manifest["shards"]
    only = StoredFeatures(remote, images, str(tmp_path / "cache2"))
    fetched.clear()
    only(["000"])
    assert len(fetched) == 1  # what is needed, when it is needed

    shard = next(name for name in readers[0].files if name.endswith(".arrow"))
    data = bytearray(read(storage.join(remote, shard)))
    data[-100] ^= 1
    storage.write_bytes(storage.join(remote, shard), bytes(data))
    damaged = StoredFeatures(remote, images, str(tmp_path / "cache3"))
    with pytest.raises(InputError, match="SHA-256"):
        damaged(names)
    (tmp_path / "file").write_text("")
    unwritable = StoredFeatures(remote, images, str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"feature_store\.cache_dir"):
        unwritable(names)
    storage.filesystem("memory://features")[0].rm("/features", recursive=True)
