"""The QuRe model: a frozen vision encoder and BLIP-2's Q-Former as a composed query encoder."""

from qure_core.model.configuration import PRESETS, QuReConfig, preset
from qure_core.model.lavis import load_lavis_checkpoint
from qure_core.model.modeling import QuReModel, encode_frozen
from qure_core.model.pretrained import build_model, load_model
from qure_core.model.processing import QuReProcessor, learn_tokenizer

__all__ = [
    "PRESETS",
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
