"""Scripts as processes that are forked from one which has imported the libraries.

A script runs as it does for a user: in a process and session of its own, with its own arguments,
directory and environment, its output in pipes' stead in files. Only the libraries' imports, which
take five seconds, are not done again; the project's own modules are imported anew.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import NoReturn

_LIBRARIES = [
    *("numpy", "pandas", "pyarrow", "pyarrow.parquet", "pyarrow.dataset", "torch", "torch._dynamo"),
    *("torch.distributed.nn", "transformers", "transformers.models.blip_2.modeling_blip_2"),
    *("transformers.models.clip.modeling_clip", "transformers.models.bert.tokenization_bert"),
    *("ray", "ray.data", "ray.train", "ray.train.torch", "ray.util.metrics", "fsspec", "s3fs"),
    *("pydantic_settings", "tensorboardX", "matplotlib.pyplot", "jinja2", "safetensors.torch"),
]


@cache
def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LIBRARIES)
    # Ray takes its mode from here when it is imported, and then for good: whether a test before
    # has started Ray, which sets it, must not matter.
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "token"
    forkserver.ensure_running()
    if before is None:
        del os.environ["RAY_AUTH_MODE"]
    else:
        os.environ["RAY_AUTH_MODE"] = before
    return context


@cache
def _fresh_path() -> list[str]:
    """``sys.path`` of a new interpreter, without its first entry."""
    code = "import sys; print('\\n'.join(sys.path[1:]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def run_script(
    script: Path,
    arguments: Sequence[str],
    folder: Path,
    timeout: float,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, as ``python SCRIPT ARGUMENTS`` in ``folder`` would.

    In this process's environment, with what ``environment`` adds.
    """
    with tempfile.TemporaryDirectory() as files:
        out, err = (Path(files) / name for name in ("out", "err"))
        process = _server().Process(
            target=_run,
            args=(str(script), list(arguments), str(folder), str(out), str(err)),
            kwargs={"environment": os.environ | (environment or {}), "path": _fresh_path()},
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            raise subprocess.TimeoutExpired([str(script), *arguments], timeout, out.read_bytes())
        status = process.exitcode
        assert status is not None
        return subprocess.CompletedProcess(
            [str(script), *arguments], status, out.read_text(), err.read_text()
        )


def _run(
    script: str,
    arguments: list[str],
    folder: str,
    out: str,
    err: str,
    environment: dict[str, str],
    path: list[str],
) -> NoReturn:
    os.setsid()
    for number, file in ((1, out), (2, err)):
        target = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(target, number)
        os.close(target)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None
    sys.argv = [script, *arguments]
    sys.path[:] = [str(Path(script).parent), *path]
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
