"""The steep-drop rule against the released program's sets and a brute-force oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st

from qure_core.mining import STATUSES, SteepDrops, steep_drop_negatives
from qure_core.mining.rules.steep_drops import _FIRST_LOOK


def cases(name: str) -> list[str]:
    return sorted({key.split("__")[0] for key in np.load(GOLDENS / name).files})


def pools(golden: dict[str, np.ndarray], fashioniq: bool) -> list[tuple[np.ndarray, slice]]:
    """(queries, columns) of each corpus in a golden case."""
    queries, images = golden["scores"].shape
    if not fashioniq:
        return [(np.arange(queries), slice(0, images))]
    return [
        (np.flatnonzero(golden["dress_type"] == category), slice(first, first + size))
        for category, first, size in zip(
            golden["category_order"], golden["pool_first_column"], golden["pool_size"], strict=True
        )
        if (golden["dress_type"] == category).any()
    ]


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in ("mining_fashioniq.npz", "mining_cirr.npz") for case in cases(name)],
)
def test_golden_sets(name: str, case: str) -> None:
    archive = np.load(GOLDENS / name)
    golden = {k.split("__")[1]: archive[k] for k in archive.files if k.split("__")[0] == case}
    fashioniq = "fashioniq" in name
    names = golden["target_id"] if fashioniq else np.arange(golden["scores"].shape[1])
    compared = different = 0
    for queries, columns in pools(golden, fashioniq):
        pool = names[columns]
        targets = golden["target_id"][queries]
        first = [int(np.flatnonzero(pool == target)[0]) for target in targets]
        if len(pool) < 2:
            continue
        scores = torch.from_numpy(golden["scores"][queries][:, columns])
        drops = steep_drop_negatives(scores, torch.tensor(first))
        for row, query in enumerate(queries):
            if golden["tie_sensitive"][query]:
                continue
            compared += 1
            status = STATUSES[int(drops.status_Q[row])]
            if golden["iso_status"][query] != 0:
                assert status in ("below_target", "corpus")
                assert drops.start_Q[row] < drops.stop_Q[row]
                continue
            assert status == "steep"
            expected = golden["iso_set_ids"][query]
            chosen = set(pool[drops.negatives(row)].tolist()) - {int(targets[row])}
            different += chosen != set(expected[expected >= 0].tolist())
            if not (golden["has_score_ties"][query] or golden["has_diff_ties"][query]):
                assert drops.target_rank_Q[row] == golden["target_rank"][query]
                assert drops.upper_Q[row] == golden["iso_start"][query]
                assert drops.lower_Q[row] == golden["iso_end"][query]
    print(f"{name} {case}: {different} of {compared} sets differ")
    assert different == 0
    assert compared or bool(golden["tie_sensitive"].all())


def oracle(
    scores: list[float], target: int, reference: int
) -> tuple[str, list[int], tuple[int, int]]:
    """The rule in plain Python: status, negatives best first, ranks above both drops."""
    kept = [i for i in range(len(scores)) if i == target or i != reference]
    ranking = sorted(kept, key=lambda i: (-np.float32(scores[i]), i))
    place = ranking.index(target)
    below = ranking[place + 1 :]
    if not below:
        return "corpus", ranking[:-1], (-1, -1)
    values = [np.float32(scores[i]) for i in below]
    gaps = [values[i] - values[i + 1] for i in range(len(below) - 1)]
    steepest = sorted(range(len(gaps)), key=lambda i: (-gaps[i], i))
    for a, b in itertools.pairwise(steepest):
        if abs(a - b) > 1:
            first, last = min(a, b), max(a, b)
            ranks = (place + 1 + first, place + 1 + last)
            return "steep", below[first + 1 : last + 1], ranks
    return "below_target", below, (-1, -1)


def check(drops: SteepDrops, query: int, scores: list[float], target: int, reference: int) -> None:
    status, negatives, ranks = oracle(scores, target, reference)
    assert STATUSES[int(drops.status_Q[query])] == status
    assert drops.negatives(query).tolist() == negatives
    assert (int(drops.upper_Q[query]), int(drops.lower_Q[query])) == ranks


SCORES = st.one_of(
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, -0.0, 0.5, 0.25, 1e-40, -1e-40]),  # ties and denormals
    st.integers(-5, 5).map(lambda i: i / 8),  # equal gaps
)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_against_the_oracle(data: st.DataObject) -> None:
    images = data.draw(st.integers(3, 90))
    rows = data.draw(
        st.lists(st.lists(SCORES, min_size=images, max_size=images), min_size=1, max_size=4)
    )
    targets = [data.draw(st.integers(0, images - 1)) for _ in rows]
    references = [data.draw(st.integers(-1, images - 1)) for _ in rows]
    drops = steep_drop_negatives(
        torch.tensor(rows, dtype=torch.float32), torch.tensor(targets), torch.tensor(references)
    )
    for query, scores in enumerate(rows):
        check(drops, query, scores, targets[query], references[query])


@pytest.mark.parametrize("images", [2, 3, 4, 5, 6, _FIRST_LOOK, _FIRST_LOOK + 2, 200])
@pytest.mark.parametrize("kind", ["linear", "equal", "outlier", "smooth", "staircase"])
def test_adversarial_curves(images: int, kind: str) -> None:
    x = np.arange(images, dtype=np.float32)
    curve = {
        "linear": -x / 128,
        "equal": np.zeros(images, np.float32),
        "outlier": np.where(x == images - 1, -100, -x / 1024),
        "smooth": np.exp(-x / 40),
        "staircase": -np.floor(x / 7),
    }[kind].astype(np.float32)
    for target in {0, images // 2, images - 1}:
        for reference in (-1, 0, images - 1, target):
            if images == 2 and reference not in (-1, target):
                continue
            drops = steep_drop_negatives(
                torch.from_numpy(curve)[None], torch.tensor([target]), torch.tensor([reference])
            )
            check(drops, 0, curve.tolist(), target, reference)


def test_bad_scores_are_refused() -> None:
    scores = torch.randn(3, 10)
    scores[1, 4] = torch.nan
    with pytest.raises(ValueError, match=r"queries \[1\] are not finite"):
        steep_drop_negatives(scores, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"no image to rank but their target"):
        steep_drop_negatives(torch.randn(1, 2), torch.tensor([0]), torch.tensor([1]))
