"""What stored features depend on besides the images: the encoder, preprocessing and precision."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from qure_core import storage
from qure_core.base.config import Pixels
from qure_core.base.errors import InputError
from qure_core.data.images import normalise, preprocess_to_bytes
from qure_core.data.pixels import upright
from qure_core.model.checkpoint_files import CHECKPOINT_KIND, checkpoint_pixels

_UPRIGHT_MODES = ("RGB", "P", "L", "RGBA", "CMYK", "I", "F")


@dataclass(frozen=True)
class FeatureKey:
    """Digests of the encoder's weights and of preprocessing, and the features' precision.

    ``image_size`` is the side of the encoder's input, pixels; ``pixels`` how images are taken,
    which ``preprocessing`` depends on too.
    """

    encoder: str
    image_size: int
    preprocessing: str
    precision: str
    pixels: Pixels

    @classmethod
    def of(cls, encoder: str, image_size: int, pixels: Pixels, precision: str) -> FeatureKey:
        return cls(encoder, image_size, preprocessing_digest(image_size, pixels), precision, pixels)

    def facts(self) -> dict[str, Any]:
        """What a store is known by."""
        return {name: value for name, value in asdict(self).items() if name != "pixels"}

    def uri(self, stores: str) -> str:
        """Where the features of this key are, below the directory of all stores."""
        whole = hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode())
        return storage.join(stores, whole.hexdigest()[:16])


def feature_key(checkpoint: str, precision: str) -> FeatureKey:
    """The key of a committed checkpoint's features."""
    manifest = storage.read_manifest(checkpoint, CHECKPOINT_KIND)
    if "encoder" not in manifest:
        raise InputError(
            f"{checkpoint}: its manifest does not say which encoder it has, so no features can be "
            "stored for it; set --features off"
        )
    pixels = checkpoint_pixels(checkpoint)
    return FeatureKey.of(manifest["encoder"], manifest["image_size"], pixels, precision)


@lru_cache
def preprocessing_digest(image_size: int, pixels: Pixels) -> str:
    """What preprocessing does, told by what it makes of some fixed pictures.

    So any change of it is noticed, whether in its settings, its code or the image library.
    """
    digest = hashlib.sha256()
    ramp = (np.arange(97 * 61 * 3, dtype=np.int64) * 7919 % 256).astype(np.uint8)
    for height, width in ((97, 61), (61, 97), (77, 77)):
        picture = Image.fromarray(np.resize(ramp, (height, width, 3)))
        for mode in ("RGB", "P", "L") if pixels == "released" else _UPRIGHT_MODES:
            converted = picture.convert(mode)
            if mode == "I":
                converted = converted.point(lambda value: value * 257)  # of 16 bits
            if pixels == "upright":
                converted.getexif()[ExifTags.Base.Orientation] = 6
                converted = upright(converted)
            values = preprocess_to_bytes(converted, image_size)
            digest.update(normalise(values[None]).tobytes())
    return digest.hexdigest()[:16]
