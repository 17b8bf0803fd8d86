"""Global batches of triplets or captioned images, and each worker's part of them.

Everything random is derived from (seed, epoch, query id), so a batch is the same under any number
of workers and after any restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qure_core.base.seeds import derive, generator
from qure_core.data.images import load_image
from qure_core.data.schema import Triplet
from qure_core.model import QuReProcessor


def random_negative(triplet: Triplet, corpus: Sequence[str], seed: int, epoch: int) -> str:
    """The warm-up's negative: uniform over the corpus except the target."""
    rng = generator(seed, "warm-up negative", epoch, triplet.query_id)
    choice = int(rng.integers(len(corpus) - 1))
    # Skip over the target's place in the sorted corpus, which holds it exactly once.
    return corpus[choice] if corpus[choice] < str(triplet.target_id) else corpus[choice + 1]


def mined_negative(
    query_id: str, negatives: np.ndarray, seed: int, mined_at: int, epoch: int
) -> str:
    """One hard negative an epoch, without replacement until the set is exhausted, then afresh."""
    cycle, place = divmod(epoch - mined_at, len(negatives))
    rng = generator(seed, "hard negative", mined_at, query_id, cycle)
    return str(negatives[rng.permutation(len(negatives))[place]])


class VisionLoader(Protocol):
    """Gives one model input, called ``name``, of images by id."""

    name: str

    def __call__(self, image_ids: Sequence[str]) -> Tensor: ...


@dataclass
class ImageLoader:
    """Decodes and preprocesses images by id, in threads, keeping the latest in memory.

    ``cache_mb`` bounds the preprocessed pixels that are kept, MB.
    """

    images: dict[str, str]
    processor: QuReProcessor
    max_pixels: int
    threads: int
    cache_mb: int

    name = "pixel_values"

    def __post_init__(self) -> None:
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        kept = self.cache_mb * 2**20 // (3 * self.processor.image_size**2)
        self._cached = lru_cache(maxsize=kept)(self._one)

    def _one(self, image_id: str) -> np.ndarray:
        return self.processor.image_bytes(load_image(self.images[image_id], self.max_pixels))

    def __call__(self, image_ids: Sequence[str]) -> Tensor:
        """Model input of the named images: float32 [B, 3, S, S]."""
        return self.processor.pixel_values(np.stack(list(self.pool.map(self._cached, image_ids))))


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch.

    inputs: the model's keyword arguments. weight_B: 1 for each sample, or 0 for the filler of a
    worker that got none of a last, short batch. count: samples of the whole global batch.
    """

    inputs: dict[str, Tensor]
    weight_B: Tensor
    count: int

    def pin_memory(self) -> Batch:
        """In memory that a GPU copies from while the program goes on."""
        pinned = {name: value.pin_memory() for name, value in self.inputs.items()}
        return Batch(pinned, self.weight_B.pin_memory(), self.count)

    def to(self, device: torch.device) -> Batch:
        moved = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return Batch(moved, self.weight_B.to(device, non_blocking=True), self.count)


def worker_part(batch: np.ndarray, rank: int, workers: int) -> tuple[np.ndarray, float]:
    """This worker's samples of a global batch and their weight; never empty."""
    part = np.array_split(batch, workers)[rank]
    return (part, 1.0) if len(part) else (batch[:1], 0.0)


def triplet_batch(
    triplets: Sequence[Triplet],
    negatives: Sequence[str],
    load: VisionLoader,
    processor: QuReProcessor,
    weight: float,
    count: int,
) -> Batch:
    """Model inputs of these triplets; each distinct image is loaded once."""
    references = [t.reference_id for t in triplets]
    targets = [str(t.target_id) for t in triplets]
    distinct = sorted({*references, *targets, *negatives})
    answers = sorted({*targets, *negatives})
    row = {image_id: i for i, image_id in enumerate(distinct)}
    answer = {image_id: i for i, image_id in enumerate(answers)}
    input_ids, mask = processor.texts([t.text for t in triplets])
    inputs = {
        load.name: load(distinct),
        "reference_B": torch.tensor([row[i] for i in references]),
        "answer_A": torch.tensor([row[i] for i in answers]),
        "target_B": torch.tensor([answer[i] for i in targets]),
        "negative_B": torch.tensor([answer[i] for i in negatives]),
        "input_ids": input_ids,
        "attention_mask": mask,
    }
    return Batch(inputs, torch.full((len(triplets),), weight), count)


def triplet_batches(
    triplets: Sequence[Triplet],
    negative_of: Callable[[Triplet], str],
    load: VisionLoader,
    processor: QuReProcessor,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int,
    workers: int,
) -> list[Callable[[], Batch]]:
    """An epoch's batches as functions that build them; the last, short batch is kept."""
    order = generator(seed, "order", epoch).permutation(len(triplets))
    steps: list[Callable[[], Batch]] = []
    for start in range(0, len(order), batch_size):
        whole = order[start : start + batch_size]
        part, weight = worker_part(whole, rank, workers)

        def build(
            part: np.ndarray = part, weight: float = weight, count: int = len(whole)
        ) -> Batch:
            chosen = [triplets[i] for i in part]
            negatives = [negative_of(triplet) for triplet in chosen]
            return triplet_batch(chosen, negatives, load, processor, weight, count)

        steps.append(build)
    return steps


def caption_batches(
    captions: dict[str, str],
    load: VisionLoader,
    processor: QuReProcessor,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int,
    workers: int,
) -> list[Callable[[], Batch]]:
    """An epoch's image-caption batches for contrastive pretraining; a short last one is dropped.

    The contrast is over the global batch, whose size would otherwise change its meaning.
    """
    image_ids = sorted(captions)
    order = generator(seed, "caption order", epoch).permutation(len(image_ids))
    size = min(batch_size, len(order))
    steps: list[Callable[[], Batch]] = []
    for start in range(0, len(order) - size + 1, size):
        part = np.array_split(order[start : start + size], workers)[rank]

        def build(part: np.ndarray = part) -> Batch:
            chosen = [image_ids[i] for i in part]
            input_ids, mask = processor.texts([captions[i] for i in chosen])
            inputs = {
                load.name: load(chosen),
                "input_ids": input_ids,
                "attention_mask": mask,
            }
            return Batch(inputs, torch.ones(len(chosen)), size)

        steps.append(build)
    return steps


def prefetched(steps: Sequence[Callable[[], Any]], depth: int = 2) -> Iterator[Any]:
    """Results of ``steps`` in order, built by a background thread ``depth`` ahead."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        waiting: list[Future[Any]] = [pool.submit(step) for step in steps[:depth]]
        try:
            for number in range(len(steps)):
                result = waiting.pop(0).result()
                if number + depth < len(steps):
                    waiting.append(pool.submit(steps[number + depth]))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def step_seed(seed: int, stage: str, epoch: int, step: int, rank: int) -> int:
    """Seed of a step's dropout, so that a resumed run drops what the first would have."""
    return derive(seed, "dropout", stage, epoch, step, rank)
