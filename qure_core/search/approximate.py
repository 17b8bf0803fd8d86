"""Candidates from FAISS: which images of a part own the vectors nearest to a query.

The score of an image is the largest inner product over its vectors, so the best images own the best
vectors. FAISS knows a part's rows by number: vector i is of row i // (vectors of an image).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from qure_core.base.errors import InputError


def ivf_of(index: Any) -> Any:
    """The inverted file inside a FAISS index; `InputError` if it has none."""
    try:
        return faiss.extract_index_ivf(index)
    except RuntimeError:
        raise InputError(
            "search.factory: has no inverted file; give one with IVF, such as IVF4096,SQ4"
        ) from None


@dataclass(frozen=True)
class Effort:
    """How far a search goes: lists looked through, and vectors asked for each image wanted."""

    nprobe: int
    depth: int


class PartIndex:
    """FAISS' index of a part's images, of each the same number of vectors."""

    def __init__(self, path: str, vectors: int) -> None:
        self.vectors = vectors
        self._index = faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        self._lists = ivf_of(self._index).nlist

    def rows(
        self, query_QD: np.ndarray, images: int, effort: Effort, usable: np.ndarray
    ) -> list[np.ndarray]:
        """Of each query the rows, sorted, of about ``images`` or more candidates among those that
        are ``usable`` [rows]; fewer if the lists looked through hold no more."""
        left = int(usable.sum())
        share = left / len(usable)
        # Where few of the images may be found, the best of them lie further away.
        nprobe = min(self._lists, int(np.ceil(effort.nprobe / max(share, 1e-9))))
        chosen = None
        if left < len(usable):
            bits = np.packbits(np.repeat(usable, self.vectors), bitorder="little")
            chosen = faiss.IDSelectorBitmap(bits)
        parameters: Any = faiss.SearchParametersIVF(nprobe=nprobe, sel=chosen)
        if isinstance(self._index, faiss.IndexPreTransform):
            parameters = faiss.SearchParametersPreTransform(index_params=parameters)
        wanted, most = min(images, left), left * self.vectors
        asked = min(images * effort.depth, most)
        while True:
            _, found_QK = self._index.search(query_QD, asked, params=parameters)
            rows = [np.unique(own[own >= 0] // self.vectors) for own in found_QK]
            short = [
                len(own) < wanted and found[-1] >= 0
                for own, found in zip(rows, found_QK, strict=True)
            ]
            if asked == most or not any(short):
                return rows
            asked = min(2 * asked, most)
