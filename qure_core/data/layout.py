"""Helpers shared by the dataset readers: JSON rows with checked keys, and image files by name."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Any

from qure_core import storage
from qure_core.base.errors import InputError, Problem

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


def names_of(
    value: Any, role: str, uri: str, where: str, problems: list[Problem]
) -> tuple[str, ...]:
    """``value`` as a list of image names; anything else is a problem, and no names."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]} ..."
        problems.append(Problem(uri, where, f"{role} is not a list of image names: {shown}"))
        return ()
    return tuple(value)


def relevant_of(
    value: Any,
    target: str | None,
    known: Collection[str],
    uri: str,
    where: str,
    problems: list[Problem],
) -> tuple[str, ...]:
    """The images that satisfy a query, its target among them, from a row that lists them.

    A row that is no list, names nothing, or names an image that is not there is a problem: every
    measure of relevance would be wrong without a word.
    """
    before = len(problems)
    names = names_of(value, "relevant", uri, where, problems)
    if not names and len(problems) == before:
        text = "relevant is empty; name at least the target, or leave it out"
        problems.append(Problem(uri, where, text))
    absent = [name for name in names if name not in known]
    if absent:
        text = f"relevant names {len(absent)} unknown image(s), first {absent[0]!r}"
        problems.append(Problem(uri, where, text))
    if len(problems) > before:
        return ()
    return names if target is None or target in names else (target, *names)


_NEAREST_AMONG = 5000  # names that are compared letter by letter with one that is missing


class ImageFolder:
    """The image files below a directory, listed once and found by relative path without suffix.

    Hidden files and folders, and what macOS leaves beside them (``._a.jpg``, ``__MACOSX``), are no
    images.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._asked = 0
        fs, path = storage.filesystem(uri)
        root = path.rstrip("/") + "/"
        self._uri_of: dict[str, str] = {}
        for file in sorted(fs.find(path)) if fs.exists(path) else []:
            relative = PurePosixPath(file.removeprefix(root))
            hidden = any(part.startswith(".") or part == "__MACOSX" for part in relative.parts)
            if relative.suffix.lower() in IMAGE_SUFFIXES and not hidden:
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

    def missing(self, name: str) -> str:
        """What to say of an image that is not there: also the name that may have been meant."""
        text = f"image {name!r} is missing in {self.uri}"
        path = PurePosixPath(name)
        plain = name.removesuffix(path.suffix) if path.suffix.lower() in IMAGE_SUFFIXES else name
        parts = plain.split("/")
        for candidate in ("/".join(parts[start:]) for start in range(len(parts))):
            if candidate in self._uri_of:
                return f"{text}; write {candidate!r}: names have no suffix and begin below it"
        self._asked += 1
        few = len(self._uri_of) <= _NEAREST_AMONG and self._asked <= 20
        near = difflib.get_close_matches(name, self._uri_of, 1) if few else []
        return f"{text}; the nearest name there is {near[0]!r}" if near else text


def safe_relative(path: str) -> str | None:
    """``path`` as a clean relative path, or None if it would leave its root."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        return None
    return str(pure)
