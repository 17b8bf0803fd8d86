"""A real S3 server for tests: SeaweedFS on the loopback interface, with one identity."""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import s3fs

START_SECONDS = 60


@dataclass(frozen=True)
class S3Server:
    """Where the server listens, and the environment that lets a process use it."""

    endpoint: str
    key: str
    secret: str
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def files(self) -> s3fs.S3FileSystem:
        """A client of the test's own, apart from the project's; s3fs makes it once."""
        return s3fs.S3FileSystem(
            key=self.key,
            secret=self.secret,
            endpoint_url=self.endpoint,
            use_listings_cache=False,
        )


def _free_ports(host: str, count: int) -> list[int]:
    """Free ports whose gRPC companions, 10,000 above, are free too; all of them different.

    Both lie below the ports that the system gives to outgoing connections.
    """
    taken: list[int] = []
    for port in random.SystemRandom().sample(range(11_000, 21_000), 1000):
        with socket.socket() as probe, socket.socket() as companion:
            try:
                probe.bind((host, port))
                companion.bind((host, port + 10_000))
            except OSError:
                continue
        taken.append(port)
        if len(taken) == count:
            return taken
    raise AssertionError("no free ports")


@contextmanager
def s3_server(directory: Path, host: str = "127.0.0.1", volumes: int = 8) -> Iterator[S3Server]:
    """Start a server that keeps its data in ``directory``; stop it at the end.

    ``volumes`` of 256 MB hold them, most of which the server reserves for itself.
    """
    key, secret = "qure-test", secrets.token_hex(16)
    identity = {
        "name": "test",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    data, config = directory / "data", directory / "s3.json"
    data.mkdir(parents=True)
    config.write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, port = _free_ports(host, 4)
    weed = Path(sys.executable).with_name("weed")
    command = [str(weed), "server", f"-ip={host}", f"-ip.bind={host}", f"-dir={data}"]
    command += ["-master.telemetry=false", f"-master.port={master}", f"-volume.port={volume}"]
    command += [f"-filer.port={filer}", "-s3", f"-s3.port={port}", f"-s3.config={config}"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # their fixed ports may be taken
    command += ["-s3.iam=false", f"-volume.max={volumes}", "-volume.preStopSeconds=1"]
    command += ["-master.volumeSizeLimitMB=256"]
    log = directory / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"GOMEMLIMIT": "256MiB"},
            start_new_session=True,
        )
    server = S3Server(f"http://{host}:{port}", key, secret, process)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            try:
                socket.create_connection((host, port), timeout=1).close()
                server.files().mkdir("bucket")
                break
            except OSError:
                time.sleep(0.2)
        yield server
    finally:
        # A clean shutdown takes 18 s; what it would keep is thrown away.
        process.kill()
        process.wait()
