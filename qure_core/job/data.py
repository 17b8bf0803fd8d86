"""The data of a run: read, kept with it, and held to what they were."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.data import Split, load_split, mining_galleries, read_split, write_split
from qure_core.data.hashing import image_digests
from qure_core.data.schema import holds, is_older_split
from qure_core.data.sources import has_split, load_descriptions
from qure_core.data.world import make_world
from qure_core.evaluation.stage import evaluation_job
from qure_core.job.resume import forget_first_weights, has_learned
from qure_core.mining.stage import check_corpora
from qure_core.storage.parquet import read_parquet, write_parquet

_CONTENTS = pa.schema([(name, pa.string()) for name in ("image_id", "uri", "stamp", "sha256")])


def _kept_split(settings: Settings, uri: str, split: Split, learned: bool) -> Split:
    """``split``, checked against what the run, which has ``learned`` from it, keeps of it."""
    kept = read_split(uri) if storage.is_committed(uri) else None
    if kept and learned:
        if is_older_split(uri) and kept.triplets == split.triplets and holds(kept, split):
            print(
                f"[prepare] this run was begun when images of other splits were part of the "
                f"{split.name} corpus; it goes on so",
                flush=True,
            )
            return replace(split, galleries=kept.galleries)
        if (kept.triplets, kept.galleries) != (split.triplets, split.galleries):
            raise InputError(
                f"data.root: the {split.name} split of {settings.data.root} has changed since this "
                f"run began ({uri}); choose another --run.dir, or restore the data"
            )
    if kept and (kept.triplets, kept.galleries) != (split.triplets, split.galleries):
        forget_first_weights(settings.run.dir)
    if kept != split:  # it is new, or its images have moved
        write_split(uri, split)
    return split


def prepare_data(settings: Settings) -> tuple[Split, Split | None, dict[str, tuple[str, ...]]]:
    """Load train, val if there is one, and the mining corpora; keep a copy of them with the run.

    What the images hold is remembered too, so that a run does not go on with other pixels.
    """
    data = settings.data
    if data.format == "world" and make_world(data.root, data.world):
        print(f"[prepare] drew {data.world.images:,} images in {data.root}", flush=True)
    folder, learned = storage.join(settings.run.dir, "data"), has_learned(settings.run.dir)

    def kept(name: str) -> Split:
        return _kept_split(settings, storage.join(folder, name), load_split(data, name), learned)

    train = kept("train")
    val = kept("val") if has_split(data, "val") else None
    corpora = mining_galleries(data, train)
    check_corpora(train, corpora, settings.train.negatives_per_triplet)
    storage.write_json(storage.join(folder, "corpora.json"), corpora)
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
    remember_contents(contents, used | {name: train.images[name] for name in described})
    return train, val, corpora


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


def remember_contents(uri: str, images: dict[str, str]) -> None:
    """Note what each image file holds (SHA-256), or check that it still holds it.

    Only files whose place, size or times differ from before are read again. Raises `InputError` if
    one has changed: half of a run would have seen other pixels than the other half.
    """
    known: dict[str, dict[str, str]] = {}
    if storage.exists(uri):
        known = {row["image_id"]: row for row in read_parquet(uri).to_pylist()}
    stamps = storage.stamps(images.values())
    asked = {
        name: image
        for name, image in images.items()
        if name not in known
        or (known[name]["uri"], known[name]["stamp"]) != (image, stamps.get(image))
    }
    digests = image_digests(asked.values())
    changed = [
        image
        for name, image in asked.items()
        if name in known and digests.get(image) != known[name]["sha256"]
    ]
    if changed:
        raise InputError(
            f"data.root: {len(changed):,} image(s) are not what they were when this run began, "
            f"first {changed[0]}; restore them, or choose another --run.dir"
        )
    rows = [row for name, row in known.items() if name not in asked]
    rows += [
        {"image_id": name, "uri": image, "stamp": stamps[image], "sha256": digests[image]}
        for name, image in asked.items()
        if image in digests and image in stamps
    ]
    if asked:
        write_parquet(uri, pa.Table.from_pylist(rows, _CONTENTS))
