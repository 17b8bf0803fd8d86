"""What judgements say, of people whose taste is known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from qure_core.preferences.exchange import read_judgements
from qure_core.preferences.judgements import Judgement, Study
from qure_core.preferences.said import (
    agreement,
    careless_participants,
    consistency,
    strengths,
    told,
    what_they_say,
)


def asked(participant: int, question: int, choice: str, **more: object) -> Judgement:
    known = {"query_id": f"query {question}", "reference_id": "r", "text": "t"}
    shown = {"left_ids": (f"a{question}",), "right_ids": (f"b{question}",)}
    values = {"question": f"q{question}", "choice": choice, **known, **shown, **more}
    return Judgement(participant=f"p{participant}", **values)  # type: ignore[arg-type]


def duels(worth: dict[str, float], people: int, each: int, seed: int = 0) -> list[Judgement]:
    """Of every two models, by people whose odds are ``exp`` of the difference of their worths;
    which is on the left is drawn."""
    rng = np.random.default_rng(seed)
    found = []
    for person in range(people):
        for number, pair in enumerate(list(combinations(worth, 2)) * each):
            left, right = pair if rng.random() < 0.5 else pair[::-1]
            chance = 1 / (1 + math.exp(worth[right] - worth[left]))
            choice = "left" if rng.random() < chance else "right"
            found.append(asked(person, number, choice, left_model=left, right_model=right))
    return found


def test_two_models_have_the_odds_of_their_wins() -> None:
    models = {"left_model": "one", "right_model": "other"}
    some = [asked(n % 5, n, "left" if n < 30 else "right", **models) for n in range(40)]
    found = strengths(some)
    assert found is not None
    assert [row["model"] for row in found] == ["one", "other"]
    assert found[0]["strength"] - found[1]["strength"] == pytest.approx(math.log(3), abs=0.01)
    ties = strengths([*some, *(asked(9, 99 + n, "both", **models) for n in range(40))])
    assert ties is not None
    assert ties[0]["strength"] - ties[1]["strength"] == pytest.approx(math.log(50 / 30), abs=0.01)


def test_strengths_are_those_that_people_judged_by() -> None:
    worth = {"bad": -0.8, "fair": 0.0, "good": 0.8}
    found = strengths(duels(worth, people=30, each=20))
    assert found is not None
    assert [row["model"] for row in found] == ["good", "fair", "bad"]
    for row in found:
        assert row["strength"] == pytest.approx(worth[row["model"]], abs=0.12)
        low, high = row["interval_95"]
        assert low < worth[row["model"]] < high
        assert 0 < high - low < 0.5
        assert row["wins"] == pytest.approx(100 / (1 + math.exp(-row["strength"])), abs=1e-6)


def test_sides_do_not_matter_to_strengths() -> None:
    some = duels({"a": 0.0, "b": 0.5}, people=6, each=15)
    turned = {"left": "right", "right": "left"}
    other = [
        replace(
            one,
            left_model=one.right_model,
            right_model=one.left_model,
            left_ids=one.right_ids,
            right_ids=one.left_ids,
            choice=turned[one.choice],  # type: ignore[arg-type]
        )
        for one in some
    ]
    ours, theirs = strengths(some), strengths(other)
    assert ours is not None
    assert theirs is not None
    for one, two in zip(ours, theirs, strict=True):
        assert one["model"] == two["model"]
        assert one["strength"] == pytest.approx(two["strength"], abs=1e-6)


def test_who_chooses_alike_on_the_other_side_is_consistent() -> None:
    first = asked(1, 1, "left")
    swapped = replace(
        first, question="q2", role="repeat", repeats="q1", left_ids=("b1",), right_ids=("a1",)
    )
    for choice, alike in (("right", 1.0), ("left", 0.0), ("both", 0.0)):
        found = consistency([first, replace(swapped, choice=choice)])  # type: ignore[arg-type]
        assert found is not None
        assert (found["value"], found["of"]) == (alike, 1)
    assert consistency([first, replace(swapped, choice="skip")]) is None
    assert consistency([first]) is None


def nominal_alpha(table: list[list[float | None]]) -> float:
    """Krippendorff's alpha by its definition, from coincidences of values within a unit."""
    pairs: dict[tuple[float, float], float] = {}
    for unit in zip(*table, strict=True):
        values = [value for value in unit if value is not None]
        for i, one in enumerate(values):
            for j, other in enumerate(values):
                if i != j:
                    pairs[one, other] = pairs.get((one, other), 0) + 1 / (len(values) - 1)
    whole = sum(pairs.values())
    totals: dict[float, float] = {}
    for (one, _), count in pairs.items():
        totals[one] = totals.get(one, 0) + count
    seen = sum(count for (one, other), count in pairs.items() if one != other)
    chance = sum(totals[a] * totals[b] for a in totals for b in totals if a != b) / (whole - 1)
    return 1 - seen / chance


def test_agreement_is_alpha_by_its_definition() -> None:
    rng = np.random.default_rng(3)
    options = ["left", "right", "both", "skip"]
    table: list[list[float | None]] = []
    some = []
    for person in range(5):
        choices = [str(rng.choice(options, p=[0.6, 0.2, 0.1, 0.1])) for _ in range(40)]
        some += [asked(person, n, choice) for n, choice in enumerate(choices)]
        codes = {"left": 0.0, "right": 1.0, "both": 2.0, "skip": None}
        table.append([codes[choice] for choice in choices])
    assert agreement(some) == pytest.approx(nominal_alpha(table), abs=1e-9)
    assert agreement([asked(n, 1, "left") for n in range(3)]) is None
    mixed = [asked(n, q, "left" if q else "right") for n in range(3) for q in range(2)]
    assert agreement(mixed) == pytest.approx(1.0)


def test_careless_people_are_found_and_attentive_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    some = []
    for person in range(60):
        for question in range(20):
            expected = str(rng.choice(["left", "right"]))
            wrong = "right" if expected == "left" else "left"
            attentive = person < 50
            hit = rng.random() < (0.95 if attentive else 0.5)
            choice = expected if hit else wrong
            some.append(asked(person, question, choice, role="obvious", expected=expected))
    found = careless_participants(some)
    assert not {name for name in found if int(name[1:]) < 50}
    assert len(found) >= 9  # of ten; by chance alone one of them may do well
    assert all(own["of"] == 20 and own["right"] < 16 for own in found.values())


def test_the_real_study(annotations: Path) -> None:
    file = str(annotations / "hp_fashioniq/hpfiq.json")
    some = read_judgements(file, Study("nowhere", "00" * 16))
    said = what_they_say(some)
    assert (said["judgements"], said["participants"]) == (3050, 61)
    assert said["choices"] == {"left": 1641, "right": 1409, "both": 0, "neither": 0, "skip": 0}
    assert said["left"]["value"] == pytest.approx(1641 / 3050)
    low, high = said["left"]["interval_95"]
    assert 0.5 < low < 1641 / 3050 < high < 0.6
    assert said["strengths"] is None  # it does not say whose the sets are
    assert "3,050 judgements of 61 participants" in told(said)
