"""What a run does before its first step: whose data and settings it goes on with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.data import load_split, read_split, write_split
from qure_core.data.positives import without_known_positives
from qure_core.job.data import prepare_data, remember_contents
from qure_core.job.resume import begin, save_config
from qure_core.model import build_model, learn_tokenizer
from qure_core.model.checkpoint_files import CHECKPOINT_KIND, checkpoint_uri
from qure_core.runtime.settings import load_settings
from qure_core.training.loop import check_weights


def settings_of(run: Path, *options: str) -> Settings:
    return load_settings([f"--run.dir={run}", *options], "train.py", "")[0]


def checkpoint(run: Path, stage: str, epoch: int) -> None:
    with storage.committed_directory(checkpoint_uri(str(run), stage, epoch), CHECKPOINT_KIND) as (
        folder,
        _,
    ):
        (folder / "model.safetensors").write_text("weights")


def test_a_run_that_has_not_trained_begins_again_with_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    save_config(settings_of(run, "--train.lr=1e-3"))
    checkpoint(run, "pretrain", 0)
    begin(settings_of(run, "--train.lr=1e-4"))
    assert "had not trained yet and begins again" in capsys.readouterr().out
    assert not (run / "checkpoints/pretrain-0000").exists()  # other settings, other first weights
    checkpoint(run, "pretrain", 0)
    begin(settings_of(run, "--train.lr=1e-3"))
    assert (run / "checkpoints/pretrain-0000").exists()


def test_a_run_that_has_trained_keeps_its_settings_and_says_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    save_config(settings_of(run, "--train.lr=1e-3"))
    for stage, epoch in (("pretrain", 0), ("pretrain", 15), ("train", 0), ("train", 3)):
        checkpoint(run, stage, epoch)
    with pytest.raises(InputError, match=r"train\.lr: 0\.001 there, 0\.0001 now") as caught:
        begin(settings_of(run, "--train.lr=1e-4"))
    assert f"--config {run}/config.yaml" in str(caught.value)
    assert "remove" not in str(caught.value)
    begin(settings_of(run, "--train.lr=1e-3", "--cluster.train_workers=4"))
    assert "goes on from checkpoint train-0003 of 30 epochs" in capsys.readouterr().out
    (run / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"config\.yaml is missing"):
        begin(settings_of(run, "--train.lr=1e-3"))


def test_an_option_that_was_taken_away_is_another_setting(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--objective.name=info_nce", '--objective.options={"candidates": "own"}']
    save_config(settings_of(run, *options))
    for stage, epoch in (("pretrain", 0), ("train", 3)):
        checkpoint(run, stage, epoch)
    begin(settings_of(run, *options))
    with pytest.raises(InputError, match=r"options\.candidates: 'own' there, None now"):
        begin(settings_of(run, options[0]))


def test_contents_are_compared_only_where_a_file_looks_different(tmp_path: Path) -> None:
    images = {}
    for name in "abc":
        (tmp_path / name).write_text(f"picture {name}")
        images[name] = str(tmp_path / name)
    note = str(tmp_path / "contents.parquet")
    remember_contents(note, images)
    before = os.stat(note).st_mtime_ns
    remember_contents(note, images)
    assert os.stat(note).st_mtime_ns == before  # nothing was read again
    # Touched, and moved: the content is the same.
    os.utime(images["a"], (1, 1))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(images["b"], moved / "b")
    images["b"] = str(moved / "b")
    remember_contents(note, images)
    # Of the same size and times.
    facts = os.stat(images["c"])
    Path(images["c"]).write_text("picture d")
    os.utime(images["c"], ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(InputError, match=r"1 image\(s\) are not what they were .*/c;"):
        remember_contents(note, images)
    Path(images["c"]).unlink()
    with pytest.raises(InputError, match=r"1 image\(s\) are not what they were"):
        remember_contents(note, images)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    from PIL import Image

    root = tmp_path / "own"
    (root / "images").mkdir(parents=True)
    for name in "abcdefgh":
        Image.new("RGB", (8, 8), f"#{ord(name):02x}0000").save(root / f"images/{name}.png")
    rows = [("a", "b", "train"), ("c", "d", "train"), ("a", "h", "val")]
    (root / "triplets.jsonl").write_text(
        "".join(
            json.dumps({"reference": r, "text": "x", "target": t, "split": s}) + "\n"
            for r, t, s in rows
        )
    )
    return root


def test_an_older_run_goes_on_with_the_corpus_it_began_with(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = settings_of(run, "--data.format=jsonl", f"--data.root={own}")
    split = load_split(settings.data, "train")
    assert "h" not in split.galleries["all"]
    older = replace(split, galleries={"all": tuple("abcdefgh")})
    write_split(str(run / "data/train"), older)
    manifest = run / "data/train/manifest.json"
    facts = json.loads(manifest.read_text())
    del facts["version"]
    manifest.write_text(json.dumps(facts))
    checkpoint(run, "train", 1)
    _, _, corpora = prepare_data(settings)
    assert corpora["all"] == tuple("abcdefgh")
    assert "this run was begun when images of other splits" in capsys.readouterr().out
    # Its images may move: it is still known as what it is, and goes on again.
    moved = settings.model_copy(deep=True)
    moved.data.root = str(shutil.copytree(own, tmp_path / "moved"))
    for _ in range(2):
        assert prepare_data(moved)[2] == corpora
        assert read_split(str(run / "data/train")).images["a"].startswith(moved.data.root)
    # One that has not trained takes the data as they are now.
    shutil.rmtree(run / "checkpoints")
    rows = (own / "triplets.jsonl").read_text().splitlines()
    (own / "triplets.jsonl").write_text("\n".join(rows[1:]) + "\n")
    prepare_data(settings)
    assert len(read_split(str(run / "data/train")).triplets) == len(split.triplets) - 1
    (own / "triplets.jsonl").write_text("\n".join(rows) + "\n")
    checkpoint(run, "train", 1)
    # One of this version whose data changed is refused.
    write_split(str(run / "data/train"), older)
    with pytest.raises(InputError, match=r"the train split of .* has changed since this run began"):
        prepare_data(settings)


def test_data_put_right_after_a_failed_attempt_are_taken(own: Path, tmp_path: Path) -> None:
    """Rows, images and captions, and with them the first weights, whose words are learned."""
    run = tmp_path / "run"
    settings = settings_of(run, "--data.format=jsonl", f"--data.root={own}")
    rows = (own / "triplets.jsonl").read_text()
    (own / "triplets.jsonl").write_text(rows.splitlines()[0] + "\n")
    prepare_data(settings)

    def changed(change: Callable[[], object]) -> bool:
        """Whether first weights that were there are gone after ``change``."""
        checkpoint(run, "pretrain", 0)
        change()
        prepare_data(settings)
        return not (run / "checkpoints/pretrain-0000").exists()

    assert not changed(lambda: None)
    (own / "images/a.png").write_bytes(b"damaged")
    prepare_data(settings)
    assert not changed(lambda: shutil.copy(own / "images/b.png", own / "images/a.png"))
    assert changed(lambda: (own / "triplets.jsonl").write_text(rows))
    kept_split = without_known_positives(read_split(str(run / "data/train")))
    assert kept_split == load_split(settings.data, "train")
    captions = json.dumps({name: f"a picture of {name}" for name in "abh"})
    assert changed(lambda: (own / "descriptions.json").write_text(captions))
    # What only val names is not learned from either.
    kept = json.loads((run / "data/captions.json").read_text())
    assert kept == {"a": "a picture of a", "b": "a picture of b"}
    # Once it has trained, a run keeps them.
    checkpoint(run, "pretrain", 1)
    (own / "descriptions.json").unlink()
    prepare_data(settings)
    assert json.loads((run / "data/captions.json").read_text()) == kept
    (own / "images/a.png").write_bytes(b"damaged again")
    with pytest.raises(InputError, match=r"1 image\(s\) are not what they were"):
        prepare_data(settings)


def test_weights_that_went_astray_are_not_kept() -> None:
    model, _ = build_model("tiny", learn_tokenizer(["a red dress"], 80), 0.0, seed=0)
    check_weights(model, "train", 4)
    with torch.no_grad():
        model.text_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"train, epoch 5: 1 of .* finite .*; lower train\.lr"):
        check_weights(model, "train", 4)
