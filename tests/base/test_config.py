from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.runtime.settings import load_settings


def load(*arguments: str) -> Settings:
    return load_settings(arguments, "train.py", "Train.")[0]


def test_options_override_the_file(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("train: {lr: 1.0e-3, epochs: 7}\n")
    settings = load("--config", str(config), "--train.lr", "2e-5", "--data.categories", "a,b")
    assert settings.train.lr == 2e-5
    assert settings.train.epochs == 7
    assert settings.data.categories == ["a", "b"]


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("train: {lr: -1, epochz: 3}\nfoo: 1\nmining: {memory_mb: lots}\n")
    with pytest.raises(InputError) as caught:
        load("--config", str(config), "--train.bogus", "3", "--model.preset", "huge")
    message = str(caught.value)
    for part in ("train.lr", "-1", "train.epochz", "foo", "memory_mb", "lots", "--train.bogus"):
        assert part in message
    assert "huge" in message
    assert "blip2-vit-l" in message


@pytest.mark.parametrize("number", ["1e400", "inf", "-inf", "nan"])
@pytest.mark.parametrize("name", ["train.lr", "mining.min_steepness", "pretrain.weight_decay"])
def test_every_number_is_finite(name: str, number: str) -> None:
    with pytest.raises(InputError, match=rf"{name}: .*finite number"):
        load(f"--{name}={number}")


def test_a_config_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--config: .* cannot be read \(Is a directory\)"):
        load("--config", str(tmp_path))
    bad = tmp_path / "bad.yaml"
    for data in (b"train: [", b"\xff\xfe\x00"):
        bad.write_bytes(data)
        with pytest.raises(InputError, match=r"bad\.yaml: not valid YAML") as caught:
            load("--config", str(bad))
        assert "\n" not in str(caught.value)


def test_the_default_recipe_is_taken_only_where_nothing_of_it_is_set() -> None:
    recipe = ROOT / "configs/quickstart.yaml"

    def taken(*arguments: str) -> tuple[bool, float]:
        settings, chosen = load_settings(arguments, "train.py", "", default=recipe)
        return chosen.default_used, settings.train.lr

    assert taken() == (True, 5e-4)
    assert taken("--run.dir=x", "--data.root=y", "--run.seed=3") == (True, 5e-4)
    assert taken("--train.epochs=7") == (False, 5e-6)
    assert taken("--config", str(ROOT / "configs/cirr.yaml")) == (False, 1e-5)


def test_impossible_schedule_is_refused() -> None:
    with pytest.raises(InputError, match=r"mining_definitions=6 exceeds train.epochs=3"):
        load("--train.epochs", "3")


def test_environment_does_not_leak_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAIN", '{"lr": 1}')
    assert load().train.lr == 5e-6


def test_help_shows_every_field_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    text = "".join(capsys.readouterr().out.split())
    for section, field in Settings.model_fields.items():
        for name, inner in getattr(field.annotation, "model_fields", {}).items():
            if not hasattr(inner.annotation, "model_fields"):
                assert f"--{section}.{name}" in text
                assert inner.description, f"{section}.{name} has no description"
                assert "".join(inner.description.split()) in text


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    settings = load("--config", str(path))
    assert yaml.safe_load(yaml.safe_dump(settings.resolved())) == settings.resolved()


def test_missing_config_is_named() -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such config file"):
        load("--config", "nowhere.yaml")


def test_relative_paths_in_a_submitted_job_outlive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert load().run.dir == str(Path.home() / "qure" / "runs" / "quickstart")
    monkeypatch.setenv("QURE_HOME", "/somewhere")
    assert load().run.dir == "/somewhere/runs/quickstart"
    assert load("--run.dir", "s3://bucket/run").run.dir == "s3://bucket/run"
