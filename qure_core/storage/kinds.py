"""Directories of ours, by kind, and what in them is ours.

A directory carries our mark if it holds the manifest of its kind, or our plan of what it is being
filled with. Only then, and only files that the manifest lists or that are named as the kind's
files are, may anything in it be removed or replaced. Whatever else is there is a stranger's: it is
refused before work begins, and left where it is by whoever tidies up.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from qure_core.base.errors import InputError
from qure_core.storage.files import (
    filesystem,
    join,
    read_bytes,
    read_json,
    remove_files,
    write_json,
)

MANIFEST = "manifest.json"
PLAN = "_plan.json"  # what an unfinished directory is being filled with
OLD_PLAN = "plan.json"  # its name before, in which the kind was not said
STAGING_OWNER = ".owner.json"  # in a directory that is being made, and for a moment after
_BESIDE = re.compile(r"(.*/)?(\.[^/]*\.lease|\.probe-[0-9a-f]{32}|[^/]*\.[0-9a-f]{32}\.partial)")
"""Leases and what a killed process left of a write: neither ours to remove nor in anyone's way."""

LISTED = r"(?!)"
"""A kind's files that are known by its manifest or plan alone, whatever their names."""


@dataclass(frozen=True)
class Kind:
    """A kind of directory: its name in manifests, and a pattern of its files' relative paths.

    ``manifest`` is the name of the file that commits it. One that begins with an underscore is
    ignored by readers of whole directories of Parquet. ``version`` is raised when what the files
    hold changes so that older programs would misread it; the manifest has it under
    ``version_key``, and a directory without it is of version 1.
    """

    name: str
    files: str
    manifest: str = MANIFEST
    version: int = 1
    version_key: str = "kind_version"

    def head(self) -> dict[str, Any]:
        """What a manifest of this kind begins with."""
        head: dict[str, Any] = {"kind": self.name}
        return head | ({self.version_key: self.version} if self.version > 1 else {})

    def __str__(self) -> str:
        return self.name


def listing(uri: str) -> dict[str, int]:
    """Sizes of all files below ``uri`` by relative path; empty folders of a disk end in "/"."""
    fs, path = filesystem(uri)
    fs.invalidate_cache(path)
    root = path.rstrip("/") + "/"
    # One listing: a question for each file would take a remote store minutes.
    found = fs.find(path, detail=True, withdirs=isinstance(fs, LocalFileSystem))
    fs.invalidate_cache(path)
    sizes: dict[str, int] = {}
    folders = []
    for name, facts in found.items():
        relative = name.removeprefix(root).rstrip("/")
        if not name.startswith(root) or not relative:
            continue  # the directory itself
        if facts["type"] == "directory":
            folders.append(relative)
        else:
            sizes[relative] = facts["size"]
    for folder in folders:
        if not any(name.startswith(f"{folder}/") for name in sizes):
            sizes[f"{folder}/"] = 0
    return sizes


def manifest_uri(uri: str, kind: Kind | None = None) -> str | None:
    """The manifest of a committed directory, that of its ``kind`` before others, or None."""
    fs, path = filesystem(uri)
    first = kind.manifest if kind else MANIFEST
    for name in sorted((MANIFEST, f"_{MANIFEST}"), key=first.__ne__):
        if fs.exists(join(path, name)):
            return join(uri, name)
    return None


def read_mark(uri: str, name: str) -> dict[str, Any]:
    """A file's JSON object; empty for anything else, which is no mark."""
    try:
        value = json.loads(read_bytes(join(uri, name)))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def own_files(uri: str, kind: Kind, names: Iterable[str]) -> set[str]:
    """Those of the files ``names`` below ``uri`` that are ours to remove."""
    names = set(names)
    own: set[str] = set()
    for name in names & {MANIFEST, f"_{MANIFEST}"}:
        mark = read_mark(uri, name)
        if mark.get("kind") == kind.name and isinstance(mark.get("files"), dict):
            own |= {name} | (set(mark["files"]) & names)
    if PLAN in names and (mark := read_mark(uri, PLAN)).get("kind") == kind.name:
        plan = mark.get("plan")
        listed = plan.get("files", []) if isinstance(plan, dict) else []
        own |= {PLAN} | (set(listed) & names)
    fits = {name for name in names if re.fullmatch(kind.files, name)}
    if OLD_PLAN in names and "checkpoint" in read_mark(uri, OLD_PLAN):
        # Before plans said their kind, each had a checkpoint, and nothing lay beside its files.
        rest = {n for n in names - fits - own - {OLD_PLAN} if not _BESIDE.fullmatch(n)}
        if own or not rest:
            own.add(OLD_PLAN)
    return own | fits | (names & {STAGING_OWNER}) if own else own


def strangers(uri: str, kind: Kind) -> list[str]:
    """Files below ``uri`` that are not ours, as relative paths; none if it does not exist."""
    names = listing(uri)
    own = own_files(uri, kind, names)
    return sorted(name for name in names if name not in own and not _BESIDE.fullmatch(name))


def check_place(uri: str, kind: Kind, setting: str = "") -> None:
    """Raise `InputError` if making a ``kind`` at ``uri`` would meet files that are not ours."""
    fs, path = filesystem(uri)
    if fs.isfile(path):
        place = f"{setting}: {uri}" if setting else uri
        raise InputError(f"{place} is a file, where a directory is made; choose another name")
    if not (found := strangers(uri, kind)):
        return
    shown = ", ".join(found[:3]) + (f" and {len(found) - 3:,} more" if len(found) > 3 else "")
    raise InputError(
        f"{setting + ': ' if setting else ''}{uri} holds what is not part of a {kind}: {shown}. "
        "Nothing was changed; choose a new or empty directory, or move those files elsewhere"
    )


def discard(uri: str, kind: Kind) -> None:
    """Remove a directory of ours, finished or not; what is not ours stays, and is said."""
    names = listing(uri)
    own = own_files(uri, kind, names)
    if not own:
        return
    if PLAN in names and PLAN not in own:
        print(f"[storage] left in place: {uri}, where {PLAN} is no plan of ours", flush=True)
        return
    if PLAN not in own:
        # The mark goes last: what a kill leaves is known as ours, and never taken for finished.
        begin(uri, kind, {"files": sorted(own)})
        own.add(PLAN)
    first = own & {MANIFEST, f"_{MANIFEST}"}
    for part in (first, own - first - {PLAN}, {PLAN}):
        remove_files(uri, part)
    _remove_folders(uri, own)
    if left := [name for name in names if name not in own and not _BESIDE.fullmatch(name)]:
        text = f"[storage] left in {uri}, being no part of a {kind}: {', '.join(left[:5])}"
        print(text, flush=True)


def adopt(uri: str, kind: Kind) -> None:
    """Mark an unfinished ``kind`` that was begun before such directories had a mark.

    For places below a directory of ours alone: whose every file is named as the kind's files are.
    Nothing happens to one that has a mark.
    """
    names = listing(uri)
    fit = all(re.fullmatch(kind.files, n) or _BESIDE.fullmatch(n) for n in names)
    if names and fit and not own_files(uri, kind, names):
        begin(uri, kind, {"files": sorted(names)})


def clear(uri: str, kind: Kind, setting: str = "") -> None:
    """Make room for a new ``kind`` at ``uri``: an old one goes, anything else is refused."""
    check_place(uri, kind, setting)
    discard(uri, kind)


def begin(uri: str, kind: Kind, plan: Any = None) -> None:
    """Mark an empty directory as one that is being filled with a ``kind``."""
    write_json(join(uri, PLAN), {"kind": kind.name, "plan": plan})


def plan_of(uri: str, kind: Kind) -> Any:
    """The plan by which a directory of ours is being filled; None if there is none."""
    names = (PLAN, OLD_PLAN)
    fs, path = filesystem(uri)
    for name in names:
        if fs.exists(join(path, name)):
            found = read_json(join(uri, name))
            if name == OLD_PLAN:
                return found
            if isinstance(found, dict) and found.get("kind") == kind.name:
                return found.get("plan")
    return None


def _remove_folders(uri: str, names: Iterable[str]) -> None:
    """On a disk, remove the folders that the files ``names`` were in, if nothing is in them now."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        folders = {os.path.dirname(name) for name in names}
        folders |= {parent for folder in folders for parent in _parents(folder)}
        for folder in sorted(folders, key=len, reverse=True):
            with suppress(OSError):  # not empty: somebody's files are in it
                os.rmdir(os.path.join(path, folder))


def _parents(folder: str) -> Iterable[str]:
    while folder:
        folder = os.path.dirname(folder)
        yield folder
