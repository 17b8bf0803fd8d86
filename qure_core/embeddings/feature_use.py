"""Whether a stage reads stored features or computes them: the ``features`` setting."""

from __future__ import annotations

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.data.hashing import image_digests, image_stamps
from qure_core.embeddings.feature_building import EncoderSource, build_store
from qure_core.features.identity import feature_key
from qure_core.features.store import FeatureStore
from qure_core.runtime.resources import Plan


def usable_store(
    settings: Settings, plan: Plan, checkpoint: str, images: dict[str, str]
) -> str | None:
    """The URI of a store with valid features of all ``images`` (URIs by id), or None.

    By ``settings.features``: "off" never looks; "auto" says why a store that is there cannot be
    used; "required" raises `InputError`; "build" first adds what the store lacks.
    """
    if settings.features == "off":
        return None
    key = feature_key(checkpoint, settings.model.vision_precision)
    uri = key.uri(settings.feature_store.dir)
    fault, touched = _check(uri, images)
    if settings.features == "build" and (fault or touched):
        build_store(settings, plan, EncoderSource(checkpoint), key, images, wait=True)
        fault, _ = _check(uri, images)
    if fault is None:
        return uri
    if settings.features == "auto":
        if storage.list_names(settings.feature_store.dir):
            print(f"[features] computed, not read from {uri}: {fault}", flush=True)
        return None
    raise InputError(
        f"features: {settings.features}, but the feature store cannot be used: {fault}. "
        f"Once the images are in order, python pipelines/embed.py --checkpoint {checkpoint} with "
        "the same settings fills it; --features auto computes what is needed"
    )


def _check(uri: str, images: dict[str, str]) -> tuple[str | None, bool]:
    """Why a store cannot serve ``images``, or None; and whether files were touched since."""
    if not storage.is_committed(uri):
        return f"there is none of this encoder, preprocessing and precision ({uri})", False
    manifest = storage.read_json(str(storage.manifest_uri(uri)))
    if lost := sorted(storage.faults(uri, manifest)):
        return f"{len(lost):,} of its files are missing or cut short, first {lost[0]}", False
    store = FeatureStore(uri, manifest)
    held = {row["uri"]: row for row in store.index(images.values()).to_pylist()}
    quarantined = manifest["quarantined"]
    if lacking := sorted(set(images.values()) - set(held)):
        named = [image for image in lacking if image in quarantined]
        first = quarantined[named[0]]["fault"] if named else lacking[0]
        count = f"{len(lacking):,} of {len(held) + len(lacking):,} images"
        return f"it lacks {count}, first {first}", False
    stamps = image_stamps(held)
    if missing := sorted(set(held) - set(stamps)):
        return f"{len(missing):,} image file(s) are missing, first {missing[0]}", False
    touched = [image for image, row in held.items() if stamps[image] != row["stamp"]]
    present = image_digests(touched)
    changed = [image for image in touched if present.get(image) != held[image]["sha256"]]
    if changed:
        text = f"{len(changed):,} image(s) changed since they were encoded, first {min(changed)}"
        return text, True
    return None, bool(touched)
