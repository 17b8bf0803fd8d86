"""Images by id as input of the vision encoder: decoded in threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qure_core.base.config import Pixels
from qure_core.data.images import load_image, normalise, preprocess_to_bytes
from qure_core.data.pixels import upright


class VisionLoader(Protocol):
    """Gives one model input, called ``name``, of images by id."""

    name: str

    def __call__(self, image_ids: Sequence[str]) -> Tensor: ...


def pixel_values(pixels_BCHW: np.ndarray) -> Tensor:
    """uint8 [B, 3, S, S] as the encoder's normalised float32 input of the same shape."""
    return torch.from_numpy(normalise(pixels_BCHW))


@dataclass
class ImageLoader:
    """Decodes and preprocesses images by id, in threads, keeping the latest in memory.

    images: URIs by id, or images. size: side of the encoder's input, pixels. pixels: how images are
    taken (`data.images.decode`). cache_mb: bounds the preprocessed pixels that are kept, MB.
    """

    images: Mapping[str, str | Image.Image]
    size: int
    pixels: Pixels
    max_pixels: int
    threads: int
    cache_mb: int = 0

    name = "pixel_values"

    def __post_init__(self) -> None:
        kept = self.cache_mb * 2**20 // (3 * self.size**2)
        self._cached = lru_cache(maxsize=kept)(self._one)

    def _one(self, image_id: str) -> np.ndarray:
        image = self.images[image_id]
        if not isinstance(image, Image.Image):
            image = load_image(image, self.max_pixels, self.pixels)
        elif self.pixels == "upright":
            image = upright(image)
        return preprocess_to_bytes(image, self.size)

    def __call__(self, image_ids: Sequence[str]) -> Tensor:
        """Model input of the named images: float32 [B, 3, S, S]."""
        # Of its own: loaders are made per shard and per call of a user, and would leave theirs.
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            return pixel_values(np.stack(list(pool.map(self._cached, image_ids))))
