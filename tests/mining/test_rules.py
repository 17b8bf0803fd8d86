"""The socket for rules: a rule of another kind, which needs image tokens and lists its members."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from benchmarks.synthetic import make_split, write_embeddings

from qure_core.base.config import MiningSettings, Settings
from qure_core.base.errors import InputError
from qure_core.embeddings.shards import EmbeddingShards
from qure_core.mining import read_mined_set
from qure_core.mining.describe import describe_query, describe_round
from qure_core.mining.engines.ranked import Ranked
from qure_core.mining.mined_set import MINED_KIND, SCHEMA_VERSION
from qure_core.mining.rules import IMAGE_TOKENS, RULES, Selection, rule_named
from qure_core.mining.stage import choose_engine, round_facts, summarise
from qure_core.mining.tasks import RoundTask, mine_by_sorting, part_name
from qure_core.ranking.blocks import QueryBlock
from qure_core.storage import write_json, write_manifest


class Alternate:
    """Every other of the ten best images below the target, those least like the target first cut:
    a rule that nobody would want, of every freedom that the socket gives."""

    name: ClassVar[str] = "alternate"
    version: ClassVar[int] = 4
    statuses: ClassVar[tuple[str, ...]] = ("alternate", "whole")
    found: ClassVar[str] = "every other image"
    details: ClassVar[Mapping[str, Any]] = {
        "likeness": "float64",
        "place": {"first": "int64", "note": "string"},
    }
    figures: ClassVar[Mapping[str, str]] = {"likeness": "likeness to the target"}
    needs: ClassVar[frozenset[str]] = frozenset({IMAGE_TOKENS})
    streams: ClassVar[bool] = False

    @classmethod
    def of(cls, mining: MiningSettings) -> Alternate:
        del mining
        return cls()

    def options(self) -> dict[str, Any]:
        return {"wanted": 5}

    def select(self, ranked: Ranked) -> Selection:
        assert ranked.image_tokens is not None
        members, details, marks, statuses = {}, [], [], []
        for query, rank in enumerate(ranked.target_rank_Q.tolist()):
            below = int(ranked.below_Q[query])
            if below < 10:
                statuses.append(1)
                details.append({"likeness": None, "place": None})
                marks.append([])
                continue
            statuses.append(0)
            members[query] = np.arange(rank + 1, rank + 11, 2)
            target = ranked.image_tokens(ranked.columns(query, slice(rank, rank + 1)))[0]
            own = ranked.image_tokens(ranked.columns(query, torch.from_numpy(members[query])))
            likeness = float((own * target).sum(dim=(1, 2)).mean())
            details.append({"likeness": likeness, "place": {"first": rank + 1, "note": "x"}})
            marks.append([rank + 1])
        start_Q = torch.where(ranked.below_Q > 0, ranked.target_rank_Q + 1, 0)
        stop_Q = torch.where(ranked.below_Q > 0, ranked.length_Q, ranked.length_Q - 1)
        return Selection(torch.tensor(statuses), start_Q, stop_Q, details, marks, members)

    @staticmethod
    def cut(details: Mapping[str, Any], target_rank: int) -> Any:
        return details["place"] and details["place"]["first"] - target_rank

    @staticmethod
    def describe(details: Mapping[str, Any]) -> list[str]:
        return [f"likeness {details['likeness']:.3f}"] if details["likeness"] is not None else []


@pytest.fixture
def task(tmp_path: Path) -> tuple[RoundTask, QueryBlock, EmbeddingShards]:
    split = make_split(40, 300)
    uri = str(tmp_path / "embeddings")
    write_embeddings(uri, split, tokens=3, width=8, shard=64)
    output = str(tmp_path / "round")
    task = RoundTask(uri, output, output, 0, 2, True, Alternate(), None, "fp32", 2**26)
    triplets = tuple(sorted(split.triplets, key=lambda t: t.query_id))
    return task, QueryBlock(0, "all", triplets, split.galleries["all"]), EmbeddingShards.open(uri)


def test_a_rule_of_its_own_kind_is_served_written_and_told(
    task: tuple[RoundTask, QueryBlock, EmbeddingShards], monkeypatch: pytest.MonkeyPatch
) -> None:
    round_task, block, embeddings = task
    statistics = mine_by_sorting(block, round_task)
    rows = pq.read_table(f"{round_task.output}/{part_name(0)}").to_pylist()
    images = embeddings.some_images(set(block.corpus))
    for row, triplet in zip(rows, block.triplets, strict=True):
        assert row["query_id"] == triplet.query_id
        if row["status"] == "whole":
            assert row["details"] == {"likeness": None, "place": None}
            continue
        assert len(row["negative_ids"]) == row["num_negatives"] == 5
        assert triplet.target_id not in row["negative_ids"]
        own = np.stack([images[name] for name in row["negative_ids"]])
        likeness = (own * images[str(triplet.target_id)]).sum(axis=(1, 2)).mean()
        assert row["details"]["likeness"] == pytest.approx(likeness, rel=1e-5)
        assert row["details"]["place"] == {"first": row["target_rank"] + 1, "note": "x"}
        assert row["negative_scores"] == sorted(row["negative_scores"], reverse=True)
    told = summarise([statistics], Alternate())  # type: ignore[arg-type]
    assert told["statuses"]["alternate"] == sum(row["status"] == "alternate" for row in rows)
    assert 0 < told["found_share"] <= 1
    assert set(told["likeness"]) == {"min", "p25", "median", "p75", "max"}
    monkeypatch.setitem(RULES, "alternate", Alternate)
    manifest = {
        "epoch": 2,
        "schema_version": SCHEMA_VERSION,
        "rule": {"name": "alternate", "version": 4, "wanted": 5},
        "settings": {},
        "engine": "sort",
        "queries": len(rows),
        "corpus_images": {"all": 300},
        "statistics": told,
        "seconds": {},
        "peak_task_memory_mb": 1.0,
    }
    write_manifest(round_task.output, MINED_KIND, manifest, [part_name(0)])
    for part in ("every other image", "fallback whole", "likeness to the target", "wanted=5"):
        assert part in describe_round(round_task.output)
    query = next(row["query_id"] for row in rows if row["status"] == "alternate")
    assert "likeness " in describe_query(round_task.output, query, 2)
    chosen = read_mined_set(round_task.output).negatives()
    assert {len(names) for names in chosen.values()} >= {5}


def test_a_later_schema_is_refused(tmp_path: Path) -> None:
    write_json(str(tmp_path / "part-00000.parquet"), {})
    manifest = {"epoch": 1, "schema_version": SCHEMA_VERSION + 1}
    write_manifest(str(tmp_path), MINED_KIND, manifest, ["part-00000.parquet"])
    later = f"a mined set of version {SCHEMA_VERSION + 1}, where this"
    with pytest.raises(InputError, match=later):
        read_mined_set(str(tmp_path))


def test_engines_that_cannot_serve_a_rule_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "alternate", Alternate)
    many = {"all": tuple(map(str, range(100_000)))}
    chosen = Settings(mining={"rule": "alternate"})
    assert choose_engine(chosen, many) == "sort"
    assert choose_engine(Settings(), many) == "streaming"
    with pytest.raises(InputError, match="the rule alternate needs whole rankings"):
        choose_engine(Settings(mining={"rule": "alternate", "engine": "streaming"}), many)
    with pytest.raises(
        InputError, match=r"mining.rule: 'steep' is not one of alternate, margin_pos"
    ):
        rule_named("steep")


def test_what_a_round_depends_on_names_its_rule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("qure_core.mining.stage.checkpoint_digest", lambda uri: "0")
    monkeypatch.setattr("qure_core.mining.stage.checkpoint_pixels", lambda uri: "upright")
    split = make_split(4, 10)
    settings = Settings(mining={"window_ranks": 50})
    facts = round_facts(settings, "", split, split.galleries, 3)
    assert facts["rule"] == {
        "name": "steep_drops",
        "version": 1,
        "window_ranks": 50,
        "window_quantile": None,
        "min_steepness": None,
    }
