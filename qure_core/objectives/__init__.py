"""Objectives of fine-tuning by name; one is added by a file beside these and a line here."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from qure_core.base.errors import InputError
from qure_core.objectives.bradley_terry import BradleyTerry
from qure_core.objectives.info_nce import InfoNCE
from qure_core.objectives.outputs import Objective, Outputs

OBJECTIVES: dict[str, Any] = {
    "bradley_terry": BradleyTerry,
    "info_nce": InfoNCE,
}

__all__ = ["OBJECTIVES", "Objective", "Outputs", "make_objective"]


def make_objective(name: str, options: dict[str, Any]) -> Objective:
    """The objective called ``name`` with its own ``options``; `InputError` if either is unknown."""
    if name not in OBJECTIVES:
        raise InputError(f"objective.name: {name!r} is not one of {', '.join(sorted(OBJECTIVES))}")
    kind = OBJECTIVES[name]
    try:
        objective: Objective = kind(kind.Options(**options))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"objective.options.{place}: {first['msg']} ({name} has the options "
            f"{', '.join(kind.Options.model_fields) or 'none'})"
        ) from None
    return objective
