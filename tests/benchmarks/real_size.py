"""The real-size ViT-L model on a CPU: time and memory of preprocess, embed and score.

    python tests/benchmarks/real_size.py

Weights are random; the structure is the paper's. Memory is set against that of the weights alone.
"""

from __future__ import annotations

import resource
import time

import numpy as np
import torch
from PIL import Image

from qure_core.model import QuReModel, QuReProcessor, learn_tokenizer, preset
from qure_core.model.relevance import relevance_scores

IMAGES = 8


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    torch.manual_seed(0)
    model = QuReModel(preset("blip2-vit-l")).eval()
    weights = sum(p.numel() for p in model.parameters())
    texts = ["is red and has longer sleeves"] * IMAGES
    processor = QuReProcessor(learn_tokenizer(texts, 100), 224)
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (480, 320, 3), np.uint8)) for _ in range(IMAGES)
    ]
    print(f"blip2-vit-l: {weights:,} parameters, {weights * 4 / 2**30:.2f} GB of weights")
    with torch.inference_mode():
        marks = [time.monotonic()]
        pixels = processor.images(pictures)
        marks.append(time.monotonic())
        vision = model.encode_vision(pixels)
        marks.append(time.monotonic())
        images = model.embed_images(vision)
        queries = model.embed_queries(vision, *processor.texts(texts))
        marks.append(time.monotonic())
        scores = relevance_scores(queries, images)
    assert vision.shape == (IMAGES, 257, 1024)
    assert images.shape == (IMAGES, 32, 256)
    assert torch.isfinite(scores).all()
    for name, start, end in zip(
        ("preprocess", "encode vision", "Q-Former, image and query"), marks, marks[1:], strict=False
    ):
        print(f"{name:<28} {(end - start) / IMAGES * 1000:8.1f} ms an image")
    ratio = peak_gb() / (weights * 4 / 2**30)
    threads = torch.get_num_threads()
    print(f"peak memory {peak_gb():.2f} GB, {ratio:.2f} x the weights; {threads} threads")


if __name__ == "__main__":
    main()
