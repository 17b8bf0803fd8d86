"""What the checks cost that keep wrong numbers out, against the work that they guard.

    python tests/benchmarks/checks.py [DIRECTORY]

Weights: loading a committed checkpoint of real size (blip2-vit-l), its digests and its finiteness.
Contents: remembering what images hold, at a run's start and at its resumption, against decoding
and preprocessing them once, on as many threads.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from qure_core import storage
from qure_core.data.images import load_image, preprocess_to_bytes
from qure_core.job.data import remember_contents
from qure_core.model import QuReModel, build_model, learn_tokenizer
from qure_core.model.base import check_finite
from qure_core.model.checkpoint_files import CHECKPOINT_KIND
from qure_core.model.checkpoints import save_checkpoint

IMAGES = 2000
SIDE = 256
THREADS = 2


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def weights(folder: Path) -> None:
    uri = str(folder / "checkpoint")
    model, processor = build_model("blip2-vit-l", learn_tokenizer(["a red dress"], 80), 0.0, 0)
    save_checkpoint(uri, model, processor, {"stage": "train", "epoch": 0})
    size = sum(value.nbytes for value in model.state_dict().values())
    load = min(seconds(lambda: QuReModel.from_directory(uri, uri)) for _ in range(2))
    finite = min(seconds(lambda: check_finite(model, uri)) for _ in range(2))
    manifest = storage.read_manifest(uri, CHECKPOINT_KIND)

    def digests() -> None:
        for name, facts in manifest["files"].items():
            assert storage.file_digest(f"{uri}/{name}") == facts["sha256"]

    digest = seconds(digests)
    print(f"weights of {size / 2**30:.2f} GiB: loading, finite check included, {load:.2f} s")
    print(f"  finite check {finite:.2f} s, {finite / (load - finite):.2f} x the rest of loading")
    print(f"  digests      {digest:.2f} s, {digest / (load - finite):.2f} x the rest of loading")


def contents(folder: Path) -> None:
    rng = np.random.default_rng(0)
    images = {}
    for number in range(IMAGES):
        noise = rng.integers(0, 256, (SIDE // 8, SIDE // 8, 3), np.uint8)
        picture = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        images[str(number)] = str(folder / f"{number}.jpg")
        picture.save(images[str(number)])
    note = str(folder / "contents.parquet")
    first = seconds(lambda: remember_contents(note, images))
    again = seconds(lambda: remember_contents(note, images))

    def decode(uri: str) -> None:
        preprocess_to_bytes(load_image(uri, 10**8, "released"), 224)

    with ThreadPoolExecutor(THREADS) as pool:
        decoding = seconds(lambda: list(pool.map(decode, images.values())))
    print(f"contents of {IMAGES:,} JPEGs of {SIDE} pixels: decoding them once {decoding:.2f} s")
    print(f"  at the start      {first:.2f} s, {first / decoding:.3f} x decoding")
    print(f"  at a resumption   {again:.2f} s, {again / decoding:.3f} x decoding")


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as folder:
        weights(Path(folder))
        contents(Path(folder))


if __name__ == "__main__":
    main()
