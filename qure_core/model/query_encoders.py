"""Query encoders by name; one is added by a file beside this and a line here."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from qure_core.base.options import NoOptions, read_options
from qure_core.model.base import ComposedModel
from qure_core.model.configuration import QuReConfig
from qure_core.model.modeling import QuReModel
from qure_core.model.sprc import SPRCModel, SPRCOptions
from qure_core.model.towers import CombinerOptions, SumOptions, TowersModel

QUERY_ENCODERS: dict[str, tuple[type[ComposedModel], type[BaseModel]]] = {
    "qformer": (QuReModel, NoOptions),
    "sprc": (SPRCModel, SPRCOptions),
    "combiner": (TowersModel, CombinerOptions),
    "sum": (TowersModel, SumOptions),
}
TOWERS = ("combiner", "sum")
"""Those over a text model of its own, in place of the Q-Former."""


def model_class(config: QuReConfig) -> type[ComposedModel]:
    """The class of the models of this configuration."""
    return QUERY_ENCODERS[config.query_encoder][0]


def checked_options(query_encoder: str, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` of a query encoder (``model.encoder_options``); `InputError` if one is wrong."""
    schema = QUERY_ENCODERS[query_encoder][1]
    read_options(schema, options, "model.encoder_options", query_encoder)
    return options
