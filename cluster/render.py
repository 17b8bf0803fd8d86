"""Kubernetes manifests from one file of values.

    python cluster/render.py all | kubectl apply -f -
    python cluster/render.py rayjob --values my-values.yaml

``${name}`` in ``cluster/kubernetes/*.yaml`` stands for a value of ``cluster/values.yaml`` or for
what follows from it and the config.
"""

from __future__ import annotations

import argparse
import re
import shlex
import string
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from qure_core.config import load_settings
from qure_core.errors import InputError, run_main

HERE = Path(__file__).parent
MANIFESTS = ("networkpolicy", "raycluster", "rayjob", "mining-cronjob")
_WHOLE = re.compile(r"\$\{(\w+)\}")


def read_values(path: Path) -> dict[str, Any]:
    """The values of ``path``, checked to be those of cluster/values.yaml, no more and no fewer."""
    values = yaml.safe_load(path.read_text())
    known = yaml.safe_load((HERE / "values.yaml").read_text())
    if not isinstance(values, dict) or set(values) != set(known):
        given = set(values) if isinstance(values, dict) else set()
        raise InputError(
            f"{path}: unknown values {sorted(given - set(known))}, missing values "
            f"{sorted(set(known) - given)}; take cluster/values.yaml as the pattern"
        )
    return values


def _arguments(values: dict[str, Any]) -> str:
    """The pipelines' options, checked as the pipelines check them."""
    words = ["--config", f"/home/ray/qure/configs/{values['config']}.yaml"]
    for option, value in (
        ("data.root", values["data_root"]),
        ("run.dir", values["run_dir"]),
        ("feature_store.dir", values["feature_store"]),
        ("cluster.gpus", 1),
        ("cluster.train_workers", values["workers"]),
        ("cluster.embed_actors", values["workers"]),
        ("cluster.scale_up_seconds", values["scale_up_seconds"]),
    ):
        words += [f"--{option}", str(value)]
    local = [word.replace("/home/ray/qure", str(HERE.parent)) for word in words]
    settings, _ = load_settings(local, "cluster/render.py", "")
    cluster = settings.cluster
    needed = max(cluster.cpus_per_train_worker, cluster.cpus_per_embed_actor)
    if values["worker_cpus"] <= needed:
        raise InputError(
            f"worker_cpus: {values['worker_cpus']} leave nothing beside the {needed} CPUs that the "
            f"config gives a worker or actor; raise it above {needed}, or lower "
            "cluster.cpus_per_train_worker and cluster.cpus_per_embed_actor in the config"
        )
    return shlex.join(words)


def _fill(node: Any, values: dict[str, Any]) -> Any:
    """``node`` with its placeholders replaced: alone by the value itself, in a text by its text."""
    if isinstance(node, dict):
        return {key: _fill(item, values) for key, item in node.items()}
    if isinstance(node, list):
        return [_fill(item, values) for item in node]
    if not isinstance(node, str):
        return node
    if match := _WHOLE.fullmatch(node):
        return values[match[1]]
    return string.Template(node).substitute(values)


def render(names: list[str], values: dict[str, Any]) -> list[dict[str, Any]]:
    """The named manifests as data."""
    values = values | {"ray_version": version("ray"), "arguments": _arguments(values)}
    # Kubernetes writes quantities as text.
    values["worker_cpus"] = str(values["worker_cpus"])

    def load(name: str) -> Any:
        return _fill(yaml.safe_load((HERE / f"kubernetes/{name}.yaml").read_text()), values)

    values["cluster_spec"] = load("cluster-spec")
    return [load(name) for name in names]


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", choices=["all", *MANIFESTS])
    parser.add_argument("--values", type=Path, default=HERE / "values.yaml")
    chosen = parser.parse_args()
    names = list(MANIFESTS) if chosen.manifest == "all" else [chosen.manifest]
    manifests = render(names, read_values(chosen.values))
    yaml.dump_all(manifests, sys.stdout, _Plain, sort_keys=False, width=100)


if __name__ == "__main__":
    run_main(main)
