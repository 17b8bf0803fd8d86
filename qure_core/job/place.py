"""The run directory: what a run keeps there under which names, and whose directory it is.

A run marks its directory with ``run.json`` before it writes anything else. Without that mark,
files that have the names of a run's own are somebody else's, and the directory is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

import yaml

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.data.schema import SPLIT_KIND
from qure_core.embeddings.shards import EMBEDDINGS_KIND
from qure_core.evaluation.stage import EVALUATION_KIND
from qure_core.mining.mined_set import MINED_KIND
from qure_core.mining.stage import SCRATCH_KIND
from qure_core.model.checkpoint_files import CHECKPOINT_KIND

RUN_KIND = "run"
MARK = "run.json"
SECTIONS = {"run", "data", "model", "pretrain", "train", "mining", "evaluation", "cluster"}
NAMES = {
    MARK,
    "config.yaml",
    "data",
    "checkpoints",
    "rounds",
    "evaluations",
    "metrics",
    "metrics.jsonl",
    "events.jsonl",
    "tensorboard",
    "tracking.json",
    "control",
    "ray_train",
    "report",
    "summary.json",
}


def _is_marked(folder: str, name: str = MARK, kind: str = RUN_KIND) -> bool:
    mark = storage.join(folder, name)
    if not storage.exists(mark):
        return False
    try:
        value = json.loads(storage.read_bytes(mark))
    except ValueError:
        return False
    return isinstance(value, dict) and value.get("kind") == kind


def _is_older_run(run_dir: str) -> bool:
    """Whether a run from before the mark is there: its whole config, and its training split."""
    config = storage.join(run_dir, "config.yaml")
    split = storage.manifest_uri(storage.join(run_dir, "data", "train"))
    if split is None or not storage.exists(config):
        return False
    try:
        settings = yaml.safe_load(storage.read_bytes(config))
        kind = json.loads(storage.read_bytes(split)).get("kind")
    except (yaml.YAMLError, ValueError, AttributeError):
        return False
    return isinstance(settings, dict) and set(settings) >= SECTIONS and kind == SPLIT_KIND.name


def claim_run(run_dir: str) -> None:
    """Mark ``run_dir`` as a run's, or raise `InputError` naming what is in the way there."""
    if not _is_marked(run_dir) and _is_older_run(run_dir):
        storage.check_writable(run_dir, "run.dir")
        for uri, kind in _unfinished(run_dir):
            storage.adopt(uri, kind)  # what the older version left unfinished had no mark
        storage.write_json(storage.join(run_dir, MARK), {"kind": RUN_KIND})
    claim(run_dir, MARK, RUN_KIND, NAMES, "run.dir")


def claim(folder: str, mark: str, kind: str, names: set[str], setting: str) -> None:
    """Mark ``folder`` as a ``kind``'s, or raise `InputError` naming what is in the way there, of
    the ``names`` that it would write."""
    if _is_marked(folder, mark, kind):
        return
    if found := [name for name in storage.list_names(folder) if name in names]:
        raise InputError(
            f"{setting}: {folder} is no {kind} of this project, and a {kind} would write over what "
            f"is there: {', '.join(found)}. Nothing was changed; choose another directory, e.g. "
            f"--{setting} {storage.join(folder, f'{kind}s', 'first')}"
        )
    storage.check_writable(folder, setting)
    storage.write_json(storage.join(folder, mark), {"kind": kind})


_UNFINISHED = {
    "checkpoints": ((r"(pretrain|train)-\d{4,}", CHECKPOINT_KIND),),
    "rounds": (
        (r"epoch-\d+", MINED_KIND),
        (r"epoch-\d+(-veto)?-embeddings", EMBEDDINGS_KIND),
        (r"epoch-\d+-scratch", SCRATCH_KIND),
    ),
    "evaluations": (
        (r"epoch-\d+", EVALUATION_KIND),
        (r"epoch-\d+-embeddings", EMBEDDINGS_KIND),
    ),
}


def _unfinished(run_dir: str) -> Iterator[tuple[str, storage.Kind]]:
    """Directories that a stage of the run fills and that are not committed, with their kinds."""
    for folder, kinds in _UNFINISHED.items():
        for name in storage.list_names(storage.join(run_dir, folder)):
            uri = storage.join(run_dir, folder, name)
            for pattern, kind in kinds:
                if re.fullmatch(pattern, name) and not storage.is_committed(uri):
                    yield uri, kind


def check_places(run_dir: str) -> None:
    """Raise `InputError` if a stage of the run there would later meet files that are not ours."""
    for uri, kind in _unfinished(run_dir):
        storage.check_place(uri, kind, "run.dir")


def check_apart(run_dir: str, data_root: str) -> None:
    """Raise `InputError` if the data lie where a run writes."""
    run, data = _real(run_dir), _real(data_root)
    inside = data == run or (
        data.startswith(f"{run}/") and data.removeprefix(f"{run}/").split("/")[0] in NAMES
    )
    if inside:
        raise InputError(
            f"data.root: {data_root} lies where a run in {run_dir} writes; choose a --run.dir "
            f"apart from the data, e.g. {storage.join(run_dir, 'runs', 'first')}"
        )


def _real(uri: str) -> str:
    if storage.is_local(uri):
        return os.path.realpath(storage.filesystem(uri)[1])
    return re.sub("/+", "/", uri).rstrip("/")
