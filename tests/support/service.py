"""A service in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def service(*arguments: str, seconds: float = 120) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start ``pipelines/serve.py``; yields its address, where it answers already, and its process.

    It is stopped as by Ctrl-C.
    """
    command = [sys.executable, str(ROOT / "pipelines/serve.py"), "--port", "0", *arguments]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    read, write = os.pipe()
    process = subprocess.Popen(
        command, stdout=write, stderr=write, env=environment, start_new_session=True
    )
    os.close(write)
    said = ""
    try:
        with open(read, "rb", buffering=0) as output:
            os.set_blocking(read, False)
            end = time.monotonic() + seconds
            while not (found := re.search(r"serving .* images: (http://\S+)/", said)):
                said += (output.read() or b"").decode()
                assert time.monotonic() < end, f"no service: {said}"
                assert process.poll() is None, said
                time.sleep(0.1)
            os.set_blocking(read, True)
            yield found[1], process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
