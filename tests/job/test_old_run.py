"""A run of an earlier version, killed after its first round: read, resumed, and ended as it was."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import GOLDENS, Runner
from safetensors.torch import load_file
from training_oracle import check_weights

from qure_core import Encoder
from qure_core.data import read_split
from qure_core.evaluation.stage import read_rankings
from qure_core.mining import read_mined_set


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The earlier version's files: run, world, features, and what its whole run came to."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(GOLDENS / "old_run.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_its_parts_are_read(old: Path) -> None:
    manifest = json.loads((old / "run/rounds/epoch-0002/_manifest.json").read_text())
    assert manifest["schema_version"] == 2
    mined = read_mined_set(str(old / "run/rounds/epoch-0002"))
    assert mined.manifest["rule"]["name"] == "steep_drops"
    negatives = mined.negatives()
    assert len(negatives) == 48
    rows = mined.rows(list(negatives))
    for query, chosen in negatives.items():
        row = rows[query]
        assert len(chosen) == row["num_negatives"]
        if row["status"] == "steep":
            upper, lower = (row["details"][name] for name in ("upper_drop", "lower_drop"))
            assert lower["rank"] - upper["rank"] == len(chosen)
    assert len(read_split(str(old / "run/data/train")).triplets) == 48
    assert len(read_rankings(str(old / "run/evaluations/epoch-0002"))) == 12
    encoder = Encoder.load(old / "run/checkpoints/train-0003")
    picture = next((old / "world/images").rglob("*.png"))
    assert torch.isfinite(encoder.encode_images([picture])).all()


def test_it_is_resumed_to_the_same_end(old: Path, tmp_path: Path, run_pipeline: Runner) -> None:
    shutil.copytree(old / "run", tmp_path / "run")
    # Its own settings, where they lie now; the weights that it started from are gone.
    settings = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert "objective" not in settings
    options = [
        f"--config={tmp_path}/run/config.yaml",
        f"--run.dir={tmp_path}/run",
        f"--data.root={old}/world",
        f"--feature_store.dir={tmp_path}/features",
        "--cluster.in_process=true",
    ]
    before = (tmp_path / "run/rounds/epoch-0002/part-00000.parquet").read_bytes()
    result = run_pipeline("train", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "goes on from checkpoint train-0003 of 4 epochs, 1 mined round(s)" in result.stdout
    assert (tmp_path / "run/rounds/epoch-0002/part-00000.parquet").read_bytes() == before
    ours = load_file(tmp_path / "run/checkpoints/train-0004/model.safetensors")
    # To the bit on one machine; products of another may round otherwise.
    check_weights(ours, load_file(old / "expected/model.safetensors"))
    summary, expected = (
        json.loads(file.read_text())["evaluations"]
        for file in (tmp_path / "run/summary.json", old / "expected/summary.json")
    )
    assert list(summary) == list(expected)
    for name in ("start", "end of warm-up"):
        assert summary[name] == expected[name]
    theirs = expected["end"]["recall"]["average"]
    # A query of a dozen more or less.
    assert summary["end"]["recall"]["average"] == pytest.approx(theirs, abs=25)
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["objective"] == {"name": "bradley_terry", "options": {}}


@pytest.mark.usefixtures("standing_cluster")
def test_its_feature_store_encodes_nothing_again(
    old: Path, tmp_path: Path, run_pipeline: Runner
) -> None:
    shutil.copytree(old / "features", tmp_path / "features")
    result = run_pipeline(
        "embed",
        f"--config={old}/run/config.yaml",
        f"--run.dir={old}/run",
        f"--data.root={old}/world",
        f"--feature_store.dir={tmp_path}/features",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"encoded now +0 ", result.stdout), result.stdout


def test_settings_of_a_later_version_are_refused(
    old: Path, tmp_path: Path, run_pipeline: Runner
) -> None:
    shutil.copytree(old / "run", tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    options = [f"--run.dir={tmp_path}/run", f"--data.root={old}/world", "--cluster.gpus=none"]
    config.write_text(config.read_text() + "invented: {name: 1}\n")
    result = run_pipeline("train", *options, "--model.pretrained=mini")
    assert result.returncode == 2
    assert "invented: unknown setting" in result.stderr
    assert "a later version wrote it" in result.stderr
