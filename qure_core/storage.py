"""Files behind URIs, and directories that appear whole or not at all.

Every path the pipelines take is a URI that fsspec understands: a local path, ``s3://``,
``memory://``. A result directory is *committed* by its ``manifest.json``, written last and listing
every file with its size and SHA-256; a directory without one is ignored by every reader. On object
storage there is no rename, so the manifest is the whole of the protocol; on a local file system
the directory is also renamed into place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from qure_core import object_storage
from qure_core.errors import InputError, chain

MANIFEST = "manifest.json"
# What listings call an entity tag or the time of the last change, on one store or another.
_CHANGE_MARKS = (
    *("ETag", "etag", "generation", "LastModified", "last_modified", "updated", "mtime"),
    "created",
)
_S3 = ("s3://", "s3a://")
# What a disk says that is full or forbidden, or that fails, as those of s3fs do whose cause was
# lost on the way from another node.
_DISK_REFUSES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_DISK_FAILS = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.EBUSY, errno.EREMOTEIO),
}
PLAN = "plan.json"  # what an unfinished directory is being filled with


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
    if "://" in path or os.path.isabs(path):
        return path
    if home := os.environ.get("QURE_HOME"):
        return os.path.join(home, path)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return str(Path.home() / "qure" / path)
    return os.path.abspath(path)


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def list_names(uri: str) -> list[str]:
    """Names directly under ``uri``, sorted; empty if it does not exist."""
    fs, path = filesystem(uri)
    fs.invalidate_cache(path)
    if not fs.exists(path):
        return []
    names = sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
    fs.invalidate_cache(path)  # other processes write here: a kept listing would hide it
    return names


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
        remove(probe)
    except Exception as error:
        if (reason := fault(error)) is None and not isinstance(error, OSError):
            raise
        raise InputError(
            f"{setting}: cannot write to {uri} ({reason or error}); "
            f"choose a directory you may write to, e.g. --{setting} /path/to/runs/name"
        ) from None


def fault(error: BaseException) -> str | None:
    """What a storage's error, or the one that Ray brought from a node, says; None if not one."""
    links = list(chain(error))
    # What the store itself said tells more than what s3fs made of it.
    for link in links:
        if text := object_storage.describe(link):
            return text
    for link in links:
        if isinstance(link, OSError) and (is_refused(link) or _fails(link)):
            return f"{link.strerror}: {link.filename}" if link.filename else str(link)
    return None


def is_refused(error: BaseException) -> bool:
    """Whether a storage is full or does not let this be written or read."""
    # s3fs's PermissionError has no number.
    return isinstance(error, PermissionError) or (
        isinstance(error, OSError) and error.errno in _DISK_REFUSES
    )


def _fails(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_FAILS


def is_away(error: BaseException) -> bool:
    """Whether the storage, not one of its files, is what failed."""
    return any(object_storage.describe(link) or _fails(link) for link in chain(error))


def remove(uri: str) -> None:
    """Remove a file or a whole directory; nothing happens if it does not exist."""
    fs, path = filesystem(uri)
    if fs.isfile(path):
        with suppress(FileNotFoundError):
            fs.rm_file(path)
    elif fs.exists(path):
        fs.rm(path, recursive=True)
        fs.invalidate_cache(path)
        # Of many objects deleted at once, s3fs does not tell which were refused.
        if any(found["type"] == "file" for found in fs.find(path, detail=True).values()):
            raise OSError(errno.EIO, "the storage did not remove all of it", uri)


def file_facts(data: memoryview | bytes) -> dict[str, int | str]:
    """A file's manifest entry: bytes and sha256."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def file_digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def committed_directory(uri: str, kind: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a local directory to fill and a dict to describe it; commit both to ``uri`` on exit.

    The manifest gets ``kind``, the dict's entries, and every file's size and SHA-256. If the body
    raises, nothing appears at ``uri``. A previous directory at ``uri`` is replaced.
    """
    fs, path = filesystem(uri)
    local = isinstance(fs, LocalFileSystem)
    if local:
        parent = os.path.dirname(path.rstrip("/"))
        os.makedirs(parent, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=parent))
    else:
        staging = Path(tempfile.mkdtemp(prefix="qure-staging-"))
    try:
        description: dict[str, Any] = {}
        yield staging, description
        names = sorted(
            str(file.relative_to(staging)) for file in staging.rglob("*") if file.is_file()
        )
        files = {
            name: {
                "bytes": (staging / name).stat().st_size,
                "sha256": file_digest(staging / name),
            }
            for name in names
        }
        manifest = {"kind": kind, **description, "files": files}
        if local:
            staging.chmod(0o755)
            write_json(str(staging / MANIFEST), manifest)
            remove(uri)
            os.replace(staging, path)
        else:
            remove(join(uri, MANIFEST))  # first: what is left without it counts for nothing
            remove(uri)
            for name in names:
                fs.put_file(str(staging / name), join(path, name))
            write_json(join(uri, MANIFEST), manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_manifest(
    uri: str,
    kind: str,
    description: dict[str, Any],
    names: list[str],
    known: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Commit files that other processes wrote under ``uri``: check that all exist, then say so.

    ``known`` has the entries (``bytes``, ``sha256``) of those whose writers told them; the others
    are read.
    """
    wanted = set(names)
    files = {name: facts for name, facts in (known or {}).items() if name in wanted}
    if files:
        for name, found in faults(uri, {"files": files}).items():
            written = files[name]["bytes"]
            raise OSError(errno.EIO, f"{found}, where {written} bytes were written", name)
    for name in sorted(wanted - set(files)):
        files[name] = file_facts(read_bytes(join(uri, name)))
    commit(uri, kind, description, files)


def commit(
    uri: str, kind: str, description: dict[str, Any], files: dict[str, dict[str, Any]]
) -> None:
    """Write the manifest of files whose ``bytes`` and ``sha256`` their writers know."""
    write_json(join(uri, MANIFEST), {"kind": kind, **description, "files": files})


def kept(uri: str, kind: str, facts: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a committed directory if it is whole and says ``facts``, else None."""
    if not is_committed(uri):
        return None
    manifest: dict[str, Any] = read_json(join(uri, MANIFEST))
    if faults(uri, manifest):
        return None
    _check_kind(uri, manifest, kind)
    plain = json.loads(json.dumps(facts))
    return manifest if all(manifest.get(name) == plain[name] for name in plain) else None


def resume(uri: str, plan: dict[str, Any]) -> set[str]:
    """Begin or continue to fill a directory by ``plan``; return the names of files already there.

    A directory begun by another plan, or by none, is emptied first. Of a committed one that is no
    longer whole, the good files are kept.
    """
    record = join(uri, PLAN)
    if exists(record) and read_json(record) == json.loads(json.dumps(plan)):
        if is_committed(uri):
            for name in faults(uri, read_json(join(uri, MANIFEST))):
                remove(join(uri, name))
            remove(join(uri, MANIFEST))
        return set(list_names(uri))
    remove(uri)
    write_json(record, plan)
    return set()


def faults(uri: str, manifest: dict[str, Any]) -> dict[str, str]:
    """The files whose size is not the manifest's, and what was found instead."""
    fs, path = filesystem(uri)
    fs.invalidate_cache(path)
    root = path.rstrip("/") + "/"
    # One listing: a question for each file would take a remote store minutes.
    sizes = {
        file.removeprefix(root): facts["size"] for file, facts in fs.find(path, detail=True).items()
    }
    fs.invalidate_cache(path)
    return {
        name: f"{sizes[name]} bytes" if name in sizes else "missing"
        for name, facts in manifest["files"].items()
        if sizes.get(name) != facts["bytes"]
    }


def _check_kind(uri: str, manifest: dict[str, Any], kind: str) -> None:
    if manifest.get("kind") != kind:
        raise InputError(f"{uri}: holds a {manifest.get('kind')!r}, where a {kind!r} is needed")


def is_committed(uri: str) -> bool:
    return exists(join(uri, MANIFEST))


def read_manifest(uri: str, kind: str | None) -> dict[str, Any]:
    """Read the manifest of a committed directory, checking every file's size and, unless None,
    its kind."""
    if not is_committed(uri):
        raise InputError(f"{uri}: no {MANIFEST}, so this is not a finished {kind or 'directory'}")
    manifest: dict[str, Any] = read_json(join(uri, MANIFEST))
    if kind is not None:
        _check_kind(uri, manifest, kind)
    for name, found in faults(uri, manifest).items():
        raise InputError(
            f"{join(uri, name)}: {found}, but its manifest says "
            f"{manifest['files'][name]['bytes']} bytes; remove {uri} and run the stage again"
        )
    return manifest


def _damaged(uri: str, name: str) -> InputError:
    return InputError(
        f"{join(uri, name)}: content differs from its manifest's SHA-256; the file is damaged. "
        f"Remove {uri} and run the stage again"
    )


def read_committed(uri: str, name: str, manifest: dict[str, Any]) -> bytes:
    """The bytes of a file of a committed directory, checked against the manifest's SHA-256."""
    data = read_bytes(join(uri, name))
    if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
        raise _damaged(uri, name)
    return data


@contextmanager
def local_copy(source: str, leave_out: Collection[str] = ()) -> Iterator[str]:
    """A local path of ``source`` while the block lasts: a URI is fetched, and removed after it.

    A path, or a name that is no URI (of a model hub), is given as it is. A committed directory is
    checked against its manifest, but for the files to ``leave_out``, which are not fetched either.
    """
    files: dict[str, dict[str, Any]] = {}
    if is_committed(source):
        files = read_manifest(source, None)["files"]
        files = {name: facts for name, facts in files.items() if name not in leave_out}
    elif "://" in source and not exists(source):
        raise InputError(f"{source}: no such file or directory")
    fs, path = filesystem(source)
    with ExitStack() as stack:
        place = path if "://" in source else source
        if not isinstance(fs, LocalFileSystem):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qure-fetched-"))
            place = _fetch(fs, path, folder, list(files))
        for name, facts in files.items():
            if file_digest(os.path.join(place, name)) != facts["sha256"]:
                raise _damaged(source, name)
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
