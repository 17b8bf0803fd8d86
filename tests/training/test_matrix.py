"""Every objective with every rule: a round mined and an epoch trained, in this process."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.data import read_split
from qure_core.mining import read_mined_set
from qure_core.mining.describe import describe_query
from qure_core.mining.mined_set import MINED_KIND
from qure_core.mining.rules import RULES
from qure_core.mining.stage import hold_round, mine_round
from qure_core.model import load_model
from qure_core.objectives import OBJECTIVES
from qure_core.report.build import left_alone_relevance
from qure_core.report.inspect import draw_query
from qure_core.runtime.in_process import stages_in_process
from qure_core.runtime.resources import plan_resources
from qure_core.training.loop import Worker, train_epochs
from qure_core.training.segment import Segment

# Scores of a model that has learned next to nothing lie close together.
OPTIONS = {"margin_pos": {"margin": 1e-4}, "perc_pos": {"share": 0.9999}}


def chosen(rule: str, objective: str = "bradley_terry") -> Settings:
    return Settings(
        mining={"rule": rule, "options": OPTIONS.get(rule, {})},
        objective={"name": objective},
        train={
            "epochs": 2,
            "mining_definitions": 1,
            "batch_size": 16,
            "lr": 1e-3,
            "negatives_per_triplet": 2,
        },
        cluster={"in_process": True, "gpus": "none", "embed_batch": 16},
        features="off",
    )


@pytest.fixture(scope="module")
def rounds(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A mined set by every rule, of a run's first checkpoint."""
    folder = tmp_path_factory.mktemp("rounds")
    split = read_split(str(finished_run / "data/train"))
    corpora = storage.read_json(str(finished_run / "data/corpora.json"))
    corpora = {category: tuple(ids) for category, ids in corpora.items()}
    checkpoint = str(finished_run / "checkpoints/train-0000")
    made = {}
    for rule in RULES:
        settings, output = chosen(rule), str(folder / rule)
        with stages_in_process(settings.cluster), hold_round(output) as lease:
            plan = plan_resources(settings.cluster)
            manifest = mine_round(settings, plan, checkpoint, split, corpora, output, 1, lease)
        assert manifest["rule"]["name"] == rule
        assert manifest["statistics"]["found_share"] > 0.3, "the rule as it means it"
        made[rule] = output
    return made


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_objective_trains_with_every_rule(
    objective: str, rule: str, rounds: dict[str, str], finished_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run / "data", tmp_path / "data")
    first = tmp_path / "checkpoints/train-0000"
    shutil.copytree(finished_run / "checkpoints/train-0000", first)
    settings = chosen(rule, objective)
    mined = rounds[rule]
    segment = Segment("train", str(tmp_path), settings.resolved(), 1, mined, 0)
    train_epochs(segment, Worker(torch.device("cpu")))
    lines = (tmp_path / "metrics/train-0001.jsonl").read_text().splitlines()
    facts = json.loads(lines[-1])
    assert facts["negatives"] == rule
    assert facts["samples"] == len(read_split(str(tmp_path / "data/train")).triplets)
    for name in ("loss", "accuracy", "margin", "gradient_norm", "temperature"):
        assert math.isfinite(facts[name]), name
    assert facts["gradient_norm"] > 0
    # Thresholds travel with the sets that have them, to the objectives that can use them.
    assert ("likely" in facts) == (rule == "target_drop" and OBJECTIVES[objective].in_batch)
    assert facts.get("likely", 1) > 0
    before, _ = load_model(str(first))
    after, _ = load_model(str(tmp_path / "checkpoints/train-0001"))
    changed = {
        name
        for name, value in after.named_parameters()
        if not torch.equal(value, before.get_parameter(name))
    }
    assert {"query_tokens", "text_proj.weight", "vision_proj.weight"} <= changed
    fixed = OBJECTIVES[objective].Options().temperature
    assert ("temperature" in changed) == (fixed is None)
    assert fixed is None or facts["temperature"] == fixed


def test_what_was_left_alone_is_told(
    rounds: dict[str, str], finished_run: Path, tmp_path: Path
) -> None:
    uri = rounds["target_drop"]
    mined, train = read_mined_set(uri), read_split(str(finished_run / "data/train"))
    left_alone, thresholds = mined.left_alone(), mined.thresholds()
    assert 0 < len(thresholds) <= len(left_alone) == len(train.triplets)
    query = next(iter(thresholds))
    told = describe_query(uri, query, 3)
    assert f"may fit, left alone: {', '.join(left_alone[query][:3])}" in told
    assert "candidates may fit and are left alone: as like the target as " in told
    draw_query(uri, query, str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").stat().st_size > 5_000
    relevant = {t.query_id: set(t.relevant_ids) for t in train.triplets}
    images = [(q, name) for q, names in left_alone.items() for name in names]
    share = sum(name in relevant[q] for q, name in images) / len(images)
    assert left_alone_relevance(mined, train) == pytest.approx(share)
    assert read_mined_set(rounds["top_k"]).left_alone() == {}
    assert left_alone_relevance(read_mined_set(rounds["top_k"]), train) is None


def test_a_set_that_lists_nothing_masks_nothing(rounds: dict[str, str], tmp_path: Path) -> None:
    """As of the version before, whose training made no use of its thresholds."""
    before = tmp_path / "before"
    shutil.copytree(rounds["target_drop"], before)
    manifest = json.loads((before / "_manifest.json").read_text())
    parts = [name for name in manifest["files"] if name.startswith("part-")]
    for name in parts:
        table = pq.read_table(before / name)
        pq.write_table(table.drop_columns(["left_alone_ids"]), before / name)
    storage.write_manifest(
        str(before), MINED_KIND, manifest | {"schema_version": 5, "files": {}}, parts
    )
    old = read_mined_set(str(before))
    assert old.left_alone() == old.thresholds() == {}
    assert old.negatives().keys() == read_mined_set(rounds["target_drop"]).negatives().keys()


def test_the_sets_differ(rounds: dict[str, str]) -> None:
    """The matrix is of rules, not of one rule by many names."""
    sets = {
        rule: repr(sorted((k, sorted(v)) for k, v in read_mined_set(uri).negatives().items()))
        for rule, uri in rounds.items()
    }
    # SimANS draws by weights from as many images as there are here.
    assert sets.pop("simans") == sets["random"]
    assert len(set(sets.values())) == len(sets)
