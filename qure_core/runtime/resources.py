"""The Ray cluster: connecting, and refusing plans that it could never start."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
import ray.data
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.sdk import request_resources

from qure_core.base.config import ClusterSettings
from qure_core.base.errors import InputError
from qure_core.runtime.in_process import device_here
from qure_core.runtime.network import free_port
from qure_core.runtime.ray_start import (
    check_room,
    clean_up,
    ray_folder,
    record_session,
    token_environment,
)

if TYPE_CHECKING:
    import torch

ANSWER_SECONDS = 30.0  # that a cluster has to answer in


def connect() -> None:
    """Join the cluster of ``RAY_ADDRESS`` or of the submitted job; else start Ray in-process.

    Raises `InputError` if nobody answers there, or Ray could not start here.
    """
    if not ray.is_initialized():
        address = _address()
        if address == "local":
            clean_up()
            check_room()
            os.environ.update(token_environment())
        # A dashboard port of its own: on the usual one, a short-lived in-process Ray would pass
        # for a cluster that jobs can be submitted to.
        context = ray.init(address, logging_level=logging.WARNING, dashboard_port=free_port())
        facts: dict[str, Any] = context.address_info  # type: ignore[attr-defined]
        if address == "local":
            record_session(facts["session_dir"], facts["address"])
        where = "started here" if address == "local" else f"joined at {facts['address']}"
        print(f"[cluster] Ray {where}; its logs: {facts['session_dir']}/logs", flush=True)
    context_of_data = ray.data.DataContext.get_current()
    context_of_data.enable_progress_bars = False  # the stages print their own
    context_of_data.raise_original_map_exception = True  # Ray's wrapping loses its cause
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _address() -> str:
    """Where to connect to: "local" to start Ray here, "auto" for the cluster Ray knows of."""
    given = os.environ.get("RAY_ADDRESS", "")
    if given.startswith(("http://", "https://")):
        raise InputError(
            f"RAY_ADDRESS: {given} is where jobs are submitted to; unset it, or submit this "
            "command there: ray job submit --working-dir . -- python ..."
        )
    if given.startswith("ray://"):
        raise InputError(
            f"RAY_ADDRESS: {given} is of Ray's client, which trains and mines nothing; give the "
            "cluster's HOST:PORT, or submit this command as a job"
        )
    if given and given not in ("auto", "local"):
        _check_answers(given)
        return given
    if given == "local":
        return given
    # A Ray that was killed leaves its address behind, and `ray.init` would wait for it for ever.
    record = ray_folder() / "ray_current_cluster"
    host, _, port = record.read_text().strip().rpartition(":") if record.exists() else ("", "", "")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
        return "auto"
    except (OSError, ValueError):
        pass
    if given == "auto":
        raise InputError("RAY_ADDRESS: 'auto', but no Ray runs on this machine; unset it")
    return "local"


def _check_answers(address: str) -> None:
    """Raise `InputError` unless a Ray cluster answers at ``address`` in `ANSWER_SECONDS`."""
    end = time.monotonic() + ANSWER_SECONDS
    if reason := _unreachable(address, end) or _no_ray(address, max(end - time.monotonic(), 5)):
        raise InputError(
            f"RAY_ADDRESS: no Ray cluster at {address} in {ANSWER_SECONDS:.0f} s ({reason}); "
            "correct it, or unset it to start Ray on this machine"
        )


def _unreachable(address: str, end: float) -> str | None:
    """Why nobody takes a connection until ``end`` of the monotonic clock; None if somebody does."""
    host, _, port = address.rpartition(":")
    reason = "no answer"
    while time.monotonic() < end:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return None
        except ValueError:
            raise InputError(f"RAY_ADDRESS: {address!r} is not HOST:PORT") from None
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(1)
    return reason


def _no_ray(address: str, seconds: float) -> str | None:
    """Why it is no Ray that listens; None if it is. A client would wait for ever, so one is asked
    aside."""
    answers: list[str | None] = []
    answered = threading.Event()

    def ask() -> None:
        try:
            GcsClient(address=address)
            answers.append(None)
        except Exception as error:  # told by the caller
            answers.append(" ".join(str(error).split())[:200] or type(error).__name__)
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answers[0] if answered.wait(seconds) else "it is not Ray that answers"


@dataclass(frozen=True)
class Plan:
    """What the stages ask of the cluster."""

    gpus: int
    train: dict[str, float]
    embed: dict[str, Any]
    score: dict[str, Any]
    slots: int  # scoring tasks that the cluster runs at once


def granted_device() -> torch.device:
    """The device of this task or actor: a GPU only if Ray granted it one. Of stages in one process:
    theirs."""
    import torch  # here, because a command that computes nothing needs none of it

    if (here := device_here()) is not None:
        return torch.device(here)
    granted = ray.is_initialized() and ray.get_runtime_context().get_accelerator_ids().get("GPU")
    return torch.device("cuda" if granted and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class _Need:
    """Workers that a stage starts at once, each on one node."""

    setting: str
    count: int
    cpus: int
    gpus: int

    @property
    def bundle(self) -> dict[str, int]:
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def room(self) -> int:
        """How many of them the nodes that live can hold."""
        return sum(
            min(int(node["Resources"].get(kind, 0) // each) for kind, each in self.bundle.items())
            for node in ray.nodes()
            if node["Alive"]
        )

    def shortage(self) -> str | None:
        if (room := self.room()) >= self.count:
            return None
        each = " and ".join(f"{count} {kind}(s)" for kind, count in self.bundle.items())
        return f"{self.setting}={self.count} with {each} each, but the nodes have room for {room}"


def _needs(cluster: ClusterSettings, gpus: int) -> list[_Need]:
    return [
        _Need("cluster.train_workers", cluster.train_workers, cluster.cpus_per_train_worker, gpus),
        _Need("cluster.embed_actors", cluster.embed_actors, cluster.cpus_per_embed_actor, gpus),
    ]


def _shortages(needs: list[_Need]) -> list[str]:
    return [shortage for need in needs if (shortage := need.shortage())]


def _scale_up(needs: list[_Need], seconds: int) -> None:
    """Ask the autoscaler for what the largest stage needs, and wait for it to come."""
    if not _shortages(needs):
        return
    # The stages run one after another: what holds the largest worker as often as the longest list.
    cpus, count = max(need.cpus for need in needs), max(need.count for need in needs)
    request_resources(bundles=[replace(needs[0], cpus=cpus).bundle] * count)
    began, said = time.monotonic(), -math.inf
    try:
        while (shortages := _shortages(needs)) and time.monotonic() - began < seconds:
            if time.monotonic() - said >= 30:
                said = time.monotonic()
                print(f"[cluster] waiting for nodes: {'; '.join(shortages)}", flush=True)
            time.sleep(2)
    finally:
        request_resources(bundles=[])  # what is idle long enough may go again


def plan_resources(cluster: ClusterSettings) -> Plan:
    """Settle GPU use and check that the nodes can hold the workers of every stage.

    Ray waits for ever for resources that no node has, so a plan that cannot start is an
    `InputError` here.
    """
    if (here := device_here()) is not None:
        return _in_process(cluster, int(here == "cuda"))
    if cluster.scale_up_seconds:
        asked = cluster.gpus if isinstance(cluster.gpus, int) else 0
        _scale_up(_needs(cluster, asked), cluster.scale_up_seconds)
    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
    each = {"auto": min(gpus, 1), "none": 0}.get(str(cluster.gpus))
    per_worker = int(cluster.gpus) if each is None else each
    if shortages := _shortages(_needs(cluster, per_worker)):
        raise InputError(
            "the cluster is too small:\n"
            + "\n".join(f"  {shortage}" for shortage in shortages)
            + "\nlower these settings, or add nodes, or larger ones"
        )
    return _plan(cluster, per_worker, max(1, gpus // per_worker if per_worker else cpus))


def _in_process(cluster: ClusterSettings, gpus: int) -> Plan:
    several = {"cluster.train_workers": cluster.train_workers}
    several["cluster.embed_actors"] = cluster.embed_actors
    if more := [name for name, count in several.items() if count > 1]:
        raise InputError(f"{more[0]}: cluster.in_process is one worker; set it to 1")
    return _plan(cluster, gpus, slots=1)


def _plan(cluster: ClusterSettings, gpus: int, slots: int) -> Plan:
    return Plan(
        gpus=gpus,
        train={"CPU": cluster.cpus_per_train_worker, "GPU": gpus},
        embed={"num_cpus": cluster.cpus_per_embed_actor, "num_gpus": gpus},
        score={"num_cpus": 1, "num_gpus": gpus},
        slots=slots,
    )
