"""The model's structure, its saving and loading, and what foreign files are refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from qure_core.base.errors import InputError
from qure_core.model import (
    QuReModel,
    QuReProcessor,
    build_model,
    learn_tokenizer,
    load_lavis_checkpoint,
    load_model,
    preset,
)
from qure_core.model.pretrained import fill_qformer, fill_vision_encoder
from qure_core.model.relevance import relevance_scores

TEXTS = ["is red and longer", "a striped dress with long sleeves", "is shorter and blue"]


@pytest.fixture(scope="module")
def tiny() -> tuple[QuReModel, QuReProcessor]:
    model, processor = build_model("tiny", learn_tokenizer(TEXTS, 100), 0.1, seed=3)
    return model.eval(), processor


def outputs(model: QuReModel, processor: QuReProcessor) -> list[torch.Tensor]:
    size = processor.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids, mask = processor.texts(TEXTS[:2])
    with torch.no_grad():
        vision = model.eval().encode_vision(pixels)
        queries = model.embed_queries(vision, ids, mask)
        images = model.embed_images(vision)
        return [
            vision,
            queries,
            images,
            model.embed_texts(ids, mask),
            relevance_scores(queries, images),
        ]


def test_shapes_and_norms(tiny: tuple[QuReModel, QuReProcessor]) -> None:
    vision, queries, images, texts, scores = outputs(*tiny)
    assert vision.shape == (2, 17, 96)
    assert queries.shape == texts.shape == (2, 64)
    assert images.shape == (2, 8, 64)
    for value in (queries, images, texts):
        torch.testing.assert_close(value.norm(dim=-1), torch.ones(value.shape[:-1]))
    expected = torch.stack([(images[m] @ queries[q]).max() for q in range(2) for m in range(2)])
    torch.testing.assert_close(scores.flatten(), expected)
    assert tiny[0].temperature.item() == pytest.approx(0.07)
    count = sum(p.numel() for p in tiny[0].parameters())
    assert 0.8e6 < count < 1.5e6


def test_relevance_scores_against_brute_force() -> None:
    query, image = torch.randn(5, 16), torch.randn(7, 3, 16)
    brute = torch.einsum("qd,mtd->qmt", query, image).amax(dim=-1)
    torch.testing.assert_close(relevance_scores(query, image), brute)


@pytest.mark.parametrize("vision_type", ["clip", "eva"])
def test_save_and_load_give_identical_outputs(vision_type: str, tmp_path: Path) -> None:
    model, processor = build_model("tiny", learn_tokenizer(TEXTS, 100), 0.1, seed=3)
    if vision_type == "eva":
        config = preset("tiny", vocabulary_size=len(processor.tokenizer))
        config.vision_type = "eva"
        config.vision = {**config.vision, "hidden_act": "gelu", "qkv_bias": True}
        model = QuReModel(config)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor_again = load_model(str(tmp_path))
    for before, after in zip(
        outputs(model, processor), outputs(again, processor_again), strict=True
    ):
        assert torch.equal(before, after)
    assert again.vision_is_frozen


def test_frozen_encoder_stays_frozen_and_in_eval_mode(
    tmp_path: Path, tiny: tuple[QuReModel, QuReProcessor]
) -> None:
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for candidate in (model, QuReModel.from_pretrained(tmp_path)):
        candidate.train()
        assert candidate.vision_is_frozen
        assert not candidate.vision_encoder.training
        assert candidate.qformer.training
        assert all(
            p.requires_grad
            for name, p in candidate.named_parameters()
            if not name.startswith("vision_encoder.")
        )
        candidate.eval()


def test_same_seed_gives_the_same_weights() -> None:
    tokenizer = learn_tokenizer(TEXTS, 100)
    a, b, c = (build_model("tiny", tokenizer, 0.1, seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["query_tokens"], c["query_tokens"])


def test_texts_are_cleaned_padded_and_cut(tiny: tuple[QuReModel, QuReProcessor]) -> None:
    processor = tiny[1]
    ids, mask = processor.texts(["Is RED!", "is red " * 60])
    assert ids.shape == (2, 32)
    tokens = processor.tokenizer.convert_ids_to_tokens(ids[0][mask[0].bool()].tolist())
    assert tokens == ["[CLS]", "is", "red", "[SEP]"]
    assert ids[1, -1] == processor.tokenizer.sep_token_id


def test_real_size_vit_l_has_the_papers_structure() -> None:
    with torch.device("meta"):
        model = QuReModel(preset("blip2-vit-l"))
    parameters = {name: p.numel() for name, p in model.named_parameters()}

    def total(prefix: str) -> int:
        return sum(count for name, count in parameters.items() if name.startswith(prefix))

    block = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    embeddings = 1024 + 3 * 14 * 14 * 1024 + 257 * 1024
    assert total("vision_encoder.") == embeddings + 2 * 1024 + 23 * block
    assert len(model.vision_encoder.encoder.layers) == 23
    hidden, inner = 768, 3072
    attention = 4 * (hidden * hidden + hidden) + 2 * hidden
    cross = 2 * (hidden * hidden + hidden) + 2 * (1024 * hidden + hidden) + 2 * hidden
    feed_forward = hidden * inner + inner + inner * hidden + hidden + 2 * hidden
    assert total("qformer.") == 12 * (attention + 2 * feed_forward) + 6 * cross + 2 * hidden
    assert total("text_embeddings.") == (30_523 + 512) * hidden
    assert model.query_tokens.shape == (1, 32, 768)
    assert total("vision_proj.") == total("text_proj.") == 768 * 256 + 256
    assert parameters["temperature"] == 1


def test_hugging_face_blip2_directory(tmp_path: Path) -> None:
    config = Blip2Config(
        vision_config={
            "hidden_size": 40,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        qformer_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 120,
            "max_position_embeddings": 64,
            "encoder_hidden_size": 40,
            "use_qformer_text_input": True,
        },
        num_query_tokens=4,
        image_text_hidden_size=32,
    )
    donor = Blip2ForImageTextRetrieval(config).eval()
    torch.nn.init.normal_(donor.query_tokens)
    donor.save_pretrained(tmp_path)
    learn_tokenizer(TEXTS, 100).save_pretrained(tmp_path)
    model, processor = load_model(str(tmp_path), dropout=0.0)
    assert isinstance(processor.tokenizer, BertTokenizer)
    pixels = torch.randn(2, 3, 28, 28)
    ids, mask = processor.texts(TEXTS[:2])
    with torch.no_grad():
        theirs = donor(
            pixel_values=pixels,
            input_ids=ids,
            attention_mask=mask,
            use_image_text_matching_head=False,
        )
        image = model.eval().embed_images(model.encode_vision(pixels))
        text = model.embed_texts(ids, mask)
    # Their ln_vision uses the encoder's epsilon (1e-6), the released program 1e-5.
    torch.testing.assert_close(image, theirs.image_embeds, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        text,
        theirs.text_embeds[:, 0] if theirs.text_embeds.dim() == 3 else theirs.text_embeds,
        rtol=1e-4,
        atol=1e-5,
    )


def test_other_models_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.pretrained: cannot load 'no/such-model'"):
        load_model("no/such-model")
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=8,
            num_attention_heads=2,
            num_hidden_layers=1,
            intermediate_size=8,
            image_size=8,
            patch_size=4,
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="a QuRe, BLIP-2 image-text-retrieval or CLIP model is needed"
    ):
        load_model(str(tmp_path))


GOLDEN = GOLDENS / "model_tiny.pth"


def load_golden(path: Path) -> QuReModel:
    return load_lavis_checkpoint(path, vision_heads=4, qformer_heads=4)


def test_wrapped_and_partial_pretraining_files_load(tmp_path: Path) -> None:
    state = torch.load(GOLDEN, weights_only=True)
    del state["temp"], state["itm_head.weight"]
    torch.save({"model": state}, tmp_path / "wrapped.pth")
    model = load_golden(tmp_path / "wrapped.pth")
    assert model.temperature.item() == pytest.approx(0.07)
    torch.testing.assert_close(model.query_tokens, state["query_tokens"], check_stride=False)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    with pytest.raises(InputError, match="no such file"):
        load_golden(file)
    file.write_bytes(GOLDEN.read_bytes()[:100_000])
    with pytest.raises(InputError, match="not a readable PyTorch file"):
        load_golden(file)
    state = torch.load(GOLDEN, weights_only=True)

    def refused(match: str, **changes: torch.Tensor | None) -> None:
        changed = {k: v for k, v in (state | changes).items() if v is not None}
        torch.save(changed, file)
        with pytest.raises(InputError, match=match):
            load_golden(file)

    refused(r"1 key\(s\) are not of a BLIP-2 or QuRe checkpoint: bogus", bogus=torch.zeros(1))
    refused("vision_proj.bias: missing", **{"vision_proj.bias": None})
    refused(
        r"ln_vision.weight: shape \[3\], expected \[64\]", **{"ln_vision.weight": torch.zeros(3)}
    )
    refused("'query_tokens' is missing", query_tokens=None)
    torch.save([1, 2], file)
    with pytest.raises(InputError, match="not a state dict of tensors"):
        load_golden(file)


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/qure-was-attacked",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    marker = Path("/tmp/qure-was-attacked")
    marker.unlink(missing_ok=True)
    torch.save({"x": _Attack()}, tmp_path / "zip.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"x": _Attack()}))
    for name in ("zip.pth", "raw.pth"):
        with pytest.raises(InputError, match="could run code"):
            load_golden(tmp_path / name)
    assert not marker.exists()


def clip_directory(path: Path, layers: int = 4) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=layers,
        intermediate_size=256,
        image_size=56,
        patch_size=14,
    )
    donor = CLIPVisionModel(config).eval()
    donor.save_pretrained(path)
    return donor


def test_encoder_filled_from_a_clip_directory(tmp_path: Path) -> None:
    donor = clip_directory(tmp_path / "clip")
    model = load_golden(GOLDEN).eval()  # three layers, of the donor's four
    fill_vision_encoder(model, str(tmp_path / "clip"))
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        states = donor(pixel_values=pixels, output_hidden_states=True).hidden_states
        assert torch.equal(model.encode_vision(pixels), states[3])
    clip_directory(tmp_path / "small", layers=2)
    with pytest.raises(InputError, match="it has only 2 layers"):
        fill_vision_encoder(model, str(tmp_path / "small"))
    with pytest.raises(InputError, match="--clip: cannot load"):
        fill_vision_encoder(model, str(tmp_path / "nowhere"))


def test_qformer_filled_from_a_blip2_directory(tmp_path: Path) -> None:
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = Blip2Config(
        vision_config={**vision, "num_attention_heads": 4, "image_size": 28, "patch_size": 14},
        qformer_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "vocab_size": 200,
            "max_position_embeddings": 64,
            "encoder_hidden_size": 64,
            "use_qformer_text_input": True,
        },
        num_query_tokens=8,
        image_text_hidden_size=32,
    )
    donor = Blip2ForImageTextRetrieval(config)
    donor.save_pretrained(tmp_path)
    model = load_golden(GOLDEN)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fill_qformer(model, str(tmp_path))
    for name, value in donor.qformer.state_dict().items():
        assert torch.equal(model.qformer.state_dict()[name], value), name
    assert torch.equal(model.vision_proj.weight, donor.vision_projection.weight)
    for name, value in model.state_dict().items():
        if name.startswith(("vision_encoder.", "ln_vision.", "temperature")):
            assert torch.equal(value, before[name]), name


def test_a_learned_vocabulary_is_the_same_every_time() -> None:
    """Its library numbers pieces by a randomly seeded table, which differs within a process too."""
    texts = [f"{a} {b} {c}ish" for a in ("red", "striped", "Élan") for b in "xyz" for c in TEXTS]
    vocabularies = [learn_tokenizer(texts, 60).get_vocab() for _ in range(8)]
    assert all(other == vocabularies[0] for other in vocabularies)
    assert learn_tokenizer(texts[::-1], 60).get_vocab() == vocabularies[0]
    assert len(vocabularies[0]) == 61
    assert any(piece.startswith("##") and len(piece) > 3 for piece in vocabularies[0])


@pytest.mark.job
@pytest.mark.parametrize("name", ["model_tiny.pth", "model_eva_tiny.pth"])
def test_convert_writes_what_from_pretrained_reads(name: str, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    learn_tokenizer(TEXTS, 100).save_pretrained(tokenizer)
    command = [sys.executable, "-m", "qure_core.model.convert", str(GOLDENS / name)]
    command += [str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    command += ["--vision-heads", "4", "--qformer-heads", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    source = load_lavis_checkpoint(GOLDENS / name, vision_heads=4, qformer_heads=4)
    model, processor = load_model(str(tmp_path / "out"))
    for before, after in zip(outputs(source, processor), outputs(model, processor), strict=True):
        assert torch.equal(before, after)
    command[3:5] = [str(tmp_path / "missing.pth"), str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "missing.pth: no such file" in done.stderr
    assert "Traceback" not in done.stderr
