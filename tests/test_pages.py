"""The pages: their commands are taken, their Python runs, their links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.model import build_model, learn_tokenizer
from qure_core.model.checkpoints import save_checkpoint
from qure_core.runtime.reference import settings_reference

ROOMS = ("pipelines", "qure_core", "configs", "tests", "cluster")
PAGES = [ROOT / "README.md", *(ROOT / room / "README.md" for room in ROOMS)]
FILE = r"\b(?:pipelines|tests|configs|cluster|qure_core)/[\w/.-]+\.\w+"


def blocks(page: Path, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_of_settings_is_the_schemas() -> None:
    assert (ROOT / "configs/README.md").read_text() == settings_reference(), (
        "python -m qure_core.runtime.reference > configs/README.md"
    )
    described = settings_reference()
    for section, field in Settings.model_fields.items():
        names = getattr(field.annotation, "model_fields", {})
        for name, inner in names.items():
            if not hasattr(inner.annotation, "model_fields"):
                assert f"| `{section}.{name}`" in described


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in link:
            continue
        file, _, part = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if part:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert part in slugs, link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_pages_name_are_there(page: Path) -> None:
    text = page.read_text()
    for name in set(
        re.findall(r"\b(?:pipelines|tests|configs|cluster|qure_core)/[\w/.-]+\.\w+", text)
    ):
        assert (ROOT / name).exists(), name
    if page.parent.name == "qure_core":
        for name in set(re.findall(r"`(\w+(?:/\w+)*\.py)", text)):
            assert (page.parent / name).exists() or (ROOT / name).exists(), name


def commands() -> Iterator[tuple[str, list[str]]]:
    """Scripts of ours and their arguments, of every page."""
    for page in PAGES:
        for block in blocks(page):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                match = re.search(r"python (?:/home/ray/qure/)?(pipelines/\w+\.py)(.*)", line)
                if match and "..." not in match[2]:
                    yield match[1], shlex.split(match[2], comments=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = build_model("tiny", learn_tokenizer(["in red"], 80), 0.1, seed=0)
    place = tmp_path_factory.mktemp("pages") / "checkpoint"
    save_checkpoint(str(place), model, processor, {"stage": "train", "epoch": 0})
    return place


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each script reads its arguments as the page gives them: options and settings exist."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("QURE_HOME", str(tmp_path))
    places = {
        "CONFIG": "configs/jsonl.yaml",
        **{
            name: str(tmp_path / name)
            for name in ("DATA", "DIR", "OUT", "RUN", "ROUND", "INDEX", "STUDY")
        },
        **{"QUERY_ID": "q1", "BUCKET": "bucket"},
    }
    seen: dict[str, int] = {}
    for path, arguments in commands():
        words = [
            re.sub(r"\b[A-Z_]{3,}\b", lambda m: places.get(m[0], m[0]), word) for word in arguments
        ]
        module = script(path)
        verbs = {"inspect", "export", "remove", "compact"}
        if words and words[0] in getattr(module, "VERBS", verbs):
            monkeypatch.setattr(sys, "argv", [path, *words])
            kinds = r"so this is not a finished (mined set|dataset|search index)"
            kinds += r"|so this is no preference study|(hpfiq.json|queries.jsonl) is not there"
            with pytest.raises(InputError, match=kinds):
                (module.VERBS if hasattr(module, "VERBS") else vars(module))[words[0]]()
        else:
            words = [word.replace("/home/ray/qure/", "") for word in words]
            monkeypatch.setattr(sys, "argv", [path, *words])
            module.read()
        seen[path] = seen.get(path, 0) + 1
    assert set(seen) == {f"pipelines/{x.name}" for x in (ROOT / "pipelines").glob("*.py")}
    assert sum(seen.values()) >= 14, seen


def test_the_python_use_runs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = next(x for x in blocks(ROOT / "README.md", "python") if "Encoder.load" in x)
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{name}.jpg")
    known: dict[str, torch.Tensor] = {}
    exec(example.replace("runs/quickstart/checkpoints/train-0008", str(checkpoint)), known)
    assert known["images"].shape == (3, 8, 64)
    assert known["queries"].shape == (1, 64)
    assert known["scores"].shape == known["places"].shape == (1, 2)
