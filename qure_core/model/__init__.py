"""The QuRe model: a frozen vision encoder and BLIP-2's Q-Former as a composed query encoder."""

from typing import TYPE_CHECKING

from qure_core.base.lazy import lazy

if TYPE_CHECKING:
    from qure_core.model.assemble import build_model
    from qure_core.model.base import ComposedModel, Embedded, encode_frozen
    from qure_core.model.configuration import PRESETS, QuReConfig, preset
    from qure_core.model.lavis import load_lavis_checkpoint
    from qure_core.model.modeling import QuReModel
    from qure_core.model.pretrained import load_model
    from qure_core.model.processing import QuReProcessor, learn_tokenizer

__all__ = [
    "PRESETS",
    "ComposedModel",
    "Embedded",
    "QuReConfig",
    "QuReModel",
    "QuReProcessor",
    "build_model",
    "encode_frozen",
    "learn_tokenizer",
    "load_lavis_checkpoint",
    "load_model",
    "preset",
]
__getattr__ = lazy(
    __name__,
    {
        "PRESETS": "configuration",
        "ComposedModel": "base",
        "Embedded": "base",
        "QuReConfig": "configuration",
        "QuReModel": "modeling",
        "QuReProcessor": "processing",
        "build_model": "assemble",
        "encode_frozen": "base",
        "learn_tokenizer": "processing",
        "load_lavis_checkpoint": "lavis",
        "load_model": "pretrained",
        "preset": "configuration",
    },
)
