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
def service(
    *arguments: str,
    script: str = "pipelines/serve.py",
    says: str = r"serving .* images: (http://\S+)/",
    seconds: float = 120,
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start ``pipelines/serve.py``, or what starts it; yields its address, where it answers
    already, and the process.

    It is stopped as by Ctrl-C.
    """
    port = ["--port", "0"] if script == "pipelines/serve.py" else []
    command = [sys.executable, str(ROOT / script), *port, *arguments]
    environment = os.environ | {"RAY_ADDRESS": "local", "PORT": "0", "BROWSER": "true"}
    read, write = os.pipe()
    process = subprocess.Popen(
        command, stdout=write, stderr=write, env=environment, start_new_session=True
    )
    os.close(write)
    said = ""
    with open(read, "rb", buffering=0) as output:  # open to the end, for it has last words
        try:
            os.set_blocking(read, False)
            end = time.monotonic() + seconds
            while not (found := re.search(says, said)):
                said += (output.read() or b"").decode()
                assert time.monotonic() < end, f"no service: {said}"
                assert process.poll() is None, said
                time.sleep(0.1)
            os.set_blocking(read, True)
            yield found[1], process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
