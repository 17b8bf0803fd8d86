"""Helpers shared by the dataset readers: JSON rows with checked keys, and images by name."""

from __future__ import annotations

import difflib
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from itertools import islice, takewhile
from pathlib import PurePosixPath
from typing import Any, TypeVar

from qure_core import storage
from qure_core.base.errors import InputError, Problem

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SUFFIX = re.compile("(" + "|".join(map(re.escape, IMAGE_SUFFIXES)) + ")$", re.IGNORECASE)
_Made = TypeVar("_Made")


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
        elif isinstance(row[name], str) and not is_text(row[name]):
            text = f"{name!r} holds half of a character, a lone surrogate: {row[name]!r}"
            problems.append(Problem(uri, where, text))
            good = False
    return good


def is_text(value: Any) -> bool:
    """Whether ``value`` is text that can be written: JSON may escape halves of characters."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def names_of(
    value: Any, role: str, uri: str, where: str, problems: list[Problem]
) -> tuple[str, ...]:
    """``value`` as a list of image names; anything else is a problem, and no names."""
    if not isinstance(value, list) or not all(map(is_text, value)):
        shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]} ..."
        problems.append(Problem(uri, where, f"{role} is not a list of image names: {shown}"))
        return ()
    return tuple(value)


def is_again(
    seen: dict[Any, str],
    key: str,
    value: Any,
    places: tuple[str, str],
    uri: str,
    problems: list[Problem],
) -> bool:
    """Whether a row before, in ``seen``, has the same ``value`` of ``key``: then a problem.

    ``places``: the row's, as problems and as sentences name it.
    """
    where, told = places
    if (first := seen.setdefault(value, told)) == told:
        return False
    text = f"{key} {value!r} is also that of {first}; give each its own"
    problems.append(Problem(uri, where, text))
    return True


def relevant_of(
    value: Any,
    target: str | None,
    known: Names,
    uri: str,
    where: str,
    problems: list[Problem],
) -> tuple[str, ...]:
    """The images that satisfy a query, its target among them, from a row that lists them.

    A row that is no list, names nothing, or names an image that is not there is a problem: every
    measure of relevance would be wrong without a word.
    """
    before = len(problems)
    names = tuple(map(known.canonical, names_of(value, "relevant", uri, where, problems)))
    if not names and len(problems) == before:
        text = "relevant is empty; name at least the target, or leave it out"
        problems.append(Problem(uri, where, text))
    absent = [name for name in names if name not in known]
    if absent:
        text = f"relevant names {len(absent)} unknown image(s), first {absent[0]!r}"
        problems.append(Problem(uri, where, text + known.nearest(absent[0])))
    if len(problems) > before:
        return ()
    return names if target is None or target in names else (target, *names)


def plain(name: str) -> str:
    """A name in Unicode's composed form (NFC): some file systems take accents apart."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def without_suffix(name: str) -> str:
    """A file's name as its image is called: composed, without the suffix of its kind."""
    return plain(_SUFFIX.sub("", name))


_NEAREST_AMONG = 2000  # names that one that is missing is compared with, letter by letter
_NEIGHBOURS = 32  # in the order of names, on either side


class Names:
    """Names of images that are there, in Unicode's composed form and without suffix."""

    def __init__(self, names: Collection[str], where: str) -> None:
        self._names = names if isinstance(names, (dict, set, frozenset)) else set(names)
        self._where = where
        self._sorted: list[str] | None = None
        self._asked = 0

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def sorted(self) -> list[str]:
        if self._sorted is None:
            self._sorted = sorted(self._names)
        return self._sorted

    def canonical(self, name: str) -> str:
        """``name`` as images are called here: a suffix that only the row writes is left out."""
        if name in self._names:
            return name
        name, short = plain(name), without_suffix(name)
        return short if name not in self._names and short in self._names else name

    def nearest(self, name: str) -> str:
        """The name that may have been meant by one that is missing, as the end of a message."""
        if not self._names:
            return f"; there are no images {self._where}"
        names = self.sorted()
        self._asked += 1
        near = names
        if len(names) > _NEAREST_AMONG or self._asked > 20:
            place = bisect_left(names, name)
            near = names[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS]
        (best,) = difflib.get_close_matches(name, near, 1, 0.0)
        return f"; the nearest name there is {best!r}"


class Images(Names):
    """Images by name, each with its URI: ``uri_of``; and what is wrong with how they lie."""

    def __init__(self, uri: str, uri_of: Mapping[str, str]) -> None:
        super().__init__(uri_of, f"in {uri}")
        self.uri, self._uri_of = uri, uri_of
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self._clashes: dict[str, tuple[str, ...]] = {}

    def find(self, *candidates: str) -> str | None:
        """The URI of the first candidate (a path, with or without suffix) that exists.

        One that several files may be meant by is a problem, and none is chosen in silence.
        """
        for candidate in map(self.canonical, candidates):
            if candidate in self._uri_of:
                if clash := self._clashes.pop(candidate, None):
                    text = f"{' and '.join(clash)} have one name, {candidate!r}; keep one of them"
                    self.problems.append(Problem(self.uri, candidate, text))
                return self._uri_of[candidate]
        return None

    def of_category(self, category: str) -> list[str]:
        """The images of one category, sorted: those below a folder of its name."""
        names, start = self.sorted(), f"{category}/"
        first = bisect_left(names, start)
        return list(takewhile(lambda name: name.startswith(start), islice(names, first, None)))

    def categories(self) -> dict[str, str]:
        """The category of each image that has one: the folder that it is in."""
        folders = {name: name.rpartition("/")[0] for name in self._uri_of}
        return {name: folder for name, folder in folders.items() if folder}

    def missing(self, name: str) -> str:
        """What to say of an image that is not there: also the name that may have been meant."""
        text = f"image {name!r} is missing in {self.uri}"
        parts = without_suffix(name.replace("\\", "/")).split("/")
        for candidate in ("/".join(parts[start:]) for start in range(len(parts))):
            if candidate in self._uri_of:
                return f"{text}; write {candidate!r}: names begin below it"
        return text + self.nearest(name)


class ImageFolder(Images):
    """The image files below a directory, listed once and found by relative path without suffix.

    Hidden files and folders, and what macOS leaves beside them (``._a.jpg``, ``__MACOSX``), are no
    images. Links to folders are followed where they stay inside the folder or ``root``.
    """

    def __init__(self, uri: str, root: str | None = None) -> None:
        listing = storage.find_files(uri, root or uri)
        files: dict[str, list[str]] = {}
        for file in (file for file in listing.files if is_text(file)):
            if not is_hidden(file) and _SUFFIX.search(file):
                files.setdefault(without_suffix(file), []).append(file)
        super().__init__(uri, {name: storage.join(uri, own[0]) for name, own in files.items()})
        self._clashes = {name: tuple(own) for name, own in files.items() if len(own) > 1}
        self.problems += [
            Problem(uri, link, text)
            for link, text in listing.refused.items()
            if not is_hidden(link)
        ]
        self.problems += [
            Problem(uri, ascii(file), "the name is no UTF-8; rename the file")
            for file in listing.files
            if not is_text(file) and _SUFFIX.search(file)
        ]


def is_hidden(path: str) -> bool:
    """Whether a file is nobody's data: hidden, in a hidden folder, or left by macOS."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


class Files:
    """A dataset's directory, of which each part is listed or read once.

    ``images``, if given, stand in the place of all its folders of image files.
    """

    def __init__(self, root: str, images: Images | None = None) -> None:
        self.root, self.images = root, images
        self._made: dict[str, Any] = {}

    @classmethod
    def of(cls, root: str | Files) -> Files:
        return root if isinstance(root, Files) else cls(root)

    def uri(self, *parts: str) -> str:
        return storage.join(self.root, *parts)

    def once(self, name: str, make: Callable[[], _Made]) -> _Made:
        """What ``make`` gave when it was first asked for by ``name``."""
        if name not in self._made:
            self._made[name] = make()
        made: _Made = self._made[name]
        return made

    def folder(self, *parts: str) -> Images:
        """The images below a directory of the dataset."""
        if self.images is not None:
            return self.images
        uri = self.uri(*parts)
        return self.once(uri, lambda: ImageFolder(uri, self.root))


def safe_relative(path: str) -> str | None:
    """``path`` as a clean relative path, or None if it would leave its root or can be no file's."""
    if "\0" in path or not is_text(path):
        return None
    path = path.replace("\\", "/")
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or re.match("[A-Za-z]:", path):
        return None
    return str(pure)
