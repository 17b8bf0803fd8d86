"""Protocols by name; one is added by a file beside these and a line here."""

from __future__ import annotations

from typing import Any

from qure_core.evaluation.protocols.circo import CIRCO, CIRCOTest
from qure_core.evaluation.protocols.cirr import CIRR, CIRRTest
from qure_core.evaluation.protocols.hp_fashioniq import HPFashionIQ
from qure_core.evaluation.protocols.protocol import Protocol, Request
from qure_core.evaluation.protocols.recalls import FashionIQ, Own, galleries_of

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        *(Own(), FashionIQ(), CIRR(), CIRRTest(), CIRCO(), CIRCOTest(), HPFashionIQ()),
    )
}

__all__ = ["PROTOCOLS", "Protocol", "Request", "galleries_of", "of_format", "of_manifest"]


def of_format(layout: str) -> Protocol:
    """What data of a layout (``data.format``) are measured by in training."""
    return PROTOCOLS[layout if layout in ("cirr", "circo") else Own.name]


def of_manifest(manifest: dict[str, Any]) -> Protocol:
    """The protocol of an evaluation; older versions had one alone and did not name it."""
    return PROTOCOLS[manifest.get("protocol", Own.name)]
