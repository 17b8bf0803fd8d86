"""Where an image's vectors looked, against transformers' own account of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qure_core.data.images import preprocess_to_bytes, seen_box
from qure_core.embeddings.encoder import Encoder


def test_maps_are_what_transformers_returns(finished_run: Path) -> None:
    encoder = Encoder.load(finished_run / "checkpoints/train-0003", "cpu")
    model = encoder.model
    assert hasattr(model, "qformer")
    vision_BPW = encoder.features(torch.randn(3, 3, *[encoder.processor.image_size] * 2)).float()
    with torch.inference_mode():
        maps_BTP = model.attention_maps(vision_BPW)
        model.qformer.set_attn_implementation("eager")
        theirs = model.qformer(
            query_embeds=model.query_tokens.expand(3, -1, -1),
            encoder_hidden_states=model.ln_vision(vision_BPW),
            output_attentions=True,
        )
    expected = [weights for weights in theirs.cross_attentions if weights is not None][-1]
    torch.testing.assert_close(maps_BTP, expected.mean(dim=1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps_BTP.sum(dim=-1), torch.ones(maps_BTP.shape[:2]))


@given(st.integers(20, 300), st.integers(20, 300))
def test_the_box_is_what_the_model_sees(width: int, height: int) -> None:
    """Pixels that tell where they are, found again in the model's square."""
    across = np.linspace(1, 255, width, dtype=np.float32)[None, :].repeat(height, 0)
    down = np.linspace(1, 255, height, dtype=np.float32)[:, None].repeat(width, 1)
    flat = np.stack([across, down, np.full_like(down, 255)], axis=-1).round().astype(np.uint8)
    seen = preprocess_to_bytes(Image.fromarray(flat), 64).astype(np.float32)
    left, top, wide, high = seen_box(width, height)
    for row, column in ((8, 32), (32, 8), (32, 32), (55, 32), (32, 55)):
        x = left + wide * (column + 0.5) / 64
        y = top + high * (row + 0.5) / 64
        if not (0.05 < x < 0.95 and 0.05 < y < 0.95):
            continue  # at the edge, or padded
        assert seen[2, row, column] > 250
        assert abs(seen[0, row, column] / 255 - x) < 0.03 + 1 / width
        assert abs(seen[1, row, column] / 255 - y) < 0.03 + 1 / height
