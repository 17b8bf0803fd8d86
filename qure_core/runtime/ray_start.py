"""What a start of Ray needs on this machine, and what starts of ours that were killed left here."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from qure_core.base.errors import InputError
from qure_core.storage.owner import lives, this_process
from qure_core.storage.temporary import clean_temporary, own_folder, read_owner

ROOM_MB = 256  # for a session's logs and sockets
_LONGEST_SOCKET = 107  # bytes of a Unix socket's path
_SOCKET = "ray/session_2000-01-01_00-00-00_000000_0000000/sockets/plasma_store"
_SESSION = re.compile(r"session_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d+_\d+")


def ray_folder() -> Path:
    """Where Ray keeps its sessions."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"


def token_environment() -> dict[str, str]:
    """A token for a Ray that is about to start, unless the user has one; Ray's own way to make one
    needs a home directory that can be written."""
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    if given or (Path.home() / ".ray" / "auth_token").exists():
        return {}
    return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}


def check_room() -> None:
    """Raise `InputError` if Ray could not start in the temporary directory."""
    place = ray_folder().parent
    remedy = "set TMPDIR (or RAY_TMPDIR) to another directory"
    if len(f"{place}/{_SOCKET}") > _LONGEST_SOCKET:
        raise InputError(f"TMPDIR: the path {place} is too long for Ray's sockets; {remedy}")
    try:
        free = shutil.disk_usage(place).free // 2**20
    except OSError as error:
        raise InputError(f"TMPDIR: {place} cannot be used ({error.strerror}); {remedy}") from None
    if free < ROOM_MB:
        raise InputError(
            f"TMPDIR: {place} has {free:,} MB free and Ray's session needs {ROOM_MB}; {remedy}"
        )
    if not os.access(place, os.W_OK):
        raise InputError(f"TMPDIR: {place} cannot be written; {remedy}")


def _records() -> Path:
    return own_folder() / "ray"


def record_session(session: str, address: str) -> None:
    """Note that this process started the Ray session in the folder ``session``."""
    folder = _records()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    note = this_process() | {"session": session, "address": address}
    (folder / f"{uuid.uuid4().hex}.json").write_text(json.dumps(note))


def session_processes(process: int) -> dict[int, str]:
    """Command lines by process number of all in the operating system's session that ``process``
    leads."""
    found = {}
    for number, command in _commands():
        with suppress(OSError):
            if os.getsid(number) == process:
                found[number] = command
    return found


def session_of(process: int) -> str | None:
    """The folder of the Ray session that ``process`` started; None if there is none."""
    for command in session_processes(process).values():
        if found := _SESSION.search(command):
            return str(ray_folder() / found[0])
    return None


def _commands() -> Iterator[tuple[int, str]]:
    """Process numbers and command lines of all processes that can be seen."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            yield int(entry.name), command


def clean_up() -> None:
    """Remove what earlier starts of ours left: folders, and Ray sessions that are over.

    Only what a note of ours names, and only if its process is known to be gone.
    """
    try:
        clean_temporary()
    except PermissionError as error:
        print(
            f"warning: {error.filename} is {error.strerror}; nothing is cleaned there", flush=True
        )
        return
    notes = [*_records().glob("*.json")] if _records().is_dir() else []
    over = [(note, read_owner(note)) for note in notes]
    over = [(note, owner) for note, owner in over if lives(owner) is False]
    if not over:
        return
    running = " ".join(command for _, command in _commands())
    for note, owner in over:
        session = Path(str(owner.get("session", "")))
        if session.name and session.name in running:
            continue  # its servers are still ending
        ours = session.parent == ray_folder() and _SESSION.fullmatch(session.name)
        if ours and not session.is_symlink():
            shutil.rmtree(session, ignore_errors=True)
        latest, current = ray_folder() / "session_latest", ray_folder() / "ray_current_cluster"
        with suppress(OSError):
            if os.readlink(latest) in (str(session), session.name):
                latest.unlink()
        with suppress(OSError):
            # By the port, since Ray writes the machine's own address there; another cluster may
            # have been given the same port since.
            port = str(owner.get("address", "")).split(":")[-1]
            if current.read_text().strip().rpartition(":")[2] == port and port not in running:
                current.unlink()
        note.unlink(missing_ok=True)
