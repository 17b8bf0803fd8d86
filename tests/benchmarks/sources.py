"""Where images come from: speed of embedding from files, packed shards and tars; memory of ids.

    python tests/benchmarks/sources.py speed [DIRECTORY] [--images 20000]
    python tests/benchmarks/sources.py ids [--images 1000000]

speed: the feature store of a tiny encoder is filled from a folder of JPEG files, from Parquet
shards that `prepare.py pack` makes, and from WebDataset tars, on a disk and on an object store of
this machine behind a counting proxy. Rates are against the folder's on the disk.

ids: memory of the process that holds a corpus' ids (generated, without pixels), after each step
that every stage takes: the index, the images by id, the split, the corpora, the embedding pass'
shards, the blocks of queries.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.data.jsonl import read_jsonl
from qure_core.data.layout import Files
from qure_core.data.pack import pack_images
from qure_core.data.packed_index import PackedImages, image_source
from qure_core.data.sources import mining_galleries
from qure_core.embeddings.feature_building import EncoderSource, build_store
from qure_core.embeddings.stage import _shards
from qure_core.features.identity import feature_key
from qure_core.mining.stage import mining_job
from qure_core.model import build_model, learn_tokenizer
from qure_core.model.checkpoints import save_checkpoint
from qure_core.ranking.blocks import make_blocks
from qure_core.runtime.resources import connect, plan_resources

SIDE = 128
TAR_IMAGES = 1000


def draw(folder: Path, count: int) -> dict[str, str]:
    """JPEG files of a few kilobytes, in folders of a thousand."""
    rng = np.random.default_rng(0)
    uris = {}
    for number in range(count):
        file = folder / f"{number // 1000:03d}/{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (SIDE // 8, SIDE // 8, 3), np.uint8)
        picture = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.save(file, quality=90)
        uris[str(file.relative_to(folder).with_suffix(""))] = str(file)
    return uris


def write_tars(uris: dict[str, str], folder: Path) -> None:
    names = sorted(uris)
    folder.mkdir()
    for first in range(0, len(names), TAR_IMAGES):
        with tarfile.open(folder / f"shard-{first // TAR_IMAGES:05d}.tar", "w") as tar:
            for name in names[first : first + TAR_IMAGES]:
                data = Path(uris[name]).read_bytes()
                member = tarfile.TarInfo(f"{name}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def upload(folder: Path, uri: str) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]

    def put(file: Path) -> None:
        storage.write_bytes(storage.join(uri, str(file.relative_to(folder))), file.read_bytes())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, files))


def fill(place: str, work: Path, checkpoint: str) -> tuple[int, float, float]:
    """Fill a new feature store from ``place``: images, seconds to list them, seconds to encode."""
    began = time.perf_counter()
    images = image_source(place, f"{work}/indexes", "data.images")
    uris = {name: str(images.find(name)) for name in images.sorted()}
    listed = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=work) as stores:
        settings = Settings(feature_store={"dir": stores}, cluster={"gpus": "none"})
        key = feature_key(checkpoint, "fp16")
        plan = plan_resources(settings.cluster)
        build_store(settings, plan, EncoderSource(checkpoint), key, uris)
    return len(uris), listed - began, time.perf_counter() - listed


def speed(work: Path, count: int) -> None:
    uris = draw(work / "files", count)
    size = sum(os.path.getsize(uri) for uri in uris.values()) / count
    print(f"{count:,} JPEG files of {size:,.0f} bytes", flush=True)
    model, processor = build_model("tiny", learn_tokenizer(["a red dress"], 80), 0.0, 0)
    checkpoint = f"{work}/checkpoint"
    save_checkpoint(checkpoint, model, processor, {"stage": "train", "epoch": 0})
    write_tars(uris, work / "tars")
    # Of the tests, which are no package.
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    from flaky_storage import flaky_storage
    from s3_server import s3_server

    with s3_server(work / "server", volumes=32) as server, flaky_storage(server.endpoint) as proxy:
        os.environ.update(server.environment | {"AWS_ENDPOINT_URL": proxy.endpoint})
        connect()
        began = time.perf_counter()
        pack_images(f"{work}/packed", uris, {}, 2000, 10**6)
        seconds = time.perf_counter() - began
        print(f"pack: {count / seconds:,.0f} images/s, {seconds:.1f} s", flush=True)
        first = 0.0
        for where in ("disk", "s3"):
            for kind in ("files", "packed", "tars"):
                place = f"{work}/{kind}"
                if where == "s3":
                    place = f"s3://bucket/{kind}"
                    upload(work / kind, place)
                before = proxy.requests
                images, listing, encoding = fill(place, work, checkpoint)
                rate = images / (listing + encoding)
                first = first or rate
                asked = (proxy.requests - before) / images
                requests = f", {asked:.3f} requests an image" if where == "s3" else ""
                line = f"{where:<4} {kind:<6} {rate:7.1f} images/s, {rate / first:.2f} x the folder"
                times = f"listing {listing:.1f} s, encoding {encoding:.1f} s"
                print(f"{line} on disk ({times}){requests}", flush=True)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ids(work: Path, count: int) -> None:
    start = peak_mb()

    def tell(step: str) -> None:
        grown = peak_mb() - start
        print(
            f"  {step:<34} {grown:8,.0f} MB, {grown * 2**20 / count:6.0f} bytes an id", flush=True
        )

    print(f"{count:,} ids, no pixels; {start:,.0f} MB before")
    numbers = np.arange(count)
    rows = {
        "image_id": pa.array([f"product-{n:08d}" for n in numbers]),
        "category": pa.nulls(count, pa.string()),
        "first": pa.array(numbers % 2000 // 100),
        "second": pa.array(numbers % 100),
        "shard": pa.array([f"s3://bucket/packed/images-{n // 2000:05d}.parquet" for n in numbers]),
    }
    index = pa.table(rows)
    del rows
    tell("the index")
    images = PackedImages("s3://bucket/packed", index, 0)
    del index
    tell("images by id")
    lines = [
        {"reference": f"product-{n:08d}", "text": "in red", "target": f"product-{n + 1:08d}"}
        for n in range(0, 20_000, 2)
    ]
    (work / "triplets.jsonl").write_text("\n".join(map(json.dumps, lines)))
    split, problems = read_jsonl(Files(str(work), images), "train")
    assert not problems, problems[:3]
    tell("the split, 10,000 triplets")
    settings = Settings(data={"format": "jsonl"})
    corpora = mining_galleries(settings.data, split)
    job = mining_job(split, corpora, "s3://bucket/round", "fp16")
    tell("what is mined among")
    _shards(job, settings.cluster.embed_batch, None)
    tell("the embedding pass' shards")
    make_blocks(split.triplets, corpora, 1024, None, 40_000)
    tell("blocks of queries")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "ids"])
    parser.add_argument("directory", nargs="?", help="where to work (default: a temporary folder)")
    parser.add_argument("--images", type=int, help="(default: 20,000; 1,000,000 ids)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.directory) as work:
        if chosen.what == "speed":
            speed(Path(work), chosen.images or 20_000)
        else:
            ids(Path(work), chosen.images or 1_000_000)


if __name__ == "__main__":
    main()
