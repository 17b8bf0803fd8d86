"""Global batches of triplets or captioned images, and each worker's part of them.

Everything random is derived from (seed, epoch, query id), so a batch is the same under any number
of workers and after any restart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from qure_core.base.seeds import derive, generator
from qure_core.data.loader import VisionLoader
from qure_core.data.positives import Query, query_of
from qure_core.data.schema import Triplet
from qure_core.data.text import random_fashioniq
from qure_core.model import QuReProcessor


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch.

    inputs: the step's keyword arguments. weight_B: 1 for each sample, or 0 for the filler of a
    worker that got none of a last, short batch. count: samples of the whole global batch. names:
    the samples of this part, by query or image id.
    """

    inputs: dict[str, Tensor]
    weight_B: Tensor
    count: int
    names: tuple[str, ...]

    def pin_memory(self) -> Batch:
        """In memory that a GPU copies from while the program goes on."""
        pinned = {name: value.pin_memory() for name, value in self.inputs.items()}
        return Batch(pinned, self.weight_B.pin_memory(), self.count, self.names)

    def to(self, device: torch.device) -> Batch:
        moved = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        weight_B = self.weight_B.to(device, non_blocking=True)
        return Batch(moved, weight_B, self.count, self.names)


@dataclass(frozen=True)
class Share:
    """Which worker this is, of how many."""

    rank: int = 0
    workers: int = 1

    def parts(self, samples: int) -> list[np.ndarray]:
        """Every worker's samples of a global batch; some are empty if there are too few."""
        return np.array_split(np.arange(samples), self.workers)

    def own(self, samples: int) -> tuple[np.ndarray, float]:
        """This worker's samples and their weight; one, of no weight, in the place of none."""
        part = self.parts(samples)[self.rank]
        return (part, 1.0) if len(part) else (np.arange(1), 0.0)

    def exchange(self, what: str, samples: int) -> dict[str, Tensor]:
        """`exchange` of one row for each sample of a global batch."""
        lengths = [len(part) for part in self.parts(samples)]
        kept = [(worker, row) for worker, length in enumerate(lengths) for row in range(length)]
        return exchange(what, lengths, max(lengths[self.rank], 1), kept)


def exchange(
    what: str, lengths: Sequence[int], own: int, kept: Sequence[tuple[int, int]]
) -> dict[str, Tensor]:
    """How workers bring rows together of which they have different numbers (`steps.gathered`).

    "send_" + what: the rows that this worker sends, as many as any has: its ``own`` and the last
    again. "take_" + what: which of all rows sent make the whole: those ``kept``, by worker and row.
    """
    most = max(1, *lengths)
    return {
        f"send_{what}": torch.arange(most).clamp(max=own - 1),
        f"take_{what}": torch.tensor([worker * most + row for worker, row in kept]),
    }


Negatives = Callable[[Triplet], tuple[str, ...]]
Texts = Callable[[Triplet], str]
Thresholds = Callable[[Triplet], float]


@dataclass(frozen=True)
class TripletBatches:
    """Builds batches of triplets with ``negative_of`` each; every distinct image is loaded once.

    in_batch: give the whole batch's answers to every worker, as an in-batch objective needs.
    text_of: a triplet's text, where it is not always the same. threshold_of: the likeness to its
    target from which an image may fit its query, infinite where that is not known.
    """

    triplets: Sequence[Triplet]
    negative_of: Negatives
    load: VisionLoader
    processor: QuReProcessor
    in_batch: bool = False
    text_of: Texts = attrgetter("text")
    threshold_of: Thresholds | None = None

    def __len__(self) -> int:
        return len(self.triplets)

    def __call__(self, chosen: np.ndarray, share: Share) -> Batch:
        """This worker's part of the global batch of the triplets at ``chosen``."""
        part, weight = share.own(len(chosen))
        own = [self.triplets[chosen[i]] for i in part]
        negatives = [self.negative_of(triplet) for triplet in own]
        references = [triplet.reference_id for triplet in own]
        answers = _answers(own, negatives)
        distinct = sorted({*references, *answers})
        row = {image_id: i for i, image_id in enumerate(distinct)}
        input_ids, mask = self.processor.texts([self.text_of(triplet) for triplet in own])
        inputs = {
            self.load.name: self.load(distinct),
            "reference_B": torch.tensor([row[i] for i in references]),
            "answer_A": torch.tensor([row[i] for i in answers]),
            "input_ids": input_ids,
            "attention_mask": mask,
        }
        if not self.in_batch:
            labels = _labels(own, negatives, answers, weight > 0)
        elif share.workers == 1:
            labels = self._labels_in_batch(own, negatives, answers)
        else:
            labels = self._whole(chosen, share, len(own), answers)
        names = tuple(triplet.query_id for triplet in own)
        weight_B = torch.full((len(own),), weight)
        return Batch(inputs | labels, weight_B, len(chosen), names)

    @cached_property
    def _targets(self) -> dict[Query, set[str]]:
        """Targets of all triplets by query: images known to fit it."""
        targets: dict[Query, set[str]] = {}
        for triplet in self.triplets:
            targets.setdefault(query_of(triplet), set()).add(str(triplet.target_id))
        return targets

    def _labels_in_batch(
        self,
        triplets: Sequence[Triplet],
        negatives: Sequence[tuple[str, ...]],
        answers: Sequence[str],
    ) -> dict[str, Tensor]:
        labels = _labels(triplets, negatives, answers)
        labels["candidate_BA"] = self._candidates(triplets, negatives, answers)
        if self.threshold_of is not None:
            labels["threshold_B"] = torch.tensor([self.threshold_of(t) for t in triplets])
        return labels

    def _candidates(
        self,
        triplets: Sequence[Triplet],
        negatives: Sequence[tuple[str, ...]],
        answers: Sequence[str],
    ) -> Tensor:
        """Which answers may stand as each triplet's negatives (`Outputs.candidate_BA`)."""
        column = {image_id: i for i, image_id in enumerate(answers)}
        of_category: dict[str, list[int]] = {}
        for triplet, own in zip(triplets, negatives, strict=True):
            columns = [column[name] for name in (str(triplet.target_id), *own)]
            of_category.setdefault(triplet.category, []).extend(columns)
        candidate_BA = torch.zeros(len(triplets), len(answers), dtype=torch.bool)
        for row, (triplet, own) in enumerate(zip(triplets, negatives, strict=True)):
            candidate_BA[row, of_category[triplet.category]] = True
            left_out = {triplet.reference_id, *self._targets[query_of(triplet)]}
            left_out.update(triplet.positive_ids)
            candidate_BA[row, [column[name] for name in left_out if name in column]] = False
            candidate_BA[row, [column[name] for name in own]] = True
        return candidate_BA

    def _whole(
        self, chosen: np.ndarray, share: Share, own: int, own_answers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Labels of the whole batch, and how its vectors are brought together."""
        triplets = [self.triplets[i] for i in chosen]
        negatives = [self.negative_of(triplet) for triplet in triplets]
        parts = share.parts(len(chosen))
        answers_of = [
            _answers([triplets[i] for i in part], [negatives[i] for i in part]) for part in parts
        ]
        answers = sorted(set().union(*answers_of))
        place: dict[str, tuple[int, int]] = {}
        for worker, names in enumerate(answers_of):
            for number, name in enumerate(names):
                place.setdefault(name, (worker, number))
        counts = [len(names) for names in answers_of]
        first = int(parts[share.rank][0]) if len(parts[share.rank]) else 0
        return {
            **self._labels_in_batch(triplets, negatives, answers),
            **share.exchange("queries", len(chosen)),
            **exchange("answers", counts, len(own_answers), [place[name] for name in answers]),
            "own_B": torch.arange(first, first + own),
        }


def _answers(triplets: Sequence[Triplet], negatives: Sequence[tuple[str, ...]]) -> list[str]:
    """The distinct targets and negatives, sorted."""
    targets = {str(triplet.target_id) for triplet in triplets}
    return sorted(targets.union(*negatives))


def _labels(
    triplets: Sequence[Triplet],
    negatives: Sequence[tuple[str, ...]],
    answers: Sequence[str],
    valid: bool = True,
) -> dict[str, Tensor]:
    column = {image_id: i for i, image_id in enumerate(answers)}
    return {
        "target_B": torch.tensor([column[str(triplet.target_id)] for triplet in triplets]),
        "negative_BK": torch.tensor([[column[name] for name in own] for own in negatives]),
        "valid_B": torch.full((len(triplets),), valid),
    }


@dataclass(frozen=True)
class CaptionBatches:
    """Builds batches of captioned images (captions by image id) for contrastive pretraining."""

    captions: Mapping[str, str]
    load: VisionLoader
    processor: QuReProcessor

    def __len__(self) -> int:
        return len(self.captions)

    def __call__(self, chosen: np.ndarray, share: Share) -> Batch:
        """This worker's part of the global batch of the images at ``chosen`` of the sorted ids."""
        whole = [self._image_ids[i] for i in chosen]
        part, weight = share.own(len(chosen))
        input_ids, mask = self.processor.texts([self.captions[name] for name in whole])
        same_NN = (input_ids[:, None] == input_ids[None]).all(dim=-1).float()
        own = [whole[i] for i in part]
        inputs = {
            self.load.name: self.load(own),
            "input_ids": input_ids[part],
            "attention_mask": mask[part],
            "same_BN": same_NN[part],
        }
        if share.workers > 1:
            inputs |= share.exchange("pairs", len(chosen))
        return Batch(inputs, torch.full((len(own),), weight), len(chosen), tuple(own))

    @cached_property
    def _image_ids(self) -> list[str]:
        return sorted(self.captions)


def epoch_batches(
    build: TripletBatches | CaptionBatches,
    order: np.ndarray,
    batch_size: int,
    share: Share,
    keep_short: bool = True,
) -> list[Callable[[], Batch]]:
    """An epoch's batches as functions that build them, of samples in ``order``.

    Without ``keep_short`` a short last batch is left out: a contrast over the batch would mean
    something else.
    """
    size = min(batch_size, len(order))
    stop = len(order) if keep_short else len(order) - size + 1
    steps: list[Callable[[], Batch]] = []
    for start in range(0, stop, size):
        chosen = order[start : start + size]

        def step(chosen: np.ndarray = chosen) -> Batch:
            return build(chosen, share)

        steps.append(step)
    return steps


def drawn_text(triplet: Triplet, seed: int, epoch: int) -> str:
    """What an epoch shows of a triplet's captions (`data.text.random_fashioniq`)."""
    draw = generator(seed, "captions", epoch, triplet.query_id).random()
    return random_fashioniq(triplet.captions, draw)


def epoch_order(samples: int, seed: int, epoch: int, stream: str = "order") -> np.ndarray:
    """The order in which an epoch meets its samples."""
    return generator(seed, stream, epoch).permutation(samples)


def step_seed(seed: int, stage: str, epoch: int, step: int, rank: int) -> int:
    """Seed of a step's dropout, so that a resumed run drops what the first would have."""
    return derive(seed, "dropout", stage, epoch, step, rank)
