"""Samples of hard negatives: uniform, different for every query and round, and by name alone."""

from __future__ import annotations

import numpy as np
import torch

from qure_core.mining.sampling import HIGHEST, image_words, lowest, priorities, query_words

QUERIES, IMAGES, WANTED = 3000, 200, 20


def samples(epoch: int, seed: int = 7) -> np.ndarray:
    """Which images each query's sample holds: bool [Q, M]."""
    words = query_words([f"q{i}" for i in range(QUERIES)], seed, epoch)
    images = image_words([f"i{i}" for i in range(IMAGES)])
    held = np.zeros((QUERIES, IMAGES), bool)
    for q in range(QUERIES):
        held[q, lowest(priorities(words[q], images), WANTED).numpy()] = True
    return held


def test_samples_are_uniform_and_independent() -> None:
    held = samples(epoch=3)
    assert (held.sum(axis=1) == WANTED).all()
    share = WANTED / IMAGES
    deviation = np.sqrt(QUERIES * share * (1 - share))
    assert np.abs(held.sum(axis=0) - QUERIES * share).max() < 4.5 * deviation
    # Two queries share as many images as two independent draws would: 2 of 20.
    shared = (held[::2] & held[1::2]).sum(axis=1)
    assert abs(shared.mean() - WANTED * share) < 0.2
    # Pairs of images are drawn together as often as independent ones.
    together = (held.T.astype(int) @ held)[np.triu_indices(IMAGES, 1)]
    expected = QUERIES * share * (WANTED - 1) / (IMAGES - 1)
    assert np.abs(together - expected).max() < 7 * np.sqrt(expected)


def test_rounds_and_seeds_draw_anew() -> None:
    first = samples(epoch=3)
    assert (first == samples(epoch=3)).all()
    for other in (samples(epoch=4), samples(epoch=3, seed=8)):
        assert abs((first & other).sum(axis=1).mean() - WANTED**2 / IMAGES) < 0.2


def test_priorities_span_their_range() -> None:
    words = query_words(["a"], 0, 0)[:, None]
    values = priorities(words, image_words([str(i) for i in range(20_000)])).double() / HIGHEST
    assert values.min() >= 0
    assert torch.allclose(
        values.quantile(torch.tensor([0.1, 0.5, 0.9]).double()),
        torch.tensor([0.1, 0.5, 0.9]).double(),
        atol=0.02,
    )
