"""`pipelines/compare.py`: what is planned, run, resumed and said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import JOB, ROOT, Runner

from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.evaluation.paired import samples_to_reach
from qure_core.job.comparison import compare
from qure_core.job.grid import plan_lines, read_grid

GRID: dict[str, Any] = {
    "seeds": [3, 4],
    "start": {"train.epochs": 1, "train.mining_definitions": 1, "train.warmup_epochs": 1},
    "settings": {"train.epochs": 2, "train.mining_definitions": 2},
    "lines": {
        "QuRe": None,
        "contrastive": {"train.negatives": "random", "objective.name": "info_nce"},
        "best below": {"mining.rule": "top_k", "mining.options": {"negatives": 5}},
        "SPRC": {"model.query_encoder": "sprc", "objective.name": "hn_nce"},
    },
    "recall": [1, 101],
}


def written(folder: Path, **changes: Any) -> str:
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID | changes, sort_keys=False))
    return str(folder / "grid.yaml")


def test_lines_share_their_seeds_start(tmp_path: Path) -> None:
    config = Settings(train={"control": True})
    lines = plan_lines(read_grid(written(tmp_path)), config, f"{tmp_path}/out")
    assert [line.label for line in lines[:3]] == [
        "QuRe (seed 3)",
        "QuRe (seed 4)",
        "contrastive (seed 3)",
    ]
    starts = {(line.name, line.seed): line.start for line in lines}
    for seed in (3, 4):
        shared = {starts[name, seed].checkpoint for name in ("QuRe", "contrastive", "best below")}
        assert len(shared) == 1
        assert starts["SPRC", seed].checkpoint not in shared
        assert starts["SPRC", seed].settings.model.query_encoder == "sprc"
    assert len({start.checkpoint for start in starts.values()}) == 4
    for line in lines:
        begun, own = line.start.settings, line.settings
        assert (begun.run.seed, own.run.seed) == (line.seed, line.seed)
        assert begun.train.negatives == "random"
        assert (
            own.model.pretrained
            == line.start.checkpoint
            == f"{begun.run.dir}/checkpoints/train-0001"
        )
        assert (own.train.warmup_epochs, own.train.epochs, own.train.eval_every) == (0, 2, 1)
        assert own.features == begun.features == "build"
        assert own.cluster.in_process
        assert not own.train.control
        assert not begun.train.control
    assert lines[4].settings.mining.options == {"negatives": 5}
    assert lines[4].settings.run.dir == f"{tmp_path}/out/lines/best-below/seed-3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lines": {}}, "lines: .* at least 1 item"),
        ({"lins": {}}, "lins: Extra inputs"),
        ({"baseline": "Qure"}, "baseline: 'Qure' is none of the lines QuRe, contrastive"),
        ({"reach": "Qure"}, "reach: 'Qure' is none of the lines QuRe, contrastive"),
        ({"seeds": [1, 1]}, r"seeds: one of \[1, 1\] is there twice"),
        ({"lines": {"a b": {}, "a-b": {}}}, "two names differ by nothing but signs"),
        ({"lines": {"x": {"train.lrr": 1}}}, "--grid: x.*train.lrr"),
        ({"lines": {"x": {"objective.name": "y"}}}, "--grid: x.*objective.name: 'y' is not one of"),
        ({"lines": {"x": {"mining.options": {"k": 1}}}}, "--grid: x.*steep_drops has none"),
        ({"settings": {"train.epochs": 0}}, "train.epochs"),
        ({"lines": {"x": {"objective": "hcl"}}}, "objective: 'hcl'; settings are by dotted name"),
        ({"lines": {"x": {"objective": "hcl", "objective.options": {}}}}, "objective: 'hcl'"),
        (
            {"lines": {"x": {"mining.engine": "streaming", "mining.rule": "top_k"}}},
            "whole rankings",
        ),
    ],
)
def test_grids_that_cannot_be_run_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        plan_lines(read_grid(written(tmp_path, **changes)), Settings(), "out")


def test_a_start_is_known_by_what_changes_it(tmp_path: Path) -> None:
    grid = read_grid(written(tmp_path))

    def starts(config: Settings) -> list[str]:
        return [line.start.checkpoint for line in plan_lines(grid, config, "out")]

    assert starts(Settings(train={"log_every": 7}, data={"root": "elsewhere"})) == starts(
        Settings()
    )
    assert starts(Settings(train={"lr": 1e-4})) != starts(Settings())


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"metric": "R@5"}, "metric: 'R@5' is none of the figures of world data: R@10"),
        ({}, "has no val split, by which lines are compared"),
    ):
        data: dict[str, Any] = {} if changes else {"format": "jsonl", "root": str(tmp_path)}
        row = {"reference": "a", "text": "b", "target": "c", "split": "train"}
        (tmp_path / "triplets.jsonl").write_text(json.dumps(row))
        grid = read_grid(written(tmp_path, **changes))
        lines = plan_lines(grid, Settings(data=data), str(tmp_path / "out"))
        with pytest.raises(InputError, match=message):
            compare(grid, lines, str(tmp_path / "out"), "world")
        assert not (tmp_path / "out").exists()


def test_what_is_no_grid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not there"):
        read_grid(str(tmp_path / "none.yaml"))
    for text, message in (("a: [", "is no YAML"), ("- 1", "has no lines")):
        (tmp_path / "grid.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            read_grid(str(tmp_path / "grid.yaml"))


def test_a_grid_extends_another(tmp_path: Path) -> None:
    folder = tmp_path / "grids"
    folder.mkdir()
    base: dict[str, Any] = {
        "seeds": [3],
        "settings": {"train.epochs": 4, "train.lr": 1e-3},
        "lines": {"a": {"train.batch_size": 2}, "b": None},
        "baseline": "a",
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    own = {"extends": "base.yaml", "settings": {"train.epochs": 1}, "start": {"train.epochs": 2}}
    (folder / "own.yaml").write_text(yaml.safe_dump(own))
    grid = read_grid(str(folder / "own.yaml"))
    assert grid.settings == {"train.epochs": 1, "train.lr": 1e-3}
    assert grid.start == {"train.epochs": 2}
    assert grid.lines == {"a": {"train.batch_size": 2}, "b": {}}
    assert (grid.seeds, grid.baseline) == ([3], "a")
    (folder / "lines.yaml").write_text("extends: own.yaml\nlines: {c: {}}\nbaseline: c\n")
    assert list(read_grid(str(folder / "lines.yaml")).lines) == ["c"]
    for text, message in (
        ("extends: own.yaml", "base.yaml: extends: .* extends it in turn"),
        ("extends: 3", "extends: 3 is no name"),
        ("extends: /a/b.yaml", "extends: '/a/b.yaml' is no name of a file beside it"),
        ("extends: away.yaml", "away.yaml is not there .extended by .*base.yaml"),
    ):
        (folder / "base.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            read_grid(str(folder / "own.yaml"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "grids").glob("*.yaml")), ids=lambda p: p.name
)
def test_the_projects_own_grids_are_whole(path: Path) -> None:
    grid = read_grid(str(path))
    assert len(plan_lines(grid, Settings(), "out")) == len(grid.lines) * len(grid.seeds)


def arguments(world: Path, output: Path, grid: str) -> list[str]:
    own = [word for word in JOB if not word.startswith("--train.")]
    return [
        *own,
        f"--feature_store.dir={output}-features",
        f"--data.root={world}",
        "--train.lr=1e-3",
        "--train.batch_size=16",
        "--grid",
        grid,
        "--output",
        str(output),
    ]


@pytest.fixture(scope="module")
def compared(
    world: Path, run_pipeline: Runner, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("compared")
    done = run_pipeline("compare", *arguments(world, folder / "out", written(folder, reach="QuRe")))
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


def test_a_comparison_says_what_it_found(compared: tuple[Path, str]) -> None:
    output, said = compared
    results = json.loads((output / "results.json").read_text())
    names = [line["name"] for line in results["lines"]]
    assert sorted(names) == sorted(GRID["lines"])
    means = [line["figures"]["R@10"]["mean"] for line in results["lines"]]
    assert means == sorted(means, reverse=True)
    base = next(line for line in results["lines"] if line["name"] == "QuRe")
    assert base["difference"]["verdict"] == "baseline"
    for line in results["lines"]:
        finals = [curve[-1][1] for curve in line["curves"]]
        assert line["figures"]["R@10"]["mean"] == pytest.approx(sum(finals) / 2)
        assert [point[0] for point in line["curves"][0]] == [0, 90, 180]
        own = [a - b[-1][1] for a, b in zip(finals, base["curves"], strict=True)]
        assert line["difference"]["by_seed"] == pytest.approx(own)
        assert line["samples_to_reach"]["1"] == [0, 0]
        assert line["samples_to_reach"]["101"] == [None, None]
        for seed, curve in enumerate(line["curves"]):
            goal = base["curves"][seed][-1][1]
            samples = line["to_reach"]["samples"][seed]
            assert samples == samples_to_reach(curve, goal)
            seconds, share = (line["to_reach"][name][seed] for name in ("seconds", "share"))
            if samples is None:
                assert (seconds, share) == (None, None)
            else:
                assert 0 <= seconds <= line["seconds"] * 2
                assert share == pytest.approx(samples / 180, abs=1e-2)
        mined = line["name"] != "contrastive"
        assert (line["false_negatives"] is not None) == mined
        evaluations = [
            json.loads(path.read_text())
            for path in sorted((output / "lines").glob("*/seed-3/evaluations/*/manifest.json"))
        ]
        assert len(evaluations) == 12
    # All lines of a seed and model begin with the same figures.
    starts = {line["name"]: [curve[0][1] for curve in line["curves"]] for line in results["lines"]}
    assert starts["QuRe"] == starts["contrastive"] == starts["best below"]
    page = (output / "report/index.html").read_text()
    for part in (*names, "within noise", "Results", "data:image/png"):
        assert part in page
    assert all(name in said for name in names)
    assert "how much training differs by chance is hardly known" in said
    assert "| QuRe |" in (output / "table.md").read_text()


def test_killed_it_goes_on_line_by_line(
    compared: tuple[Path, str], world: Path, tmp_path: Path, run_pipeline: Runner
) -> None:
    # Of fewer lines and one seed: each is a run of its own.
    lines = {name: GRID["lines"][name] for name in ("QuRe", "contrastive")}
    output, grid = tmp_path / "out", written(tmp_path, lines=lines, seeds=GRID["seeds"][:1])
    command = [sys.executable, str(ROOT / "pipelines/compare.py"), *arguments(world, output, grid)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    end = time.monotonic() + 200
    try:
        while not (finished := list((output / "lines").glob("*/*/summary.json"))):
            assert time.monotonic() < end, "no line was finished"
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (output / "results.json").exists()
    before = {path: path.stat().st_mtime_ns for path in finished[0].parent.rglob("*.safetensors")}
    done = run_pipeline("compare", *arguments(world, output, grid))
    assert done.returncode == 0, done.stderr
    ours, whole = (
        {row["name"]: row for row in json.loads((place / "results.json").read_text())["lines"]}
        for place in (output, compared[0])
    )
    assert set(ours) == set(lines)
    for name, line in ours.items():
        assert line["curves"][0] == whole[name]["curves"][0]
        assert line["rounds"][0] == whole[name]["rounds"][0]
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.usefixtures("standing_cluster")
def test_a_line_that_fails_leaves_the_others(
    compared: tuple[Path, str], world: Path, tmp_path: Path, run_pipeline: Runner
) -> None:
    # A learning rate that no training survives.
    lines = {"QuRe": None, "wild": {"train.lr": 1e38}}
    grid = written(tmp_path, lines=lines, seeds=[3])
    done = run_pipeline("compare", *arguments(world, tmp_path / "out", grid))
    assert done.returncode == 2
    assert "1 of 2 lines could not be finished" in done.stderr
    assert "wild (seed 3): " in done.stderr
    assert (tmp_path / "out/lines/qure/seed-3/summary.json").exists()
    assert not (tmp_path / "out/results.json").exists()
    assert "lower train.lr" in (tmp_path / "out/logs/lines-wild-seed-3.txt").read_text()


@pytest.mark.usefixtures("standing_cluster")
def test_strangers_files_are_left(world: Path, tmp_path: Path, run_pipeline: Runner) -> None:
    output = tmp_path / "out"
    (output / "report").mkdir(parents=True)
    (output / "report/index.html").write_text("mine")
    done = run_pipeline("compare", *arguments(world, output, written(tmp_path)))
    assert done.returncode == 2
    assert f"output: {output} is no comparison of this project" in done.stderr
    assert [p.name for p in output.rglob("*")] == ["report", "index.html"]
