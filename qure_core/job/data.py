"""The data of a run: read, kept with it, and held to what they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.data import Split, load_split, mining_galleries, read_split, write_split
from qure_core.data.hashing import image_digests, image_stamps
from qure_core.data.packed_index import image_source
from qure_core.data.positives import (
    twins_said,
    with_known_positives,
    without_known_positives,
)
from qure_core.data.schema import holds, is_older_split
from qure_core.data.sources import Dataset, load_descriptions, with_more_images
from qure_core.data.world import make_world
from qure_core.evaluation.stage import evaluation_job
from qure_core.job.resume import forget_first_weights, has_learned
from qure_core.mining.stage import check_corpora
from qure_core.storage.parquet import read_parquet, write_parquet

_CONTENTS = pa.schema([(name, pa.string()) for name in ("image_id", "uri", "stamp", "sha256")])


def _checked(settings: Settings, uri: str, split: Split, learned: bool) -> Split:
    """``split``, checked against what the run, which has ``learned`` from it, keeps of it."""
    kept = read_split(uri) if storage.is_committed(uri) else None
    # What answers a query besides its target follows from labels and contents.
    before = without_known_positives(kept).triplets if kept else ()
    triplets = without_known_positives(split).triplets
    if kept and learned:
        if is_older_split(uri) and before == triplets and holds(kept, split):
            print(
                f"[prepare] this run was begun when images of other splits were part of the "
                f"{split.name} corpus; it goes on so",
                flush=True,
            )
            return replace(split, galleries=kept.galleries)
        if (before, kept.galleries) != (triplets, split.galleries):
            raise InputError(
                f"data.root: the {split.name} split of {settings.data.root} has changed since this "
                f"run began ({uri}); choose another --run.dir, or restore the data"
            )
    if kept and (before, kept.galleries) != (triplets, split.galleries):
        forget_first_weights(settings.run.dir)
    return split


def _keep(uri: str, split: Split, learned: bool) -> None:
    """Write ``split`` if it is new, or its images have moved.

    One that the run, which has ``learned`` from it, goes on with as it was begun (`_checked`) stays
    known as such.
    """
    there = storage.is_committed(uri)
    if not there or read_split(uri) != split:
        write_split(uri, split, older=there and learned and is_older_split(uri))


def _mined_among(settings: Settings, train: Split) -> tuple[Split, dict[str, tuple[str, ...]]]:
    """The training split with all images that are mined among, and those by category."""
    corpora = mining_galleries(settings.data, train)
    if settings.mining.corpus is None:
        return train, corpora
    more = image_source(settings.mining.corpus, settings.data.index_dir, "mining.corpus")
    return with_more_images(train, corpora, more)


def _keep_corpora(
    settings: Settings, uri: str, corpora: dict[str, tuple[str, ...]], learned: bool
) -> None:
    """Note what is mined among, or check that it is what the run began with."""
    plain = {category: list(ids) for category, ids in corpora.items()}
    if learned and storage.exists(uri) and storage.read_json(uri) != plain:
        raise InputError(
            f"mining.corpus: the images of {settings.mining.corpus or settings.data.root} are not "
            f"those that this run began with ({uri}); choose another --run.dir, or restore them"
        )
    storage.write_json(uri, plain)


def _known(settings: Settings, split: Split, digest_of: Mapping[str, str]) -> Split:
    """``split`` with all that is known to answer its queries, or with targets alone."""
    if not settings.mining.exclude_known_positives:
        return without_known_positives(split)
    return with_known_positives(split, digest_of)


def prepare_data(settings: Settings) -> tuple[Split, Split | None, dict[str, tuple[str, ...]]]:
    """Load train, val if there is one, and the mining corpora; keep a copy of them with the run.

    What the images hold is remembered too, so that a run does not go on with other pixels.
    """
    data = settings.data
    if data.format == "world" and make_world(data.root, data.world):
        print(f"[prepare] drew {data.world.images:,} images in {data.root}", flush=True)
    folder, learned = storage.join(settings.run.dir, "data"), has_learned(settings.run.dir)

    dataset = Dataset(data)

    def checked(name: str) -> Split:
        return _checked(settings, storage.join(folder, name), dataset.load(name), learned)

    train = checked("train")
    val = checked("val") if dataset.has("val") else None
    train, corpora = _mined_among(settings, train)
    _keep_corpora(settings, storage.join(folder, "corpora.json"), corpora, learned)
    captions, described = storage.join(folder, "captions.json"), load_descriptions(data, train)
    if not storage.exists(captions) or not learned:  # a run keeps those that it began with
        if storage.exists(captions) and storage.read_json(captions) != described:
            forget_first_weights(settings.run.dir)
        storage.write_json(captions, described)
    count = f"{len(val.triplets):,} val" if val else "no val"
    print(
        f"[prepare] {len(train.triplets):,} train and {count} triplets; mining corpus: "
        + ", ".join(f"{category} {len(ids):,}" for category, ids in corpora.items()),
        flush=True,
    )
    if not val:
        print("[prepare] there is no val split: evaluations and their figures are skipped")
    contents = storage.join(folder, "contents.parquet")
    if learned and not storage.exists(contents):
        print(
            "[prepare] this run did not remember what its images hold; from here on it does, but "
            "whether they changed before cannot be told",
            flush=True,
        )
    if not learned:
        storage.remove_file(contents)  # of an attempt whose images may have been put right since
    used = used_images(settings, train, val, corpora)
    digest_of = remember_contents(contents, used | {name: train.images[name] for name in described})
    for note in twins_said(digest_of):
        print(f"[data] {note}", flush=True)
    own = training_images(train, corpora)  # as a round alone knows them
    train = _known(settings, train, {n: d for n, d in digest_of.items() if n in own})
    check_corpora(train, corpora, settings.train.negatives_per_triplet)
    _keep(storage.join(folder, "train"), train, learned)
    if val:
        _keep(storage.join(folder, "val"), val, learned)
    return train, val, corpora


def mining_data(settings: Settings) -> tuple[Split, dict[str, tuple[str, ...]]]:
    """The training split and the mining corpora, as a round alone needs them.

    Contents are those that the run remembers, or read where it does not.
    """
    split, corpora = _mined_among(settings, load_split(settings.data, "train"))
    if settings.mining.exclude_known_positives:
        uri = storage.join(settings.run.dir, "data", "contents.parquet")
        images = training_images(split, corpora)
        known, asked, _ = _contents(uri, images)
        digest_of = {name: row["sha256"] for name, row in known.items() if name in images} | asked
        split = _known(settings, split, {name: own for name, own in digest_of.items() if own})
    else:
        split = without_known_positives(split)
    check_corpora(split, corpora)
    return split, corpora


def training_images(train: Split, corpora: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """URIs by id of the images that fine-tuning reads: references, targets and negatives."""
    wanted = {name for ids in corpora.values() for name in ids}
    for triplet in train.triplets:
        wanted |= {triplet.reference_id, str(triplet.target_id)}
    return {image_id: train.images[image_id] for image_id in sorted(wanted)}


def used_images(
    settings: Settings, train: Split, val: Split | None, corpora: dict[str, tuple[str, ...]]
) -> dict[str, str]:
    """URIs by id of the images that fine-tuning, mining and evaluation read."""
    evaluated = evaluation_job(settings, val, "").images() if val else {}
    return training_images(train, corpora) | evaluated


def _contents(
    uri: str, images: dict[str, str]
) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str]]:
    """What is known of images' contents at ``uri``, digests of those that were read again, and
    stamps: rows by id, SHA-256 by id, and `storage.stamps` by URI.

    Only files whose place, size or times differ from before are read again.
    """
    known: dict[str, dict[str, str]] = {}
    if storage.exists(uri):
        known = {row["image_id"]: row for row in read_parquet(uri).to_pylist()}
    stamps = image_stamps(images.values())
    asked = {
        name: image
        for name, image in images.items()
        if name not in known
        or (known[name]["uri"], known[name]["stamp"]) != (image, stamps.get(image))
    }
    digests = image_digests(asked.values())
    return known, {name: digests.get(image, "") for name, image in asked.items()}, stamps


def remember_contents(uri: str, images: dict[str, str]) -> dict[str, str]:
    """Note what each image file holds, or check that it still holds it; SHA-256 by image id.

    Raises `InputError` if one has changed: half of a run would have seen other pixels than the
    other half.
    """
    known, asked, stamps = _contents(uri, images)
    changed = [
        images[name]
        for name, digest in asked.items()
        if name in known and digest != known[name]["sha256"]
    ]
    if changed:
        raise InputError(
            f"data.root: {len(changed):,} image(s) are not what they were when this run began, "
            f"first {changed[0]}; restore them, or choose another --run.dir"
        )
    rows = [row for name, row in known.items() if name not in asked]
    rows += [
        {"image_id": name, "uri": images[name], "stamp": stamps[images[name]], "sha256": digest}
        for name, digest in asked.items()
        if digest and images[name] in stamps
    ]
    if asked:
        write_parquet(uri, pa.Table.from_pylist(rows, _CONTENTS))
    return {row["image_id"]: row["sha256"] for row in rows if row["image_id"] in images}
