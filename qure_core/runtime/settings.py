"""Settings from YAML and the command line.

``load_settings(["--config", "configs/quickstart.yaml", "--train.lr", "1e-5"])`` returns checked
`Settings`, or raises one `InputError` that lists every unknown key, wrong type and impossible
value at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import ValidationError
from pydantic_settings import CliSettingsSource

from qure_core import storage
from qure_core.base.config import Settings, flatten
from qure_core.base.errors import InputError


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _merge(below, value)
        merged[key] = value
    return merged


def _read_yaml(path: str) -> dict[str, Any]:
    uri = storage.resolve(path)
    if "://" not in path and not storage.exists(uri):
        # Configs travel with the code, so inside a submitted job they are in its own directory.
        uri = path
    try:
        value = yaml.safe_load(storage.read_bytes(uri))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such config file (inside a Ray job, files ignored by .gitignore or "
            ".rayignore do not reach the cluster)"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"--config: {path} cannot be read ({reason}); give a YAML file of settings"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{path}: not valid YAML ({text})") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: the top level must be a mapping of sections such as 'train:'")
    return value


def refused(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{name}: unknown setting")
        elif not name:
            lines.append(str(item["msg"]).removeprefix("Value error, "))
        else:
            lines.append(f"{name}: {item['msg']} (got {item['input']!r})")
    return lines


def _credentials(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that hold a user's name or password; what is wrong is told without the value."""
    lines: list[str] = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += _credentials(value, f"{prefix}{name}.")
        elif isinstance(value, str) and "@" in urlsplit(value).netloc:
            lines.append(
                f"{prefix}{name}: holds credentials, which config.yaml and logs would show; give "
                "them in the environment (AWS_*, MLFLOW_TRACKING_URI, ...)"
            )
    return lines


def parse_settings(values: dict[str, Any], source: str) -> Settings:
    """Settings as ``source`` keeps them; those that it has not have their defaults."""
    try:
        return Settings(**values)
    except (ValidationError, TypeError) as error:
        found = refused(error) if isinstance(error, ValidationError) else [str(error)]
        raise InputError(
            f"{source}: not settings of this version ({'; '.join(found[:3])}); it was changed, or "
            "a later version wrote it"
        ) from None


def load_settings(
    arguments: Sequence[str],
    prog: str,
    description: str,
    extra: argparse.ArgumentParser | None = None,
    default: Path | None = None,
) -> tuple[Settings, argparse.Namespace]:
    """Read ``--config FILE`` and ``--section.field VALUE`` overrides into checked settings.

    ``extra`` declares a stage's own options (``--checkpoint`` and the like); they are returned
    as the second value. Without a config, ``default`` is read if no option sets what it would,
    places apart; ``default_used`` of the second value tells. Raises `InputError` listing everything
    that is wrong.
    """
    own = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--SECTION.FIELD VALUE ...] (--help lists all)",
        add_help=False,
        allow_abbrev=False,
        parents=[extra] if extra else [],
    )
    own.add_argument("--config", metavar="FILE", help="YAML settings; options override its values")
    if {"-h", "--help"} & set(arguments):
        # One parser of everything, for its text: it exits.
        everything = argparse.ArgumentParser(prog=prog, description=description, parents=[own])
        CliSettingsSource(Settings, root_parser=everything, cli_parse_args=["--help"])
    namespace, rest = own.parse_known_args(list(arguments))
    source: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
        Settings,
        root_parser=argparse.ArgumentParser(prog=prog, allow_abbrev=False),
        cli_parse_args=rest,
    )
    from_command_line = source()
    unknown = from_command_line.pop("unknown_arguments", [])
    lines = [
        f"{word}: unknown option (--help lists the settings)" for word in unknown if word[:1] == "-"
    ] or [f"{word}: unexpected argument" for word in unknown]
    from_file = _read_yaml(namespace.config) if namespace.config else {}
    namespace.default_used = False
    if default and not namespace.config:
        recipe = _read_yaml(str(default))
        given = set(flatten(from_command_line)) - {"run.dir", "data.root"}
        if not given & set(flatten(recipe)):
            namespace.default_used, from_file = True, recipe
    settings = None
    try:
        settings = Settings(**_merge(from_file, from_command_line))
    except ValidationError as error:
        lines += refused(error)
    lines += _credentials(settings.resolved() if settings else {})
    if lines or settings is None:
        where = f" in {namespace.config} and the command line" if namespace.config else ""
        raise InputError(
            "\n".join([f"{len(lines)} bad setting(s){where}:"] + [f"  {x}" for x in lines])
        )
    resolve_places(settings)
    return settings, namespace


def resolve_places(settings: Settings) -> None:
    """Make whole URIs of the places that settings name, in place."""
    settings.run.dir = storage.resolve(settings.run.dir)
    settings.data.root = storage.resolve(settings.data.root)
    settings.data.index_dir = storage.resolve(settings.data.index_dir)
    if settings.data.images is not None:
        settings.data.images = storage.resolve(settings.data.images)
    if settings.mining.corpus is not None:
        settings.mining.corpus = storage.resolve(settings.mining.corpus)
    if settings.mining.veto is not None:
        settings.mining.veto = storage.resolve(settings.mining.veto)
    settings.feature_store.dir = storage.resolve(settings.feature_store.dir)
