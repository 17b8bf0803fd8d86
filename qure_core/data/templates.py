"""What is said of a change of attributes: the templates' file."""

from __future__ import annotations

import string

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from qure_core import storage
from qure_core.base.errors import InputError


class AttributeTemplates(BaseModel, extra="forbid"):
    """How a change of one attribute is said in each caption: ``{new}`` and ``{old}`` values."""

    first: list[str] = Field(min_length=1)
    second: list[str] = Field(min_length=1)

    @field_validator("first", "second")
    @classmethod
    def _placeholders(cls, value: list[str]) -> list[str]:
        for text in value:
            check_placeholders(text, {"new", "old"})
            if "{new}" not in text:
                raise ValueError(f"{text!r} does not say {{new}}, the value asked for")
        return value


class Templates(BaseModel, extra="forbid"):
    """The templates' file.

    attributes: what may change, by the table's column. changes: how many of them at once.
    joined: between what two changes say. descriptions: of a single image, by its attributes.
    category: the column whose values are ranked apart.
    """

    attributes: dict[str, AttributeTemplates] = Field(min_length=1)
    changes: list[int] = Field([1, 2], min_length=1)
    joined: str = " and "
    descriptions: list[str] = []
    category: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> Templates:
        for count in self.changes:
            if not 1 <= count <= len(self.attributes):
                raise ValueError(f"changes: {count} of {len(self.attributes)} attributes")
        for name in self.attributes:
            if not name.isidentifier():
                raise ValueError(f"attributes: {name!r} is no word; rename the column")
        for text in self.descriptions:
            check_placeholders(text, set(self.attributes))
        return self


def check_placeholders(text: str, known: set[str]) -> None:
    """Raise `ValueError` if ``text`` names what is not ``known``, or is no template."""
    try:
        parts = [(name, *rest) for _, name, *rest in string.Formatter().parse(text)]
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    for name, form, conversion in parts:
        if name is not None and (name not in known or form or conversion):
            names = ", ".join(f"{{{one}}}" for one in sorted(known))
            raise ValueError(f"{text!r}: {{{name}}} is not one of {names}")


def read_templates(uri: str) -> Templates:
    """The templates in a YAML file; `InputError` that lists what is wrong with it."""
    try:
        value = yaml.safe_load(storage.read_bytes(uri))
    except FileNotFoundError:
        raise InputError(f"--templates: {uri} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--templates: {uri} is not YAML ({error})") from None
    try:
        return Templates.model_validate(value)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise InputError("\n".join([f"--templates: {uri}:", *lines])) from None
