"""A Ray head on this machine: submit a job to it, or keep one running.

    python cluster/local.py submit -- python pipelines/train.py --config configs/quickstart.yaml
    python cluster/local.py head

``submit`` uses the cluster of ``RAY_ADDRESS`` or the head on port 8265 if either answers, else
starts a head for the job and stops it afterwards. Ctrl-C stops the job. The job's relative paths
are taken from the current directory. Exit status: the job's own, or 130 if it was interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qure_core.base.errors import InputError
from qure_core.runtime.command import EXIT_INTERRUPTED, run_main
from qure_core.runtime.console import Console
from qure_core.runtime.network import free_port
from qure_core.runtime.ray_start import (
    check_room,
    clean_up,
    record_session,
    session_of,
    session_processes,
    token_environment,
)
from qure_core.storage import temporary_folder

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
START_SECONDS = 90
# What Ray's job server writes into a job's log.
_JOB_MANAGER = re.compile(r"\S+ \S+\s+INFO job_manager\.py.*|Running entrypoint for job .*")
STOP_SECONDS = 6.0  # that a job has to end in after it was told to


def _environment() -> dict[str, str]:
    """This environment with token authentication on and this Python's scripts first on PATH."""
    environment = dict(os.environ)
    scripts = str(Path(sys.executable).parent)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        environment.pop(name, None)  # the address is always passed explicitly
    environment["PATH"] = os.pathsep.join([scripts, environment.get("PATH", "")])
    environment.setdefault("RAY_AUTH_MODE", "token")
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if environment["RAY_AUTH_MODE"] == "token":
        environment |= token_environment()
    return environment


def _answers(address: str, path: str = "/api/version") -> bool:
    """Whether a Ray server (by default the job server) is there; one that asks for a token is.

    Other programs listen on Ray's port too, and answer whatever they are asked.
    """
    try:
        with urllib.request.urlopen(f"{address}{path}", timeout=5) as answer:
            text = answer.read(4096).decode(errors="replace")
    except urllib.error.HTTPError as error:
        text = error.read(4096).decode(errors="replace").lower()
        return error.code in (401, 403) and "token" in text
    except OSError:
        return False
    return '"ray_version"' in text if path == "/api/version" else text.strip() == "success"


def _die_with_parent() -> None:
    """Have Linux end the head if this process is killed outright."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@contextlib.contextmanager
def local_head(environment: dict[str, str]) -> Iterator[str]:
    """Start a head on free ports of the loopback interface; yield its address; stop it."""
    clean_up()
    check_room()
    port, dashboard, agent = free_port(), free_port(), free_port()
    command = ["ray", "start", "--head", "--block", "--node-ip-address", "127.0.0.1"]
    command += ["--port", str(port), "--dashboard-host", "127.0.0.1"]
    command += ["--dashboard-port", str(dashboard), "--include-dashboard", "true"]
    command += ["--dashboard-agent-listen-port", str(agent)]
    with tempfile.TemporaryFile() as output:
        head = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        address = f"http://127.0.0.1:{dashboard}"
        try:
            deadline = time.monotonic() + START_SECONDS
            # The job server hands jobs to the node's agent, which comes up after it.
            while not (
                _answers(address)
                and _answers(f"http://127.0.0.1:{agent}", "/api/local_raylet_healthz")
            ):
                if head.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    last = output.read().decode(errors="replace").strip().splitlines()[-6:]
                    raise InputError("the local Ray head did not start:\n" + "\n".join(last))
                time.sleep(0.25)
            if session := session_of(head.pid):
                record_session(session, f"127.0.0.1:{port}")
            yield address
        finally:
            _stop(head)


def _stop(head: subprocess.Popen[bytes]) -> None:
    """End a head and its servers, of which nothing is needed any more."""
    processes = session_processes(head.pid)
    head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=2)
    for process in {*processes, head.pid}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    head.wait()


def submit(address: str, environment: dict[str, str], command: list[str]) -> int:
    """Submit ``command`` with this directory as its working directory, and follow it."""
    os.environ.clear()
    os.environ.update(environment)  # without RAY_ADDRESS, which the client would follow instead
    from ray.job_submission import JobSubmissionClient

    console = Console(sys.stdout, unshown=_JOB_MANAGER)
    client, job = JobSubmissionClient(address), f"qure-{uuid.uuid4().hex[:12]}"
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("ray")]:
        # What is packed and where it goes; of folders left out, which is as it should be, nothing.
        quiet = logging.ERROR if name.endswith(".working_dir") else logging.WARNING
        logging.getLogger(name).setLevel(quiet)

    async def follow() -> None:
        async for text in client.tail_job_logs(job):
            console.write(text)

    try:
        client.submit_job(
            entrypoint=shlex.join(command),
            submission_id=job,
            runtime_env={"working_dir": ".", "env_vars": {"QURE_HOME": os.getcwd()}},
        )
        asyncio.run(follow())
        facts = client.get_job_info(job)
        while not facts.status.is_terminal():  # the log ends a moment before
            time.sleep(0.2)
            facts = client.get_job_info(job)
    except KeyboardInterrupt:
        print("\nstopping the job ...", file=sys.stderr, flush=True)
        _stop_job(client, job, address)
        return EXIT_INTERRUPTED
    finally:
        console.end()
    if facts.driver_exit_code is None:
        print(f"error: the job ended as {facts.status}: {facts.message}", file=sys.stderr)
        return 1
    return int(facts.driver_exit_code)


def _stop_job(client: Any, job: str, address: str) -> None:
    try:
        client.stop_job(job)
    except RuntimeError:  # it was not submitted yet
        print("interrupted; the same command goes on", file=sys.stderr, flush=True)
        return
    end = time.monotonic() + STOP_SECONDS
    while time.monotonic() < end:
        if client.get_job_status(job).is_terminal():
            print("interrupted; the same command goes on", file=sys.stderr, flush=True)
            return
        time.sleep(0.2)
    again = shlex.join(["ray", "job", "stop", "--address", address, job])
    print(f"the job has not ended yet; repeat: {again}", file=sys.stderr, flush=True)


def keep_head(environment: dict[str, str]) -> int:
    """Start a head, say how jobs are submitted to it, and keep it until Ctrl-C."""
    with local_head(environment) as address, temporary_folder("token") as folder:
        words = [f"RAY_AUTH_MODE={environment['RAY_AUTH_MODE']}"]
        if "RAY_AUTH_TOKEN" in environment and "RAY_AUTH_TOKEN" not in os.environ:
            # Made for this head: another shell has it from a file that this user alone can read.
            token = Path(folder) / "token"
            token.touch(mode=0o600)
            token.write_text(environment["RAY_AUTH_TOKEN"])
            words.append(f"RAY_AUTH_TOKEN_PATH={token}")
        here = Path(sys.executable).with_name("ray")
        ray = "ray" if shutil.which("ray") == str(here) else str(here)
        line = f"{ray} job submit --address {address} --working-dir . -- python pipelines/train.py"
        print(f"Ray head: {address} (Ctrl-C stops it). Submit a job to it with")
        print(f"  {' '.join(words)} {line}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    job = tasks.add_parser("submit", help="submit a job, on a head of its own if none runs")
    job.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND ...")
    tasks.add_parser("head", help="start a head and keep it until Ctrl-C")
    chosen = parser.parse_args()
    environment = _environment()
    if chosen.task == "head":
        return keep_head(environment)
    command = chosen.command[1:] if chosen.command[:1] == ["--"] else chosen.command
    if not command:
        parser.error("submit: give the job's command after --")
    given = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    if given.startswith("http"):
        if not _answers(given):
            raise InputError(
                f"RAY_ADDRESS: no Ray job server answers at {given}; correct it, or unset it to "
                "start a head here"
            )
        return submit(given, environment, command)
    if _answers(DEFAULT_ADDRESS):
        return submit(DEFAULT_ADDRESS, environment, command)
    print("[local] starting a Ray head for this job ...", flush=True)
    with local_head(environment) as address:
        return submit(address, environment, command)


if __name__ == "__main__":
    run_main(main)
