"""A committed index, opened for reading, and search in it.

Below an index's directory:

    manifest.json          the version that readers open: replaced whole, so that they see one
    images-DIGEST.parquet  its images: id, URI, category, SHA-256, and the row that holds each
    segment-DIGEST/        committed embeddings [m, T, D] of images that were added together
    faiss-DIGEST/          FAISS' files of a segment, one for each part of it
    trained-DIGEST.faiss   what they share: the centroids of the lists, and the quantizer
    questions-DIGEST/      committed embeddings of the queries on which the recall is measured

Shapes: Q queries, M images, T tokens of an image, D embedding width, K answers of a query.
"""

from __future__ import annotations

import getpass
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.mining.engines.keys import LAST_KEY, key_columns, key_scores, pack_key
from qure_core.model.checkpoint_files import checkpoint_digest
from qure_core.model.relevance import refuse_bad_scores
from qure_core.ranking.tiles import Scorer
from qure_core.search.approximate import Effort, PartIndex
from qure_core.search.segments import Segment
from qure_core.storage.parquet import read_committed_parquet

INDEX_KIND = storage.Kind(
    "search index",
    r"images-[0-9a-f]{16}\.parquet|trained-[0-9a-f]{16}\.faiss|"
    r"faiss-[0-9a-f]{16}/(part-\d{5}\.faiss|(manifest|_plan)\.json)|"
    r"(segment|questions)-[0-9a-f]{16}/"
    r"(((images|queries)-\d{5}\.arrow)|(shapes|manifest|_plan)\.json)",
)
FAISS_KIND = storage.Kind("FAISS files of a search index", r"part-\d{5}\.faiss")
IMAGES = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("category", pa.string()),
        ("metadata", pa.map_(pa.string(), pa.string())),
        ("sha256", pa.string()),
        ("stamp", pa.string()),
        ("segment", pa.string()),
        ("row", pa.int64()),
    ]
)
CACHE = f"{tempfile.gettempdir()}/qure-indexes-{getpass.getuser()}"
"""Where this user's copies of remote indexes are kept, unless told."""
_COLUMNS, _BLOCK = 16_384, 256  # images and queries of whose scores are held at a time
_TILE = 8  # queries are few; always as many, as products of one shape give the same bits
_FEW = 5_000  # images of which all are scored rather than some found


_PAIRS = pa.list_(pa.struct([("key", pa.string()), ("value", pa.string())]))


def part_bounds(rows: int, most: int) -> list[tuple[int, int]]:
    """First and last row of a segment's parts: as even as can be, of ``most`` rows at most."""
    parts = -(-rows // most)
    return [(rows * n // parts, rows * (n + 1) // parts) for n in range(parts)]


def part_file(part: int) -> str:
    return f"part-{part:05d}.faiss"


def checkpoint_of(uri: str, manifest: Mapping[str, Any], given: str | None = None) -> str:
    """Where the checkpoint is that the index at ``uri`` was made with: as ``given``, or where it
    was then. Raises `InputError` if it is not there, or has other weights."""
    source = storage.resolve(given or manifest["checkpoint"])
    if not storage.is_committed(source):
        raise InputError(
            f"{source}: the checkpoint that the index {uri} was made with is not there; say with "
            "--checkpoint where it is now"
        )
    if checkpoint_digest(source) != manifest["checkpoint_digest"]:
        raise InputError(
            f"{source}: other weights than those that the index {uri} was made with; build the "
            "index again with this checkpoint, or give its own"
        )
    return source


@dataclass(frozen=True)
class Found:
    """Of each query the places [Q, K] of its best images and their scores, best first; where fewer
    than K could be, place -1 and score -inf."""

    place_QK: np.ndarray
    score_QK: np.ndarray

    @classmethod
    def of_keys(cls, best_QK: Tensor) -> Found:
        none_QK = best_QK == LAST_KEY
        place_QK = key_columns(best_QK).masked_fill(none_QK, -1)
        score_QK = key_scores(best_QK).masked_fill(none_QK, -torch.inf)
        return cls(place_QK.numpy(), score_QK.numpy())


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a segment, and FAISS' index of them if there is one."""

    segment: Segment
    first: int
    last: int
    faiss: PartIndex | None

    def usable(self, allowed: np.ndarray | None) -> np.ndarray:
        """Which of its rows are in use, and of ``allowed`` [M] images."""
        places = self.segment.places[self.first : self.last]
        return (places >= 0) if allowed is None else (places >= 0) & allowed[places]


class Index:
    """The images of one version of an index, by place: sorted by id."""

    def __init__(
        self,
        uri: str,
        manifest: Mapping[str, Any],
        images: pa.Table,
        cache: str = CACHE,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.uri, self.manifest, self.cache, self.share = uri, dict(manifest), cache, share
        self.images = images.combine_chunks()

    @classmethod
    def open(cls, uri: str, cache: str = CACHE) -> Index:
        """The newest version at ``uri``; `InputError` if none is there, or a file is damaged.

        Of a remote index, copies of what is needed are kept in the directory ``cache``.
        """
        uri = storage.resolve(uri).rstrip("/")
        index = cls.version(uri, storage.read_manifest(uri, INDEX_KIND), cache)
        for name in index.manifest["segments"]:
            storage.read_manifest(storage.join(uri, name), None)  # is there, and whole
        return index

    @classmethod
    def version(
        cls,
        uri: str,
        manifest: Mapping[str, Any],
        cache: str = CACHE,
        share: tuple[int, int] = (0, 1),
    ) -> Index:
        """The version that ``manifest`` describes. ``share`` (i, n): every nth of its parts alone,
        from the ith, is searched."""
        images = read_committed_parquet(uri, manifest["images_file"], dict(manifest))
        if images.schema != IMAGES:
            raise InputError(f"{uri}: made by an earlier version; build the index again")
        return cls(uri, manifest, images, cache, share)

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def ids(self) -> list[str]:
        """Image ids by place."""
        ids: list[str] = self.images["image_id"].to_pylist()
        return ids

    @cached_property
    def _place_of(self) -> dict[str, int]:
        return {image: place for place, image in enumerate(self.ids)}

    def row(self, place: int) -> dict[str, Any]:
        """What is known of an image."""
        (row,) = self.images.slice(place, 1).to_pylist()
        return dict(row)

    def places(self, image_ids: Iterable[str]) -> list[int]:
        """Places of images by id; `InputError` naming one that the index does not hold."""
        found = []
        for image in image_ids:
            if image not in self._place_of:
                raise InputError(f"image {image!r} is not in the index {self.uri}")
            found.append(self._place_of[image])
        return found

    def holds(self, image_id: str) -> bool:
        """Whether there is an image of this id."""
        return image_id in self._place_of

    def same_content(self, sha256: str) -> list[int]:
        """Places of the images whose files have this digest."""
        return np.flatnonzero(
            pc.equal(self.images["sha256"], sha256).to_numpy(zero_copy_only=False)
        ).tolist()

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """The categories that images have, sorted."""
        found = pc.unique(self.images["category"]).to_pylist()
        return tuple(sorted(name for name in found if name is not None))

    def of_category(self, category: str) -> np.ndarray:
        """Which images, by place, are of a category [M]; `InputError` if none is."""
        if category not in self.categories:
            known = ", ".join(self.categories) or "there are none"
            raise InputError(f"category {category!r} is none of the index {self.uri}: {known}")
        equal = pc.equal(self.images["category"], category)
        return np.asarray(pc.fill_null(equal, False).to_numpy(zero_copy_only=False))

    @cached_property
    def metadata(self) -> tuple[str, ...]:
        """The columns that images have besides, sorted."""
        keys = pc.list_flatten(self.images["metadata"].combine_chunks().cast(_PAIRS)).field("key")
        return tuple(sorted(pc.unique(keys).to_pylist()))

    @cached_property
    def values(self) -> dict[str, tuple[str, ...]]:
        """The values of each column, sorted."""

        def of(column: str) -> tuple[str, ...]:
            found = pc.unique(pc.map_lookup(self.images["metadata"], column, "first")).to_pylist()
            return tuple(sorted(value for value in found if value is not None))

        return {column: of(column) for column in self.metadata}

    def with_metadata(self, column: str, value: str) -> np.ndarray:
        """Which images, by place, have a value in a column [M]; `InputError` if none has."""
        if column not in self.metadata:
            known = ", ".join(self.metadata) or "there are none"
            raise InputError(f"column {column!r} is none of the index {self.uri}: {known}")
        values = pc.map_lookup(self.images["metadata"], column, "first")
        equal = pc.fill_null(pc.equal(values, value), False).to_numpy(zero_copy_only=False)
        if not equal.any():
            raise InputError(f"no image of the index {self.uri} has {column} {value!r}")
        return np.asarray(equal)

    def allowed(
        self, category: str | None, where: Iterable[tuple[str, str]] = ()
    ) -> np.ndarray | None:
        """Which images, by place, are of a category and have all values of metadata columns [M];
        None for all of them."""
        masks = [self.with_metadata(column, value) for column, value in where]
        if category is not None:
            masks.append(self.of_category(category))
        return np.logical_and.reduce(masks) if masks else None

    @cached_property
    def segments(self) -> dict[str, Segment]:
        """Embeddings by the names of segments."""
        names = self.images["segment"].to_numpy(zero_copy_only=False)
        row_of_place = self.images["row"].to_numpy()
        found = {}
        for name in self.manifest["segments"]:
            used = np.flatnonzero(names == name)
            places = np.full(self.manifest["rows"][name], -1, np.int32)
            places[row_of_place[used]] = used
            found[name] = Segment.open(self.uri, name, places, self.cache)
        return found

    @cached_property
    def parts(self) -> list[Part]:
        """What is searched, of this index's share."""
        made = self.manifest.get("faiss")
        found = []
        for name, segment in self.segments.items():
            rows = len(segment.places)
            folder = None
            if made:
                folder = storage.join(self.uri, made["parts"][name])
                folder = storage.kept_copy(folder, FAISS_KIND, self.cache)
            for number, (first, last) in enumerate(part_bounds(rows, self.manifest["part_rows"])):
                own = None
                if folder and made:
                    path = storage.filesystem(storage.join(folder, part_file(number)))[1]
                    own = PartIndex(path, len(made["positions"]))
                found.append(Part(segment, first, last, own))
        return found[self.share[0] :: self.share[1]]

    @property
    def effort(self) -> Effort | None:
        """How far FAISS searches; None of an index that is searched exactly."""
        made = self.manifest.get("faiss")
        return Effort(made["nprobe"], made["depth"]) if made else None

    def search(
        self,
        query_QD: Tensor,
        top: int,
        excluded: Sequence[Sequence[int]] | None = None,
        allowed: np.ndarray | None = None,
        exact: bool = False,
    ) -> Found:
        """The ``top`` best images of every query: of all, or of the candidates that FAISS finds if
        the index has its files and ``exact`` does not forbid it. Scores are the model's own.

        ``excluded`` lists places that a query is not to find; ``allowed`` [M] are the images that
        any may. Equal scores are in the order of ids, as evaluation ranks them. Raises `InputError`
        if a score is not finite.
        """
        effort = None if exact else self.effort
        return Found.of_keys(self.best(query_QD, top, excluded, allowed, effort))

    def winning_tokens(self, query_QD: Tensor, place_QK: np.ndarray) -> np.ndarray:
        """Which of an image's vectors gives its score, [Q, K]; -1 where there is no image."""
        token_QK = np.full(place_QK.shape, -1)
        places = np.unique(place_QK[place_QK >= 0])
        for segment in self.segments.values():
            rows = np.flatnonzero(np.isin(segment.places, places) & (segment.places >= 0))
            image_MTD = segment.embeddings(rows)
            row_of = np.full(len(self) + 1, -1)  # the last is of place -1
            row_of[segment.places[rows]] = np.arange(len(rows))
            for query_D, own, tokens in zip(query_QD.numpy(), place_QK, token_QK, strict=True):
                here = row_of[own] >= 0
                tokens[here] = (image_MTD[row_of[own[here]]] @ query_D).argmax(axis=1)
        return token_QK

    def best(
        self,
        query_QD: Tensor,
        top: int,
        excluded: Sequence[Sequence[int]] | None,
        allowed: np.ndarray | None,
        effort: Effort | None,
        tile: int = _TILE,
    ) -> Tensor:
        """`search` as ascending keys [Q, K] of scores and places, which can be merged; with None
        for ``effort`` exactly. Another ``tile``, of many queries, is quicker, and gives other last
        bits."""
        query_QD = torch.as_tensor(query_QD, dtype=torch.float32)
        usable = [part.usable(allowed) for part in self.parts]
        left = sum(int(rows.sum()) for rows in usable)
        if effort is None or (allowed is not None and left <= max(_FEW, len(self) // 50)):
            step, effort = _BLOCK, None
        else:
            step = tile
        blocks = []
        for first in range(0, len(query_QD), step):
            block, out = query_QD[first : first + step], (excluded or ())[first : first + step]
            keys = self._best(block, top, out, usable, effort, tile)
            if effort is not None:
                # A query of which FAISS found fewer than there are is answered exactly.
                for row, found in enumerate((keys != LAST_KEY).sum(dim=1).tolist()):
                    there = left - (len(out[row]) if out else 0)
                    if found < min(top, there):
                        one = slice(row, row + 1)
                        own = self._best(block[one], top, out[one], usable, None, tile)
                        keys = _padded(keys, own.shape[1])
                        keys[one] = _padded(own, keys.shape[1])
            blocks.append(keys)
        width = max((keys.shape[1] for keys in blocks), default=0)
        empty = torch.empty(0, 0, dtype=torch.int64)
        return torch.cat([_padded(keys, width) for keys in blocks]) if blocks else empty

    def _best(
        self,
        query_QD: Tensor,
        top: int,
        excluded: Sequence[Sequence[int]],
        usable: Sequence[np.ndarray],
        effort: Effort | None,
        tile: int,
    ) -> Tensor:
        best_QK = torch.full((len(query_QD), 0), LAST_KEY, dtype=torch.int64)
        scorer = Scorer(query_QD, tile=tile)
        out = [torch.tensor(places, dtype=torch.int32) for places in excluded]
        wanted = top + max(map(len, excluded), default=0)
        for part, rows in zip(self.parts, usable, strict=True):
            candidates = None
            chosen = np.flatnonzero(rows)
            if effort is not None and part.faiss is not None and len(chosen):
                candidates = part.faiss.rows(query_QD.numpy(), wanted, effort, rows)
                chosen = np.unique(np.concatenate(candidates))
            for own, scores_QC in _scored(scorer, part.segment, chosen + part.first):
                refuse_bad_scores(scores_QC)
                columns_C = torch.from_numpy(part.segment.places[own])
                keys_QC = pack_key(scores_QC.cpu(), columns_C)
                for row, places in enumerate(out):
                    if len(places):
                        keys_QC[row, torch.isin(columns_C, places)] = LAST_KEY
                if candidates is not None:
                    for row, found in enumerate(candidates):
                        alien = ~np.isin(own - part.first, found, assume_unique=True)
                        keys_QC[row, torch.from_numpy(alien)] = LAST_KEY
                both = torch.cat([best_QK, keys_QC], dim=1)
                best_QK = both.topk(min(top, both.shape[1]), dim=1, largest=False).values
        return best_QK


def _scored(
    scorer: Scorer, segment: Segment, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield some of a segment's ``rows`` and the scores [Q, C] of their images."""
    for first in range(0, len(rows), _COLUMNS):
        some = rows[first : first + _COLUMNS]
        scores_QC = torch.empty(scorer.queries, len(some), device=scorer.device)
        filled = 0
        for own, image_MTD in segment.tiles(some):
            scorer(image_MTD, scores_QC[:, filled : filled + len(own)])
            filled += len(own)
        yield some, scores_QC


def _padded(keys: Tensor, width: int) -> Tensor:
    """Keys [Q, K] with as many more, of no image, as make ``width`` of them."""
    return torch.nn.functional.pad(keys, (0, max(width - keys.shape[1], 0)), value=LAST_KEY)
