"""Temporary folders that say who made them, so that a later start can remove what a kill left.

Each lies in a folder of its own, ``TMPDIR/qure-UID/PROCESS-TOKEN``, beside a note of the process.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qure_core.storage.owner import lives, this_process

_OWNER = "owner.json"


def own_folder() -> Path:
    """The folder of all that this user's processes keep in the temporary directory.

    Anyone can make a folder of that name there: raises `PermissionError` unless it is this user's
    and nobody else's.
    """
    folder = Path(tempfile.gettempdir()) / f"qure-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise PermissionError(
            errno.EPERM, "not a folder that this user alone can write", str(folder)
        )
    return folder


@contextmanager
def temporary_folder(purpose: str) -> Iterator[str]:
    """A new empty folder, removed at the end; a kill leaves it to `clean_temporary`."""
    process = own_folder() / f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
    process.mkdir(mode=0o700, parents=True)
    (process / _OWNER).write_text(json.dumps(this_process()))
    folder = process / purpose
    folder.mkdir()
    try:
        yield str(folder)
    finally:
        shutil.rmtree(process, ignore_errors=True)


def read_owner(note: Path) -> dict[str, Any]:
    """The process that a note names; empty if it cannot be read."""
    try:
        value = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def clean_temporary() -> int:
    """Remove the folders of processes that are known to be gone; return how many."""
    removed = 0
    for folder in own_folder().iterdir():
        note = folder / _OWNER
        if note.is_file() and lives(read_owner(note)) is False:
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed
