"""Asking an index: from an image and a few words to a ranked list."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.data.images import read_image_bytes
from qure_core.embeddings.encoder import Encoder, Picture
from qure_core.search.index import CACHE, Index, checkpoint_of


@dataclass(frozen=True)
class Answer:
    """An image of the index that was found; ``rank`` counts from 1, the best."""

    rank: int
    image_id: str
    score: float
    uri: str
    category: str | None


@dataclass(frozen=True)
class Question:
    """A reference image (a path, a URI, a picture, or the id of an image of the index) with a
    modification text; either may be left out.

    category: look among its images alone. exclude: ids that are not to be found. where: values that
    columns of the corpus's metadata are to have. The reference, and what has the same bytes, is
    never found, unless it is given as a picture.
    """

    image: Picture | None = None
    text: str | None = None
    category: str | None = None
    exclude: tuple[str, ...] = ()
    where: tuple[tuple[str, str], ...] = ()


class Retriever:
    """An index, and the encoder of the checkpoint that it was made with."""

    def __init__(self, index: Index, encoder: Encoder) -> None:
        self.index, self.encoder = index, encoder

    @classmethod
    def open(
        cls,
        index: str | PathLike[str],
        checkpoint: str | PathLike[str] | None = None,
        device: str | None = None,
        cache: str = CACHE,
    ) -> Retriever:
        """The index at a path or URI. ``checkpoint`` says where the one it was made with is now;
        copies of a remote index are kept in ``cache``.

        Raises `InputError` if either is not there, is damaged, or is of another checkpoint.
        """
        opened = Index.open(fspath(index), cache)
        given = fspath(checkpoint) if checkpoint else None
        source = checkpoint_of(opened.uri, opened.manifest, given)
        options = {
            "precision": opened.manifest["vision_precision"],
            "max_pixels": opened.manifest["max_image_pixels"],
        }
        return cls(opened, Encoder.load(source, device, **options))

    def ask(
        self,
        image: Picture | None = None,
        text: str | None = None,
        top: int = 20,
        category: str | None = None,
        exclude: Collection[str] = (),
        where: Mapping[str, str] | None = None,
        exact: bool = False,
    ) -> list[Answer]:
        """The ``top`` images that fit best: a reference image changed as the text says, or what
        one of both alone is like. ``exact``: all are scored, whatever FAISS could find."""
        values = tuple((where or {}).items())
        question = Question(image, text, category, tuple(exclude), values)
        return self.ask_all([question], top, exact=exact)[0]

    def ask_all(
        self,
        questions: Sequence[Question],
        top: int = 20,
        names: Sequence[str] | None = None,
        exact: bool = False,
    ) -> list[list[Answer]]:
        """Answers of every question; raises `InputError` of the first that cannot be asked, after
        its name if there are ``names``."""
        if top < 1:
            raise InputError(f"top: {top} is less than 1")
        excluded = []
        filters = [(question.category, question.where) for question in questions]
        allowed_by: dict[Any, np.ndarray | None] = {}
        for row, question in enumerate(questions):
            try:
                excluded.append(self._excluded(question))
                if filters[row] not in allowed_by:
                    allowed_by[filters[row]] = self.index.allowed(*filters[row])
            except InputError as error:
                raise (InputError(f"{names[row]}: {error}") if names else error) from None
        query_QD = self.embed(questions)
        answers: list[list[Answer]] = [[] for _ in questions]
        for own, allowed in allowed_by.items():
            rows = [i for i, other in enumerate(filters) if other == own]
            out = [excluded[i] for i in rows]
            found = self.index.search(query_QD[rows], top, out, allowed, exact)
            for row, places, scores in zip(rows, found.place_QK, found.score_QK, strict=True):
                answers[row] = [
                    self._answer(rank, int(place), float(score))
                    for rank, (place, score) in enumerate(zip(places, scores, strict=True), 1)
                    if place >= 0
                ]
        return answers

    def embed(self, questions: Sequence[Question]) -> Tensor:
        """Questions' embeddings [Q, D]."""
        query_QD = torch.empty(len(questions), self.index.manifest["width"])
        texts = [(question.text or "").strip() for question in questions]
        for pictures in (False, True):
            rows = [i for i, one in enumerate(questions) if (one.image is not None) == pictures]
            if rows:
                images = [self.source(one.image) for i in rows if (one := questions[i]).image]
                words = [texts[row] for row in rows]
                query_QD[rows] = self.encoder.encode_queries(
                    images if pictures else None, words, show_progress=False
                )
        return query_QD

    def source(self, image: Picture) -> Picture:
        """Where a reference image is: of an id of the index its URI, else itself, resolved."""
        if isinstance(image, Image.Image):
            return image
        place = self._place(image)
        return (
            storage.resolve(fspath(image)) if place is None else str(self.index.row(place)["uri"])
        )

    def _place(self, image: Picture | None) -> int | None:
        """Where an image given by its id is; None for any other."""
        if isinstance(image, str) and self.index.holds(image):
            return self.index.places([image])[0]
        return None

    def _excluded(self, question: Question) -> list[int]:
        """Places that a question is not to find; `InputError` if it cannot be asked."""
        if question.image is None and not (question.text or "").strip():
            raise InputError("ask with an image, a text, or both")
        places = self.index.places(question.exclude)
        image = question.image
        if (place := self._place(image)) is not None:
            return places + self.index.same_content(self.index.row(place)["sha256"])
        if image is not None and not isinstance(image, Image.Image):
            uri = storage.resolve(fspath(image))
            if not storage.is_file(uri):
                raise InputError(
                    f"image: {fspath(image)} is neither the id of an image of the index nor a file"
                )
            data = read_image_bytes(uri, self.encoder.max_pixels)
            places += self.index.same_content(hashlib.sha256(data).hexdigest())
        return places

    def _answer(self, rank: int, place: int, score: float) -> Answer:
        row = self.index.row(place)
        return Answer(rank, row["image_id"], score, row["uri"], row["category"])
