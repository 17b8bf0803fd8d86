"""Fetching: a local path of whatever a URI names."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import fsspec
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from qure_core.base.errors import InputError
from qure_core.storage.commits import (
    committed_directory,
    damaged,
    is_ours,
    kept,
    read_manifest,
)
from qure_core.storage.files import exists, file_digest, filesystem, is_local, join
from qure_core.storage.kinds import Kind
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


def kept_copy(uri: str, kind: Kind, cache: str) -> str:
    """A local path of a committed directory whose name tells its content: a remote one is copied
    below the directory ``cache``, once, and stays there. Of processes that want it, one copies."""
    if is_local(uri):
        return uri
    target = join(cache, uri.rstrip("/").rsplit("/", 1)[-1])
    try:
        os.makedirs(cache, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        lock.acquire()
    except OSError as error:
        raise InputError(
            f"{cache}: cannot be written ({error.strerror or error}), where copies of {uri} are "
            "kept; choose a directory with room"
        ) from None
    try:
        if not kept(target, kind, {}):
            manifest = read_manifest(uri, kind)
            with committed_directory(target, kind) as (folder, description):
                fs, path = filesystem(uri)
                _fetch(fs, path, str(folder), list(manifest["files"]))
                for name, facts in manifest["files"].items():
                    if file_digest(os.path.join(folder, name)) != facts["sha256"]:
                        raise damaged(uri, name)
                description |= {key: manifest[key] for key in manifest if key != "files"}
    finally:
        lock.release()
    return target
