"""CLIP's towers under a sum or a Combiner, and one model's weights under another query encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from baseline_goldens import FOLDER, facts
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from qure_core.base.errors import InputError
from qure_core.data.images import preprocess_to_bytes
from qure_core.data.loader import pixel_values
from qure_core.embeddings.encoder import Encoder
from qure_core.model import build_model, learn_tokenizer, load_model
from qure_core.model.checkpoints import save_checkpoint
from qure_core.model.combiner import Combiner
from qure_core.model.convert import main as convert
from qure_core.model.sprc import SPRCModel
from qure_core.model.towers import TowersModel

TEXTS = ["is red and longer", "a Striped dress, with long sleeves!"]
POSITIONS = 77  # as CLIP has, which is no multiple of 8
LETTERS = "abcdefghijklmnopqrstuvwxyz,!"
GOLDEN = min(path.stem for path in FOLDER.glob("clip4cir_*.pth"))
FEATURES = int(facts(f"{GOLDEN}_config")["feature_dim"])


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level vocabulary of letters alone."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{x}</w>" for x in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<|endoftext|>"
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPModel, CLIPTokenizer, str]:
    """A tiny CLIP whose features are as wide as the golden Combiner's, as a directory."""
    folder = tmp_path_factory.mktemp("clip")
    words = tokenizer(folder)
    narrow = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            projection_dim=FEATURES,
            text_config=CLIPTextConfig(
                **narrow,
                num_attention_heads=2,
                vocab_size=len(words),
                max_position_embeddings=POSITIONS,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                projection_dim=FEATURES,
            ).to_dict(),
            vision_config=CLIPVisionConfig(
                **narrow,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
                projection_dim=FEATURES,
            ).to_dict(),
        )
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return model, words, str(folder)


def pictures() -> list[Image.Image]:
    torch.manual_seed(1)
    return [Image.fromarray((torch.rand(40, 48, 3) * 255).byte().numpy()) for _ in range(2)]


def plain_features(clip: tuple[CLIPModel, CLIPTokenizer, str]) -> tuple[Any, Any]:
    """Features of images and of texts, each text by itself, as CLIP gives them."""
    model, words, _ = clip
    pixels = pixel_values(
        torch.stack([torch.from_numpy(preprocess_to_bytes(p, 32)) for p in pictures()]).numpy()
    )
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        text = torch.cat(
            [
                model.text_projection(
                    model.text_model(**words(t, return_tensors="pt")).pooler_output
                )
                for t in TEXTS
            ]
        )
    return image, text


def test_the_sum_of_a_clip_model(
    clip: tuple[CLIPModel, CLIPTokenizer, str], tmp_path: Path
) -> None:
    image, text = plain_features(clip)
    model, processor = load_model(clip[2], query_encoder="sum")
    processor.pixels = "released"
    save_checkpoint(str(tmp_path / "sum"), model, processor, {"stage": "train", "epoch": 0})
    for encoder in (
        Encoder(model.eval(), processor, precision="fp32"),
        Encoder.load(tmp_path / "sum", precision="fp32"),
    ):
        images = encoder.encode_images(pictures())
        assert images.shape == (2, 1, FEATURES)
        torch.testing.assert_close(images[:, 0], F.normalize(image, dim=-1))
        queries = encoder.encode_queries(pictures(), TEXTS)
        torch.testing.assert_close(queries, F.normalize(image + text, dim=-1))
        torch.testing.assert_close(encoder.encode_queries(texts=TEXTS), F.normalize(text, dim=-1))


def test_texts_longer_than_clip_has_positions_are_cut(
    clip: tuple[CLIPModel, CLIPTokenizer, str],
) -> None:
    model, processor = load_model(clip[2], query_encoder="sum")
    ids, mask = processor.texts(["a " * 200, "b"])
    assert ids.shape == mask.shape == (2, POSITIONS)
    assert processor.texts(["a b"])[0].shape == (1, 8)
    assert torch.isfinite(model.embed_texts(ids, mask)).all()


def test_released_combiner_weights(
    clip: tuple[CLIPModel, CLIPTokenizer, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = FOLDER / f"{GOLDEN}.pth"
    # As the program saves them: beside other things, in a dictionary.
    state = torch.load(source, weights_only=True)
    torch.save({"epoch": 3, "Combiner": state}, tmp_path / "combiner.pt")
    target = tmp_path / "converted"
    arguments = [str(tmp_path / "combiner.pt"), str(target), "--combiner", clip[2]]
    monkeypatch.setattr("sys.argv", ["convert", *arguments])
    convert()
    assert "converted" in capsys.readouterr().out
    image, text = plain_features(clip)
    encoder = Encoder.load(target, precision="fp32")
    model = encoder.model
    assert isinstance(model, TowersModel)
    assert model.combiner is not None
    for name, value in state.items():
        assert torch.equal(model.combiner.state_dict()[name], value), name
    a = F.relu(
        F.linear(text, state["text_projection_layer.weight"], state["text_projection_layer.bias"])
    )
    c = F.relu(
        F.linear(
            image, state["image_projection_layer.weight"], state["image_projection_layer.bias"]
        )
    )
    both = torch.cat([a, c], dim=1)

    def linear(values: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(values, state[f"{name}.weight"], state[f"{name}.bias"])

    residual = linear(F.relu(linear(both, "combiner_layer")), "output_layer")
    share = torch.sigmoid(linear(F.relu(linear(both, "dynamic_scalar.0")), "dynamic_scalar.3"))
    expected = F.normalize(residual + share * text + (1 - share) * image, dim=-1)
    torch.testing.assert_close(encoder.encode_queries(pictures(), TEXTS), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("other", r"a Combiner of features \d+ wide; those of .* are \d+ wide"),
        ("missing", "no Combiner's weights: combiner_layer.weight is missing"),
        ("short", r"no Combiner's weights: .*state_dict"),
    ],
)
def test_weights_that_are_no_combiners_are_refused(
    change: str,
    message: str,
    clip: tuple[CLIPModel, CLIPTokenizer, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = torch.load(FOLDER / f"{GOLDEN}.pth", weights_only=True)
    if change == "other":
        state = Combiner(FEATURES + 1, 4, 4, 0.0).state_dict()
    if change == "missing":
        del state["combiner_layer.weight"]
    if change == "short":
        del state["output_layer.bias"]
    torch.save(state, tmp_path / "combiner.pt")
    target = tmp_path / "converted"
    monkeypatch.setattr(
        "sys.argv", ["convert", str(tmp_path / "combiner.pt"), str(target), "--combiner", clip[2]]
    )
    with pytest.raises(InputError, match=message):
        convert()
    assert not target.exists()


def test_what_fine_tuning_trains(clip: tuple[CLIPModel, CLIPTokenizer, str]) -> None:
    def trained(query_encoder: Any, **options: Any) -> set[str]:
        model, _ = load_model(clip[2], query_encoder=query_encoder, options=options)
        model.train()
        assert not model.vision_encoder.training
        assert not any(p.requires_grad for p in model.vision_encoder.parameters())
        return {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}

    assert trained("combiner") == {"combiner", "temperature"}
    assert trained("combiner", train_towers=True) == {"combiner", "temperature", "text_encoder"}
    assert trained("sum") == {"temperature", "text_encoder"}
    assert trained("sum", train_towers=False) == {"temperature"}


def test_options_over_weights(clip: tuple[CLIPModel, CLIPTokenizer, str], tmp_path: Path) -> None:
    model, processor = load_model(
        clip[2], query_encoder="combiner", options={"projection": 8, "hidden": 12}, seed=1
    )
    assert isinstance(model, TowersModel)
    assert model.combiner is not None
    assert model.combiner.combiner_layer.weight.shape == (12, 16)
    other, _ = load_model(clip[2], query_encoder="combiner", options={"projection": 8}, seed=2)
    weight = "combiner.text_projection_layer.weight"
    assert not torch.equal(other.state_dict()[weight], model.state_dict()[weight])
    uri = str(tmp_path / "saved")
    save_checkpoint(uri, model, processor, {"stage": "train", "epoch": 0})
    # Of the same encoder, what is not said stays as it was.
    again, _ = load_model(uri, options={"train_towers": True})
    assert again.config.encoder_options == {"projection": 8, "hidden": 12, "train_towers": True}
    assert torch.equal(again.state_dict()[weight], model.state_dict()[weight])
    with pytest.raises(InputError, match=r"model.encoder_options: .* of another size; leave out"):
        load_model(uri, options={"hidden": 13})
    with pytest.raises(InputError, match=r"model.tokenizer: .*, a CLIP, has its own; leave it out"):
        load_model(clip[2], "bert-base-uncased", query_encoder="sum")


def test_a_damaged_clip_is_refused(
    clip: tuple[CLIPModel, CLIPTokenizer, str], tmp_path: Path
) -> None:
    model, words, _ = clip
    state = {n: v for n, v in model.state_dict().items() if n != "text_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    words.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"lacks 1 parameter\(s\) of a CLIP model, first text_proj"
    ):
        load_model(str(tmp_path), query_encoder="combiner")


def test_weights_of_one_query_encoder_under_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = build_model("tiny", learn_tokenizer(TEXTS, 100), 0.1, 3)
    uri = str(tmp_path / "qure")
    save_checkpoint(uri, model, processor, {"stage": "train", "epoch": 0})
    options = {"prompt_weight": 0.2}
    sprc, _ = load_model(uri, query_encoder="sprc", options=options)
    assert isinstance(sprc, SPRCModel)
    assert sprc.options.prompt_weight == 0.2
    assert sprc.prompt_tokens.std() > 0
    for name, value in model.state_dict().items():
        assert torch.equal(sprc.state_dict()[name], value), name
    save_checkpoint(str(tmp_path / "sprc"), sprc, processor, {"stage": "train", "epoch": 0})
    again, _ = load_model(str(tmp_path / "sprc"))
    assert isinstance(again, SPRCModel)
    assert again.options.prompt_weight == 0.2
    assert torch.equal(again.prompt_tokens, sprc.prompt_tokens)
    back, _ = load_model(str(tmp_path / "sprc"), query_encoder="qformer")
    assert not hasattr(back, "prompt_tokens")
    assert "not taken for qformer: prompt_tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("query_encoder", "options", "message"),
    [
        ("combiner", {}, "combiner cannot be made of the weights of .*give those of a CLIP model"),
        (
            "sprc",
            {"prompt": 1},
            r"model.encoder_options.prompt: .*sprc has the options prompt_weight",
        ),
        ("qformer", {"x": 1}, r"model.encoder_options.x: .*qformer has the options none"),
    ],
)
def test_query_encoders_that_cannot_be_are_refused(
    query_encoder: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, processor = build_model("tiny", learn_tokenizer(TEXTS, 100), 0.1, 3)
    save_checkpoint(str(tmp_path / "qure"), model, processor, {"stage": "train", "epoch": 0})
    with pytest.raises(InputError, match=message):
        load_model(str(tmp_path / "qure"), query_encoder=query_encoder, options=options)


def test_a_clip_under_a_q_former_is_refused(clip: tuple[CLIPModel, CLIPTokenizer, str]) -> None:
    with pytest.raises(InputError, match=r"qformer cannot be made of .*give those of a BLIP-2 or"):
        load_model(clip[2], query_encoder="qformer")
