"""Helpers shared by the dataset readers: JSON rows with checked keys, and image files by name."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from qure_core import storage
from qure_core.errors import InputError, Problem

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def read_rows(uri: str, kind: type, problems: list[Problem]) -> Any:
    """The value in ``uri`` if it is a ``kind``, list or dict; else a problem and an empty one."""
    try:
        value = storage.read_json(uri)
    except InputError as error:
        problems.append(Problem(uri, "", str(error).removeprefix(f"{uri}: ")))
        return kind()
    if not isinstance(value, kind):
        problems.append(
            Problem(uri, "", f"holds a {type(value).__name__}, where a {kind.__name__} is needed")
        )
        return kind()
    return value


def check_row(
    row: Any,
    fields: dict[str, type | tuple[type, ...]],
    uri: str,
    where: str,
    problems: list[Problem],
) -> bool:
    """Whether ``row`` is a mapping with every field of the right type; adds a problem per fault."""
    if not isinstance(row, dict):
        problems.append(
            Problem(uri, where, f"is a {type(row).__name__}, where a mapping is needed")
        )
        return False
    good = True
    for name, kind in fields.items():
        if name not in row:
            problems.append(Problem(uri, where, f"key {name!r} is missing"))
            good = False
        elif not isinstance(row[name], kind) or isinstance(row[name], bool):
            problems.append(
                Problem(uri, where, f"{name!r} is a {type(row[name]).__name__}: {row[name]!r}")
            )
            good = False
    return good


class ImageFolder:
    """The image files below a directory, listed once and found by relative path without suffix."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        fs, path = storage.filesystem(uri)
        root = path.rstrip("/") + "/"
        self._uri_of: dict[str, str] = {}
        for file in sorted(fs.find(path)) if fs.exists(path) else []:
            relative = PurePosixPath(file.removeprefix(root))
            if relative.suffix.lower() in IMAGE_SUFFIXES:
                key = str(relative.with_suffix(""))
                self._uri_of.setdefault(key, storage.join(uri, str(relative)))

    def names(self) -> list[str]:
        return sorted(self._uri_of)

    def find(self, *candidates: str) -> str | None:
        """The URI of the first candidate (a path without suffix) that exists."""
        for candidate in candidates:
            if candidate in self._uri_of:
                return self._uri_of[candidate]
        return None


def safe_relative(path: str) -> str | None:
    """``path`` as a clean relative path, or None if it would leave its root."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        return None
    return str(pure)
