"""HP-FashionIQ's set score: the golden model, query and images give the golden mean relevance."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from PIL import Image

from qure_core.data.images import normalise, preprocess_to_bytes
from qure_core.data.text import clean_text
from qure_core.model import load_lavis_checkpoint
from qure_core.model.relevance import relevance_scores

GOLDEN = json.loads((GOLDENS / "metrics.json").read_text())["hpfiq_set_score"]


def test_mean_relevance_of_a_set() -> None:
    arrays = np.load(GOLDENS / "metrics.npz")
    model = load_lavis_checkpoint(
        GOLDENS / "model_tiny.pth", vision_heads=4, qformer_heads=4
    ).eval()
    inputs = np.load(GOLDENS / "model_tiny_inputs.npz")
    config = json.loads((GOLDENS / "model_tiny_config.json").read_text())
    sentences = [clean_text(s) for s in config["inputs"]["sentences_raw"]]
    row = sentences.index(clean_text(GOLDEN["sentence"]))
    images = [
        Image.open(io.BytesIO(arrays[f"hpfiq_set_score__png_{k}"].tobytes())) for k in range(6)
    ]
    pixels = np.stack([preprocess_to_bytes(image, GOLDEN["img_size"]) for image in images])
    with torch.no_grad():
        vision = model.encode_vision(torch.from_numpy(normalise(pixels)))
        query = model.embed_queries(
            vision[:1],
            torch.from_numpy(inputs["input_ids"][row : row + 1]),
            torch.from_numpy(inputs["attention_mask"][row : row + 1]),
        )
        score = relevance_scores(query, model.embed_images(vision[1:])).mean().item()
    assert score == pytest.approx(GOLDEN["mean_score"], rel=1e-5)
