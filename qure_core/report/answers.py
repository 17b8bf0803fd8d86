"""The answers of an index as one page with the pictures inside."""

from __future__ import annotations

from collections.abc import Sequence

import jinja2

from qure_core.base.config import DataSettings
from qure_core.data.images import load_image
from qure_core.report.figures import thumbnail
from qure_core.search.retriever import Answer


def answers_page(
    reference: str | None, text: str | None, answers: Sequence[Answer], data: DataSettings
) -> str:
    """HTML of one question, its reference image a path or URI, and its answers, best first."""

    def show(uri: str) -> str:
        return thumbnail(load_image(uri, data.max_image_pixels, data.pixels))

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qure_core.report", ""), autoescape=True
    )
    return environment.get_template("answers.html.j2").render(
        reference=reference and {"id": reference, "src": show(reference)},
        text=text,
        answers=[
            {
                "id": answer.image_id,
                "src": show(answer.uri),
                "rank": answer.rank,
                "score": f"{answer.score:.4f}",
            }
            for answer in answers
        ],
    )
