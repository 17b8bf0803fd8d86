"""Making FAISS' part of an index: which vectors, which lists, and how far to look through them.

First some queries are answered exactly. The vectors that win there are those that FAISS is given;
what it is trained on is a sample of them; and from the same answers follow how many lists are to be
looked through, and the recall, which is stated of queries that had no say in it.

Shapes: Q queries, K answers, T vectors (tokens) of an image, D embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import faiss
import numpy as np
import ray

from qure_core import storage
from qure_core.base.config import SearchSettings
from qure_core.base.errors import InputError, bad_input_of_workers
from qure_core.ranking.blocks import prepare_worker
from qure_core.runtime.in_process import device_here
from qure_core.runtime.progress import Progress
from qure_core.search.approximate import Effort, ivf_of
from qure_core.search.index import FAISS_KIND, Found, Index, part_bounds, part_file
from qure_core.search.questions import Questions
from qure_core.search.segments import Segment

EXACT_BELOW = 200_000  # vectors: all are scored in the time that finding some would take
_ANSWERS, _FIRST = 50, 10  # of which the recall is measured
_SHARE_OF_WINS = 0.999  # that the vectors which FAISS is given have
_PER_LIST = 64  # vectors of the sample that the lists' centroids are trained on, for each
_SEED = 20_250_711
_DEPTH, _DEEPEST = 4, 64  # vectors asked for each image wanted
_GREW = 4  # times as many vectors as it was trained for, or as few, ask for new lists


def lists_for(vectors: int) -> int:
    """About four times the root of the number of vectors, a power of two."""
    return int(2 ** np.floor(np.log2(max(4 * np.sqrt(vectors), 16))))


def factory_for(vectors: int) -> str:
    """FAISS' index for so many vectors: 4 bits a dimension, for with its centroids and the fp16
    embeddings that is within 1.3 times their bytes; from 16,384 lists on found by a graph."""
    lists = lists_for(vectors)
    return f"IVF{lists}{'_HNSW32' if lists >= 16_384 else ''},SQ4"


def wanted(search: SearchSettings, vectors: int) -> bool:
    """Whether an index of so many vectors is to have FAISS' files."""
    return search.kind == "faiss" or (search.kind == "auto" and vectors >= EXACT_BELOW)


def chosen_vectors(wins_T: np.ndarray, tokens: int | None) -> list[int]:
    """The vectors that win most often: so many, or as few as have `_SHARE_OF_WINS` of the wins."""
    order = np.argsort(-wins_T, kind="stable")
    if tokens is None:
        shares = np.cumsum(wins_T[order]) / max(wins_T.sum(), 1)
        tokens = int(np.searchsorted(shares, _SHARE_OF_WINS)) + 1
    return sorted(order[:tokens].tolist())


def _run(
    stage: str, unit: str, tasks: Sequence[Callable[[], Any]], cpus: int
) -> Iterator[tuple[int, Any]]:
    """Results of tasks by their numbers, as they come: of the cluster, or of this process."""
    progress = Progress(stage, len(tasks), unit)
    if device_here() is not None:
        for number, task in enumerate(tasks):
            yield number, task()
            progress.advance(1)
        return

    def on_worker(task: Callable[[], Any]) -> Any:
        prepare_worker()
        faiss.omp_set_num_threads(cpus)
        return task()

    remote = ray.remote(on_worker).options(num_cpus=cpus)
    number_of = {remote.remote(task): number for number, task in enumerate(tasks)}
    left = list(number_of)
    with bad_input_of_workers():
        while left:
            (done,), left = ray.wait(left, num_returns=1)
            yield number_of[done], ray.get(done)
            progress.advance(1)


def empty_index(factory: str, width: int) -> Any:
    """FAISS' index of a factory string; `InputError` if it takes no such one, or it has no IVF."""
    try:
        made = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        why = str(error).splitlines()[-1][:200]
        raise InputError(f"search.factory: FAISS takes no {factory!r} ({why})") from None
    ivf_of(made)
    return made


@dataclass(frozen=True)
class _Source:
    """Where a task finds a segment's vectors."""

    uri: str
    name: str
    rows: int
    cache: str
    positions: tuple[int, ...]
    part_rows: int

    @property
    def parts(self) -> list[tuple[int, int]]:
        return part_bounds(self.rows, self.part_rows)

    def vectors(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The chosen vectors [n x positions, D] of some rows at a time, float32."""
        segment = Segment.open(self.uri, self.name, np.zeros(self.rows, np.int32), self.cache)
        for start in range(0, len(rows), 1024):
            values = segment.embeddings(rows[start : start + 1024])[:, list(self.positions)]
            yield np.ascontiguousarray(values.reshape(-1, values.shape[-1]))


def _train(
    factory: str, width: int, sample: Sequence[tuple[_Source, np.ndarray]], output: str
) -> dict[str, Any]:
    """Train an empty index on some rows of segments, and write it; return the file's facts."""
    index = empty_index(factory, width)
    index.train(np.concatenate([some for own, rows in sample for some in own.vectors(rows)]))
    return _write(index, output)


def _add(trained: str, source: _Source, part: int, output: str) -> dict[str, Any] | None:
    """Write FAISS' file of a part's images; None if it is there."""
    if storage.exists(output):
        return None
    index = _read(storage.read_bytes(trained))
    for vectors in source.vectors(np.arange(*source.parts[part])):
        index.add(vectors)
    return _write(index, output)


def _read(data: bytes) -> Any:
    return faiss.deserialize_index(np.frombuffer(data, np.uint8))


def _write(index: Any, output: str) -> dict[str, Any]:
    data = faiss.serialize_index(index).tobytes()
    storage.write_bytes(output, data)
    return storage.file_facts(data)


def _digest(*facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def make_faiss(
    index: Index,
    questions: Questions,
    search: SearchSettings,
    before: dict[str, Any] | None,
    cpus: int,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Make what FAISS needs of an index that can be searched exactly; return what the manifest says
    of it, and the facts of files in the index's own directory by name.

    What ``before``, the version before, has is taken over where it serves; what a killed build has
    written too. ``cpus`` are those of the task that trains.
    """
    out, tile = questions.excluded, len(questions.query_QD)
    keys = index.best(questions.query_QD, _ANSWERS, out, None, None, tile)
    truth_QK = Found.of_keys(keys).place_QK
    vectors = len(index) * index.manifest["tokens"]
    made: dict[str, Any]
    if before and _still_fits(before, search, vectors):
        made = {name: before[name] for name in ("factory", "positions", "wins", "vectors")}
        trained = before["trained"]
    else:
        token_QK = index.winning_tokens(questions.query_QD, truth_QK)
        wins_T = np.bincount(token_QK[token_QK >= 0], minlength=index.manifest["tokens"])
        positions = chosen_vectors(wins_T, search.tokens)
        made = {
            "factory": search.factory or factory_for(len(index) * len(positions)),
            "positions": positions,
            "wins": {
                "ever": int((wins_T > 0).sum()),
                "share": round(float(wins_T[positions].sum() / max(wins_T.sum(), 1)), 6),
            },
            "vectors": vectors,
        }
        content = [index.manifest[key] for key in ("images_file", "segments")]
        trained = f"trained-{_digest(made['factory'], positions, content)}.faiss"
    place = storage.join(index.uri, trained)
    sources = {
        name: _Source(
            index.uri,
            name,
            len(segment.places),
            index.cache,
            tuple(made["positions"]),
            index.manifest["part_rows"],
        )
        for name, segment in index.segments.items()
    }
    if not storage.exists(place):
        task = _training(index, made["factory"], sources, place)
        list(_run("train FAISS", "indexes", [task], cpus))
    data = storage.read_bytes(place)
    lists = ivf_of(_read(data)).nlist
    made |= {"trained": trained, "lists": lists, "parts": _parts(index, trained, sources)}
    ready = Index(index.uri, index.manifest | {"faiss": made}, index.images, index.cache)
    made |= _tuned(ready, questions, truth_QK, search.recall, lists)
    return made, {trained: storage.file_facts(data)}


def _still_fits(before: dict[str, Any], search: SearchSettings, vectors: int) -> bool:
    """Whether the lists of the version before serve this one."""
    return (
        search.factory in (None, before["factory"])
        and search.tokens in (None, len(before["positions"]))
        and before["vectors"] / _GREW <= vectors <= before["vectors"] * _GREW
    )


def _training(
    index: Index, factory: str, sources: dict[str, _Source], output: str
) -> Callable[[], dict[str, Any]]:
    """The task that trains a factory's index on a sample of the images."""
    width = index.manifest["width"]
    lists = ivf_of(empty_index(factory, width)).nlist
    each = len(next(iter(sources.values())).positions)
    if len(index) * each < lists:
        raise InputError(
            f"search.factory: {factory} has {lists:,} lists, but there are only "
            f"{len(index) * each:,} vectors; take fewer lists, or search.kind exact"
        )
    images = min(len(index), -(-_PER_LIST * lists // each))
    drawn = np.random.default_rng(_SEED).choice(len(index), images, replace=False)
    sample = []
    for name, segment in index.segments.items():
        chosen = (segment.places >= 0) & np.isin(segment.places, drawn)
        sample.append((sources[name], np.flatnonzero(chosen)))
    return partial(_train, factory, width, sample, output)


def _parts(index: Index, trained: str, sources: dict[str, _Source]) -> dict[str, str]:
    """Make FAISS' files of all segments; return the names of their directories by segment."""
    folders = {name: f"faiss-{_digest(trained, name)}" for name in sources}
    tasks, owners = [], []
    known: dict[str, dict[str, Any]] = {}
    for name, source in sources.items():
        uri, facts = storage.join(index.uri, folders[name]), {"segment": name, "trained": trained}
        if storage.kept(uri, FAISS_KIND, facts):
            continue
        storage.resume(uri, FAISS_KIND, facts)
        known[name] = {}
        for part in range(len(source.parts)):
            output = storage.join(uri, part_file(part))
            tasks.append(partial(_add, storage.join(index.uri, trained), source, part, output))
            owners.append((name, part_file(part)))
    for task, written in _run("add to FAISS", "parts", tasks, 1) if tasks else ():
        name, file = owners[task]
        known[name] |= {file: written} if written else {}
    for name, files in known.items():
        storage.write_manifest(
            storage.join(index.uri, folders[name]),
            FAISS_KIND,
            {"segment": name, "trained": trained},
            [file for owner, file in owners if owner == name],
            files,
        )
    return folders


def _recall(
    index: Index, questions: Questions, truth_QK: np.ndarray, effort: Effort
) -> tuple[float, float]:
    """The mean share of the exact answers that are found: of the first 10, and of all."""
    keys = index.best(questions.query_QD, _ANSWERS, questions.excluded, None, effort)
    found_QK = Found.of_keys(keys).place_QK

    def share(top: int) -> float:
        own = []
        for some, true in zip(found_QK[:, :top], truth_QK[:, :top], strict=True):
            there = true[true >= 0]
            own.append(np.isin(there, some).mean() if len(there) else 1.0)
        return float(np.mean(own))

    return share(_FIRST), share(_ANSWERS)


def _tuned(
    index: Index, questions: Questions, truth_QK: np.ndarray, target: float, lists: int
) -> dict[str, Any]:
    """The fewest lists with which half of the queries reach the recall, and what it is of the
    others."""
    chosen_on, stated_of = slice(1, None, 2), slice(0, None, 2)
    effort = Effort(1, _DEPTH)
    while min(_recall(index, questions[chosen_on], truth_QK[chosen_on], effort)) < target:
        if effort.nprobe < lists:
            effort = replace(effort, nprobe=min(2 * effort.nprobe, lists))
        elif effort.depth < _DEEPEST:
            effort = replace(effort, depth=2 * effort.depth)
        else:
            break
    first, whole = _recall(index, questions[stated_of], truth_QK[stated_of], effort)
    return {
        "nprobe": effort.nprobe,
        "depth": effort.depth,
        "recall": {str(_FIRST): round(first, 5), str(_ANSWERS): round(whole, 5)},
        "recall_queries": len(truth_QK[stated_of]),
        "recall_target": target,
    }
