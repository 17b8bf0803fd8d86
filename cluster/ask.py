"""What `make search` does: ask what was trained, on a page.

    python cluster/ask.py --config configs/quickstart.yaml

Trains first if nothing is trained yet, makes the index of the configured data with the newest
checkpoint (again made, it takes seconds), and serves it on this machine. Ctrl-C ends all of it.
``PORT`` in the environment says where (8000).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.model.checkpoint_files import newest_checkpoint
from qure_core.runtime.command import run_main
from qure_core.runtime.settings import load_settings

HERE = Path(__file__).parent
PIPELINES = HERE.parent / "pipelines"


def _run(*command: str | Path) -> int:
    """A command's exit status. Interrupted, it is told so, and has time to end what it began."""
    process = subprocess.Popen([sys.executable, *map(str, command)])
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise


def main() -> int:
    arguments = sys.argv[1:]
    settings, _ = load_settings(arguments, "cluster/ask.py", "Ask what was trained.")
    try:
        newest_checkpoint(settings.run.dir)
    except InputError:
        print(f"nothing is trained in {settings.run.dir} yet: training first", flush=True)
        train = PIPELINES / "train.py"
        if status := _run(HERE / "local.py", "submit", "--", "python", train, *arguments):
            return status
    if status := _run(PIPELINES / "index.py", "build", *arguments):
        return status
    index = storage.join(storage.resolve(settings.run.dir), "index")
    port = os.environ.get("PORT", "8000")
    return _run(PIPELINES / "serve.py", "--index", index, "--port", port, "--open")


if __name__ == "__main__":
    run_main(main)
