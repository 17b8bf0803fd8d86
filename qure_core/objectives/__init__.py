"""Objectives of fine-tuning by name; one is added by a file beside these and a line here."""

from __future__ import annotations

from typing import Any

from qure_core.base.errors import InputError
from qure_core.base.options import read_options
from qure_core.objectives.bradley_terry import BradleyTerry
from qure_core.objectives.dcl import DCL
from qure_core.objectives.fnc import FNC
from qure_core.objectives.hcl import HCL
from qure_core.objectives.hinge import Hinge
from qure_core.objectives.hn_nce import HNNCE
from qure_core.objectives.info_nce import InfoNCE
from qure_core.objectives.outputs import Objective, Outputs
from qure_core.objectives.plackett_luce import PlackettLuce

OBJECTIVES: dict[str, Any] = {
    "bradley_terry": BradleyTerry,
    "dcl": DCL,
    "fnc": FNC,
    "hcl": HCL,
    "hinge": Hinge,
    "hn_nce": HNNCE,
    "info_nce": InfoNCE,
    "plackett_luce": PlackettLuce,
}

__all__ = ["OBJECTIVES", "Objective", "Outputs", "make_objective"]


def make_objective(name: str, options: dict[str, Any]) -> Objective:
    """The objective called ``name`` with its own ``options``; `InputError` if either is unknown."""
    if name not in OBJECTIVES:
        raise InputError(f"objective.name: {name!r} is not one of {', '.join(sorted(OBJECTIVES))}")
    kind = OBJECTIVES[name]
    objective: Objective = kind(read_options(kind.Options, options, "objective.options", name))
    return objective
