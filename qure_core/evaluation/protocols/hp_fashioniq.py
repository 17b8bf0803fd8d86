"""HP-FashionIQ: how often people prefer the set of images that scores higher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, ClassVar

import numpy as np

from qure_core import storage
from qure_core.base.errors import InputError, Problem, raise_problems
from qure_core.data.schema import Split, Triplet
from qure_core.data.sources import files_of
from qure_core.embeddings.shards import EmbeddingShards
from qure_core.evaluation.metrics import preference_summary
from qure_core.evaluation.protocols.protocol import Asked, Protocol, Request, Result, Rows

_SPELLED_OUT = {"dotmark": ".", "questionmark": "?", "andmark": " & "}


@dataclass(frozen=True)
class JudgedPair:
    """Two sets of five images retrieved for one query, and which one a participant preferred."""

    participant: str
    reference_id: str
    text: str
    set1: tuple[str, ...]
    set2: tuple[str, ...]
    preferred: int


def _image_name(path: str) -> str:
    """The image id of a stored path such as ``/-/image_data/shirt/B000.jpg``."""
    return path.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def parse_hp_fashioniq(value: Any, file: str) -> list[JudgedPair]:
    """The judged pairs of ``hpfiq.json`` in file order, with its spelled-out marks put back."""
    pairs = []
    for participant, question_sets in value.items():
        for name, questions in question_sets.items():
            try:
                rows = zip(
                    questions["ref_img_paths"],
                    questions["sentences"],
                    questions["retrieved_set1"],
                    questions["retrieved_set2"],
                    questions["preferred set"],
                    strict=True,
                )
                for reference, text, set1, set2, preferred in rows:
                    for word, mark in _SPELLED_OUT.items():
                        text = text.replace(word, mark)
                    choice = int(preferred)
                    if choice not in (1, 2):
                        raise ValueError(f"preferred set is {preferred!r}")
                    pairs.append(
                        JudgedPair(
                            participant,
                            _image_name(reference),
                            text,
                            tuple(map(_image_name, set1["img_path"])),
                            tuple(map(_image_name, set2["img_path"])),
                            choice,
                        )
                    )
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{file} [{participant}.{name}]: malformed ({error})") from None
    return pairs


def _judged_pairs(request: Request) -> list[JudgedPair]:
    if request.judged is None:
        raise InputError("--judged: the hp-fashioniq protocol needs the path of hpfiq.json")
    return parse_hp_fashioniq(storage.read_json(request.judged), request.judged)


class HPFashionIQ(Protocol):
    """People's judgements of pairs of sets, each of images retrieved for one query."""

    name: ClassVar[str] = "hp-fashioniq"
    columns: ClassVar[tuple[str, ...]] = ("ratio", "symmetric")

    def load(self, request: Request) -> Split:
        """A query for every judged pair, and the images of both sets."""
        pairs, file = _judged_pairs(request), str(request.judged)
        folder = files_of(request.data).folder("images")
        by_name = {name.rsplit("/", 1)[-1]: name for name in folder.sorted()}
        images: dict[str, str] = {}
        problems = []
        for name in sorted({i for p in pairs for i in (p.reference_id, *p.set1, *p.set2)}):
            uri = folder.find(by_name.get(name, name))
            if uri is None:
                problems.append(Problem(file, name, folder.missing(name)))
            else:
                images[name] = uri
        raise_problems(problems, f"{file} ({self.name})")
        queries = tuple(
            Triplet(f"{number:06d}", pair.reference_id, pair.text, None, "hp")
            for number, pair in enumerate(pairs)
        )
        return Split("hp", queries, images, {"hp": tuple(images)})

    def judgements(self, request: Request) -> list[Any]:
        """The judged pairs."""
        return [astuple(pair) for pair in _judged_pairs(request)]

    def metrics(self, rows: Rows, split: Split) -> dict[str, Any]:
        """None of rankings: sets are judged, in `result`."""
        del rows, split
        return {}

    def headline(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Both ratios."""
        return {name: metrics[name]["value"] for name in self.columns}

    def result(self, asked: Asked) -> Result:
        """How people preferred the set that scores higher."""
        return _judge(asked.embeddings, _judged_pairs(asked.request)), {}

    def lines(self, result: dict[str, Any], dataset: str | None) -> list[str]:
        """Both ratios with their intervals."""
        del dataset
        return [
            f"{name:<10} {part['value']:.4f}  95% interval {part['interval_95'][0]:.4f} to "
            f"{part['interval_95'][1]:.4f}  ({part['pairs']:,} pairs)"
            for name, part in (("ratio", result["ratio"]), ("symmetric", result["symmetric"]))
        ] + [f"{result['ties']} ties; intervals resample {result['participants']} participants"]


def _judge(embeddings: str, pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Mean relevance of both sets of every judged pair, and how people preferred them."""
    # Here, because to know a protocol's name need not take the seconds that this import takes.
    import torch

    from qure_core.model.relevance import refuse_bad_scores, relevance_scores

    shards = EmbeddingShards.open(embeddings)
    images: dict[str, np.ndarray] = {}
    queries: dict[str, np.ndarray] = {}
    for number in range(shards.shards):
        ids, image_MTD = shards.images(number)
        images |= dict(zip(ids, image_MTD, strict=True))
        ids, query_QD = shards.queries(number)
        queries |= dict(zip(ids, query_QD, strict=True))

    def mean_relevance(number: int, names: Sequence[str]) -> float:
        query_QD = torch.from_numpy(queries[f"{number:06d}"])[None]
        image_MTD = torch.from_numpy(np.stack([images[name] for name in names]))
        scores_QM = relevance_scores(query_QD, image_MTD)
        refuse_bad_scores(scores_QM)
        return float(scores_QM.mean())

    score1, score2 = (
        np.asarray([mean_relevance(number, sets) for number, sets in enumerate(column)])
        for column in ([pair.set1 for pair in pairs], [pair.set2 for pair in pairs])
    )
    return preference_summary(
        score1,
        score2,
        np.asarray([pair.preferred for pair in pairs]),
        [pair.participant for pair in pairs],
    )
