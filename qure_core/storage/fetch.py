"""Fetching: a local path of whatever a URI names."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from qure_core.base.errors import InputError
from qure_core.storage.commits import damaged, is_ours, read_manifest
from qure_core.storage.files import exists, file_digest, filesystem, join
from qure_core.storage.temporary import temporary_folder


@contextmanager
def local_copy(source: str, leave_out: Collection[str] = ()) -> Iterator[str]:
    """A local path of ``source`` while the block lasts: a URI is fetched, and removed after it.

    A path, or a name that is no URI (of a model hub), is given as it is. A committed directory is
    checked against its manifest, but for the files to ``leave_out``, which are not fetched either.
    """
    files: dict[str, dict[str, Any]] = {}
    if is_ours(source):
        files = read_manifest(source, None)["files"]
        files = {name: facts for name, facts in files.items() if name not in leave_out}
    elif "://" in source and not exists(source):
        raise InputError(f"{source}: no such file or directory")
    fs, path = filesystem(source)
    with ExitStack() as stack:
        place = path if "://" in source else source
        if not isinstance(fs, LocalFileSystem):
            folder = stack.enter_context(temporary_folder("fetched"))
            place = _fetch(fs, path, folder, list(files))
        for name, facts in files.items():
            if file_digest(os.path.join(place, name)) != facts["sha256"]:
                raise damaged(source, name)
        yield place


def _fetch(fs: fsspec.AbstractFileSystem, path: str, folder: str, names: list[str]) -> str:
    """Copy a remote file or directory, or its files that are named, into a local folder.

    Returns the path of what was copied.
    """
    if names:
        fs.get([join(path, name) for name in names], [join(folder, name) for name in names])
        return folder
    if fs.isfile(path):
        file = os.path.join(folder, os.path.basename(path))
        fs.get_file(path, file)
        return file
    fs.get(path.rstrip("/") + "/", folder + "/", recursive=True)
    return folder
