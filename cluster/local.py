"""A Ray head on this machine: submit a job to it, or keep one running.

    python cluster/local.py submit -- python pipelines/train.py --config configs/quickstart.yaml
    python cluster/local.py head

``submit`` uses the cluster of ``RAY_ADDRESS`` or the head on port 8265 if either answers, else
starts a head for the job and stops it afterwards. Ctrl-C stops the job. The job's relative paths
are taken from the current directory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

from qure_core.network import free_port

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
START_SECONDS = 90
TOKEN_FILE = Path.home() / ".ray" / "auth_token"


def _environment() -> dict[str, str]:
    """This environment with token authentication on and this Python's scripts first on PATH."""
    environment = dict(os.environ)
    scripts = str(Path(sys.executable).parent)
    environment.pop("RAY_ADDRESS", None)  # the address is always passed explicitly
    environment["PATH"] = os.pathsep.join([scripts, environment.get("PATH", "")])
    environment.setdefault("RAY_AUTH_MODE", "token")
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    has_token = "RAY_AUTH_TOKEN" in environment or "RAY_AUTH_TOKEN_PATH" in environment
    if environment["RAY_AUTH_MODE"] == "token" and not has_token and not TOKEN_FILE.exists():
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return environment


def _answers(address: str, path: str = "/api/version") -> bool:
    """Whether a Ray server (by default the job server) is there; one that asks for a token is."""
    try:
        with urllib.request.urlopen(f"{address}{path}", timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return False


def _die_with_parent() -> None:
    """Have Linux end the head if this process is killed outright."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@contextlib.contextmanager
def local_head(environment: dict[str, str]) -> Iterator[str]:
    """Start a head on free ports of the loopback interface; yield its address; stop it."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    command = ["ray", "start", "--head", "--block", "--node-ip-address", "127.0.0.1"]
    command += ["--port", str(port), "--dashboard-host", "127.0.0.1"]
    command += ["--dashboard-port", str(dashboard), "--include-dashboard", "true"]
    command += ["--dashboard-agent-listen-port", str(agent)]
    head = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + START_SECONDS
        # The job server hands jobs to the node's agent, which comes up after it.
        while not (
            _answers(address) and _answers(f"http://127.0.0.1:{agent}", "/api/local_raylet_healthz")
        ):
            if head.poll() is not None or time.monotonic() > deadline:
                head.terminate()
                output = head.communicate(timeout=30)[0].decode(errors="replace")
                sys.exit(f"error: the local Ray head did not start:\n{output}")
            time.sleep(0.5)
        yield address
    finally:
        head.terminate()
        try:
            head.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def submit(address: str, environment: dict[str, str], command: list[str]) -> int:
    """Submit ``command`` with this directory as its working directory, and follow it."""
    job = f"qure-{uuid.uuid4().hex[:12]}"
    runtime = {"env_vars": {"QURE_HOME": os.getcwd()}}
    line = ["ray", "job", "submit", "--address", address, "--submission-id", job]
    line += ["--working-dir", ".", "--runtime-env-json", json.dumps(runtime), "--", *command]
    follower = subprocess.Popen(line, env=environment)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        return follower.wait()
    except KeyboardInterrupt:
        print("\nstopping the job ...", flush=True)
        stop = ["ray", "job", "stop", "--address", address, job]
        try:
            subprocess.run(stop, env=environment, check=False, timeout=60)
        except subprocess.TimeoutExpired:
            print(f"the job did not stop within 60 s; repeat: {shlex.join(stop)}", flush=True)
        follower.kill()
        return 130


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    job = tasks.add_parser("submit", help="submit a job, on a head of its own if none runs")
    job.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND ...")
    tasks.add_parser("head", help="start a head and keep it until Ctrl-C")
    chosen = parser.parse_args()
    environment = _environment()
    if chosen.task == "head":
        with local_head(environment) as address:
            print(f"Ray head: {address} (Ctrl-C stops it)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
        return 0
    command = chosen.command[1:] if chosen.command[:1] == ["--"] else chosen.command
    if not command:
        parser.error("submit: give the job's command after --")
    given = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    if given.startswith("http"):
        return submit(given, environment, command)
    if _answers(DEFAULT_ADDRESS):
        return submit(DEFAULT_ADDRESS, environment, command)
    print("starting a local Ray head ...", flush=True)
    with local_head(environment) as address:
        return submit(address, environment, command)


if __name__ == "__main__":
    sys.exit(main())
