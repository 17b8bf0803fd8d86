"""The study's page and its routes: two results of a query, and which of them is better.

Which model a side is of, and what a question is for, never leave the server.
"""

from __future__ import annotations

import asyncio
import datetime
from typing import Annotated, Any

from fastapi import HTTPException, Query, Response
from pydantic import BaseModel, Field

from qure_core.preferences.judgements import Choice, Judgement, Study
from qure_core.preferences.questions import Pairs, Question, begin_plan, in_turn, plan_of
from qure_core.serve.guard import Guard
from qure_core.serve.options import Options
from qure_core.serve.pages import SIDES, begun_app, image_path, make_thumbnail, serve_page

_HASHED = r"^[0-9a-f]{16}$"
_LONGEST = 24 * 3600.0  # seconds of one answer: what is longer was left open


class Begin(BaseModel):
    """Who takes part. The name is hashed before anything is stored."""

    name: str = Field(min_length=1, max_length=200)


class Judged(BaseModel):
    """An answer."""

    participant: str = Field(pattern=_HASHED)
    question: str = Field(pattern=r"^q[0-9]{4,8}$")
    choice: Choice
    seconds: float = Field(ge=0, allow_inf_nan=False)


class Undone(BaseModel):
    """Whose last answer is taken back."""

    participant: str = Field(pattern=_HASHED)


def make_judging(study: Study, pairs: Pairs, options: Options) -> Guard:
    """The study's application."""
    app = begun_app(options, "study", title="Preference study")

    def planned(participant: str) -> list[Question]:
        plan = plan_of(study, participant)
        if plan is None:
            raise HTTPException(404, "nobody has begun by that name; begin again")
        return plan

    def shown(participant: str, plan: list[Question]) -> dict[str, Any]:
        judged = study.answered(participant)
        question = in_turn(plan, [one.question for one in judged])
        told: dict[str, Any] = {
            "participant": participant,
            "done": len(judged),
            "total": len(plan),
            "question": None,
        }
        if question is not None:
            told["question"] = {
                "id": question.question,
                "text": question.text,
                "reference": image_path(question.reference_id),
                "left": [image_path(name) for name in question.left_ids],
                "right": [image_path(name) for name in question.right_ids],
            }
        return told

    @app.post("/v1/begin")
    async def begin(who: Begin) -> dict[str, Any]:
        """Begin, or go on with, a participant's questions."""
        if not who.name.strip():
            raise HTTPException(422, "say a name; it is not stored")

        def first() -> dict[str, Any]:
            participant = study.participant(who.name)
            begin_plan(pairs, study, participant)
            return shown(participant, planned(participant))

        return await asyncio.to_thread(first)

    @app.get("/v1/next")
    async def following(participant: Annotated[str, Query(pattern=_HASHED)]) -> dict[str, Any]:
        """The question that is next, as after a reload."""
        return await asyncio.to_thread(lambda: shown(participant, planned(participant)))

    @app.post("/v1/judge")
    async def judge(judged: Judged) -> dict[str, Any]:
        """Keep an answer; sent again, it counts once. Gives the question that is next."""

        def keep() -> dict[str, Any]:
            plan = planned(judged.participant)
            asked = next((one for one in plan if one.question == judged.question), None)
            if asked is None:
                raise HTTPException(404, "this participant was not asked that")
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            study.write(
                Judgement(
                    participant=judged.participant,
                    choice=judged.choice,
                    seconds=min(judged.seconds, _LONGEST),
                    time=now,
                    **vars(asked),
                )
            )
            return shown(judged.participant, plan)

        return await asyncio.to_thread(keep)

    @app.post("/v1/undo")
    async def undo(who: Undone) -> dict[str, Any]:
        """Take the last answer back, and ask it again."""

        def take_back() -> dict[str, Any]:
            plan = planned(who.participant)
            done = {one.question for one in study.answered(who.participant)}
            last = [one.question for one in plan if one.question in done][-1:]
            for question in last:
                study.take_back(who.participant, question)
            return shown(who.participant, plan)

        return await asyncio.to_thread(take_back)

    @app.get("/v1/images/{image_id:path}", response_class=Response)
    async def image(
        image_id: str, side: Annotated[int, Query(ge=SIDES[0], le=SIDES[1])] = 256
    ) -> Response:
        """A picture of the study, no larger than ``side`` pixels."""
        if image_id not in pairs.images:
            raise HTTPException(404, "the study has no such image")
        uri, digest = pairs.images[image_id]
        made = await make_thumbnail(uri, digest, side, pairs.pixels, pairs.max_pixels)
        headers = {"cache-control": "private, max-age=3600"}
        return Response(made, media_type="image/jpeg", headers=headers)

    serve_page(app, "judge.html", "judge.js", "judge.css")
    return Guard(app, options)
