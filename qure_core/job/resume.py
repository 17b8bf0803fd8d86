"""Whether and how a run goes on: with its own settings, or begun again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from qure_core import storage
from qure_core.base.config import Settings, flatten, free_settings
from qure_core.base.errors import InputError
from qure_core.job.layout import committed
from qure_core.model.checkpoint_files import CHECKPOINT_KIND, checkpoint_uri, latest_epoch
from qure_core.runtime.settings import parse_settings

# What runs were begun with before there was a choice, where today's default is another.
_BEFORE = {
    "data.pixels": "released",
    "data.texts": "released",
    "mining.exclude_known_positives": False,
}


def _kept_settings(run_dir: str) -> tuple[dict[str, Any], set[str]]:
    """The settings of the run there, by dotted name, and those that it did not know yet."""
    uri = storage.join(run_dir, "config.yaml")
    values = yaml.safe_load(storage.read_bytes(uri))
    # What it did not know yet has a default that means what was done then, or is listed here.
    kept = flatten(parse_settings(values, uri).resolved())
    unknown = set(_BEFORE) - set(flatten(values))
    return kept | {name: _BEFORE[name] for name in unknown}, unknown


def as_begun(settings: Settings) -> None:
    """Let a run of an earlier version go on as it was begun, unless other settings are asked for.

    Changes ``settings``.
    """
    run_dir = settings.run.dir
    if not has_learned(run_dir) or not storage.exists(storage.join(run_dir, "config.yaml")):
        return
    said = []
    for name in sorted(_kept_settings(run_dir)[1]):
        section, key = name.split(".")
        if key not in (part := getattr(settings, section)).model_fields_set:
            setattr(part, key, _BEFORE[name])
            said.append(f"{name} {_BEFORE[name]}")
    if said:
        print(f"[run] begun by an earlier version; it goes on so: {', '.join(said)}", flush=True)


def _differences(settings: Settings, sections: Sequence[str]) -> list[str]:
    """The settings of ``sections`` that the run there, if any, was made with other values of."""
    uri = storage.join(settings.run.dir, "config.yaml")
    if not storage.exists(uri):
        return []
    before, _ = _kept_settings(settings.run.dir)
    now, free = flatten(settings.resolved()), free_settings()
    # An option that was taken away is in the old ones alone.
    return [
        f"  {name}: {before.get(name)!r} there, {now.get(name)!r} now"
        for name in [*now, *(set(before) - set(now))]
        if name.split(".")[0] in sections and name not in free and before.get(name) != now.get(name)
    ]


def check_settings(settings: Settings, sections: Sequence[str]) -> None:
    """Raise `InputError` if the run there, if any, was made with other settings of ``sections``.

    First `as_begun`.
    """
    as_begun(settings)
    run_dir = settings.run.dir
    if not has_learned(run_dir):
        return
    if changed := _differences(settings, sections):
        raise InputError(
            f"run.dir: {run_dir} holds a run with other settings:\n"
            + "\n".join(changed[:7])
            + (f"\n  ... and {len(changed) - 7} more" if len(changed) > 7 else "")
            + f"\nto go on with that run give its own, --config {run_dir}/config.yaml; "
            "for other settings choose another --run.dir"
        )


def has_learned(run_dir: str) -> bool:
    """Whether a run has trained at all: until then nothing is lost by beginning it again."""
    return any(latest_epoch(run_dir, stage) for stage in ("pretrain", "train"))


def save_config(settings: Settings) -> None:
    """Write config.yaml; what a run remembers of its settings."""
    uri = storage.join(settings.run.dir, "config.yaml")
    storage.write_bytes(uri, yaml.safe_dump(settings.resolved(), sort_keys=False).encode())


def begin(settings: Settings) -> None:
    """Say what a run goes on from; let one that has not trained begin again with these settings."""
    run_dir, sections = settings.run.dir, list(settings.resolved())
    check_settings(settings, sections)
    config = storage.join(run_dir, "config.yaml")
    known = storage.exists(config)
    if has_learned(run_dir):
        if not known:
            raise InputError(
                f"run.dir: {config} is missing, by which a run is known; put it back, or choose "
                "another --run.dir"
            )
        stage = "train" if latest_epoch(run_dir, "train") is not None else "pretrain"
        epochs = (settings.train if stage == "train" else settings.pretrain).epochs
        newest = f"{stage}-{latest_epoch(run_dir, stage):04d} of {epochs} epochs"
        rounds = len(committed(run_dir, "rounds"))
        print(f"[run] goes on from checkpoint {newest}, {rounds} mined round(s)", flush=True)
        return
    if not known or _differences(settings, sections):
        forget_first_weights(run_dir)
    if known:
        print(f"[run] {run_dir} had not trained yet and begins again", flush=True)


def forget_first_weights(run_dir: str) -> None:
    """Remove weights that no step has changed yet: they were made for other data or settings."""
    for stage in ("pretrain", "train"):
        storage.discard(checkpoint_uri(run_dir, stage, 0), CHECKPOINT_KIND)
