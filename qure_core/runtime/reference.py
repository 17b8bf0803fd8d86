"""The page of all settings, made from their schema.

python -m qure_core.runtime.reference > configs/README.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qure_core.base.config import Settings, free_settings

_HEAD = """# Settings

Every setting of every stage. `configs/*.yaml` are recipes; what a recipe leaves out has the default
below, and any setting is overridden on the command line:

```
python pipelines/train.py --config configs/quickstart.yaml --train.lr 1e-4 --run.dir runs/other
```

| recipe | what it is for |
|---|---|
| `quickstart.yaml` | `make train`: the built-in world and a tiny model on two CPU cores |
| `jsonl.yaml` | the pattern for images and triplets of your own |
| `emoji.yaml` | a real data set without photographs, from random weights |
| `fashioniq.yaml`, `cirr.yaml` | the paper's settings, for BLIP-2 weights on GPUs |

Everything wrong with a config is said at once, and an unknown name is an error. A run is resumed
under the settings that it was begun with; those marked *free* may differ, as they do not change its
result. A run of an older version, whose config lacks a setting, had its default.

This page is made by `python -m qure_core.runtime.reference` and held equal to it by a test.
"""


def _type(annotation: Any) -> str:
    """A type in the words of a config's reader."""
    if get_origin(annotation) is not None and str(annotation).startswith("typing.Literal"):
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if arguments := [part for part in get_args(annotation) if part is not type(None)]:
        if get_origin(annotation) in (list, dict):
            return "list" if get_origin(annotation) is list else "mapping"
        return " or ".join(_type(part) for part in arguments)
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{sign} {getattr(item, name):,}"
        for item in field.metadata
        for name, sign in signs.items()
        if getattr(item, name, None) is not None
    ]
    return f" ({', '.join(found)})" if found else ""


def _default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, str) and "/qure-features-" in value:
        return "in the temporary directory"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value == {}:
        return "none"
    return f"`{value}`"


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    free = free_settings()
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _rows(field.annotation, f"{prefix}{name}.")
        elif field.description:
            full = f"{prefix}{name}"
            mark = " *free*" if full in free else ""
            kind = _type(field.annotation) + _bounds(field)
            meaning = re.sub(r"\s+", " ", field.description).replace("|", "\\|")
            yield f"| `{full}`{mark} | {kind} | {_default(field)} | {meaning} |"


def settings_reference() -> str:
    """The page, as Markdown."""
    lines = [_HEAD, "| setting | value | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*lines, *_rows(Settings, "")]) + "\n"


if __name__ == "__main__":
    print(settings_reference(), end="")
