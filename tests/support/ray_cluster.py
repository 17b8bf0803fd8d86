"""A real Ray cluster for tests: a head and worker nodes, each a raylet with processes of its own.

Nodes share one address, or each gets a network namespace with its own and a home and temporary
folder that no other sees, so that only shared storage connects them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from qure_core.runtime.network import free_port

ROOT = Path(__file__).parent.parent.parent
START_SECONDS = 120
BRIDGE_NET = "10.211.7"  # of the namespaces' own bridge; nothing outside them sees it
BRIDGE_ADDRESS = f"{BRIDGE_NET}.1"  # this process's, as nodes in namespaces see it
_MARK = "QURE_TEST_NODE"


_marks: dict[psutil.Process, str | None] = {}


def _mark(process: psutil.Process) -> str | None:
    """The mark of a process, read once: tests look at all processes again and again."""
    if process not in _marks:
        mark = process.environ().get(_MARK)
        if time.time() - process.create_time() < 10:
            return mark  # it may still be what it was forked from
        _marks[process] = mark
    return _marks[process]


@dataclass
class Node:
    """A node: the processes that carry its mark."""

    name: str
    address: str
    prefix: list[str]  # what a command is started with, to run where the node does
    environment: dict[str, str]
    log: Path

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Its processes, or those whose command line has ``title``."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                own = _mark(process) == self.environment[_MARK]
                if own and title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        """End the node as a machine that loses power does."""
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)


@dataclass
class RayCluster:
    """A head without CPUs for work, and its workers."""

    folder: Path
    environment: dict[str, str]
    bridge: str | None = None  # with one, every node is in namespaces of its own
    head: Node = field(init=False)
    workers: dict[str, Node] = field(default_factory=dict)
    dashboard: str = ""
    _gcs: str = ""
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    # Names of sockets are limited to 107 characters, which a test's folder may exceed.
    _temporary: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="qr"))

    @property
    def _private(self) -> Path:
        return self.folder / "private"

    def _node(self, name: str, extra: dict[str, str]) -> Node:
        number = next(self._numbers)
        environment = {
            **os.environ,
            **self.environment,
            "RAY_AUTH_MODE": "token",
            _MARK: f"{self.folder.name}-{name}-{number}",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            **extra,
        }
        environment.pop("RAY_ADDRESS", None)
        prefix, address = [], "127.0.0.1"
        if self.bridge:
            prefix, address = self._namespace(self.bridge, number)
            environment |= {"TMPDIR": str(self._private), "HOME": str(self._private)}
        log = self.folder / f"{name}-{number}.log"
        return Node(name, address, prefix, environment, log)

    def _namespace(self, bridge: str, number: int) -> tuple[list[str], str]:
        """A network namespace on the bridge, where one folder has another content on each node."""
        name, address = f"{bridge}-{number}", f"{BRIDGE_NET}.{number + 10}"
        here, there = f"{bridge}h{number}", f"{bridge}n{number}"
        _ip("netns", "add", name)
        _ip("link", "add", here, "type", "veth", "peer", "name", there)
        _ip("link", "set", here, "master", bridge)
        _ip("link", "set", here, "up")
        _ip("link", "set", there, "netns", name)
        for command in (
            ["addr", "add", f"{address}/24", "dev", there],
            ["link", "set", there, "up"],
            ["link", "set", "lo", "up"],
        ):
            _ip("-n", name, *command)
        private = self.folder / f"private-{number}"
        private.mkdir()
        self._private.mkdir(exist_ok=True)
        mount = f'mount --bind "{private}" "{self._private}" && exec "$@"'
        prefix = ["ip", "netns", "exec", name, "unshare", "--mount", "sh", "-c", mount, "sh"]
        return prefix, address

    def _start(self, node: Node, arguments: Sequence[str]) -> None:
        command = ["ray", "start", "--block", "--node-ip-address", node.address, *arguments]
        command += ["--temp-dir", f"{self._temporary}/{node.log.stem}"]
        # Nodes of one address must not share ports.
        for port in ("min-worker", "max-worker", "node-manager", "object-manager"):
            command += [f"--{port}-port", "0"]
        for port in ("metrics-export", "dashboard-agent-grpc", "runtime-env-agent"):
            command += [f"--{port}-port", "0"]
        with node.log.open("wb") as output:
            subprocess.Popen(
                [*node.prefix, *command],
                env=node.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_head(self) -> None:
        self.head = self._node("head", {})
        port, dashboard = free_port(), free_port()
        self._gcs = f"{self.head.address}:{port}"
        self.dashboard = f"http://{self.head.address}:{dashboard}"
        arguments = ["--head", "--port", str(port), "--num-cpus", "0"]
        arguments += ["--dashboard-host", self.head.address, "--dashboard-port", str(dashboard)]
        arguments += ["--include-dashboard", "true", "--object-store-memory", str(2**28)]
        self._start(self.head, [*arguments, "--dashboard-agent-listen-port", str(free_port())])
        self._wait(0)

    def add_worker(self, cpus: int = 1, **extra: str) -> Node:
        """Start another worker node; ``extra`` goes into its environment."""
        node = self._node("worker", extra)
        arguments = ["--address", self._gcs, "--num-cpus", str(cpus)]
        arguments += ["--object-store-memory", str(2**28)]
        self._start(node, [*arguments, "--dashboard-agent-listen-port", str(free_port())])
        self.workers[node.environment[_MARK]] = node
        return node

    def kill_worker(self, node: Node) -> None:
        node.kill()
        del self.workers[node.environment[_MARK]]

    def ask(self, path: str) -> Any:
        """What the head's dashboard answers."""
        request = urllib.request.Request(
            f"{self.dashboard}{path}",
            headers={"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"},
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    def metrics(self) -> str:
        """What Prometheus would read from all nodes."""
        texts = []
        for group in self.ask("/api/prometheus/sd"):
            for target in group["targets"]:
                with contextlib.suppress(OSError):
                    answer = urllib.request.urlopen(f"http://{target}/metrics", timeout=5)
                    texts.append(answer.read().decode())
        return "".join(texts)

    def _alive(self) -> int | None:
        """Worker nodes that the head knows and can hand work to; None before it answers."""
        try:
            rows = self.ask("/api/v0/nodes")["data"]["result"]["result"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return sum(row["state"] == "ALIVE" and not row["is_head_node"] for row in rows)

    def _wait(self, workers: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._alive() != workers:
            logs = "".join(path.read_text(errors="replace") for path in self.folder.glob("*.log"))
            assert time.monotonic() < deadline, f"{workers} workers did not come up:\n{logs}"
            time.sleep(0.3)

    def wait(self) -> None:
        """Until every worker started and not killed is there, and no other."""
        self._wait(len(self.workers))

    def submit(self, *command: str, log: Path, **extra: str) -> Job:
        """``ray job submit`` from the tree, followed into ``log``."""
        name = f"test-{uuid.uuid4().hex[:10]}"
        line = ["ray", "job", "submit", "--address", self.dashboard, "--submission-id", name]
        line += ["--working-dir", "."]
        if extra:
            line += ["--runtime-env-json", json.dumps({"env_vars": extra})]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self.head.prefix, *line, "--", *command],
                cwd=ROOT,
                env=self.head.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Job(name, process, log)

    def stop(self) -> None:
        for node in [*self.workers.values(), self.head]:
            node.kill()
        shutil.rmtree(self._temporary, ignore_errors=True)


@dataclass
class Job:
    """A submitted job, followed by a client."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = 280) -> int:
        """Its exit status (of the client: 1 for any failure)."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job did not end:\n{self.output()[-6000:]}") from None

    def wait_for(self, text: str, timeout: float = 200) -> None:
        """Until its log has ``text``."""
        deadline = time.monotonic() + timeout
        while text not in self.output():
            assert self.process.poll() is None, f"ended without {text!r}:\n{self.output()[-6000:]}"
            assert time.monotonic() < deadline, f"no {text!r}:\n{self.output()[-6000:]}"
            time.sleep(0.1)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def can_make_namespaces() -> bool:
    """Whether this user may make network and mount namespaces."""
    try:
        command = ["unshare", "--net", "--mount", "ip", "link", "add", "q0", "type", "bridge"]
        return os.geteuid() == 0 and not subprocess.run(command, capture_output=True).returncode
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def network_bridge() -> Iterator[str]:
    """A bridge for nodes in network namespaces; this process is at `BRIDGE_ADDRESS`."""
    bridge = f"qb{secrets.token_hex(3)}"
    _ip("link", "add", bridge, "type", "bridge")
    try:
        _ip("addr", "add", f"{BRIDGE_ADDRESS}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        yield bridge
    finally:
        for line in subprocess.check_output(["ip", "netns", "list"], text=True).splitlines():
            if line.startswith(f"{bridge}-"):
                _ip("netns", "del", line.split()[0])
        _ip("link", "del", bridge)


@contextlib.contextmanager
def ray_cluster(
    folder: Path, workers: int = 2, *, bridge: str | None = None, **environment: str
) -> Iterator[RayCluster]:
    """A head and ``workers`` of one CPU each, ready for jobs."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"RAY_AUTH_TOKEN": secrets.token_hex(32), **environment}
    cluster = RayCluster(folder, environment, bridge)
    try:
        cluster.start_head()
        for _ in range(workers):
            cluster.add_worker()
        cluster.wait()
        yield cluster
    finally:
        cluster.stop()
