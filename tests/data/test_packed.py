"""Packed images: every kind of shard read image by image, indexed once, and packed from files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from s3_server import S3Server, s3_server

from qure_core import storage
from qure_core.base.config import DataSettings, Settings
from qure_core.base.errors import InputError
from qure_core.data import packed_listing
from qure_core.data.hashing import image_digests, image_stamps
from qure_core.data.images import load_image, read_image_bytes
from qure_core.data.pack import pack_images
from qure_core.data.packed import entries, read, shard_of
from qure_core.data.packed_index import PackedImages, image_source
from qure_core.data.sources import Dataset
from qure_core.job.data import mining_data

NAMES = [f"{'hats' if number % 2 else 'bags'}/{number:02d}" for number in range(12)]


def encoded(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG" if number % 3 else "PNG")
    return file.getvalue()


DATA = {name: encoded(number) for number, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def by_itself(check: str, *arguments: str, **environment: str) -> None:
    """Run a check of this module in a process with a Ray and an environment of its own."""
    code = f"import sys; sys.path[:0] = sys.argv[1].split(':'); import test_packed as t; t.{check}"
    command = [sys.executable, "-c", f"{code}(*sys.argv[2:])", ":".join(sys.path), *arguments]
    subprocess.run(command, check=True, timeout=250, env={**os.environ, **environment})


def table(names: list[str], **more: Any) -> pa.Table:
    rows = {"image_id": names, "image": [DATA[name] for name in names]}
    return pa.table(rows | {"category": [name.split("/")[0] for name in names]} | more)


def as_parquet(folder: Path) -> None:
    for number, first in enumerate(range(0, 12, 5)):
        part = table(NAMES[first : first + 5])
        pq.write_table(part, folder / f"part-{number}.parquet", row_group_size=2)


def as_arrow(folder: Path) -> None:
    for number, first in enumerate(range(0, 12, 7)):
        part = table(NAMES[first : first + 7])
        with pa.ipc.new_file(str(folder / f"part-{number}.arrow"), part.schema) as writer:
            writer.write_table(part, max_chunksize=3)


def hugging_face() -> datasets.Dataset:
    rows = {
        "image": [{"bytes": DATA[name], "path": f"{name}.jpg"} for name in NAMES],
        "category": [name.split("/")[0] for name in NAMES],
    }
    features = {"image": datasets.Image(), "category": datasets.Value("string")}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def as_hugging_face_parquet(folder: Path) -> None:
    hugging_face().to_parquet(str(folder / "train-00000-of-00001.parquet"), batch_size=5)


def as_hugging_face_on_disk(folder: Path) -> None:
    # It keeps no more than the last part of a path, which is no name for all of them.
    named = hugging_face().add_column("image_id", NAMES)
    named.save_to_disk(str(folder), num_shards=2)


def as_tars(folder: Path) -> None:
    for number, first in enumerate(range(0, 12, 4)):
        with tarfile.open(folder / f"shard-{number:03d}.tar", "w") as tar:
            for name in NAMES[first : first + 4]:
                suffix = "JPG" if DATA[name][:2] == b"\xff\xd8" else "png"
                facts = json.dumps({"category": name.split("/")[0]}).encode()
                for end, data in ((suffix, DATA[name]), ("json", facts), ("txt", b"a hat")):
                    member = tarfile.TarInfo(f"./{name}.{end}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


KINDS = [as_parquet, as_arrow, as_hugging_face_parquet, as_hugging_face_on_disk, as_tars]


def put(make: Callable[[Path], None], place: str, folder: Path) -> None:
    """Shards at ``place``, which may be remote."""
    folder.mkdir(exist_ok=True)
    make(folder)
    for file in folder.iterdir():
        storage.write_bytes(storage.join(place, file.name), file.read_bytes())


@pytest.mark.parametrize("make", KINDS)
def test_every_kind_gives_every_image(
    make: Callable[[Path], None], tmp_path: Path, local_ray: str
) -> None:
    check_kind(make, f"{tmp_path}/shards", tmp_path)


@pytest.mark.parametrize("where", ["s3"])
def test_object_storage_gives_and_takes_the_same(
    where: str, server: S3Server, tmp_path: Path
) -> None:
    by_itself("check_all", f"{where}://bucket/all", str(tmp_path), **server.environment)


def check_all(place: str, folder: str) -> None:
    for make in KINDS:
        (Path(folder) / make.__name__).mkdir()
        check_kind(make, f"{place}/{make.__name__}", Path(folder) / make.__name__)
    check_packing(f"{place}/packed", Path(folder))


def check_kind(make: Callable[[Path], None], place: str, tmp_path: Path) -> None:
    put(make, place, tmp_path / "made")
    index = str(tmp_path / "indexes")
    images = image_source(place, index, "data.images")
    assert not images.problems
    assert images.sorted() == sorted(NAMES)
    assert images.of_category("hats") == [name for name in NAMES if name.startswith("hats/")]
    uris = {name: str(images.find(f"{name}.png")) for name in NAMES}
    for name, uri in uris.items():
        assert read_image_bytes(uri, 10**6) == DATA[name]
        assert load_image(uri, 10**6, "upright").size == (7, 9)
        assert read(uri, 5) == DATA[name][:5]
        with pytest.raises(InputError, match=r"more than 8 bytes"):
            read_image_bytes(uri, 1)
    assert image_digests(uris.values()) == {
        uri: hashlib.sha256(DATA[name]).hexdigest() for name, uri in uris.items()
    }
    assert set(image_stamps(uris.values())) == set(uris.values())
    assert "nearest name there is 'bags/00'" in images.missing("bags/0000")


def test_only_what_changed_is_listed_again(
    tmp_path: Path, local_ray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, index = tmp_path / "shards", str(tmp_path / "indexes")
    put(as_tars, str(place), tmp_path / "made")
    listed: list[list[str]] = []
    listing = packed_listing.listed
    monkeypatch.setattr(packed_listing, "listed", lambda s: listed.append(s) or listing(s))

    def names() -> list[str]:
        return image_source(str(place), index, "data.images").sorted()

    assert names() == names() == sorted(NAMES)
    assert [len(shards) for shards in listed] == [3]
    os.utime(place / "shard-001.tar", (1, 1))
    assert names() == sorted(NAMES)
    assert listed.pop() == [f"{place}/shard-001.tar"]
    (place / "shard-002.tar").unlink()
    assert names() == sorted(NAMES[:8])
    assert [len(shards) for shards in listed] == [3]
    assert len(list(Path(index).iterdir())) == 1


def test_ids_that_stand_twice_are_a_problem(tmp_path: Path, local_ray: str) -> None:
    pq.write_table(table([*NAMES, NAMES[3], NAMES[3]]), tmp_path / "a.parquet")
    images = image_source(f"{tmp_path}/a.parquet", f"{tmp_path}/indexes", "data.images")
    (problem,) = images.problems
    assert "1 image id(s) stand several times, first 'hats/03'" in str(problem)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: (f / "a.parquet").write_bytes(b"PAR1 nothing"), r"a\.parquet: cannot be read"),
        (lambda f: (f / "a.tar").write_bytes(b"x" * 2000), r"a\.tar: cannot be read"),
        (lambda f: (f / "a.arrow").write_bytes(b"x" * 2000), r"a\.arrow: cannot be read"),
        (lambda f: (f / "a.tar.gz").write_bytes(b""), "is compressed, so single images cannot"),
        (
            lambda f: pq.write_table(pa.table({"picture": [b"x"]}), f / "a.parquet"),
            r"has no column 'image' \(it has picture\)",
        ),
        (
            lambda f: pq.write_table(pa.table({"image_id": ["a"], "image": [3]}), f / "a.parquet"),
            "its column 'image' is int64, not the bytes of image files",
        ),
        (
            lambda f: pq.write_table(pa.table({"image": [b"x"]}), f / "a.parquet"),
            "has no column 'image_id', by which",
        ),
        (
            lambda f: pq.write_table(
                pa.table({"image_id": [["a"]], "image": [b"x"]}), f / "a.parquet"
            ),
            "cannot be read",
        ),
        (
            lambda f: pq.write_table(
                table(NAMES).set_column(0, "image_id", [[None] * 12]), f / "a.parquet"
            ),
            r"row 0 of group 0 has no image_id",
        ),
    ],
)
def test_what_is_no_shard_is_named(
    make: Callable[[Path], None], message: str, tmp_path: Path, local_ray: str
) -> None:
    (tmp_path / "shards").mkdir()
    make(tmp_path / "shards")
    with pytest.raises(InputError, match=message):
        image_source(f"{tmp_path}/shards", f"{tmp_path}/indexes", "data.images")


def test_a_tars_other_parts_are_passed_over_and_said(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("x.jpg", "x.seg.png", "y.v2.png", ".hidden.png", "__MACOSX/x.png", "x.cls"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo("z.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (found,) = entries(f"{tmp_path}/a.tar")
    assert found["image_id"].to_pylist() == ["x"]
    images = PackedImages("a", found.append_column("shard", [["a.tar"]]), 2)
    (note,) = images.notes
    assert "2 file(s) with a dot in their sample's name" in note


def test_a_shard_that_is_gone_or_shorter_is_a_missing_or_damaged_image(tmp_path: Path) -> None:
    for uri in (f"{tmp_path}/a.tar#0+9", f"{tmp_path}/a.parquet#0.1"):
        with pytest.raises(InputError, match="image file is missing"):
            read_image_bytes(uri, 10**6)
    assert image_stamps([f"{tmp_path}/a.tar#0+9"]) == {}
    pq.write_table(table(NAMES), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet#0\.99: the file has no such row"):
        read_image_bytes(f"{tmp_path}/b.parquet#0.99", 10**6)
    assert shard_of("/data/odd#1.png") is None
    rows = {"image_id": ["a"], "image": pa.array([None], pa.binary())}
    pq.write_table(pa.table(rows), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet#0\.0: the row has no bytes of an image"):
        read_image_bytes(f"{tmp_path}/c.parquet#0.0", 10**6)
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(b"PAR1" + b"\0" * 200 + whole[204:])
    with pytest.raises(InputError, match=r"d\.parquet#0\.0: "):
        read_image_bytes(f"{tmp_path}/d.parquet#0.0", 10**6)


def write_images(folder: Path) -> dict[str, str]:
    uris = {}
    for name, data in DATA.items():
        file = folder / f"{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        uris[name] = str(file)
    return uris


def pack(output: str, uris: dict[str, str]) -> dict[str, Any]:
    category_of = {name: name.split("/")[0] for name in uris}
    return pack_images(output, uris, category_of, 5, 10**6)


def test_packing_keeps_bytes_and_goes_on(tmp_path: Path, local_ray: str) -> None:
    check_packing(f"{tmp_path}/packed", tmp_path)


def check_packing(place: str, tmp_path: Path) -> None:
    uris = write_images(tmp_path / "files")
    whole = pack(place, uris)
    assert whole["images"] == 12
    assert sorted(whole["files"]) == [f"images-0000{n}.parquet" for n in range(3)]
    images = image_source(place, f"{tmp_path}/indexes", "data.images")
    assert {n: read_image_bytes(str(images.find(n)), 10**6) for n in NAMES} == DATA
    assert images.of_category("bags") == sorted(n for n in NAMES if n.startswith("bags"))
    assert pack(place, uris) == whole
    # One that was killed: without its manifest, and with a shard less.
    storage.remove_file(storage.join(place, "manifest.json"))
    storage.remove_file(storage.join(place, "images-00001.parquet"))
    kept = storage.stamps([storage.join(place, "images-00000.parquet")])
    again = pack(place, uris)
    assert again["files"] == whole["files"]
    assert storage.stamps(kept) == kept
    # A picture that changed is packed anew; one that is lost is named.
    Path(uris[NAMES[0]]).write_bytes(DATA[NAMES[1]])
    assert pack(place, uris)["files"] != whole["files"]
    Path(uris[NAMES[0]]).unlink()
    with pytest.raises(InputError, match=r"1 image\(s\) are missing, first .*bags/00\.jpg"):
        pack(place, uris)


def test_packing_does_not_touch_what_is_there(tmp_path: Path, local_ray: str) -> None:
    uris = write_images(tmp_path / "files")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/images-00000.parquet").write_bytes(b"mine")
    with pytest.raises(InputError):
        pack(f"{tmp_path}/out", uris)
    assert (tmp_path / "out/images-00000.parquet").read_bytes() == b"mine"


def test_packing_onto_its_own_images_is_refused(tmp_path: Path, local_ray: str) -> None:
    uris = write_images(tmp_path / "files")
    pack(f"{tmp_path}/packed", uris)
    before = {file.name: file.read_bytes() for file in (tmp_path / "packed").iterdir()}
    images = image_source(f"{tmp_path}/packed", f"{tmp_path}/indexes", "data.images")
    packed = {name: str(images.find(name)) for name in images.sorted()}
    with pytest.raises(InputError, match=r"--output: .*packed holds images that are to be packed"):
        pack_images(f"{tmp_path}/packed", packed, {}, 3, 10**6)
    assert {f.name: f.read_bytes() for f in (tmp_path / "packed").iterdir()} == before


def test_folders_that_are_named_like_shards_or_hold_both(tmp_path: Path, local_ray: str) -> None:
    put(as_parquet, f"{tmp_path}/spark.parquet", tmp_path / "made")
    spark = image_source(f"{tmp_path}/spark.parquet", f"{tmp_path}/indexes", "data.images")
    assert spark.sorted() == sorted(NAMES)
    write_images(tmp_path / "files")
    (tmp_path / "files/images.tgz").write_bytes(b"")  # where they came from
    assert image_source(f"{tmp_path}/files", "", "data.images").sorted() == sorted(NAMES)
    pq.write_table(table(NAMES), tmp_path / "files/a.parquet")
    with pytest.raises(InputError, match=r"holds image files .* and shards"):
        image_source(f"{tmp_path}/files", "", "data.images")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """JSON lines over packed images, without any folder of them."""
    root = tmp_path / "own"
    root.mkdir()
    row = {"text": "in red", "category": "hats"}
    rows = [
        row | {"reference": "hats/01", "target": "hats/03.jpg"},
        row | {"reference": "hats/05", "target": "hats/07", "split": "val"},
    ]
    (root / "triplets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_any_layout_takes_its_images_from_shards(own: Path, tmp_path: Path, local_ray: str) -> None:
    put(as_tars, f"{tmp_path}/shards", tmp_path / "made")
    data = DataSettings(
        format="jsonl", root=str(own), images=f"{tmp_path}/shards", index_dir=f"{tmp_path}/indexes"
    )
    split = Dataset(data).load("train")
    assert split.triplets[0].target_id == "hats/03"
    assert split.galleries == {"hats": ("hats/01", "hats/03", "hats/09", "hats/11")}
    assert set(split.images) == set(NAMES)
    fashion = tmp_path / "fashion"
    for name, value in (
        ("image_splits/split.hats.train.json", ["01", "03", "05"]),
        (
            "captions/cap.hats.train.json",
            [{"candidate": "01", "target": "03", "captions": ["a", "b"]}],
        ),
        ("cirr/image_splits/split.rc2.val.json", {name: f"./dev/{name}.png" for name in NAMES}),
        (
            "cirr/captions/cap.rc2.val.json",
            [
                {"pairid": 1, "reference": NAMES[0], "target_hard": NAMES[1], "caption": "x"}
                | {"img_set": {"members": NAMES[:3]}}
            ],
        ),
    ):
        (fashion / name).parent.mkdir(parents=True, exist_ok=True)
        (fashion / name).write_text(json.dumps(value))
    for layout, split_name, count in (("fashioniq", "train", 3), ("cirr", "val", 12)):
        other = data.model_copy(update={"format": layout, "root": str(fashion)})
        assert len(Dataset(other).load(split_name).images) == count


def test_a_corpus_larger_than_the_triplets(own: Path, tmp_path: Path, local_ray: str) -> None:
    uris = write_images(own / "images")
    more = tmp_path / "more"
    rows = {"image_id": ["m1", "m2", "m3"], "category": ["hats", "hats", "shoes"]}
    more.mkdir()
    pq.write_table(
        pa.table(rows | {"image": [encoded(n) for n in (20, 21, 22)]}), more / "a.parquet"
    )

    def settings(**mining: Any) -> Settings:
        data = {"format": "jsonl", "root": str(own), "index_dir": f"{tmp_path}/indexes"}
        return Settings(data=data, mining=mining, run={"dir": f"{tmp_path}/run"})

    _, before = mining_data(settings())
    split, corpora = mining_data(settings(corpus=str(more)))
    assert corpora == {"hats": tuple(sorted({*before["hats"], "m1", "m2"}))}
    assert split.galleries == {"hats": before["hats"]}  # what is evaluated stays
    assert read_image_bytes(split.images["m2"], 10**6) == encoded(21)
    assert {name: split.images[name] for name in uris} == uris
    # A folder without categories is everyone's.
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "n1.png").write_bytes(encoded(23))
    assert "n1" in mining_data(settings(corpus=str(folder)))[1]["hats"]
    (folder / "hats").mkdir()
    (folder / "hats/01.png").write_bytes(encoded(24))
    with pytest.raises(
        InputError, match=r"mining\.corpus: 1 of its images have the ids .*'hats/01'"
    ):
        mining_data(settings(corpus=str(folder)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"mining\.corpus: there are no images in"):
        mining_data(settings(corpus=f"{tmp_path}/empty"))
    with pytest.raises(InputError, match=r"mining\.corpus: .*nowhere does not exist"):
        mining_data(settings(corpus=f"{tmp_path}/nowhere"))
