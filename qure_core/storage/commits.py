"""Directories that appear whole or not at all.

A result directory is *committed* by its manifest, written last and listing every file with its
size and SHA-256; a directory without one is ignored by every reader. On object storage there is no
rename, so the manifest is the whole of the protocol; on a local file system a directory that one
process makes is also renamed into place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qure_core.base.errors import InputError
from qure_core.storage.files import (
    facts_of_file,
    file_facts,
    filesystem,
    is_local,
    join,
    list_names,
    read_bytes,
    read_json,
    remove_file,
    remove_files,
    write_json,
)
from qure_core.storage.kinds import (
    OLD_PLAN,
    PLAN,
    STAGING_OWNER,
    Kind,
    begin,
    check_place,
    clear,
    discard,
    listing,
    manifest_uri,
    own_files,
    plan_of,
    read_mark,
)
from qure_core.storage.owner import lives, this_process
from qure_core.storage.temporary import read_owner, temporary_folder


@contextmanager
def committed_directory(uri: str, kind: Kind) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a local directory to fill and a dict to describe it; commit both to ``uri`` on exit.

    The manifest gets the kind's name, the dict's entries, and every file's size and SHA-256. If the
    body raises, nothing appears at ``uri``. A previous ``kind`` at ``uri`` is replaced; raises
    `InputError`, before the body runs, if anything else is there.
    """
    check_place(uri, kind)
    if is_local(uri):
        # A directory that is a link is replaced where it lies.
        uri = os.path.realpath(filesystem(uri)[1])
        names = listing(uri)
        if left := set(names) - own_files(uri, kind, names):
            raise InputError(f"{uri} holds {min(left)}, which would be lost; move it away")
    with _staging(uri) as staging:
        description: dict[str, Any] = {}
        yield staging, description
        made = sorted(file for file in staging.rglob("*") if file.is_file())
        files = {
            name: facts_of_file(file)
            for file in made
            if (name := str(file.relative_to(staging))) != STAGING_OWNER
        }
        manifest = {**kind.head(), **description, "files": files}
        clear(uri, kind)
        fs, path = filesystem(uri)
        if is_local(uri):
            staging.chmod(0o755)
            write_json(str(staging / kind.manifest), manifest)
            os.replace(staging, path)
            remove_file(join(uri, STAGING_OWNER))  # until here it says whose staging this is
        else:
            # A kill from here on leaves files that are known as ours by the plan.
            begin(uri, kind, {"files": list(files)})
            for name in files:
                fs.put_file(str(staging / name), join(path, name))
            write_json(join(uri, kind.manifest), manifest)
            remove_file(join(uri, PLAN))


@contextmanager
def _staging(uri: str) -> Iterator[Path]:
    """A local folder to fill: beside ``uri`` if that is on a disk, so that it can be renamed."""
    if not is_local(uri):
        with temporary_folder("staging") as folder:
            yield Path(folder)
        return
    place = Path(filesystem(uri)[1].rstrip("/"))
    place.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".staging-{place.name}-"
    for left in place.parent.glob(f"{prefix}*"):
        if lives(read_owner(left / STAGING_OWNER)) is False:
            shutil.rmtree(left)  # of a process that was killed
    staging = place.parent / f"{prefix}{uuid.uuid4().hex[:12]}"
    staging.mkdir(mode=0o700)
    (staging / STAGING_OWNER).write_text(json.dumps(this_process()))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_manifest(
    uri: str,
    kind: Kind,
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
    uri: str, kind: Kind, description: dict[str, Any], files: dict[str, dict[str, Any]]
) -> None:
    """Write the manifest of files whose ``bytes`` and ``sha256`` their writers know."""
    write_json(join(uri, kind.manifest), {**kind.head(), **description, "files": files})


def kept(
    uri: str,
    kind: Kind,
    facts: dict[str, Any],
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any] | None:
    """The manifest of a committed directory if it is whole and says ``facts``, else None.

    ``upgrade`` puts a manifest that an older version wrote in the terms of today's.
    """
    place = manifest_uri(uri, kind)
    if place is None:
        return None
    manifest = _read(place)
    _check_kind(uri, manifest, kind)
    if faults(uri, manifest):
        return None
    manifest = upgrade(manifest)
    plain = json.loads(json.dumps(facts))
    return manifest if all(manifest.get(name) == plain[name] for name in plain) else None


def resume(uri: str, kind: Kind, plan: dict[str, Any]) -> set[str]:
    """Begin or continue to fill a directory by ``plan``; return the names of files already there.

    A directory of the same kind begun by another plan is emptied first; raises `InputError` if
    anything else is there. Of a committed one that is no longer whole, the good files are kept.
    """
    check_place(uri, kind)
    if plan_of(uri, kind) == json.loads(json.dumps(plan)):
        begin(uri, kind, plan)
        if place := manifest_uri(uri, kind):
            remove_files(uri, list(faults(uri, _read(place))))
            remove_file(place)
        remove_file(join(uri, OLD_PLAN))
        return set(list_names(uri))
    discard(uri, kind)
    begin(uri, kind, plan)
    return set()


def faults(uri: str, manifest: dict[str, Any]) -> dict[str, str]:
    """The files whose size is not the manifest's, and what was found instead."""
    sizes = listing(uri)
    return {
        name: f"{sizes[name]} bytes" if name in sizes else "missing"
        for name, facts in manifest["files"].items()
        if sizes.get(name) != facts["bytes"]
    }


def _read(place: str) -> dict[str, Any]:
    manifest = read_json(place)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise InputError(f"{place}: not a manifest of this project; give another directory")
    return manifest


def _check_kind(uri: str, manifest: dict[str, Any], kind: Kind) -> None:
    if manifest.get("kind") != kind.name:
        raise InputError(f"{uri}: holds a {manifest.get('kind')!r}, where a '{kind}' is needed")
    if (version := int(manifest.get(kind.version_key, 1))) > kind.version:
        raise InputError(
            f"{uri}: a {kind} of version {version}, where this program reads up to {kind.version}: "
            "a later version of it wrote that. Update qure-core, or make it again"
        )


def is_committed(uri: str) -> bool:
    return manifest_uri(uri) is not None


def is_ours(uri: str) -> bool:
    """Whether a directory is committed by a manifest of this project, whatever its kind."""
    place = manifest_uri(uri)
    if place is None:
        return False
    mark = read_mark(uri, place.rsplit("/", 1)[-1])
    return "kind" in mark and isinstance(mark.get("files"), dict)


def read_manifest(uri: str, kind: Kind | None) -> dict[str, Any]:
    """Read the manifest of a committed directory, checking every file's size and, unless None,
    its kind."""
    place = manifest_uri(uri, kind)
    if place is None:
        raise InputError(
            f"{uri}: no manifest.json, so this is not a finished {kind or 'directory'}"
        )
    manifest = _read(place)
    if kind is not None:
        _check_kind(uri, manifest, kind)
    for name, found in faults(uri, manifest).items():
        raise InputError(
            f"{join(uri, name)}: {found}, but its manifest says "
            f"{manifest['files'][name]['bytes']} bytes; remove {uri} and run the stage again"
        )
    return manifest


def damaged(uri: str, name: str) -> InputError:
    return InputError(
        f"{join(uri, name)}: content differs from its manifest's SHA-256; the file is damaged. "
        f"Remove {uri} and run the stage again"
    )


def read_committed(uri: str, name: str, manifest: dict[str, Any]) -> bytes:
    """The bytes of a file of a committed directory, checked against the manifest's SHA-256."""
    data = read_bytes(join(uri, name))
    if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
        raise damaged(uri, name)
    return data
