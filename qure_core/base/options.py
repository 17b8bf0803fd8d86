"""Settings of a part that is chosen by name: its own schema, read from a plain mapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qure_core.base.errors import InputError

_Options = TypeVar("_Options", bound=BaseModel)


class NoOptions(BaseModel, extra="forbid"):
    """Of a part that has none."""


def read_options(
    schema: type[_Options], given: Mapping[str, Any], setting: str, name: str
) -> _Options:
    """``given`` as ``schema`` has it; `InputError` naming ``setting`` and the part's ``name``."""
    try:
        return schema(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join([setting, *map(str, first["loc"])])
        raise InputError(
            f"{place}: {first['msg']} ({name} has the options "
            f"{', '.join(schema.model_fields) or 'none'})"
        ) from None
