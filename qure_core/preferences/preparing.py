"""From two indexes and a file of queries to what a study asks."""

from __future__ import annotations

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.base.seeds import generator
from qure_core.preferences.exchange import json_lines
from qure_core.preferences.questions import Asking, Pair, Pairs
from qure_core.search.retriever import Question, Retriever

_OTHERS = 500  # images that sides of obvious questions are drawn from


def read_queries(uri: str) -> list[tuple[str, str, str]]:
    """(id, reference image id, text) of every line {"image": ..., "text": ..., "id": ...}; without
    an id a query is known by its number. Raises `InputError` naming the line that is wrong."""
    if not storage.is_file(uri):
        raise InputError(f"--queries: {uri} is not there")
    found: dict[str, tuple[str, str, str]] = {}
    for number, (where, value) in enumerate(json_lines(uri), 1):
        try:
            image, text = value["image"], value.get("text", "")
            name = str(value.get("id", f"query {number}"))
        except (KeyError, TypeError, AttributeError):
            image = text = name = None
        if not isinstance(image, str) or not isinstance(text, str) or name is None:
            raise InputError(f'--queries: {where}: is not {{"image": ID, "text": ...}}')
        if name in found:
            raise InputError(f"--queries: {where}: id {name!r} is there twice")
        found[name] = (name, image, text)
    if not found:
        raise InputError(f"--queries: {uri} holds no query")
    return list(found.values())


def make_pairs(
    retrievers: tuple[Retriever, Retriever],
    models: tuple[str, str],
    queries: list[tuple[str, str, str]],
    top: int,
    asking: Asking,
    seed: int,
) -> tuple[Pairs, int]:
    """Both models' ``top`` results of every query, and of how many queries they are the same: there
    is nothing to choose between.

    Raises `InputError` of a reference image that one of the indexes has not.
    """
    questions = [Question(image, text) for _, image, text in queries]
    for retriever in retrievers:
        for name, image, _ in queries:
            if not retriever.index.holds(image):
                raise InputError(
                    f"--queries: {name}: the index {retriever.index.uri} has no image {image!r}"
                )
    found = [
        [tuple(answer.image_id for answer in own) for own in retriever.ask_all(questions, top)]
        for retriever in retrievers
    ]
    pairs = tuple(
        Pair(name, image, text, (one, other))
        for (name, image, text), one, other in zip(queries, *found, strict=True)
        if one != other and one and other
    )
    images: dict[str, tuple[str, str]] = {}
    ids = retrievers[0].index.ids
    rng = generator(seed, "images of obvious questions")
    places = rng.choice(len(ids), min(_OTHERS, len(ids)), replace=False)
    others = tuple(sorted(ids[place] for place in places.tolist()))
    shown = {name for pair in pairs for own in pair.found for name in own}.union(others)
    for image_id in sorted(shown | {pair.reference_id for pair in pairs}):
        index = next(r.index for r in retrievers if r.index.holds(image_id))
        row = index.row(index.places([image_id])[0])
        images[image_id] = (row["uri"], row["sha256"])
    manifest = retrievers[0].index.manifest
    pixels, most = manifest["pixels"], manifest["max_image_pixels"]
    made = Pairs(models, pairs, others, images, asking, pixels, most, seed)
    return made, len(queries) - len(pairs)
