"""The Ray cluster: connecting, and refusing plans that it could never start."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import torch

from qure_core.config import ClusterSettings
from qure_core.errors import InputError
from qure_core.network import free_port


def connect() -> None:
    """Join the cluster of ``RAY_ADDRESS`` or of the submitted job; else start Ray in-process."""
    if not ray.is_initialized():
        # A dashboard port of its own: on the usual one, a short-lived in-process Ray would pass
        # for a cluster that jobs can be submitted to.
        ray.init(logging_level=logging.WARNING, dashboard_port=free_port())
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the stages print their own
    logging.getLogger("ray.data").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Plan:
    """What the stages ask of the cluster."""

    gpus: int
    train: dict[str, float]
    embed: dict[str, Any]
    score: dict[str, Any]
    slots: int  # scoring tasks that the cluster runs at once


def granted_device() -> torch.device:
    """The device of this task or actor: a GPU only if Ray granted it one."""
    granted = ray.is_initialized() and ray.get_runtime_context().get_accelerator_ids().get("GPU")
    return torch.device("cuda" if granted and torch.cuda.is_available() else "cpu")


def plan_resources(cluster: ClusterSettings) -> Plan:
    """Settle GPU use and check every stage against the cluster's total resources.

    Ray waits for ever for resources that no node has, so a plan that cannot start is an
    `InputError` here.
    """
    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
    each = {"auto": min(gpus, 1), "none": 0}.get(str(cluster.gpus))
    per_worker = int(cluster.gpus) if each is None else each
    needs = [
        ("cluster.train_workers", cluster.train_workers, cluster.cpus_per_train_worker),
        ("cluster.embed_actors", cluster.embed_actors, cluster.cpus_per_embed_actor),
    ]
    faults = []
    for setting, count, cpus_each in needs:
        if count * cpus_each > cpus:
            faults.append(
                f"{setting}={count} with {cpus_each} CPU(s) each need {count * cpus_each} CPUs, "
                f"but the cluster has {cpus}"
            )
        if count * per_worker > gpus:
            faults.append(
                f"{setting}={count} with {per_worker} GPU(s) each need {count * per_worker} GPUs, "
                f"but the cluster has {gpus}"
            )
    if faults:
        raise InputError(
            "the cluster is too small:\n"
            + "\n".join(f"  {fault}" for fault in faults)
            + "\nlower these settings or add nodes"
        )
    return Plan(
        gpus=per_worker,
        train={"CPU": cluster.cpus_per_train_worker, "GPU": per_worker},
        embed={"num_cpus": cluster.cpus_per_embed_actor, "num_gpus": per_worker},
        score={"num_cpus": 1, "num_gpus": per_worker},
        slots=max(1, gpus // per_worker if per_worker else cpus),
    )
