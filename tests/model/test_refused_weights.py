"""Weights and vocabularies that would give wrong numbers: refused when they are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file, save_file

from qure_core.base.errors import InputError
from qure_core.model import (
    QuReModel,
    build_model,
    learn_tokenizer,
    load_lavis_checkpoint,
    load_model,
)
from qure_core.model.checkpoints import save_checkpoint
from qure_core.model.convert import check_target
from qure_core.model.pretrained import check_vocabulary

TEXTS = ["a red dress", "a long blue coat with dots"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model, processor = build_model("tiny", learn_tokenizer(TEXTS, 80), 0.0, seed=0)
    save_checkpoint(str(tmp_path / "checkpoint"), model, processor, {"stage": "train", "epoch": 0})
    return tmp_path / "checkpoint"


def unmarked(checkpoint: Path) -> Path:
    """The same files without a manifest, as another program would leave them."""
    copy = checkpoint.with_name("plain")
    shutil.copytree(checkpoint, copy)
    (copy / "manifest.json").unlink()
    return copy


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["temperature", "text_proj.weight"])
def test_weights_that_are_not_finite_are_refused(checkpoint: Path, name: str, value: float) -> None:
    folder = unmarked(checkpoint)
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (load_model, QuReModel.from_pretrained):
        with pytest.raises(
            InputError, match=rf"plain: 1 of [\d,]+ values of {name} are not finite"
        ):
            load(str(folder))


def test_large_finite_weights_are_no_fault(checkpoint: Path) -> None:
    """Whose sum is beyond float32."""
    folder = unmarked(checkpoint)
    weights = load_file(folder / "model.safetensors")
    weights["text_proj.bias"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert (load_model(str(folder))[0].text_proj.bias == 3e38).all()


def test_from_pretrained_checks_our_own_directories(checkpoint: Path) -> None:
    QuReModel.from_pretrained(checkpoint)
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"model\.safetensors: content differs"):
        QuReModel.from_pretrained(checkpoint)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_are_not_whole_are_refused_not_drawn_at_random(
    checkpoint: Path, change: str
) -> None:
    folder = unmarked(checkpoint)
    weights = load_file(folder / "model.safetensors")
    if change == "missing":
        del weights["vision_proj.bias"]
    else:
        weights["other"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"1 parameter\(s\) {change}, first (vision_proj|other)"):
        load_model(str(folder))


def test_a_vocabulary_that_is_not_the_models_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load_model(str(checkpoint))
    vectors = model.config.qformer["vocab_size"]
    many = learn_tokenizer(["".join(map(chr, range(97, 123))), *TEXTS], 120)
    assert len(many) > vectors
    with pytest.raises(InputError, match=rf"has {len(many)} words .* model has {vectors} vectors"):
        check_vocabulary(many, model, "many")
    # Words that were exchanged after the checkpoint was made.
    folder = unmarked(checkpoint)
    many.save_pretrained(folder)
    with pytest.raises(InputError, match=r"model\.tokenizer: .*plain' has"):
        load_model(str(folder))
    # Of the same size, but other words.
    other = learn_tokenizer([text.replace("red", "raw") for text in TEXTS], 80)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="has other words than those"):
        load_model(str(checkpoint), str(tmp_path / "other"))
    # Fewer are said: vectors may be padding.
    few = learn_tokenizer(["red"], 64)
    assert len(few) < vectors
    capsys.readouterr()
    check_vocabulary(few, model, "few")
    assert f"warning: model.tokenizer: 'few' has {len(few)} words" in capsys.readouterr().out


def test_blip2s_vectors_take_berts_words_alone(checkpoint: Path) -> None:
    """As many words as BLIP-2 has, but of another vocabulary."""
    from transformers import BertTokenizer

    model, _ = load_model(str(checkpoint))
    model.config.qformer["vocab_size"] = 30_523
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    names += [f"w{number}" for number in range(30_523 - len(names))]
    other = BertTokenizer(vocab={name: number for number, name in enumerate(names)})
    assert len(other) == 30_523
    with pytest.raises(InputError, match="not those that the model has 30,523 vectors for"):
        check_vocabulary(other, model, "other")
    places = {101: "[CLS]", 102: "[SEP]", 1996: "the"}
    bert = [places.get(number, f"b{number}") for number in range(30_523)]
    bert[0], bert[100], bert[103] = "[PAD]", "[UNK]", "[MASK]"
    check_vocabulary(BertTokenizer(vocab={w: n for n, w in enumerate(bert)}), model, "bert")


def test_convert_says_what_the_file_cannot_tell(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--vision-heads: how many .* part \d+ wide"):
        load_lavis_checkpoint(GOLDENS / "model_tiny.pth")
    with pytest.raises(InputError, match="--qformer-heads"):
        load_lavis_checkpoint(GOLDENS / "model_tiny.pth", vision_heads=4)
    for text in ("hello", "", json.dumps({"a": 1}), "q" * 4000):
        file = tmp_path / "text.pth"
        file.write_text(text)
        with pytest.raises(InputError, match=r"text\.pth: (not a readable|refused)"):
            load_lavis_checkpoint(file)


def test_a_conversion_may_be_repeated(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="holds another checkpoint"):
        check_target(str(checkpoint), "model.pth")
