"""Serve an index: the trained model answers over HTTP, and on a page.

    python pipelines/serve.py --index INDEX
    python pipelines/serve.py --index s3://BUCKET/index --host 0.0.0.0 --token-file token.txt

Without a Ray cluster it starts Ray here; on one, its processes are spread over the nodes. A newer
version of the index, and the checkpoint it was made with, replaces the one in use while requests
go on. Ctrl-C ends all of it. Routes: /openapi.json, cluster/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import webbrowser
from typing import TYPE_CHECKING, Any

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.runtime.command import run_job

if TYPE_CHECKING:
    from qure_core.serve.ingress import Served

_SCREENS = {"DISPLAY", "WAYLAND_DISPLAY"}


def read() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pipelines/serve.py", description="Serve an index over HTTP, and a page to ask it."
    )
    parser.add_argument("--index", required=True, help="an index: a path or URI")
    parser.add_argument("--checkpoint", help="where the checkpoint it was made with is now")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    parser.add_argument("--token-file", help="file with a token that whoever asks has to send")
    parser.add_argument("--encoders", type=int, default=1, help="encoding processes (%(default)s)")
    parser.add_argument("--shares", type=int, default=1, help="index processes, each with a share")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of each of them (%(default)s)")
    parser.add_argument(
        "--gpus", type=float, help="GPUs of an encoder (default: 1 if there is one)"
    )
    parser.add_argument("--waiting", type=int, default=64, help="requests taken on at a time")
    parser.add_argument("--seconds", type=float, default=30.0, help="that a request may take")
    parser.add_argument("--upload-mb", type=int, default=20, help="that a request may send")
    parser.add_argument("--poll", type=float, default=5.0, help="seconds between looks for news")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--cache", help="directory for copies of a remote index")
    chosen = parser.parse_args()
    for name in ("encoders", "shares", "cpus", "waiting", "upload_mb"):
        if getattr(chosen, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: {getattr(chosen, name)} is less than 1")
    for name in ("seconds", "poll"):
        if not getattr(chosen, name) > 0:
            raise InputError(f"--{name}: {getattr(chosen, name)} is not above 0")
    if not 0 <= chosen.port < 65536:
        raise InputError(f"--port: {chosen.port} is no port")
    return chosen


def work(chosen: Any) -> None:
    import ray

    from qure_core.runtime.network import free_port
    from qure_core.runtime.resources import connect
    from qure_core.search.index import CACHE, Index, checkpoint_of
    from qure_core.serve.application import Sizes, started
    from qure_core.serve.options import LOOPBACK, Options, token_of

    token = token_of(chosen.token_file)
    index = Index.open(chosen.index)
    checkpoint_of(index.uri, index.manifest, chosen.checkpoint)
    local = chosen.host in LOOPBACK
    options = Options(
        index=index.uri,
        checkpoint=chosen.checkpoint and storage.resolve(chosen.checkpoint),
        token=token,
        hosts=LOOPBACK if local else None,
        upload_mb=chosen.upload_mb,
        waiting=chosen.waiting,
        seconds=chosen.seconds,
        poll=chosen.poll,
        cache=chosen.cache or CACHE,
    )
    if not local and token is None:
        print(
            f"[serve] anyone who reaches {chosen.host} can ask; --token-file limits it", flush=True
        )
    connect()
    gpus = chosen.gpus
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= chosen.encoders else 0.0
    sizes = Sizes(encoders=chosen.encoders, shares=chosen.shares, cpus=chosen.cpus, gpus=gpus)
    needed = chosen.cpus * (chosen.encoders + chosen.shares)
    there = ray.cluster_resources().get("CPU", 0)
    if needed > there:
        raise InputError(
            f"--encoders and --shares take {needed} CPUs, but the cluster has {there:g}; take fewer"
        )
    port = chosen.port or free_port()
    shown = "127.0.0.1" if chosen.host in ("0.0.0.0", "::") else chosen.host
    with started(options, sizes) as served:
        asyncio.run(answer(served, chosen, port, f"http://{shown}:{port}/"))


async def answer(served: Served, chosen: argparse.Namespace, port: int, address: str) -> None:
    """Answer requests until the process is told to end."""
    import uvicorn

    config = uvicorn.Config(
        *(served.app, chosen.host, port),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not serving.done() and not (server.started and served.service.now):
        await asyncio.sleep(0.05)
    if not serving.done() and (now := served.service.now):
        print(f"serving {len(now.index):,} images: {address}\nCtrl-C ends it", flush=True)
        # Without a screen, a browser of text would take the terminal.
        if chosen.open and (sys.platform == "darwin" or os.environ.keys() & _SCREENS):
            webbrowser.open(address)
    await serving


def main() -> None:
    run_job("serve", read, work)


if __name__ == "__main__":
    main()
