"""A run on data of CIRR's layout: CIRR's metrics wherever figures are shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Runner
from PIL import Image

from qure_core.evaluation.metrics import cirr_summary
from qure_core.evaluation.stage import read_evaluation, read_rankings
from qure_core.job.metrics_log import read_metrics
from qure_core.job.tracking import scalars

NAMES = {"R@1", "R@5", "R@10", "R@50", "R_s@1", "R_s@2", "R_s@3", "mean(R@5, R_s@1)"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images in each split, in sets of six, and a triplet from each image."""
    root = tmp_path_factory.mktemp("cirr")
    rng = np.random.default_rng(0)
    for split, folder in (("train", "train/0"), ("val", "dev")):
        names = [f"{split}-{n}-{n % 4}-img0" for n in range(12)]
        (root / folder).mkdir(parents=True)
        for name in names:
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{name}.png")
        captions = [
            {
                "pairid": number,
                "reference": names[number],
                "target_hard": names[number - number % 6 + (number + 1) % 6],
                "caption": ["make it red", "two of them on a table", "the same dog outside"][
                    number % 3
                ],
                "img_set": {"members": names[number - number % 6 :][:6]},
            }
            for number in range(12)
        ]
        for kind, value in (
            ("captions/cap.rc2", captions),
            ("image_splits/split.rc2", {name: f"./{folder}/{name}.png" for name in names}),
        ):
            file = root / "cirr" / f"{kind}.{split}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(value))
    return root


def test_cirrs_metrics_everywhere(data: Path, tmp_path: Path, run_pipeline: Runner) -> None:
    run_dir = tmp_path / "run"
    settings = [
        *("--data.format=cirr", f"--data.root={data}", f"--run.dir={run_dir}"),
        *("--pretrain.epochs=0", "--train.epochs=1", "--train.mining_definitions=1"),
        *("--train.lr=1e-3", "--train.batch_size=6", "--cluster.gpus=none", "--features=off"),
        *("--report.examples=1", "--objective.name=info_nce", "--train.negatives_per_triplet=2"),
        "--cluster.in_process=true",
    ]
    result = run_pipeline("train", *settings)
    assert result.returncode == 0, result.stdout + result.stderr
    manifest = read_evaluation(str(run_dir / "evaluations/epoch-0001"))
    rows = read_rankings(str(run_dir / "evaluations/epoch-0001")).to_pylist()
    # Without the reference, eleven images are ranked, and five of the set.
    assert all(row["target_rank"] < 11 and len(row["subset_ids"]) == 5 for row in rows)
    by_hand = cirr_summary(
        [row["top_ids"].index(row["target_id"]) for row in rows],
        [row["subset_ids"].index(row["target_id"]) for row in rows],
    )
    assert manifest["metrics"] == {"recall": pytest.approx(by_hand)}
    assert set(by_hand) == NAMES
    # In the lines of the run, its last table, the metrics, the trackers, and the report.
    for line in result.stdout.splitlines():
        if line.startswith("evaluation at "):
            assert all(f"{name} " in line for name in NAMES), line
    table = result.stdout[result.stdout.index("\nval, CIRR's protocol") :]
    assert all(name in table.splitlines()[2] for name in NAMES)
    assert f"{by_hand['R_s@1']:.2f}" in next(x for x in table.splitlines() if x[:3] == "end")
    lines = read_metrics(str(run_dir))
    assert {f"val/{name}" for name in NAMES} <= {name for name, _, _ in scalars(lines)}
    page = (run_dir / "report/index.html").read_text()
    assert all(f"<th>{name}</th>" in page for name in NAMES)
    assert "R-precision" not in page
    # And alone, where "own" is what the run was measured by.
    output = tmp_path / "out"
    alone = run_pipeline(
        "evaluate",
        *settings[:2],
        "--protocol=own",
        f"--checkpoint={run_dir}/checkpoints/train-0001",
        f"--output={output}",
        "--cluster.gpus=none",
    )
    assert alone.returncode == 0, alone.stdout + alone.stderr
    found = json.loads((output / "own.json").read_text())["result"]["recall"]
    assert found == manifest["metrics"]["recall"]
    assert "R_s@1" in alone.stdout
