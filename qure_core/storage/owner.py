"""Which process made something, and whether that process is known to be gone."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any


def process_start(process: int) -> str | None:
    """When a process of this namespace started, in ticks since boot; None if there is none."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return text.rsplit(")", 1)[1].split()[19]


def place() -> str:
    """This boot of this machine and this process namespace; empty if they cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def this_process() -> dict[str, Any]:
    """What `lives` asks for: host, place, process number and when it started."""
    return {
        "host": socket.gethostname(),
        "place": place(),
        "process": os.getpid(),
        "started": process_start(os.getpid()),
    }


def lives(owner: dict[str, Any]) -> bool | None:
    """Whether the process that `this_process` described lives; None if it cannot be seen from here.

    A process number alone says little: it is used again, and other machines have it too.
    """
    if not owner or not place() or owner.get("place") != place():
        return None
    return process_start(int(owner["process"])) == owner["started"]
