"""What a study asks: pairs of results of a query, and which of them a participant meets.

    pairs.json                   queries with both models' results, written when the study begins
    plans/PARTICIPANT.json       the questions of one participant, drawn when they come

A plan is written once, so whichever replica answers, and after a reload, the same questions come in
the same order. Which model is on the left is drawn per question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.base.seeds import generator
from qure_core.preferences.judgements import Role, Study


@dataclass(frozen=True)
class Pair:
    """A query and what two models (0 and 1) found for it, best first."""

    query_id: str
    reference_id: str
    text: str
    found: tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Asking:
    """How much is asked. people: who judge a query. questions: of a participant, at most. repeats
    and obvious: so many of them besides, asked again or with a side that is plainly wrong."""

    people: int = 3
    questions: int = 50
    repeats: int = 3
    obvious: int = 3


@dataclass(frozen=True)
class Question:
    """One question of a participant, as it is stored and judged."""

    question: str
    query_id: str
    reference_id: str
    text: str
    left_ids: tuple[str, ...]
    right_ids: tuple[str, ...]
    left_model: str
    right_model: str
    role: Role = "plain"
    repeats: str = ""
    expected: str = ""

    def turned(self) -> Question:
        """With its sides exchanged."""
        return replace(
            self,
            left_ids=self.right_ids,
            right_ids=self.left_ids,
            left_model=self.right_model,
            right_model=self.left_model,
        )


@dataclass(frozen=True)
class Pairs:
    """Everything a study can ask, and where its pictures are.

    models: their names. others: images drawn from the corpus, for sides that are plainly wrong.
    images: of each image its URI and digest. pixels, max_pixels: how files are decoded.
    """

    models: tuple[str, str]
    pairs: tuple[Pair, ...]
    others: tuple[str, ...]
    images: dict[str, tuple[str, str]]
    asking: Asking
    pixels: Any
    max_pixels: int
    seed: int

    def write(self, study: Study) -> Pairs:
        """Keep them with the study, unless it has some; return those that it has."""
        place = storage.join(study.uri, "pairs.json")
        storage.create(place, storage.compact_json(asdict(self)))
        return self.read(study)

    @classmethod
    def read(cls, study: Study) -> Pairs:
        """A study's; `InputError` if it has none, as one that was only brought in."""
        place = storage.join(study.uri, "pairs.json")
        if not storage.exists(place):
            raise InputError(f"{study.uri}: has no pairs.json, so it asks nothing")
        value = storage.read_json(place)
        pairs = tuple(
            Pair(
                one["query_id"],
                one["reference_id"],
                one["text"],
                (tuple(one["found"][0]), tuple(one["found"][1])),
            )
            for one in value["pairs"]
        )
        images = {name: (uri, digest) for name, (uri, digest) in value["images"].items()}
        known = {name: tuple(value[name]) for name in ("models", "others")}
        asking = Asking(**value["asking"])
        return cls(**(value | known | {"pairs": pairs, "images": images, "asking": asking}))


def _plan(study: Study, participant: str) -> str:
    return storage.join(study.uri, "plans", f"{participant}.json")


def begin_plan(pairs: Pairs, study: Study, participant: str) -> None:
    """Draw and keep a participant's questions, unless they have some."""
    place = _plan(study, participant)
    if not storage.exists(place):
        drawn = draw_questions(pairs, _asked_so_far(study), participant)
        storage.create(place, storage.compact_json([asdict(one) for one in drawn]))


def plan_of(study: Study, participant: str) -> list[Question] | None:
    """The questions of a participant; None of one who has not begun."""
    place = _plan(study, participant)
    if not storage.exists(place):
        return None
    return [
        Question(**(row | {side: tuple(row[side]) for side in ("left_ids", "right_ids")}))
        for row in storage.read_json(place)
    ]


def _asked_so_far(study: Study) -> dict[str, int]:
    """How many plans have each query."""
    folder = storage.join(study.uri, "plans")
    counts: dict[str, int] = {}
    for name in storage.list_names(folder):
        if name.endswith(".json"):
            for row in storage.read_json(storage.join(folder, name)):
                if row["role"] == "plain":
                    counts[row["query_id"]] = counts.get(row["query_id"], 0) + 1
    return counts


def draw_questions(pairs: Pairs, asked: dict[str, int], participant: str) -> list[Question]:
    """A participant's questions: of the queries that fewest have been asked, in an order of their
    own, with repeats and obvious ones strewn in. A repeat has its sides exchanged and comes after
    what it repeats."""
    asking, rng = pairs.asking, generator(pairs.seed, "questions", participant)
    wanted = [pair for pair in pairs.pairs if asked.get(pair.query_id, 0) < asking.people]
    order = [wanted[place] for place in rng.permutation(len(wanted))]
    order.sort(key=lambda pair: asked.get(pair.query_id, 0))  # stable: drawn among the same
    chosen = order[: asking.questions]
    chosen = [chosen[place] for place in rng.permutation(len(chosen))]
    plain = [_shown(pairs, pair, bool(rng.integers(2))) for pair in chosen]
    questions = list(plain)
    for _ in range(asking.obvious if plain else 0):
        like = plain[int(rng.integers(len(plain)))]
        if question := _obvious(pairs, like, rng):
            questions.insert(int(rng.integers(len(questions) + 1)), question)
    # The first questions are asked again at the end, when they are no longer remembered.
    questions += [replace(one.turned(), role="repeat") for one in plain[: asking.repeats]]
    named = [replace(one, question=f"q{number:04d}") for number, one in enumerate(questions)]
    first = {one.query_id: one.question for one in named if one.role == "plain"}
    return [
        replace(one, repeats=first[one.query_id]) if one.role == "repeat" else one for one in named
    ]


def _shown(pairs: Pairs, pair: Pair, turned: bool) -> Question:
    question = Question("", pair.query_id, pair.reference_id, pair.text, *pair.found, *pairs.models)
    return question.turned() if turned else question


def _obvious(pairs: Pairs, like: Question, rng: np.random.Generator) -> Question | None:
    """What was found beside as many images drawn from the corpus; None of one so small that it
    has none besides."""
    known = {*like.left_ids, *like.right_ids, like.reference_id}
    others = [name for name in pairs.others if name not in known]
    if len(others) < len(like.left_ids):
        return None
    drawn = tuple(
        others[place] for place in rng.choice(len(others), len(like.left_ids), replace=False)
    )
    expected = "left" if rng.integers(2) else "right"
    wrong = {"right_ids": drawn, "right_model": ""}
    if expected == "right":
        wrong = {"left_ids": drawn, "left_model": ""}
    return replace(like, role="obvious", expected=expected, **wrong)  # type: ignore[arg-type]


def in_turn(plan: Sequence[Question], answered: Sequence[str]) -> Question | None:
    """The first question that is not answered; None at the end."""
    done = set(answered)
    return next((question for question in plan if question.question not in done), None)
