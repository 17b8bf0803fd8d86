"""pipelines/embed.py as users run it: on a disk that fills up, killed, and to the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Runner, SmallDisk

from qure_core.base.config import DataSettings
from qure_core.data.images import load_image
from qure_core.data.sources import read_source
from qure_core.features.store import StoredFeatures
from qure_core.model import build_model, encode_frozen, learn_tokenizer
from qure_core.model.checkpoints import save_checkpoint


@pytest.mark.timeout(400)
def test_a_full_disk_and_a_kill_lose_nothing(
    world: Path, small_disk: SmallDisk, tmp_path: Path
) -> None:
    prefix, disk = small_disk("256k")
    # A gallery names an image that is not there: no reason not to encode the others.
    data = DataSettings(root=str(tmp_path / "data"))
    shutil.copytree(world, data.root)
    names = min(Path(data.root, "image_splits").glob("split.*.val.json"))
    names.write_text(json.dumps([*json.loads(names.read_text()), "ghost"]))
    model, processor = build_model("tiny", learn_tokenizer(["a red dress"], 80), 0.1, seed=5)
    checkpoint = tmp_path / "train-0000"
    model.eval()
    save_checkpoint(str(checkpoint), model, processor, {"stage": "train", "epoch": 0})
    options = [
        f"--data.root={data.root}",
        f"--checkpoint={checkpoint}",
        f"--run.dir={tmp_path}/run",
        "--feature_store.shard_images=8",
        "--cluster.gpus=none",
    ]
    inside = [*options, f"--feature_store.dir={tmp_path}/disk"]
    command = [*prefix, sys.executable, str(ROOT / "pipelines/embed.py"), *inside]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    def shards() -> dict[str, int]:
        """Shards that are finished, and when they were written."""
        if [*disk.glob("*/manifest.json")]:
            return {path.name: path.stat().st_mtime_ns for path in disk.glob("*/shard-*.arrow")}
        records = [*disk.glob("*/record-*.json")]
        shards = [path.parent / json.loads(path.read_text())["shard"] for path in records]
        return {path.name: path.stat().st_mtime_ns for path in shards}

    full = run()
    assert full.returncode == 2, full.stdout + full.stderr
    assert "No space left on device" in full.stderr
    assert "--feature_store.dir" in full.stderr
    assert "Traceback" not in full.stderr
    first = shards()
    assert first
    assert not list(disk.glob("*/manifest.json"))
    assert not list(disk.glob("*/*.partial"))

    subprocess.run([*prefix, "mount", "-o", "remount,size=64m", f"{tmp_path}/disk"], check=True)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(shards()) < len(first) + 2:
        assert process.poll() is None, "the build ended before it was killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    second = shards()
    assert not list(disk.glob("*/manifest.json"))

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "were encoded by an earlier attempt" in done.stdout
    assert "quarantined                     1" in done.stdout
    assert "image 'ghost' is missing" in done.stdout
    last = shards()
    for before in (first, second):
        assert {name: last[name] for name in before} == before, "a shard was written again"
    images = read_source(data, "train")[0].images | read_source(data, "val")[0].images
    (store,) = (path.parent for path in disk.glob("*/manifest.json"))
    stored = StoredFeatures(str(store), images, "/nonexistent")
    assert len(stored) == len(images)
    for name in images:
        pixels = processor.images([load_image(images[name], 10**6, "released")])
        assert torch.equal(stored([name]), encode_frozen(model.vision_encoder, pixels, "fp16"))


def test_without_an_encoder_it_says_what_to_give(
    world: Path, tmp_path: Path, run_pipeline: Runner
) -> None:
    result = run_pipeline("embed", f"--data.root={world}", f"--run.dir={tmp_path}/none")
    assert result.returncode == 2
    assert "give --checkpoint" in result.stderr
    assert "Traceback" not in result.stderr
