"""Make a model repository of a run's checkpoint, and push it to a model hub if asked to.

    python -m qure_core.job.publish runs/quickstart published --licence apache-2.0
    python -m qure_core.job.publish runs/quickstart published --push user/model

The repository has the weights, the processor and a model card made from the run; no optimizer
state, and no path of this machine. `Encoder.load` takes its directory, or its name on the hub.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import yaml
from huggingface_hub import HfApi

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.job.model_card import make_card
from qure_core.model.checkpoint_files import (
    CHECKPOINT_KIND,
    OPTIMIZER_FILE,
    checkpoint_uri,
    latest_epoch,
)
from qure_core.runtime.command import run_main
from qure_core.runtime.settings import parse_settings


def make_repository(
    settings: Settings, checkpoint: str, output: str, licence: str, name: str
) -> None:
    """Commit a checkpoint's files and its card to ``output``; ``name`` is the model's.

    Raises `InputError` if the checkpoint is damaged, or if something else is at ``output``.
    """
    manifest = storage.read_manifest(checkpoint, CHECKPOINT_KIND)
    storage.check_place(output, CHECKPOINT_KIND, "output")
    if storage.is_committed(output):
        found = storage.read_manifest(output, CHECKPOINT_KIND)
        weights = (found["files"], manifest["files"])
        same = weights[0].get("model.safetensors") == weights[1]["model.safetensors"]
        if "published" not in found or not (same or found["published"] == name):
            raise InputError(
                f"output: {output} holds another checkpoint, not the model {name!r} published "
                "before; choose another directory"
            )
    card = make_card(settings, checkpoint, licence, name, name.rsplit("/", 1)[-1])
    with (
        storage.local_copy(checkpoint, {OPTIMIZER_FILE}) as folder,
        storage.committed_directory(output, CHECKPOINT_KIND) as (directory, description),
    ):
        for file in manifest["files"]:
            if file != OPTIMIZER_FILE:
                shutil.copyfile(Path(folder) / file, directory / file)
        (directory / "README.md").write_text(str(card), encoding="utf-8")
        description |= {n: v for n, v in manifest.items() if n not in ("files", "kind", "origin")}
        description["published"] = name


def push(output: str, name: str) -> str:
    """Upload the repository at ``output`` to the hub as ``name``; return its address.

    Raises `InputError` if the hub is not reached, refuses it, or is switched off.
    """
    api = HfApi()
    try:
        with storage.local_copy(output) as folder:
            api.create_repo(name, exist_ok=True)
            return str(api.upload_folder(repo_id=name, folder_path=folder).commit_url)
    except Exception as error:  # of a library that lets its transport's own errors through
        if isinstance(error, InputError) or storage.fault(error) is not None:
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--push: {name} was not uploaded ({first}); {output} is whole. Log in (hf auth login, "
            "or HF_TOKEN), unset HF_HUB_OFFLINE, name it USER/MODEL, and run the same command again"
        ) from None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m qure_core.job.publish", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", help="run directory: a path or URI")
    parser.add_argument("output", help="directory to write: a path or URI")
    parser.add_argument("--checkpoint", help="another than the run's newest: a path or URI")
    parser.add_argument(
        "--licence", default="other", help="as the hub names it, e.g. apache-2.0 (%(default)s)"
    )
    parser.add_argument("--push", metavar="USER/MODEL", help="also upload it to the hub")
    chosen = parser.parse_args()
    run, output = (storage.resolve(path).rstrip("/") for path in (chosen.run, chosen.output))
    config = storage.join(run, "config.yaml")
    if not storage.exists(config):
        raise InputError(f"{run}: has no config.yaml, so it is no run; give a run's directory")
    settings = parse_settings(yaml.safe_load(storage.read_bytes(config)), config)
    settings.run.dir = run
    epoch = latest_epoch(run, "train")
    if chosen.checkpoint is None and not epoch:
        raise InputError(f"{run}: has not been fine-tuned yet; there is no checkpoint to publish")
    checkpoint = (
        storage.resolve(chosen.checkpoint)
        if chosen.checkpoint
        else checkpoint_uri(run, "train", epoch or 0)
    )
    name = chosen.push or output.rsplit("/", 1)[-1]
    make_repository(settings, checkpoint, output, chosen.licence, name)
    print(f"model repository: {output}", flush=True)
    if chosen.push:
        print(f"uploaded: {push(output, chosen.push)}", flush=True)


if __name__ == "__main__":
    run_main(main)
