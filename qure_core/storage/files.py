"""Files behind URIs: reading, writing them whole, removing them, and what a storage's errors say.

Every path the pipelines take is a URI that fsspec understands: a local path, ``s3://``,
``memory://``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from qure_core.base.errors import InputError
from qure_core.storage import s3 as object_storage
from qure_core.storage.failures import fault

# What listings call an entity tag or the time of the last change, on one store or another.
_CHANGE_MARKS = (
    *("ETag", "etag", "generation", "LastModified", "last_modified", "updated", "mtime"),
    "created",
)
_S3 = ("s3://", "s3a://")


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem | None, str]:
    """For libraries that write with Arrow: the file system of ``uri`` and the path within it.

    None where Arrow finds the right one by the URI itself.
    """
    if not uri.startswith(_S3):
        return None, uri
    return object_storage.arrow_filesystem(), uri.split("://", 1)[1]


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of ``uri`` and the path within it."""
    if not uri.startswith(_S3):
        fs, path = url_to_fs(uri)
        return fs, path
    fs, path = url_to_fs(uri, **object_storage.options())
    fs.retries = object_storage.ATTEMPTS
    return fs, path


def is_local(uri: str) -> bool:
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def resolve(path: str) -> str:
    """Make a relative local path absolute, against a place that outlives the process.

    A job submitted to Ray runs in Ray's temporary copy of the working directory, where results
    would be lost. So a relative path is taken from ``QURE_HOME`` if that is set, else from
    ``~/qure`` inside a submitted job, else from the current directory.
    """
    if "://" in path:
        return path
    if not os.path.isabs(path):
        home = os.environ.get("QURE_HOME", "")
        if not home and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
            home = str(Path.home() / "qure")
        path = os.path.join(home, path)
    return os.path.abspath(path)  # one spelling of one place


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def is_file(uri: str) -> bool:
    fs, path = filesystem(uri)
    return bool(fs.isfile(path))


def list_names(uri: str) -> list[str]:
    """Names directly under ``uri``, sorted; empty if it does not exist."""
    fs, path = filesystem(uri)
    fs.invalidate_cache(path)
    if not fs.exists(path):
        return []
    names = sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
    fs.invalidate_cache(path)  # other processes write here: a kept listing would hide it
    return names


@dataclass(frozen=True)
class Listing:
    """Files below a directory, by relative path, sorted; and links that were not followed: why."""

    files: list[str]
    refused: dict[str, str]


def find_files(uri: str, root: str) -> Listing:
    """Every file below ``uri``, listed once; none if it does not exist.

    On a disk, links to folders are followed while they stay inside ``uri`` or ``root`` and do not
    lead back to a folder that they lie in.
    """
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.invalidate_cache(path)
        below = path.rstrip("/") + "/"
        found = sorted(file.removeprefix(below) for file in fs.find(path))
        return Listing([file for file in found if file], {})
    inside = {os.path.realpath(path), os.path.realpath(filesystem(root)[1])}
    files: list[str] = []
    refused: dict[str, str] = {}
    # Folders, each with the real folders on the way to it.
    left: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(path),))]
    while left:
        folder, way = left.pop()
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(way[-1]) as entries:
            for entry in entries:
                name = f"{folder}{entry.name}"
                if not entry.is_dir():
                    # A link that leads nowhere is a file that is missing; a pipe would never end.
                    if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                        files.append(name)
                    continue
                real = os.path.realpath(entry.path)
                if not any(f"{real}/".startswith(f"{top.rstrip('/')}/") for top in inside):
                    refused[name] = (
                        f"is a link that leaves the data ({real}), so nothing in it is taken; copy "
                        "or mount the folder here"
                    )
                elif real in way:
                    refused[name] = f"is a link to a folder that it lies in ({real}); remove it"
                else:
                    left.append((f"{name}/", (*way, real)))
    return Listing(sorted(files), refused)


def read_bytes(uri: str, limit: int | None = None) -> bytes:
    """The content of a file, or its first ``limit`` bytes."""
    fs, path = filesystem(uri)
    if limit is not None:
        try:
            return bytes(fs.cat_file(path, start=0, end=limit))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # An empty object has no first byte to answer with.
    return bytes(fs.cat_file(path))


def read_range(uri: str, first: int, size: int) -> bytes:
    """``size`` bytes of a file from byte ``first``, fewer if it ends before."""
    fs, path = filesystem(uri)
    return bytes(fs.cat_file(path, start=first, end=first + size)) if size else b""


def read_json(uri: str) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except FileNotFoundError:
        raise InputError(f"{uri}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{uri}: not valid JSON ({error})") from None


@contextmanager
def _appearing(path: str) -> Iterator[str]:
    """A name to write a local file under; it is synced and renamed to ``path`` if all goes well."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write a whole file; on a local file system through a rename, so it is never half there."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with _appearing(path) as partial:
            Path(partial).write_bytes(data)
    else:
        fs.pipe_file(path, bytes(data))


def put_file(file: str, uri: str) -> None:
    """Move a local file to ``uri``; it appears whole."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with _appearing(path) as partial:
            shutil.move(file, partial)
    else:
        fs.put_file(file, path)


def create(uri: str, data: bytes) -> bool:
    """Write a file that must not exist yet; whether this call made it."""
    fs, path = filesystem(uri)
    try:
        if isinstance(fs, LocalFileSystem):
            whole = f"{path}.{uuid.uuid4().hex}.partial"
            write_bytes(whole, data)
            try:
                os.link(whole, path)  # whole from its first moment, or not made
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                with open(path, "xb") as file:
                    file.write(data)
            finally:
                os.unlink(whole)
        else:
            fs.pipe_file(path, data, mode="create")
    except OSError:
        # Servers say "it exists" in more than one way.
        fs.invalidate_cache()
        if fs.exists(path):
            return False
        raise
    return True


def stamps(uris: Iterable[str]) -> dict[str, str]:
    """What tells without reading it whether a file has changed; missing files are left out.

    Size and times of a local file, as ``make`` and ``git`` go by; elsewhere size and ETag, or the
    time of the last change.
    """
    found: dict[str, str] = {}
    folders: dict[str, list[str]] = {}
    for uri in uris:
        fs, path = filesystem(uri)
        if not isinstance(fs, LocalFileSystem):
            folders.setdefault(uri.rsplit("/", 1)[0], []).append(uri)
            continue
        with suppress(FileNotFoundError, NotADirectoryError):
            facts = os.stat(path)
            found[uri] = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
    for folder, members in folders.items():
        fs, path = filesystem(folder)
        fs.invalidate_cache(path)
        listed = fs.ls(path, detail=True) if fs.exists(path) else []
        facts_of = {entry["name"].rsplit("/", 1)[-1]: entry for entry in listed}
        for uri in members:
            if entry := facts_of.get(uri.rsplit("/", 1)[-1]):
                marks = [entry[name] for name in _CHANGE_MARKS if entry.get(name)]
                # Without any, it looks different every time, so that its content is compared.
                found[uri] = f"{entry['size']} {marks[0] if marks else uuid.uuid4().hex}"
    return found


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def compact_json(value: Any) -> bytes:
    """JSON without spaces, for files whose size a server limits."""
    return json.dumps(value, separators=(",", ":")).encode()


def check_writable(uri: str, setting: str) -> None:
    """Raise `InputError` naming ``setting`` unless a file can be created under ``uri``."""
    probe = join(uri, f".probe-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"")
        remove_file(probe)
    except Exception as error:
        if (reason := fault(error)) is None and not isinstance(error, OSError):
            raise
        raise InputError(
            f"{setting}: cannot write to {uri} ({reason or error}); "
            f"choose a directory you may write to, e.g. --{setting} /path/to/runs/name"
        ) from None


def remove_file(uri: str) -> None:
    """Remove a file; nothing happens if it does not exist."""
    fs, path = filesystem(uri)
    with suppress(FileNotFoundError):
        fs.rm_file(path)


def remove_empty_folder(uri: str) -> None:
    """On a disk, remove a folder if nothing is in it."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with suppress(OSError):
            os.rmdir(path)


def remove_files(uri: str, names: Collection[str]) -> None:
    """Remove the files called ``names`` below ``uri``; those that do not exist are passed over."""
    fs, path = filesystem(uri)
    paths = [join(path, name) for name in sorted(names)]
    if isinstance(fs, LocalFileSystem):
        for file in paths:
            with suppress(FileNotFoundError):
                os.unlink(file)
    elif paths:
        with suppress(FileNotFoundError):
            fs.rm(paths)
        fs.invalidate_cache(path)
        # Of many objects deleted at once, s3fs does not tell which were refused.
        if set(paths) & set(fs.find(path)):
            raise OSError(errno.EIO, "the storage did not remove all of it", uri)


def file_facts(data: memoryview | bytes) -> dict[str, int | str]:
    """A file's manifest entry: bytes and sha256."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def facts_of_file(path: str | Path) -> dict[str, int | str]:
    """`file_facts` of a local file."""
    return {"bytes": os.path.getsize(path), "sha256": file_digest(path)}


def file_digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
