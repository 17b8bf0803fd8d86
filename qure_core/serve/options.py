"""What a service is started with, and which version of an index it answers from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.search.index import CACHE, INDEX_KIND

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
"""Names of this machine alone."""


def checked_token(token: str, source: str) -> str:
    """A token that a header and a cookie can carry; `InputError` naming ``source``."""
    if not token.isascii() or len(token) < 8 or set(token) & set(' ;,"\\'):
        raise InputError(
            f"{source}: holds no token: 8 or more ASCII characters without blanks, quotes, commas, "
            "semicolons and backslashes"
        )
    return token


def token_of(path: str | None) -> str | None:
    """The token that a file holds."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise InputError(f"--token-file: {path} is no file")
    return checked_token(Path(path).read_text().strip(), f"--token-file: {path}")


@dataclass(frozen=True)
class Options:
    """What all of a service's processes know.

    index: its URI. checkpoint: where the one that it was made with is, if not where the index says.
    token: who asks has to send it; None lets everyone. hosts: names under which it may be called;
    None any. upload_mb: of one request. waiting: requests that one replica of the ingress takes on
    at a time. seconds: that one may take. poll: seconds between looks for a new version.
    """

    index: str
    checkpoint: str | None = None
    token: str | None = None
    hosts: tuple[str, ...] | None = None
    upload_mb: int = 20
    waiting: int = 64
    seconds: float = 30.0
    poll: float = 5.0
    cache: str = CACHE


@dataclass(frozen=True)
class Version:
    """A version of an index: its manifest as JSON. It travels with every request, so that all
    processes answer from the same one, whenever they come to know of it."""

    text: str

    @classmethod
    def newest(cls, uri: str) -> Version:
        """The one at ``uri`` now; `InputError` if there is none, or it is damaged."""
        return cls(json.dumps(storage.read_manifest(uri, INDEX_KIND), sort_keys=True))

    @property
    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text)
        return found

    @property
    def name(self) -> str:
        """Its name in answers: what differs has another."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]
