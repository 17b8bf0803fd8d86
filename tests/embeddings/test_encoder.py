"""The encoder as people use it: against the model one image at a time, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qure_core import Encoder
from qure_core.base.errors import InputError
from qure_core.data.images import load_image
from qure_core.embeddings.encoder import _CHUNK
from qure_core.model import build_model, encode_frozen, learn_tokenizer
from qure_core.model.checkpoints import save_checkpoint

TEXTS = ["the same in red", "longer, with no sleeves and a belt", "a blue coat"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = build_model("tiny", learn_tokenizer(TEXTS, 80), 0.1, seed=3)
    place = tmp_path_factory.mktemp("encoder") / "checkpoint"
    save_checkpoint(str(place), model, processor, {"stage": "train", "epoch": 0})
    return place


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Encoder:
    return Encoder.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    files = []
    for number in range(5):
        size = (40 + 7 * number, 70 - 5 * number, 3)
        files.append(folder / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(files[-1])
    return files


@torch.inference_mode()
def alone(encoder: Encoder, picture: Path, text: str | None) -> torch.Tensor:
    """The model's embedding of one image, or of it with a text."""
    pixels = encoder.processor.images([load_image(str(picture), 10**6, "released")])
    vision = encode_frozen(encoder.model.vision_encoder, pixels, "fp16")
    if text is None:
        return encoder.model.embed_images(vision)[0]
    return encoder.model.embed_queries(vision, *encoder.processor.texts([text]))[0]


def test_images_as_paths_or_pictures(encoder: Encoder, pictures: list[Path]) -> None:
    config = encoder.model.config
    vectors = encoder.encode_images(pictures, batch_size=2)
    assert vectors.shape == (5, config.query_tokens, config.embed_dim)
    assert vectors.dtype == torch.float32
    for picture, vector in zip(pictures, vectors, strict=True):
        torch.testing.assert_close(vector, alone(encoder, picture, None))
    mixed = [Image.open(pictures[0]), str(pictures[1]), *pictures[2:]]
    assert torch.equal(encoder.encode_images(mixed, batch_size=2), vectors)
    assert encoder.encode_images([]).shape == (0, *vectors.shape[1:])


def test_queries_of_images_and_texts(encoder: Encoder, pictures: list[Path]) -> None:
    both = encoder.encode_queries(pictures[:3], TEXTS, batch_size=2)
    empty = encoder.encode_queries(pictures[:3])
    for row, picture in enumerate(pictures[:3]):
        torch.testing.assert_close(both[row], alone(encoder, picture, TEXTS[row]))
        torch.testing.assert_close(empty[row], alone(encoder, picture, ""))
    with torch.inference_mode():
        texts = encoder.model.embed_texts(*encoder.processor.texts(TEXTS))
    torch.testing.assert_close(encoder.encode_queries(texts=TEXTS, batch_size=2), texts)
    for queries in (both, empty, texts):
        torch.testing.assert_close(queries.norm(dim=1), torch.ones(3))
    with pytest.raises(InputError, match="2 images and 3 texts; give one text for each image"):
        encoder.encode_queries(pictures[:2], TEXTS)
    with pytest.raises(InputError, match="give images, texts, or both"):
        encoder.encode_queries()


def test_scores_and_the_best(encoder: Encoder) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, width = encoder.model.config.query_tokens, encoder.model.config.embed_dim
    images = torch.randn(_CHUNK + 70, tokens, width, generator=generator)
    images[_CHUNK + 5] = images[3]  # of equal scores the earlier comes first
    queries = torch.cat([torch.randn(3, width, generator=generator), images[3, :1]])
    scores = encoder.score(queries, images)
    by_hand = torch.stack([(images @ query).amax(dim=1) for query in queries])
    torch.testing.assert_close(scores, by_hand)
    best, places = encoder.top_k(queries, images, k=7)
    order = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(best, order.values[:, :7])
    assert torch.equal(places, order.indices[:, :7])
    assert places[3, :2].tolist() == [3, _CHUNK + 5]
    few, _ = encoder.top_k(queries, images[:4], k=10)
    assert few.shape == (4, 4)
    assert encoder.score(queries, images[:0]).shape == (4, 0)
    with pytest.raises(InputError, match=r"are not embeddings \[Q, D\] and \[M, T, D\]"):
        encoder.score(images[:2], images)


def test_what_cannot_be_read_is_named(encoder: Encoder, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"broken\.png: cannot be decoded"):
        encoder.encode_images([broken])
    with pytest.raises(InputError, match=r"none\.png: image file is missing"):
        encoder.encode_images([tmp_path / "none.png"])
    with pytest.raises(InputError, match="cannot load"):
        Encoder.load(tmp_path)


def test_a_bar_is_shown_when_asked_for(
    encoder: Encoder, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    encoder.encode_images(pictures)  # not on a terminal
    assert capsys.readouterr().err == ""
    encoder.encode_images(pictures, show_progress=True)
    assert "5/5" in capsys.readouterr().err


def test_it_needs_no_ray(checkpoint: Path, pictures: list[Path]) -> None:
    code = (
        "import sys; from qure_core import Encoder\n"
        f"print(Encoder.load({str(checkpoint)!r}).encode_images([{str(pictures[0])!r}]).shape)\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'ray'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["torch.Size([1, 8, 64])", "[]"]
