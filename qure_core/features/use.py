"""Whether a stage reads stored features or computes them: the ``features`` setting."""

from __future__ import annotations

from qure_core import storage
from qure_core.config import Settings
from qure_core.data.hashing import image_digests
from qure_core.errors import InputError
from qure_core.features.build import EncoderSource, build_store
from qure_core.features.identity import feature_key
from qure_core.features.store import FeatureStore
from qure_core.resources import Plan


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
    if storage.is_committed(uri):
        fault = _fault(uri, images)
    else:
        fault = f"there is none of this encoder, preprocessing and precision ({uri})"
    if fault is None:
        return uri
    if settings.features == "build":
        build_store(settings, plan, EncoderSource(checkpoint), key, images, wait=True)
        fault = _fault(uri, images)
        if fault is None:
            return uri
    if settings.features == "auto":
        if storage.is_committed(uri):
            print(f"[features] computed, not read from {uri}: {fault}", flush=True)
        return None
    raise InputError(
        f"features: {settings.features}, but the feature store cannot be used: {fault}. Run "
        f"python pipelines/embed.py --checkpoint {checkpoint} with the same settings, or set "
        "--features auto to compute what is needed"
    )


def _fault(uri: str, images: dict[str, str]) -> str | None:
    """Why a store cannot serve ``images``, or None if it can."""
    manifest = storage.read_json(storage.join(uri, storage.MANIFEST))
    if lost := sorted(storage.faults(uri, manifest)):
        return f"{len(lost):,} of its files are missing or cut short, first {lost[0]}"
    store = FeatureStore(uri, manifest)
    rows = store.index(images.values()).to_pylist()
    held = {row["uri"]: row for row in rows}
    quarantined = manifest["quarantined"]
    lacking = sorted(set(images.values()) - set(held))
    if lacking:
        named = [image for image in lacking if image in quarantined]
        first = quarantined[named[0]]["fault"] if named else lacking[0]
        return f"it lacks {len(lacking):,} of {len(held) + len(lacking):,} images, first {first}"
    stamps = storage.stamps(held)
    suspects = [image for image, row in held.items() if stamps.get(image) != row["stamp"]]
    present = image_digests(image for image in suspects if image in stamps)
    changed = [image for image in suspects if present.get(image) != held[image]["sha256"]]
    if changed:
        return f"{len(changed):,} image(s) changed since they were encoded, first {min(changed)}"
    return None
