"""Which negatives a triplet meets in an epoch, drawn from (seed, epoch, query id) alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from qure_core.base.seeds import generator
from qure_core.data.schema import Triplet


def random_negatives(
    triplet: Triplet, corpus: Sequence[str], seed: int, epoch: int, count: int = 1
) -> tuple[str, ...]:
    """The warm-up's negatives: ``count`` different images, uniform over all but the target and
    the other images that are known to answer the query."""
    rng = generator(seed, "warm-up negative", epoch, triplet.query_id)
    # Places in the sorted corpus that are taken; the target is in it exactly once.
    taken = [bisect_left(corpus, str(triplet.target_id))]
    for image in triplet.positive_ids:
        place = bisect_left(corpus, image)
        if place < len(corpus) and corpus[place] == image:
            insort(taken, place)
    drawn = []
    for _ in range(count):
        place = int(rng.integers(len(corpus) - len(taken)))
        for other in taken:
            place += other <= place
        insort(taken, place)
        drawn.append(corpus[place])
    return tuple(drawn)


def mined_negatives(
    query_id: str,
    negatives: np.ndarray,
    seed: int,
    mined_at: int,
    epoch: int,
    count: int = 1,
    weights: np.ndarray | None = None,
) -> tuple[str, ...]:
    """``count`` hard negatives an epoch, without replacement until the set is exhausted, then
    afresh.

    With ``weights`` they are drawn in proportion to them, anew in every epoch, without replacement
    until those that have any weight are exhausted.
    """
    if weights is not None:
        return _weighted(query_id, negatives, weights, seed, epoch, count)
    drawn = []
    for number in range((epoch - mined_at) * count, (epoch - mined_at + 1) * count):
        cycle, place = divmod(number, len(negatives))
        rng = generator(seed, "hard negative", mined_at, query_id, cycle)
        drawn.append(str(negatives[rng.permutation(len(negatives))[place]]))
    return tuple(drawn)


def _weighted(
    query_id: str, negatives: np.ndarray, weights: np.ndarray, seed: int, epoch: int, count: int
) -> tuple[str, ...]:
    rng = generator(seed, "weighted negative", epoch, query_id)
    share = weights / weights.sum()
    some = int(np.count_nonzero(share))
    places: list[int] = []
    while len(places) < count:
        wanted = min(count - len(places), some)
        places += rng.choice(len(share), wanted, replace=False, p=share).tolist()
    return tuple(str(negatives[place]) for place in places)
