"""The mining stage on Ray: real embeddings, any sharding, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qure_core import storage
from qure_core.base.config import DataSettings, Settings
from qure_core.base.errors import InputError
from qure_core.data import Split, load_split, mining_galleries
from qure_core.data.images import load_image
from qure_core.embeddings.shards import EMBEDDINGS_KIND, EmbeddingShards
from qure_core.embeddings.stage import embed_splits
from qure_core.mining import STATUSES, read_mined_set, steep_drop_negatives
from qure_core.mining.describe import describe_round, round_table
from qure_core.mining.mined_set import MINED_KIND, mined_schema
from qure_core.mining.rules.steep_drops import DropRule
from qure_core.mining.stage import SCRATCH_KIND, check_corpora, hold_round, mine_round, mining_job
from qure_core.model import QuReModel, QuReProcessor, build_model, learn_tokenizer
from qure_core.model.checkpoints import save_checkpoint
from qure_core.ranking.blocks import make_blocks
from qure_core.ranking.tiles import QUERY_TILE
from qure_core.runtime.resources import plan_resources


@pytest.fixture(scope="module")
def data(world: Path) -> tuple[Split, dict[str, tuple[str, ...]]]:
    settings = DataSettings(root=str(world), mining_corpus="split")
    split = load_split(settings, "train")
    return split, mining_galleries(settings, split)


@pytest.fixture(scope="module")
def checkpoint(
    data: tuple[Split, dict[str, tuple[str, ...]]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, QuReModel, QuReProcessor]:
    tokenizer = learn_tokenizer([t.text for t in data[0].triplets], 200)
    model, processor = build_model("tiny", tokenizer, 0.1, seed=5)
    uri = str(tmp_path_factory.mktemp("checkpoint") / "train-0003")
    save_checkpoint(uri, model, processor, {"stage": "train", "epoch": 3})
    return uri, model.eval(), processor


def mine(
    data: tuple[Split, dict[str, tuple[str, ...]]], checkpoint: str, output: str, **changes: Any
) -> dict[str, Any]:
    settings = Settings(
        mining=changes, cluster={"embed_batch": 16, "gpus": "none"}, data={"mining_corpus": "split"}
    )
    plan = plan_resources(settings.cluster)
    with hold_round(output) as lease:
        return mine_round(settings, plan, checkpoint, *data, output, 3, lease)


@pytest.fixture(scope="module")
def mined(
    data: tuple[Split, dict[str, tuple[str, ...]]],
    checkpoint: tuple[str, QuReModel, QuReProcessor],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    output = str(tmp_path_factory.mktemp("mined") / "epoch-0003")
    mine(data, checkpoint[0], output)
    return output


def test_mined_set_against_an_independent_computation(
    data: tuple[Split, dict[str, tuple[str, ...]]],
    checkpoint: tuple[str, QuReModel, QuReProcessor],
    mined: str,
) -> None:
    split, corpora = data
    _, model, processor = checkpoint
    rows = {row["query_id"]: row for row in read_mined_set(mined).table.to_pylist()}
    assert set(rows) == {t.query_id for t in split.triplets}

    def vision(image_id: str) -> torch.Tensor:
        image = load_image(split.images[image_id], 10**6, "released")
        return model.encode_vision(processor.images([image]))

    with torch.no_grad():
        images = {i: model.embed_images(vision(i))[0] for c in corpora.values() for i in c}
        for triplet in split.triplets[::7]:
            corpus = [i for i in corpora[triplet.category] if i != triplet.reference_id]
            ids, mask = processor.texts([triplet.text])
            query = model.embed_queries(vision(triplet.reference_id), ids, mask)[0]
            scores = torch.stack([(images[i] @ query).max() for i in corpus])
            drops = steep_drop_negatives(
                scores[None], torch.tensor([corpus.index(str(triplet.target_id))])
            )
            row = rows[triplet.query_id]
            assert row["status"] == STATUSES[int(drops.status_Q[0])]
            assert row["target_rank"] == drops.target_rank_Q[0]
            assert row["negative_ids"] == [corpus[i] for i in drops.negatives(0)]
            assert row["num_negatives"] == len(row["negative_ids"]) == len(row["negative_scores"])
            assert triplet.target_id not in row["negative_ids"]
            assert triplet.reference_id not in row["negative_ids"]
            if row["status"] == "steep":
                upper, lower = (row["details"][name] for name in ("upper_drop", "lower_drop"))
                assert upper["rank"] == drops.upper_Q[0]
                assert lower["rank"] == drops.lower_Q[0]
                assert row["negative_scores"][-1] == lower["score_above"]
                assert row["negative_scores"][0] == upper["score_below"]


@pytest.mark.parametrize(
    "changes",
    [
        {"corpus_shards": 2, "query_block": 1},
        {"corpus_shards": 5, "memory_mb": 64},
    ],
)
def test_any_sharding_gives_the_same_set(
    data: tuple[Split, dict[str, tuple[str, ...]]],
    checkpoint: tuple[str, QuReModel, QuReProcessor],
    mined: str,
    tmp_path: Path,
    changes: dict[str, int],
) -> None:
    manifest = mine(data, checkpoint[0], str(tmp_path / "round"), **changes)
    expected = read_mined_set(mined)
    ours = read_mined_set(str(tmp_path / "round"))
    plain = pa.schema(
        [
            f.with_type(pa.large_list(pa.string())) if f.name == "negative_ids" else f
            for f in mined_schema(DropRule.details)
        ]
    )
    key = [("query_id", "ascending")]
    for a, b in zip(
        ours.table.cast(plain).sort_by(key).to_pylist(),
        expected.table.cast(plain).sort_by(key).to_pylist(),
        strict=True,
    ):
        assert a == b  # scores too, to the last bit
    assert manifest["statistics"] == expected.manifest["statistics"]


def test_a_lost_shard_of_embeddings_is_made_again(
    data: tuple[Split, dict[str, tuple[str, ...]]],
    checkpoint: tuple[str, QuReModel, QuReProcessor],
    tmp_path: Path,
) -> None:
    settings = Settings(cluster={"embed_batch": 16, "gpus": "none"})
    job = mining_job(*data, str(tmp_path / "round"), "fp16")
    uri = Path(job.output)

    def embed() -> dict[str, bytes]:
        plan = plan_resources(settings.cluster)
        embed_splits(checkpoint[0], [job], settings, plan, shards=4)
        shards = {path.name: path.read_bytes() for path in uri.glob("*.arrow")}
        # Some told by their writers, those of an earlier attempt read.
        files = storage.read_json(str(uri / "manifest.json"))["files"]
        assert {name: facts["sha256"] for name, facts in files.items()} == {
            name: hashlib.sha256(data).hexdigest() for name, data in shards.items()
        }
        return shards

    first = embed()
    assert len(first) == 8
    (uri / "images-00001.arrow").write_bytes(b"cut short")
    (uri / "queries-00003.arrow").unlink()
    kept = (uri / "images-00002.arrow").stat().st_mtime_ns
    assert embed() == first
    assert (uri / "images-00002.arrow").stat().st_mtime_ns == kept
    # Other inputs in the same place are embedded anew.
    fewer = dataclasses.replace(job, corpus=frozenset(sorted(job.corpus)[:20]))
    plan = plan_resources(settings.cluster)
    embed_splits(checkpoint[0], [fewer], settings, plan, shards=4)
    ids = [name for shard in range(4) for name in EmbeddingShards.open(job.output).images(shard)[0]]
    assert ids == sorted(fewer.corpus)


def test_many_tiles_do_not_change_scores(tmp_path: Path, local_ray: str) -> None:
    """Tiles are cut from the whole lists, so a block of 128 or 384 queries scores the same."""
    from qure_core.data.schema import Triplet
    from qure_core.ranking.blocks import QueryBlock, score_block

    rng = np.random.default_rng(0)
    ids = [f"i{n:05d}" for n in range(2500)]
    queries = [Triplet(f"q{n:04d}", ids[n], "t", ids[n + 1], "all") for n in range(300)]
    images, vectors = (
        rng.standard_normal((2500, 4, 32), np.float32),
        rng.standard_normal((300, 32), np.float32),
    )

    def write(folder: Path, shards: int) -> EmbeddingShards:
        folder.mkdir()
        names = []
        for shard in range(shards):
            for kind, keys, values in (
                ("images", ids, images),
                ("queries", [q.query_id for q in queries], vectors),
            ):
                part = slice(len(keys) * shard // shards, len(keys) * (shard + 1) // shards)
                flat = pa.array(values[part].reshape(-1))
                column = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))
                table = pa.table({"id": keys[part], "embedding": column})
                name = f"{kind}-{shard:05d}.arrow"
                with pa.ipc.new_file(str(folder / name), table.schema) as writer:
                    writer.write_table(table)
                names.append(name)
        starts = [ids[len(ids) * shard // shards] for shard in range(shards)]
        facts = {"shards": shards, "tokens": 4, "width": 32, "first_ids": starts}
        storage.write_manifest(str(folder), EMBEDDINGS_KIND, facts, names)
        return EmbeddingShards.open(str(folder))

    whole = QueryBlock(0, "all", tuple(queries), tuple(ids))
    expected = score_block(write(tmp_path / "one", 1), whole)
    brute = np.einsum("qd,mtd->qmt", vectors.astype(np.float64), images).max(axis=-1)
    np.testing.assert_allclose(expected.numpy(), brute, rtol=1e-4, atol=1e-4)
    seven = write(tmp_path / "seven", 7)
    for start in range(0, 300, QUERY_TILE):
        block = QueryBlock(0, "all", tuple(queries[start : start + QUERY_TILE]), tuple(ids))
        assert torch.equal(score_block(seven, block), expected[start : start + QUERY_TILE])


def test_manifest_commits_the_round(
    data: tuple[Split, dict[str, tuple[str, ...]]],
    checkpoint: tuple[str, QuReModel, QuReProcessor],
    mined: str,
) -> None:
    manifest = json.loads((Path(mined) / "_manifest.json").read_text())
    assert (
        manifest["queries"]
        == len(data[0].triplets)
        == sum(manifest["statistics"]["statuses"].values())
    )
    assert manifest["schema_version"] == 6
    assert manifest["rule"]["name"] == "steep_drops"
    assert manifest["settings"]["exclude_reference"] is True
    assert manifest["peak_task_memory_mb"] > 0
    table = round_table(manifest)
    for part in (
        "between two steep drops",
        "fallback below_target",
        "negatives per query",
        "target - negatives",
        "embed",
        "score, sort and write",
        "steepness of drops",
    ):
        assert part in table
    assert not Path(f"{mined}-embeddings").exists()
    query = data[0].triplets[0].query_id
    row = read_mined_set(mined).rows([query])[query]
    assert (np.diff(row["curve_scores"]) <= 0).all()
    assert (np.diff(row["curve_ranks"]) > 0).all()
    assert row["target_rank"] in row["curve_ranks"]
    # A second call finds the committed round, and what a kill after the commit left beside it.
    before = (Path(mined) / "_manifest.json").stat().st_mtime_ns
    leftovers = [Path(f"{mined}-embeddings"), Path(f"{mined}-scratch")]
    for leftover, kind in zip(leftovers, (EMBEDDINGS_KIND, SCRATCH_KIND), strict=True):
        storage.begin(str(leftover), kind)
    (leftovers[0] / "images-00000.arrow").touch()
    (leftovers[1] / "anchors-00000.npz").touch()
    mine(data, checkpoint[0], mined)
    assert not any(leftover.exists() for leftover in leftovers)
    assert (Path(mined) / "_manifest.json").stat().st_mtime_ns == before


def test_a_second_model_that_agrees_vetoes_all_above_the_target(
    data: tuple[Split, dict[str, tuple[str, ...]]],
    checkpoint: tuple[str, QuReModel, QuReProcessor],
    mined: str,
    tmp_path: Path,
) -> None:
    output = str(tmp_path / "vetoed")
    manifest = mine(data, checkpoint[0], output, veto=checkpoint[0])
    assert manifest["settings"]["veto"] == manifest["checkpoint"]
    before = {row["query_id"]: row for row in read_mined_set(mined).table.to_pylist()}
    rows = read_mined_set(output).table.to_pylist()
    for row in rows:
        was = before[row["query_id"]]
        if was["status"] != "corpus":  # where nothing ranks below the target none would be left
            assert (row["target_rank"], row["vetoed"]) == (0, was["target_rank"])
            assert row["negative_ids"] == was["negative_ids"]
    vetoed = sum(row["vetoed"] for row in rows)
    assert manifest["statistics"]["vetoed"]["images"] == vetoed > 0
    assert "vetoed by a second model" in describe_round(output)
    assert not list(tmp_path.glob("*-embeddings"))


def test_a_truncated_part_is_noticed(mined: str, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(mined, copy)
    part = copy / "part-00000.parquet"
    assert pq.read_metadata(part).num_rows > 0
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"part-00000\.parquet: \d+ bytes, but its manifest says"):
        read_mined_set(str(copy))
    (copy / "_manifest.json").unlink()
    with pytest.raises(InputError, match="not a finished mined set"):
        read_mined_set(str(copy))


def test_memory_sets_the_block_whatever_the_number_of_queries(
    data: tuple[Split, dict[str, tuple[str, ...]]],
) -> None:
    triplets = data[0].triplets * 50
    million = {c: tuple(map(str, range(10**6))) for c in data[1]}
    for block in make_blocks(triplets, million, memory_mb=4096):
        assert len(block.triplets) * 10**6 * 4 <= 4096 * 2**20 / 4
    small = make_blocks(triplets, data[1], memory_mb=64)
    assert len(small) == 3  # one a category: sixty images are far below the memory


def test_impossible_corpora_are_refused(data: tuple[Split, dict[str, tuple[str, ...]]]) -> None:
    split, corpora = data
    with pytest.raises(InputError, match="category coat has fewer than 3 images"):
        check_corpora(split, corpora | {"coat": corpora["coat"][:2]})
    with pytest.raises(InputError, match=r"fewer than 1002 images; .* at least 1,000 other images"):
        check_corpora(split, corpora, negatives=1000)
    with pytest.raises(InputError, match=r"target\(s\) are absent from their mining corpus"):
        check_corpora(split, corpora | {"coat": corpora["dress"]})


def test_a_mined_set_is_read_by_what_reads_parquet(mined: str, tmp_path: Path) -> None:
    """The whole directory by pyarrow, its Parquet files by Hugging Face's datasets."""
    import datasets

    ours = read_mined_set(mined).table
    theirs = pq.read_table(mined)
    assert theirs.num_rows == ours.num_rows
    assert theirs["query_id"].to_pylist() == ours["query_id"].to_pylist()
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{mined}/*.parquet", split="train", cache_dir=str(tmp_path)
    )
    assert loaded["query_id"] == ours["query_id"].to_pylist()
    assert loaded[0]["negative_ids"] == ours["negative_ids"][0].as_py()


def test_a_round_of_before_is_still_read(mined: str, tmp_path: Path) -> None:
    """Whose manifest and plan had other names."""
    import shutil

    older = tmp_path / "older"
    shutil.copytree(mined, older)
    (older / "_manifest.json").rename(older / "manifest.json")
    (older / "_plan.json").unlink()
    assert read_mined_set(str(older)).table.equals(read_mined_set(mined).table)
    storage.check_place(str(older), MINED_KIND)
    storage.clear(str(older), MINED_KIND)
    assert not older.exists()


def test_an_unfinished_round_of_before_is_gone_on_with(tmp_path: Path) -> None:
    plan = {"checkpoint": "abc", "epoch": 3}
    older = tmp_path / "round"
    older.mkdir()
    (older / "plan.json").write_text(json.dumps(plan))
    (older / "part-00000.parquet").write_text("done")
    assert "part-00000.parquet" in storage.resume(str(older), MINED_KIND, plan)
    assert {path.name for path in older.iterdir()} == {"_plan.json", "part-00000.parquet"}
    (older / "_plan.json").unlink()
    (older / "plan.json").write_text(json.dumps(plan))
    assert storage.resume(str(older), MINED_KIND, plan | {"epoch": 4}) == set()
    assert [path.name for path in older.iterdir()] == ["_plan.json"]
