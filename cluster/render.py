"""Kubernetes manifests from one file of values.

    python cluster/render.py all | kubectl apply -f -
    python cluster/render.py rayjob --values my-values.yaml

``${name}`` in ``cluster/kubernetes/*.yaml`` stands for a value of ``cluster/values.yaml`` or for
what follows from it and the config.
"""

from __future__ import annotations

import argparse
import copy
import re
import shlex
import string
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qure_core.base.errors import InputError
from qure_core.runtime.command import run_main
from qure_core.runtime.settings import load_settings

HERE = Path(__file__).parent
MANIFESTS = ("networkpolicy", "raycluster", "rayjob", "mining-cronjob", "rayservice")
_WHOLE = re.compile(r"\$\{(\w+)\}")


_NAME = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
_SHARED = r"(?!file:)[a-z][a-z0-9]*://[^/\s]+.*"
_QUANTITY = r"[1-9][0-9]*(\.[0-9]+)?([kMGTPE]i?)?"
_FIELD = r"(\*|[0-9A-Za-z]+(-[0-9A-Za-z]+)?)(/[1-9][0-9]*)?"
_CRON = rf"@(yearly|monthly|weekly|daily|hourly)|({_FIELD}(,{_FIELD})*\s+){{4}}{_FIELD}(,{_FIELD})*"
_CRON_LIMITS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))


class Values(BaseModel):
    """The values of cluster/values.yaml, as they must be written."""

    model_config = ConfigDict(extra="forbid", strict=True, regex_engine="python-re")

    image: str = Field(pattern=r"^[^\s]+$", description="an image, e.g. registry/qure:0.1.0")
    config: str = Field(description="a name of configs/, without .yaml")
    data_root: str = Field(pattern=f"^{_SHARED}$", description="a URI that all pods reach")
    run_dir: str = Field(pattern=f"^{_SHARED}$", description="a URI that all pods reach")
    index: str = Field(pattern=f"^{_SHARED}$", description="a URI that all pods reach")
    feature_store: str = Field(pattern=f"^{_SHARED}$", description="a URI that all pods reach")
    storage_secret: str = Field(pattern=f"^{_NAME}$", description="the name of a Secret")
    schedule: str = Field(pattern=f"^({_CRON})$", description='five fields of cron, "*/30 * * * *"')
    workers: int = Field(ge=1, description="a whole number, 1 or more")
    worker_cpus: int = Field(ge=1, description="a whole number, 1 or more")
    worker_memory: str = Field(pattern=f"^{_QUANTITY}$", description="a quantity such as 64Gi")
    head_memory: str = Field(pattern=f"^{_QUANTITY}$", description="a quantity such as 24Gi")
    encoders: int = Field(ge=1, description="a whole number, 1 or more")
    scale_up_seconds: int = Field(ge=0, description="a whole number of seconds")

    @field_validator("config")
    @classmethod
    def _is_there(cls, name: str) -> str:
        if not (HERE.parent / "configs" / f"{name}.yaml").is_file():
            raise ValueError("no such config")
        return name

    @field_validator("schedule")
    @classmethod
    def _is_a_time(cls, text: str) -> str:
        for field, (low, high) in zip(text.split(), _CRON_LIMITS, strict=False):
            numbers = [int(n) for n in re.findall(r"(?<![/0-9])[0-9]+", field)]
            if not all(low <= number <= high for number in numbers):
                raise ValueError(f"{field} is not from {low} to {high}")
        return text


def read_values(path: Path) -> dict[str, Any]:
    """The values of ``path``; an `InputError` names every one that is wrong."""
    remedy = "take cluster/values.yaml as the pattern"
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"--values: {path}: {error.strerror}; {remedy}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"--values: {path}: not valid YAML ({text}); {remedy}") from None
    if not isinstance(found, dict):
        raise InputError(f"--values: {path}: not a mapping of values; {remedy}")
    try:
        return Values(**{str(name): value for name, value in found.items()}).model_dump()
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            name = str(item["loc"][0])
            known = Values.model_fields.get(name)
            wanted = f"; it is {known.description}" if known else ""
            given = f" (got {item['input']!r})" if item["type"] != "missing" else ""
            lines.append(f"  {name}: {item['msg'].removeprefix('Value error, ')}{given}{wanted}")
        raise InputError("\n".join([f"--values: {path}: {remedy}", *_plain(lines)])) from None


def _plain(lines: list[str]) -> list[str]:
    """Without the patterns, which say less than the description that follows."""
    return [re.sub(r"String should match pattern '.*' \(got", "not right (got", x) for x in lines]


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


SERVE_PORT = 8000


def _serve_config(values: dict[str, Any]) -> str:
    """Ray Serve's config of the service."""
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": SERVE_PORT, "request_timeout_s": 35},
        "applications": [
            {
                "name": "search",
                "route_prefix": "/",
                "import_path": "qure_core.serve.application:built",
                "args": {"index": values["index"], "encoders": values["encoders"], "gpus": 1},
            }
        ],
    }
    return yaml.safe_dump(config, sort_keys=False)


def _serving(cluster: dict[str, Any], encoders: int) -> dict[str, Any]:
    """The cluster's spec with the service's port open on every pod, its token, and pods that stay:
    one for each encoder."""
    spec = copy.deepcopy(cluster)
    (workers,) = spec["workerGroupSpecs"]
    workers |= {"replicas": encoders, "minReplicas": encoders}
    workers["maxReplicas"] = max(workers["maxReplicas"], encoders)
    reference = {"name": "qure-token", "key": "token", "optional": True}
    for group in (spec["headGroupSpec"], workers):
        for container in group["template"]["spec"]["containers"]:
            container["ports"].append({"containerPort": SERVE_PORT, "name": "serve"})
            container["env"] = [{"name": "QURE_TOKEN", "valueFrom": {"secretKeyRef": reference}}]
    return spec


def render(names: list[str], values: dict[str, Any]) -> list[dict[str, Any]]:
    """The named manifests as data."""
    values = values | {"ray_version": version("ray"), "arguments": _arguments(values)}
    # Kubernetes writes quantities as text.
    values["worker_cpus"] = str(values["worker_cpus"])

    def load(name: str) -> Any:
        return _fill(yaml.safe_load((HERE / f"kubernetes/{name}.yaml").read_text()), values)

    values["cluster_spec"] = load("cluster-spec")
    values["serve_config"] = _serve_config(values)
    values["service_spec"] = _serving(values["cluster_spec"], values["encoders"])
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
