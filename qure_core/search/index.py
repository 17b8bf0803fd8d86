"""A committed index, opened for reading, and exact search in it.

Below an index's directory:

    manifest.json          the version that readers open: replaced whole, so that they see one
    images-DIGEST.parquet  its images: id, URI, category, SHA-256, and the segment that holds it
    segment-DIGEST/        committed embeddings [m, T, D] of images that were added together

Shapes: Q queries, M images, T tokens of an image, D embedding width, K answers of a query.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from qure_core.embeddings.shards import EmbeddingShards
from qure_core.mining.engines.keys import LAST_KEY, key_columns, key_scores, pack_key
from qure_core.model.relevance import refuse_bad_scores
from qure_core.ranking.tiles import Scorer, score_chunks
from qure_core.storage.parquet import read_committed_parquet

INDEX_KIND = storage.Kind(
    "search index",
    r"images-[0-9a-f]{16}\.parquet|"
    r"segment-[0-9a-f]{16}/(((images|queries)-\d{5}\.arrow)|(shapes|manifest|_plan)\.json)",
)
IMAGES = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("category", pa.string()),
        ("sha256", pa.string()),
        ("segment", pa.string()),
    ]
)
_COLUMNS, _BLOCK = 16_384, 256  # images and queries of whose scores are held at a time
_TILE = 8  # queries are few; always as many, as products of one shape give the same bits


@dataclass(frozen=True)
class Found:
    """Of each query the places [Q, K] of its best images and their scores, best first; where fewer
    than K could be, place -1 and score -inf."""

    place_QK: np.ndarray
    score_QK: np.ndarray


class Index:
    """The images of one version of an index, by place: sorted by id."""

    def __init__(self, uri: str, manifest: Mapping[str, Any], images: pa.Table) -> None:
        self.uri, self.manifest = uri, dict(manifest)
        self._images = images.combine_chunks()

    @classmethod
    def open(cls, uri: str) -> Index:
        """The newest version at ``uri``; `InputError` if none is there, or a file is damaged."""
        uri = storage.resolve(uri).rstrip("/")
        manifest = storage.read_manifest(uri, INDEX_KIND)
        index = cls(uri, manifest, read_committed_parquet(uri, manifest["images_file"], manifest))
        for name in manifest["segments"]:
            index._shards(name)  # is there, and whole
        return index

    def __len__(self) -> int:
        return len(self._images)

    @cached_property
    def ids(self) -> list[str]:
        """Image ids by place."""
        ids: list[str] = self._images["image_id"].to_pylist()
        return ids

    @cached_property
    def _place_of(self) -> dict[str, int]:
        return {image: place for place, image in enumerate(self.ids)}

    def row(self, place: int) -> dict[str, Any]:
        """What is known of an image."""
        (row,) = self._images.slice(place, 1).to_pylist()
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
            pc.equal(self._images["sha256"], sha256).to_numpy(zero_copy_only=False)
        ).tolist()

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """The categories that images have, sorted."""
        found = pc.unique(self._images["category"]).to_pylist()
        return tuple(sorted(name for name in found if name is not None))

    def of_category(self, category: str) -> np.ndarray:
        """Which images, by place, are of a category [M]; `InputError` if none is."""
        if category not in self.categories:
            known = ", ".join(self.categories) or "there are none"
            raise InputError(f"category {category!r} is none of the index {self.uri}: {known}")
        equal = pc.equal(self._images["category"], category)
        return np.asarray(pc.fill_null(equal, False).to_numpy(zero_copy_only=False))

    def _shards(self, segment: str) -> EmbeddingShards:
        return EmbeddingShards.open(storage.join(self.uri, segment))

    @cached_property
    def _segments(self) -> list[tuple[EmbeddingShards, tuple[str, ...], np.ndarray]]:
        """Of each segment its embeddings, and ids and places of its images that are in use."""
        segments = self._images["segment"].to_numpy(zero_copy_only=False)
        found = []
        for name in self.manifest["segments"]:
            places = np.flatnonzero(segments == name)
            ids = tuple(self.ids[place] for place in places.tolist())
            found.append((self._shards(name), ids, places))
        return found

    def search(
        self,
        query_QD: Tensor,
        top: int,
        excluded: Sequence[Sequence[int]] | None = None,
        allowed: np.ndarray | None = None,
    ) -> Found:
        """The ``top`` best images of every query, exactly: every image is scored.

        ``excluded`` lists places that a query is not to find; ``allowed`` [M] are the images that
        any may. Equal scores are in the order of ids, as evaluation ranks them. Raises `InputError`
        if a score is not finite.
        """
        query_QD = torch.as_tensor(query_QD, dtype=torch.float32)
        best_QK = torch.cat(
            [
                self._best(block, top, excluded and excluded[first : first + _BLOCK], allowed)
                for first, block in zip(
                    range(0, len(query_QD), _BLOCK), query_QD.split(_BLOCK), strict=True
                )
            ]
        )
        none_QK = best_QK == LAST_KEY
        place_QK = key_columns(best_QK).masked_fill(none_QK, -1)
        score_QK = key_scores(best_QK).masked_fill(none_QK, -torch.inf)
        return Found(place_QK.numpy(), score_QK.numpy())

    def _best(
        self,
        query_QD: Tensor,
        top: int,
        excluded: Sequence[Sequence[int]] | None,
        allowed: np.ndarray | None,
    ) -> Tensor:
        """Keys [Q, K] of some queries' best images."""
        best_QK = torch.full((len(query_QD), 0), LAST_KEY, dtype=torch.int64)
        scorer = Scorer(query_QD, tile=_TILE)
        for shards, ids, places in self._segments:
            column_of = torch.from_numpy(places.astype(np.int32))
            for first, scores_QC in score_chunks(scorer, shards, ids, _COLUMNS):
                columns_C = column_of[first : first + scores_QC.shape[1]]
                refuse_bad_scores(scores_QC)
                keys_QC = pack_key(scores_QC.cpu(), columns_C)
                self._leave_out(keys_QC, columns_C, excluded, allowed)
                both = torch.cat([best_QK, keys_QC], dim=1)
                best_QK = both.topk(min(top, both.shape[1]), dim=1, largest=False).values
        return best_QK

    @staticmethod
    def _leave_out(
        keys_QC: Tensor,
        columns_C: Tensor,
        excluded: Sequence[Sequence[int]] | None,
        allowed: np.ndarray | None,
    ) -> None:
        if allowed is not None:
            keys_QC[:, ~torch.from_numpy(allowed[columns_C.numpy()])] = LAST_KEY
        for row, places in enumerate(excluded or ()):
            if places:
                keys_QC[row, torch.isin(columns_C, torch.tensor(places))] = LAST_KEY
