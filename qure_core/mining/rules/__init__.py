"""Rules by name: which images are a query's hard negatives.

One is added by a file beside these and a line here.
"""

from __future__ import annotations

from typing import Any

from qure_core.base.errors import InputError
from qure_core.mining.rules.margin_pos import MarginPos
from qure_core.mining.rules.perc_pos import PercPos
from qure_core.mining.rules.random import Random
from qure_core.mining.rules.rule import IMAGE_TOKENS, Rule, Selection
from qure_core.mining.rules.simans import SimANS
from qure_core.mining.rules.steep_drops import DropRule
from qure_core.mining.rules.target_drop import TargetDrop
from qure_core.mining.rules.top_k import TopK

RULES: dict[str, Any] = {
    "margin_pos": MarginPos,
    "perc_pos": PercPos,
    "random": Random,
    "simans": SimANS,
    "steep_drops": DropRule,
    "target_drop": TargetDrop,
    "top_k": TopK,
}

__all__ = ["IMAGE_TOKENS", "RULES", "Rule", "Selection", "rule_named"]


def rule_named(name: str) -> Any:
    """The class of the rule called ``name``; `InputError` if there is none."""
    if name not in RULES:
        raise InputError(f"mining.rule: {name!r} is not one of {', '.join(sorted(RULES))}")
    return RULES[name]
