"""A full disk under a training, and files that were damaged after they were committed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Runner, SmallDisk, job, recovery
from test_run import kill_when, started, weights

from qure_core.base.errors import InputError
from qure_core.data import read_split
from qure_core.job.place import MARK
from qure_core.mining import read_mined_set


def flip(file: Path, place: float = 0.5) -> None:
    """Change one bit of a file; its size and all its other bytes stay."""
    data = bytearray(file.read_bytes())
    data[int(len(data) * place)] ^= 1
    file.write_bytes(data)


@pytest.mark.timeout(400)
def test_a_full_disk_in_training_loses_nothing(
    finished: tuple[Path, str], world: Path, small_disk: SmallDisk, tmp_path: Path
) -> None:
    source = tmp_path / "started"
    source.mkdir()
    options = job(world, tmp_path / "disk/run", "--cluster.max_failures=0")
    started(finished, source, options)
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    # Room for what is there, the data and the logs, but not for the first epoch's checkpoint.
    prefix, disk = small_disk(f"{size // 1024 + 700}k")
    shutil.copytree(source, disk / "run")
    command = [*prefix, sys.executable, str(ROOT / "pipelines/train.py"), *options]
    full = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert full.returncode == 74, full.stdout + full.stderr
    assert "error: storage: No space left on device" in full.stderr
    assert "the same command goes on" in full.stderr
    assert not (disk / "run/checkpoints/train-0001").exists()
    assert not [*(disk / "run").rglob("*.partial"), *(disk / "run").rglob(".staging*")]

    subprocess.run([*prefix, "mount", "-o", "remount,size=200m", f"{tmp_path}/disk"], check=True)
    with recovery("disk full, from room made to the second epoch's checkpoint"):
        kill_when(disk / "run/checkpoints/train-0002/manifest.json", command)
    expected = weights(finished[0], 2)
    for name, value in weights(disk / "run", 2).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.usefixtures("standing_cluster")
def test_a_truncated_part_of_a_round_is_made_again(
    finished: tuple[Path, str], world: Path, tmp_path: Path, run_pipeline: Runner
) -> None:
    run_dir = tmp_path / "run"
    for name in ("checkpoints/train-0002", "rounds/epoch-0002"):
        shutil.copytree(finished[0] / name, run_dir / name)
    shutil.copy(finished[0] / MARK, run_dir)
    part = run_dir / "rounds/epoch-0002/part-00001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"part-00001\.parquet: \d+ bytes, but its manifest says"):
        read_mined_set(str(part.parent))
    with recovery("Parquet part truncated, to the round's commit"):
        result = run_pipeline("mine", *job(world, run_dir), "--if-newer")
    assert result.returncode == 0, result.stdout + result.stderr
    assert part.read_bytes() == whole
    assert read_mined_set(str(part.parent)).table.num_rows == 90


@pytest.mark.usefixtures("standing_cluster")
def test_a_flipped_byte_is_noticed(
    finished: tuple[Path, str], world: Path, tmp_path: Path, run_pipeline: Runner
) -> None:
    run_dir = tmp_path / "run"
    for name in ("checkpoints/train-0002", "rounds/epoch-0002", "data/train"):
        shutil.copytree(finished[0] / name, run_dir / name)
    shutil.copy(finished[0] / MARK, run_dir)
    part = run_dir / "rounds/epoch-0002/part-00001.parquet"
    flip(part)
    with pytest.raises(InputError, match=r"part-00001\.parquet: content differs from its manifest"):
        read_mined_set(str(part.parent))
    flip(run_dir / "data/train/triplets.parquet")
    with pytest.raises(InputError, match=r"triplets\.parquet: content differs from its manifest"):
        read_split(str(run_dir / "data/train"))
    flip(run_dir / "checkpoints/train-0002/model.safetensors")
    checkpoint = f"--checkpoint={run_dir}/checkpoints/train-0002"
    result = run_pipeline("mine", *job(world, run_dir), checkpoint, f"--output={tmp_path}/out")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "model.safetensors: content differs from its manifest's SHA-256" in result.stderr
    assert not (tmp_path / "out" / "_manifest.json").exists()
