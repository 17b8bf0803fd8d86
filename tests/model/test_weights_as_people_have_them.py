"""Checkpoints as training tools, hubs and people leave them: taken, and said what was done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from qure_core.base.errors import InputError
from qure_core.model import learn_tokenizer, load_lavis_checkpoint, load_model
from qure_core.model.lavis import BERT_WORDS, read_state, with_decoder_word

GOLDEN = GOLDENS / "model_tiny.pth"
State = dict[str, Tensor]


def plain() -> State:
    state: State = torch.load(GOLDEN, weights_only=True)
    return state


WAYS: dict[str, tuple[Callable[[State], Any], str]] = {
    "lightning": (
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "epoch": 3},
        "taken from its entry 'state_dict' (not read: epoch)",
    ),
    "lavis": (lambda s: {"model": s, "optimizer": {"lr": 1.0}}, "from its entry 'model'"),
    "ddp": (lambda s: {f"module.{k}": v for k, v in s.items()}, "'module.' before every name"),
    "compiled ddp": (
        lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        "'_orig_mod.' before every name is left out",
    ),
    "a name of its own": (
        lambda s: {"epoch": 1, "Blip2QformerCir": s},
        "taken from its entry 'Blip2QformerCir' (not read: epoch)",
    ),
    "nested": (lambda s: {"checkpoint": {"model": s}, "model": {"state_dict": s}}, "'state_dict'"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_around_the_tensors_is_left_out_and_said(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrap, said = WAYS[way]
    torch.save(wrap(plain()), tmp_path / "x.ckpt")
    found = read_state(tmp_path / "x.ckpt")
    assert set(found) == set(plain())
    assert all(torch.equal(found[name], value) for name, value in plain().items())
    assert said in capsys.readouterr().out
    model = load_lavis_checkpoint(tmp_path / "x.ckpt", vision_heads=4, qformer_heads=4)
    torch.testing.assert_close(model.query_tokens, plain()["query_tokens"], check_stride=False)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_half_precision_in_any_file(
    kind: torch.dtype, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = {k: v.to(kind).contiguous() for k, v in plain().items() if v.is_floating_point()}
    file = tmp_path / f"x.{suffix}"
    save_file(half, file) if suffix == "safetensors" else torch.save(half, file)
    model = load_lavis_checkpoint(file, vision_heads=4, qformer_heads=4)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.text_proj.weight, half["text_proj.weight"].float())
    assert f"values of {str(kind)[6:]} are taken as float32" in capsys.readouterr().out


def test_what_holds_no_tensors_or_several_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    for value in ({}, {"a": 1}, [plain()], {"one": plain(), "two": plain()}, {"model": {"a": 1}}):
        torch.save(value, file)
        with pytest.raises(InputError, match=r"x\.pth: not a state dict of tensors"):
            read_state(file)
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match=r"not a readable safetensors file"):
        read_state(tmp_path / "x.safetensors")
    torch.save(plain(), file)
    with pytest.raises(InputError, match=r"is one file of weights; make a directory of it with"):
        load_model(str(file))


def test_berts_words_get_one_more_that_is_never_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = torch.randn(BERT_WORDS, 3)
    more = with_decoder_word(words, "x")
    assert more.shape == (30_523, 3)
    assert torch.equal(more[:-1], words)
    assert not more[-1].any()
    assert "x: has vectors of BERT's 30,522 words" in capsys.readouterr().out
    assert with_decoder_word(more, "x") is more
    assert with_decoder_word(words[:100], "x").shape == (100, 3)
    state = plain()
    name = "Qformer.bert.embeddings.word_embeddings.weight"
    state[name] = torch.randn(BERT_WORDS, state[name].shape[1])
    torch.save(state, tmp_path / "x.pth")
    model = load_lavis_checkpoint(tmp_path / "x.pth", vision_heads=4, qformer_heads=4)
    assert model.config.qformer["vocab_size"] == 30_523


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    qformer = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    qformer |= {"num_attention_heads": 2, "vocab_size": 120, "encoder_hidden_size": 16}
    qformer |= {"use_qformer_text_input": True}
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, num_query_tokens=4, image_text_hidden_size=8
    )
    donor = Blip2ForImageTextRetrieval(config)
    torch.nn.init.normal_(donor.query_tokens)
    donor.save_pretrained(tmp_path)
    learn_tokenizer(["a red dress"], 100).save_pretrained(tmp_path)
    return tmp_path


def changed(folder: Path, change: Callable[[State], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_keys_that_other_versions_add_do_not_refuse_a_checkpoint(
    hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, _ = load_model(str(hub))
    capsys.readouterr()
    changed(hub, lambda s: s.update(logit_scale=torch.tensor(2.6), logit_bias=torch.zeros(1)))
    after, _ = load_model(str(hub))
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name])
    assert "not read" not in capsys.readouterr().out
    changed(hub, lambda s: s.update({"language_model.x": torch.zeros(1), "other": torch.ones(1)}))
    load_model(str(hub))
    assert "2 parameter(s) are not read, first language_model.x, other" in capsys.readouterr().out


def test_a_model_whose_class_has_them_is_taken_too(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Blip2ForImageTextRetrieval.__init__

    def newer(self: Any, config: Any) -> None:
        made(self, config)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.6))

    monkeypatch.setattr(Blip2ForImageTextRetrieval, "__init__", newer)
    load_model(str(hub))

    def stranger(self: Any, config: Any) -> None:
        made(self, config)
        self.extra = torch.nn.Linear(2, 2)

    monkeypatch.setattr(Blip2ForImageTextRetrieval, "__init__", stranger)
    changed(
        hub, lambda s: s.update({"extra.weight": torch.zeros(2, 2), "extra.bias": torch.zeros(2)})
    )
    with pytest.raises(
        InputError, match=r"2 parameter\(s\) are not of .*: extra.weight, extra.bias"
    ):
        load_model(str(hub))


def test_what_a_hub_model_lacks_is_not_drawn_at_random(hub: Path) -> None:
    changed(hub, lambda s: s.pop("text_projection.weight"))
    with pytest.raises(InputError, match=r"lacks 1 parameter\(s\) .* first text_projection.weight"):
        load_model(str(hub))
