"""A run's checkpoint as a model repository: its card, and the hub's own client to and fro."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hub_server import hub_server
from huggingface_hub import ModelCard
from PIL import Image

from qure_core import Encoder
from qure_core.base.errors import InputError
from qure_core.job.layout import committed
from qure_core.model.checkpoint_files import OPTIMIZER_FILE, checkpoint_uri, latest_epoch


def publish(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qure_core.job.publish", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_the_card_says_what_the_run_knows(finished_run: Path, tmp_path: Path) -> None:
    result = publish(str(finished_run), f"{tmp_path}/model", "--licence=apache-2.0")
    assert result.returncode == 0, result.stderr
    card = ModelCard.load(tmp_path / "model/README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "qure-core"
    assert card.data.model_name == "model"
    last = committed(str(finished_run), "evaluations")[-1]
    told = {one.metric_type: one.metric_value for one in card.data.eval_results}
    recall = last["metrics"]["recall"]["average"]
    assert told["R@10"] == pytest.approx(recall["R@10"], abs=1e-4)
    assert "gallery: split" in card.data.eval_results[0].dataset_name
    for part in ("| end | split |", 'Encoder.load("model")', "train.lr: ", "- val: 24 triplets"):
        assert part in card.text
    # It is public: no path of this machine.
    assert str(finished_run.parent) not in str(card)
    assert "run.dir" not in card.text
    # The weights are the checkpoint's, and it is loaded as any.
    newest = latest_epoch(str(finished_run), "train") or 0
    checkpoint = Path(checkpoint_uri(str(finished_run), "train", newest))
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert "README.md" in names
    assert OPTIMIZER_FILE not in names
    picture = tmp_path / "a.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(picture)
    ours, theirs = (
        Encoder.load(p).encode_images([picture]) for p in (tmp_path / "model", checkpoint)
    )
    assert torch.equal(ours, theirs)
    # Never over a checkpoint of a run.
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    result = publish(str(finished_run), str(checkpoint))
    assert result.returncode == 2
    assert "holds another checkpoint, not the model" in result.stderr
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
    # Again, and over what is not its own.
    assert publish(str(finished_run), f"{tmp_path}/model").returncode == 0
    (tmp_path / "model/mine.txt").write_text("mine")
    result = publish(str(finished_run), f"{tmp_path}/model")
    assert result.returncode == 2
    assert "mine.txt" in result.stderr


def test_it_is_pushed_and_loaded_by_its_name(finished_run: Path, tmp_path: Path) -> None:
    output = f"{tmp_path}/model"
    with hub_server() as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": f"{tmp_path}/home", "HF_TOKEN": "x"}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        result = publish(str(finished_run), output, "--push=me/model", **environment)
        assert result.returncode == 0, result.stderr
        assert f"uploaded: {hub.endpoint}/me/model/commit/" in result.stdout
        files = {name: data for (owner, name), data in hub.files.items() if owner == "me/model"}
        for file in Path(output).iterdir():
            assert files[file.name] == file.read_bytes()
        assert b'Encoder.load("me/model")' in files["README.md"]
        code = (
            "import sys; from qure_core import Encoder; e = Encoder.load('me/model');"
            "print(e.encode_images([sys.argv[1]]).double().sum().item())"
        )
        picture = tmp_path / "a.png"
        Image.effect_noise((40, 30), 90).convert("RGB").save(picture)
        loaded = subprocess.run(
            [sys.executable, "-c", code, str(picture)],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        assert loaded.returncode == 0, loaded.stderr
    expected = Encoder.load(output).encode_images([picture]).double().sum().item()
    assert float(loaded.stdout.split()[-1]) == expected


def test_what_keeps_it_from_being_published_is_said(finished_run: Path, tmp_path: Path) -> None:
    output = f"{tmp_path}/model"
    result = publish(str(finished_run), output, "--push=me/model", HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert "--push: me/model was not uploaded" in result.stderr
    assert "offline mode is enabled" in result.stderr
    assert json.loads((tmp_path / "model/manifest.json").read_text())["kind"] == "checkpoint"
    result = publish(
        str(finished_run), output, "--push=me/model", HF_ENDPOINT="http://127.0.0.1:1", HF_TOKEN="x"
    )
    assert result.returncode == 2
    assert "--push: me/model was not uploaded" in result.stderr
    result = publish(str(tmp_path), output)
    assert result.returncode == 2
    assert "has no config.yaml, so it is no run" in result.stderr
    with pytest.raises(InputError, match="cannot load 'no/such'"):
        Encoder.load("no/such")
