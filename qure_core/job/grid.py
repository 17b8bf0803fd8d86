"""What a comparison runs: lines of settings times seeds, each from its seed's own warm-up.

seeds: [1000, 1001]
start: {train.epochs: 4}             # settings of the warm-up, besides the config's
settings: {train.epochs: 3}          # settings of every line
lines:
  QuRe: {}
  contrastive: {objective.name: info_nce, train.negatives: random}
baseline: QuRe                       # what paired differences are taken from

``extends: field.yaml`` takes what a grid does not say from another one beside it: ``start`` and
``settings`` setting by setting, all else (``lines``, ``baseline``) in whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qure_core import storage
from qure_core.base.config import Settings, flatten, free_settings
from qure_core.base.errors import InputError
from qure_core.mining.stage import check_mining
from qure_core.model.checkpoint_files import checkpoint_uri
from qure_core.objectives import make_objective
from qure_core.runtime.settings import refused, resolve_places

# What a warm-up must share with the lines that go on from it.
_SHARED = ("model.", "pretrain.", "data.")
# What says nothing of a warm-up, which mines nothing.
_OF_MINING = ("mining.rule", "mining.options", "mining.window_", "mining.min_", "mining.max_")
# What a line takes from the warm-up's weights.
_IN_WEIGHTS: dict[str, Any] = {"model.vision": None, "model.vision_size": None, "model.text": None}
_IN_WEIGHTS |= {"model.tokenizer": None, "model.query_encoder": None, "model.encoder_options": {}}


class Grid(BaseModel):
    """A grid's file. Settings are by dotted name.

    metric: the figure that lines are ordered and compared by. recall: of which the samples needed
    to reach them are told, in its percent. reach: the line whose last figure others are to reach:
    after how many samples and seconds they do is told.
    """

    model_config = ConfigDict(extra="forbid")

    seeds: list[int] = Field([1000], min_length=1)
    start: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    lines: dict[str, dict[str, Any]] = Field(min_length=1)  # each a line's own settings
    baseline: str | None = None
    metric: str = "R@10"
    recall: list[float] = [50.0, 75.0]
    reach: str | None = None

    @field_validator("lines", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {k: v or {} for k, v in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True)
class Start:
    """A warm-up: its settings, and the checkpoint that it ends with."""

    settings: Settings
    checkpoint: str


@dataclass(frozen=True)
class Line:
    """A line of the grid under one seed, with the warm-up that it goes on from."""

    name: str
    seed: int
    settings: Settings
    start: Start

    @property
    def label(self) -> str:
        """What people know it by."""
        return f"{self.name} (seed {self.seed})"


def read_grid(path: str) -> Grid:
    """The grid in a YAML file, a path or URI; `InputError` that names what is wrong with it."""
    value = _read_whole(path, ())
    try:
        grid = Grid(**value)
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        place = ".".join(map(str, first["loc"])) if first else ""
        raise InputError(f"--grid: {path}: {place}: {first['msg'] if first else error}") from None
    for what, name in (("baseline", grid.baseline), ("reach", grid.reach)):
        if name is not None and name not in grid.lines:
            raise InputError(
                f"--grid: {path}: {what}: {name!r} is none of the lines {', '.join(grid.lines)}"
            )
    if len(set(grid.seeds)) < len(grid.seeds):
        raise InputError(f"--grid: {path}: seeds: one of {grid.seeds} is there twice")
    return grid


def _read_whole(path: str, through: tuple[str, ...]) -> dict[str, Any]:
    """A grid's file with what it extends; ``through`` are those that led to it."""
    uri = storage.resolve(path)
    if uri in through:
        raise InputError(f"--grid: {through[-1]}: extends: {path} extends it in turn")
    try:
        value = yaml.safe_load(storage.read_bytes(uri))
    except FileNotFoundError:
        of = f" (extended by {through[-1]})" if through else ""
        raise InputError(f"--grid: {path} is not there{of}") from None
    except yaml.YAMLError as error:
        raise InputError(f"--grid: {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise InputError(f"--grid: {path} has no lines; see configs/grids for examples")
    if "extends" not in value:
        return value
    other = value.pop("extends")
    if not isinstance(other, str) or "/" in other:
        raise InputError(f"--grid: {path}: extends: {other!r} is no name of a file beside it")
    base = _read_whole(storage.join(uri.rpartition("/")[0], other), (*through, uri))
    for name in ("start", "settings"):
        if isinstance(value.get(name), dict) and isinstance(base.get(name), dict):
            value[name] = base[name] | value[name]
    return base | value


def plan_lines(grid: Grid, config: Settings, output: str) -> list[Line]:
    """Every line under every seed, by line; `InputError` naming the first whose settings are wrong.

    ``config`` holds the settings that the grid's own come over.
    """
    base = flatten_but_options(config.resolved())
    lines = []
    for name, own in grid.lines.items():
        for seed in grid.seeds:
            lines.append(_line(grid, base, output, name, own, seed))
    folders = [line.settings.run.dir for line in lines]
    if len(set(folders)) < len(folders):
        raise InputError("--grid: lines: two names differ by nothing but signs; rename one")
    return lines


_OPTIONS = ("objective.options", "mining.options", "model.encoder_options")


def flatten_but_options(value: dict[str, Any]) -> dict[str, Any]:
    """`flatten`, with the options of parts, which are mappings themselves, in one piece."""
    whole = {}
    for name in _OPTIONS:
        section, key = name.split(".")
        if key in value.get(section, {}):
            whole[name] = value[section][key]
    flat = flatten(value)
    return {
        name: item
        for name, item in flat.items()
        if not name.startswith(tuple(f"{n}." for n in whole))
    } | whole


def _line(
    grid: Grid, base: dict[str, Any], output: str, name: str, own: dict[str, Any], seed: int
) -> Line:
    own, every, begun = (
        flatten_but_options(_nested(some)) for some in (own, grid.settings, grid.start)
    )
    shared = {key: value for key, value in (every | own).items() if key.startswith(_SHARED)}
    # Lines go on from random negatives alone, whatever they mine themselves.
    start = base | {"train.negatives": "random"} | begun | shared
    start |= {"run.seed": seed, "report.examples": 0} | _places(start)
    # Told apart by what changes its result: a later version's settings must not move it.
    free, default = free_settings(), flatten_but_options(Settings().resolved())
    known = {
        key: value
        for key, value in start.items()
        if key not in free and default.get(key) != value and not key.startswith(_OF_MINING)
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    start["run.dir"] = storage.join(output, "starts", f"{digest.hexdigest()[:12]}-{seed}")
    warmed = Start(
        _settings(start, f"{name}, its warm-up"),
        checkpoint_uri(start["run.dir"], "train", int(start["train.epochs"])),
    )
    settings = base | {"train.eval_every": 1, "train.warmup_epochs": 0} | every | own
    settings |= _IN_WEIGHTS | {"model.pretrained": warmed.checkpoint}
    settings = {k: v for k, v in settings.items() if not k.startswith("model.sizes.")}
    settings |= {"run.seed": seed, "report.examples": 0} | _places(settings)
    folder = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    settings["run.dir"] = storage.join(output, "lines", folder, f"seed-{seed}")
    return Line(name, seed, _settings(settings, name), warmed)


def _places(settings: dict[str, Any]) -> dict[str, Any]:
    """Features are made once and shared; small work needs no workers of its own; what mining added
    is for other lines to say."""
    places: dict[str, Any] = {"train.control": False}
    if settings["features"] == "auto":
        places["features"] = "build"
    alone = settings["cluster.train_workers"] == settings["cluster.embed_actors"] == 1
    return places | {"cluster.in_process": alone}


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, key = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise InputError(f"--grid: {section}: {place!r} is no section of settings")
        if not sections and not isinstance(value, dict) and key != "features":
            raise InputError(
                f"--grid: {key}: {value!r}; settings are by dotted name, e.g. objective.name"
            )
        place[key] = {**place[key], **value} if isinstance(place.get(key), dict) else value
    return nested


def _settings(flat: dict[str, Any], line: str) -> Settings:
    try:
        settings = Settings(**_nested(flat))
        resolve_places(settings)
        make_objective(settings.objective.name, settings.objective.options)
        check_mining(settings)
    except ValidationError as error:
        raise InputError(f"--grid: {line}: {'; '.join(refused(error)[:3])}") from None
    except InputError as error:
        raise InputError(f"--grid: {line}: {error}") from None
    return settings
