"""Rules by name: which images are a query's hard negatives.

One is added by a file beside these and a line here.
"""

from __future__ import annotations

from typing import Any

from qure_core.base.errors import InputError
from qure_core.mining.rules.rule import IMAGE_TOKENS, Rule, Selection
from qure_core.mining.rules.steep_drops import DropRule

RULES: dict[str, Any] = {
    "steep_drops": DropRule,
}

__all__ = ["IMAGE_TOKENS", "RULES", "Rule", "Selection", "rule_named"]


def rule_named(name: str) -> Any:
    """The class of the rule called ``name``; `InputError` if there is none."""
    if name not in RULES:
        raise InputError(f"mining.rule: {name!r} is not one of {', '.join(sorted(RULES))}")
    return RULES[name]
