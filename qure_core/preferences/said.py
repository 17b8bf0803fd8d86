"""What judgements say: which model people prefer, how sure that is, and how far to trust them.

Intervals hold 95 of 100 studies with as many participants drawn like these: whole participants are
resampled, for what one of them says is not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb
from typing import Any

import choix
import krippendorff
import numpy as np

from qure_core.preferences.judgements import CHOICES, Judgement

_RESAMPLES, _SEED = 1000, 0
# Of obvious questions: who answers so few of them right that somebody attentive, who is right in
# nine of ten, would hardly ever do, is called careless.
_ATTENTIVE, _HARDLY = 0.9, 0.01


def what_they_say(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """All figures of a study as plain data; None where there is nothing to tell them from."""
    plain = [one for one in judgements if one.role == "plain"]
    people = sorted({one.participant for one in judgements})
    careless = careless_participants(judgements)
    return {
        "judgements": len(judgements),
        "participants": len(people),
        "queries": len({one.query_id for one in judgements}),
        "choices": {name: sum(one.choice == name for one in plain) for name in CHOICES},
        "seconds": _median([one.seconds for one in plain if one.seconds is not None]),
        "left": _share(plain, lambda one: one.choice == "left" if one.decided else None),
        "consistency": consistency(judgements),
        "agreement": agreement(plain),
        "obvious": _share(
            [one for one in judgements if one.role == "obvious"],
            lambda one: None if one.choice == "skip" else one.choice == one.expected,
        ),
        "careless": careless,
        "strengths": strengths(plain),
    }


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _share(
    judgements: Sequence[Judgement], counts: Callable[[Judgement], bool | None]
) -> dict[str, Any] | None:
    """How often ``counts`` is true of those of which it is not None, with its interval."""
    told = [(one.participant, value) for one in judgements if (value := counts(one)) is not None]
    if not told:
        return None
    people, code_N = np.unique([name for name, _ in told], return_inverse=True)
    hit_N = np.asarray([value for _, value in told], float)
    hits, all_of = np.bincount(code_N, hit_N), np.bincount(code_N)
    draws = np.random.default_rng(_SEED).integers(len(people), size=(_RESAMPLES, len(people)))
    shares = hits[draws].sum(axis=1) / all_of[draws].sum(axis=1)
    low, high = np.quantile(shares, [0.025, 0.975]).tolist()
    return {"value": float(hit_N.mean()), "interval_95": [low, high], "of": len(told)}


def consistency(judgements: Sequence[Judgement]) -> dict[str, Any] | None:
    """How often a participant who is asked again chooses alike, whichever side it was on then."""
    first = {(one.participant, one.question): one for one in judgements}

    def alike(again: Judgement) -> bool | None:
        before = first.get((again.participant, again.repeats))
        if before is None or "skip" in (before.choice, again.choice):
            return None
        if before.decided and again.decided:
            return before.winner == again.winner
        return before.choice == again.choice

    return _share([one for one in judgements if one.role == "repeat"], alike)


def agreement(judgements: Sequence[Judgement]) -> float | None:
    """Krippendorff's alpha (nominal) between participants, over the pairs of results that more
    than one of them judged: 1 is full agreement, 0 what chance gives. None without such pairs, or
    where all choose the same."""
    values: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in judgements:
        if one.choice != "skip":
            pair = (one.query_id, *sorted((one.left_ids, one.right_ids)))
            choice = one.winner if one.decided else one.choice
            values.setdefault(pair, {})[one.participant] = choice
    shared = {pair: own for pair, own in values.items() if len(own) > 1}
    # Chosen results differ from pair to pair: first, second of the sorted two, both or neither.
    names = {"both": 2.0, "neither": 3.0}

    def code(pair: tuple[Any, ...], choice: Any) -> float:
        return names[choice] if isinstance(choice, str) else float(choice == pair[2])

    people = sorted({name for own in shared.values() for name in own})
    table = [
        [code(pair, own[name]) if name in own else np.nan for pair, own in shared.items()]
        for name in people
    ]
    domain = {value for row in table for value in row if not np.isnan(value)}
    if len(domain) < 2:
        return None
    return float(krippendorff.alpha(np.asarray(table), level_of_measurement="nominal"))


def careless_participants(judgements: Sequence[Judgement]) -> dict[str, dict[str, int]]:
    """Participants who fail obvious questions more often than somebody attentive hardly ever
    would: how many were right, and of how many."""
    right: dict[str, list[bool]] = {}
    for one in judgements:
        if one.role == "obvious" and one.choice != "skip":
            right.setdefault(one.participant, []).append(one.choice == one.expected)
    return {
        name: {"right": sum(own), "of": len(own)}
        for name, own in sorted(right.items())
        if _at_most(sum(own), len(own), _ATTENTIVE) < _HARDLY
    }


def _at_most(hits: int, count: int, chance: float) -> float:
    """The chance of ``hits`` or fewer of ``count``."""
    return sum(comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(hits + 1))


def strengths(judgements: Sequence[Judgement]) -> list[dict[str, Any]] | None:
    """Bradley-Terry strengths of the models, the best first, with intervals; None of fewer than
    two. A strength is the log-odds against the mean of all; ``wins`` is the chance, in percent, of
    being preferred to a model of that mean. A tie is half a win of each."""
    duels = [
        one
        for one in judgements
        if one.choice != "skip" and one.left_model and one.right_model != one.left_model
    ]
    models = sorted({name for one in duels for name in (one.left_model, one.right_model)})
    if len(models) < 2:
        return None
    place = {name: number for number, name in enumerate(models)}
    people = sorted({one.participant for one in duels})
    wins_PMM = np.zeros((len(people), len(models), len(models)))
    for one in duels:
        left, right = place[one.left_model], place[one.right_model]
        wins_MM = wins_PMM[people.index(one.participant)]
        share = {"left": 1.0, "right": 0.0}.get(one.choice, 0.5)
        wins_MM[left, right] += share
        wins_MM[right, left] += 1 - share

    def fitted(wins_MM: np.ndarray) -> np.ndarray:
        # A little of a prior: a model that never loses has no finite strength else.
        found_M: np.ndarray = choix.ilsr_pairwise_dense(wins_MM, alpha=1e-3)
        return found_M - found_M.mean()

    strength_M = fitted(wins_PMM.sum(axis=0))
    rng = np.random.default_rng(_SEED)
    draws = rng.integers(len(people), size=(_RESAMPLES, len(people)))
    resampled = np.stack([fitted(wins_PMM[drawn].sum(axis=0)) for drawn in draws])
    low_M, high_M = np.quantile(resampled, [0.025, 0.975], axis=0)
    rows = [
        {
            "model": name,
            "strength": float(strength_M[i]),
            "interval_95": [float(low_M[i]), float(high_M[i])],
            "wins": float(100 / (1 + np.exp(-strength_M[i]))),
            "judgements": sum(name in (one.left_model, one.right_model) for one in duels),
        }
        for i, name in enumerate(models)
    ]
    return sorted(rows, key=lambda row: -row["strength"])


def told(said: dict[str, Any]) -> str:
    """What judgements say, for people."""

    def share(name: str) -> str:
        part = said[name]
        if part is None:
            return "nothing to tell it from"
        low, high = part["interval_95"]
        return f"{part['value']:.1%}  95% interval {low:.1%} to {high:.1%}  (of {part['of']:,})"

    lines = [
        f"{said['judgements']:,} judgements of {said['participants']:,} participants on "
        f"{said['queries']:,} queries",
        "choices       " + "  ".join(f"{name} {n:,}" for name, n in said["choices"].items()),
    ]
    if said["seconds"] is not None:
        lines.append(f"time          {said['seconds']:.1f} s a judgement, median")
    lines += [
        f"left side     {share('left')}",
        f"consistency   {share('consistency')}",
        f"obvious       {share('obvious')}",
    ]
    alpha = said["agreement"]
    lines.append(
        "agreement     "
        + ("nothing to tell it from" if alpha is None else f"Krippendorff's alpha {alpha:.3f}")
    )
    for name, own in said["careless"].items():
        lines.append(f"careless      {name}: {own['right']} of {own['of']} obvious ones right")
    for row in said["strengths"] or []:
        low, high = row["interval_95"]
        lines.append(
            f"{row['model']:<24} strength {row['strength']:+.3f}  95% interval {low:+.3f} to "
            f"{high:+.3f}  preferred in {row['wins']:.1f}%  ({row['judgements']:,} judgements)"
        )
    return "\n".join(lines)
