"""An index answers as every image's score says, however it came about."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Runner
from PIL import Image
from torch import Tensor

from qure_core import storage
from qure_core.base.config import Settings
from qure_core.base.errors import InputError
from qure_core.data import read_split
from qure_core.embeddings.shards import EmbeddingShards
from qure_core.evaluation.stage import read_rankings
from qure_core.model.relevance import relevance_scores
from qure_core.ranking.order import rank_row
from qure_core.runtime.in_process import stages_in_process
from qure_core.runtime.resources import plan_resources
from qure_core.search import Index, Retriever
from qure_core.search.build import build_index, without_images
from qure_core.search.compact import compacted
from qure_core.search.corpus import Corpus, read_corpus, read_metadata
from qure_core.search.retriever import Question

SETTINGS = Settings(cluster={"in_process": True, "gpus": "none", "embed_batch": 16}, features="off")


def built(run: Path, corpus: Corpus, output: Path, **options: Any) -> dict[str, Any]:
    with stages_in_process(SETTINGS.cluster):
        plan = plan_resources(SETTINGS.cluster)
        checkpoint = str(run / "checkpoints/train-0003")
        return build_index(SETTINGS, plan, checkpoint, corpus, str(output), **options)


@pytest.fixture(scope="module")
def corpus(finished_run: Path) -> Corpus:
    val = read_split(str(finished_run / "data/val"))
    (category, ids), *_ = val.galleries.items()
    return Corpus({name: val.images[name] for name in ids}, dict.fromkeys(ids, category))


@pytest.fixture(scope="module")
def index(finished_run: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("index") / "whole"
    built(finished_run, corpus, output, stored="fp32")
    return output


def queries(index: Path, count: int = 7) -> Tensor:
    manifest = json.loads((index / "manifest.json").read_text())
    generator = torch.Generator().manual_seed(3)
    return torch.nn.functional.normalize(
        torch.randn(count, manifest["width"], generator=generator), dim=-1
    )


def whole(index: Path) -> tuple[list[str], np.ndarray]:
    """Ids and embeddings of all segments' images, sorted by id."""
    manifest = json.loads((index / "manifest.json").read_text())
    rows = pq.read_table(index / manifest["images_file"]).to_pylist()
    values = [
        EmbeddingShards.open(str(index / row["segment"])).rows([row["image_id"]])[0] for row in rows
    ]
    return [row["image_id"] for row in rows], np.stack(values).astype(np.float32)


def answers(index: Path, top: int, **options: Any) -> list[list[tuple[str, float]]]:
    opened = Index.open(str(index))
    found = opened.search(queries(index), top, **options)
    return [
        [(opened.ids[p], float(s)) for p, s in zip(places, scores, strict=True) if p >= 0]
        for places, scores in zip(found.place_QK, found.score_QK, strict=True)
    ]


def all_scores(index: Path, values: np.ndarray) -> Tensor:
    """Scores [Q, M], by products of one shape, 8 queries and 128 images, which give the same
    bits."""
    query_QD, image_MTD = queries(index), torch.from_numpy(values)
    count, images = len(query_QD), len(image_MTD)
    query_QD = torch.nn.functional.pad(query_QD, (0, 0, 0, 8 - count))
    image_MTD = torch.nn.functional.pad(image_MTD, (0, 0, 0, 0, 0, -images % 128))
    parts = [relevance_scores(query_QD, part) for part in image_MTD.split(128)]
    return torch.cat(parts, dim=1)[:count, :images]


@pytest.mark.parametrize("top", [1, 5, 10_000])
def test_exact_search_is_the_order_of_all_scores(index: Path, top: int) -> None:
    ids, values = whole(index)
    scores_QM = all_scores(index, values)
    for found, scores_M in zip(answers(index, top), scores_QM, strict=True):
        order = rank_row(scores_M).order_R[:top].tolist()
        assert [name for name, _ in found] == [ids[i] for i in order]
        assert [score for _, score in found] == scores_M[order].tolist()


def test_filters_leave_out_what_they_say(index: Path) -> None:
    plain = answers(index, 10_000)
    ids = Index.open(str(index)).ids
    allowed = np.arange(len(ids)) % 3 == 0
    kept = {name for name, keep in zip(ids, allowed, strict=True) if keep}
    excluded = [[row, row + 3] for row in range(len(plain))]
    some = answers(index, 10_000, allowed=allowed, excluded=excluded)
    for row, (found, before) in enumerate(zip(some, plain, strict=True)):
        out = {ids[row], ids[row + 3]}
        assert found == [pair for pair in before if pair[0] in kept - out]
    assert answers(index, 2, allowed=np.zeros(len(ids), bool)) == [[]] * len(plain)


def test_equal_scores_are_in_the_order_of_ids(
    finished_run: Path, corpus: Corpus, tmp_path: Path
) -> None:
    first, *_ = corpus.images.values()
    copies = Corpus({f"copy-{n}": first for n in range(5)}, {})
    built(finished_run, copies, tmp_path / "copies")
    for found in answers(tmp_path / "copies", 4):
        assert [name for name, _ in found] == [f"copy-{n}" for n in range(4)]


def test_added_removed_and_changed_images_are_as_built_at_once(
    finished_run: Path, corpus: Corpus, index: Path, tmp_path: Path
) -> None:
    names = sorted(corpus.images)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    mine = {}
    for name in names:
        shutil.copy(corpus.images[name], pictures / f"{name}.png")
        mine[name] = str(pictures / f"{name}.png")
    output = tmp_path / "grown"

    def part(chosen: list[str]) -> Corpus:
        return Corpus({name: mine[name] for name in chosen}, corpus.categories)

    assert built(finished_run, part(names[::2]), output, stored="fp32")["embedded"] == len(
        names[::2]
    )
    reader = Index.open(str(output))
    again = built(finished_run, part(names[::2]), output, stored="fp32")
    assert (again["embedded"], len(again["segments"])) == (0, 1)
    grown = built(finished_run, part(names[1::2]), output, stored="fp32", keep_others=True)
    assert (grown["embedded"], grown["images"]) == (len(names[1::2]), len(names))
    assert answers(output, 10_000) == answers(index, 10_000)
    assert len(reader) == len(names[::2])  # whoever had it open sees the version it opened
    reader.search(queries(output), 3)

    left = without_images(str(output), names[:3])
    assert left["images"] == len(names) - 3
    expected = [[pair for pair in own if pair[0] not in names[:3]] for own in answers(index, 9999)]
    assert answers(output, 10_000) == expected
    with pytest.raises(InputError, match=r"holds no image 'nobody' .1 of 2 are not there"):
        without_images(str(output), ["nobody", names[5]])

    Image.new("RGB", (40, 60), "#f0f").save(mine[names[5]])
    changed = built(finished_run, part(names[3:]), output, stored="fp32")
    assert changed["embedded"] == 1
    built(finished_run, part(names[3:]), tmp_path / "at once", stored="fp32")
    assert answers(output, 10_000) == answers(tmp_path / "at once", 10_000)
    merged, removed = compacted(str(output))
    assert (merged, len(Index.open(str(output)).segments)) == (3, 1)
    assert removed > 3
    assert compacted(str(output)) == (0, 0)
    assert answers(output, 10_000) == answers(tmp_path / "at once", 10_000)


def test_it_ranks_as_evaluation_does(finished_run: Path, corpus: Corpus, index: Path) -> None:
    val = read_split(str(finished_run / "data/val"))
    retriever = Retriever.open(str(index))
    (category,) = set(corpus.categories.values())
    rankings = read_rankings(str(finished_run / "evaluations/epoch-0003")).to_pylist()
    expected = {row["query_id"]: row for row in rankings if row["category"] == category}
    asked = [t for t in val.triplets if t.category == category]
    assert len(asked) > 3
    found = retriever.ask_all([Question(t.reference_id, t.text) for t in asked], top=20)
    for triplet, own in zip(asked, found, strict=True):
        row = expected[triplet.query_id]
        # FashionIQ's protocol ranks the reference too.
        pairs = zip(row["top_ids"], row["top_scores"], strict=True)
        ranked = [pair for pair in pairs if pair[0] != triplet.reference_id][:20]
        assert [answer.image_id for answer in own] == [name for name, _ in ranked]
        scores = [score for _, score in ranked]
        np.testing.assert_allclose([a.score for a in own], scores, atol=1e-5)


def test_the_reference_is_not_found_however_it_is_given(index: Path, corpus: Corpus) -> None:
    retriever = Retriever.open(str(index))
    name, uri = next(iter(corpus.images.items()))
    by_id = retriever.ask(name, "is red", top=10_000)
    assert len(by_id) == len(corpus.images) - 1
    assert name not in [answer.image_id for answer in by_id]
    assert retriever.ask(uri, "is red", top=10_000) == by_id
    seen = retriever.ask(Image.open(uri), "is red", top=10_000)
    assert len(seen) == len(corpus.images)
    assert len(retriever.ask(text="a red dress", top=3)) == 3
    assert len(retriever.ask(name, top=3, exclude=[by_id[0].image_id])) == 3


def test_what_cannot_be_asked_is_said(index: Path, finished_run: Path, tmp_path: Path) -> None:
    retriever = Retriever.open(str(index))
    for asked, message in (
        ({}, "ask with an image, a text, or both"),
        ({"text": "  "}, "ask with an image, a text, or both"),
        ({"text": "red", "top": 0}, "top: 0 is less than 1"),
        ({"text": "red", "category": "hats"}, "category 'hats' is none of the index"),
        ({"text": "red", "exclude": ["x"]}, "image 'x' is not in the index"),
        ({"image": "nowhere.png"}, "nowhere.png"),
    ):
        with pytest.raises(InputError, match=message):
            retriever.ask(**asked)
    with pytest.raises(InputError, match="other weights than those that the index"):
        Retriever.open(str(index), str(finished_run / "checkpoints/train-0002"))
    with pytest.raises(InputError, match="say with --checkpoint where it is now"):
        Retriever.open(str(index), str(tmp_path / "away"))
    with pytest.raises(InputError, match="not a finished search index"):
        Retriever.open(str(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(index, broken)
    (segment,) = broken.glob("segment-*")
    (segment / "images-00000.arrow").unlink()
    with pytest.raises(InputError, match=r"images-00000.arrow: missing"):
        Retriever.open(str(broken))


def test_a_stranger_in_its_place_stays(finished_run: Path, corpus: Corpus, tmp_path: Path) -> None:
    note = tmp_path / "mine/images-of-mine.txt"
    note.parent.mkdir()
    note.write_text("mine")
    with pytest.raises(InputError, match=r"images-of-mine.txt"):
        built(finished_run, corpus, note.parent)
    assert note.read_text() == "mine"
    assert storage.list_names(str(note.parent)) == [note.name]


def test_a_folder_is_a_corpus_and_a_picture_that_is_none_is_named(
    finished_run: Path, tmp_path: Path
) -> None:
    for name in ("shoes/a.png", "shoes/b.png", "c.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 30), "#abc").save(path)
    found = read_corpus(Settings().data, str(tmp_path / "photos"))
    assert sorted(found.images) == ["c", "shoes/a", "shoes/b"]
    assert found.categories == {"shoes/a": "shoes", "shoes/b": "shoes"}
    (tmp_path / "photos/d.png").write_text("no picture")
    with pytest.raises(InputError, match=r"d\.png"):
        built(finished_run, read_corpus(Settings().data, str(tmp_path / "photos")), tmp_path / "i")
    assert not (tmp_path / "i/manifest.json").exists()


def test_the_commands(
    finished_run: Path, run_pipeline: Runner, tmp_path: Path, world: Path
) -> None:
    index = str(tmp_path / "index")
    command = ["build", f"--run.dir={finished_run}", f"--data.root={world}", "--output", index]
    command += ["--cluster.in_process=true", "--cluster.gpus=none", "--features=off"]
    command_of_build = command
    done = run_pipeline("index", *command)
    assert done.returncode == 0, done.stderr
    assert f"index: {index}" in done.stdout
    name = Index.open(index).ids[0]
    ask = ["--index", index, "--image", name, "--text", "is red", "--top", "4"]
    page = tmp_path / "page.html"
    asked = run_pipeline("search", *ask, "--html", str(page))
    assert asked.returncode == 0, asked.stderr
    lines = [line for line in asked.stdout.splitlines()[1:] if "matches" not in line]
    assert "likely matches above" in asked.stdout
    told = run_pipeline("search", *ask, "--json")
    rows = json.loads(told.stdout)
    assert [line.split()[2] for line in lines] == [row["image_id"] for row in rows]
    assert page.read_text().count("<figure") == 5
    batch = tmp_path / "batch.jsonl"
    questions = [{"id": "q", "image": name, "text": "is red"}]
    questions += [{"image": other, "text": "is blue"} for other in Index.open(index).ids[:70]]
    batch.write_text("\n\n".join(map(json.dumps, questions)))
    output = tmp_path / "answers.parquet"
    command = ["--index", index, "--batch", str(batch), "--output", str(output), "--top", "4"]
    done = run_pipeline("search", *command, "--actors", "2")
    assert done.returncode == 0, done.stderr
    found = pq.read_table(output).to_pylist()
    assert [row["image_id"] for row in found[:4]] == [row["image_id"] for row in rows]
    retriever = Retriever.open(index)
    expected = retriever.ask_all([Question(q["image"], q["text"]) for q in questions], 4)
    assert [row["image_id"] for row in found] == [a.image_id for own in expected for a in own]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": "x"}) + "\n" + json.dumps({"image": "nowhere"}))
    refused = run_pipeline(
        "search", "--index", index, "--batch", str(bad), "--output", str(tmp_path / "none.parquet")
    )
    assert refused.returncode == 2
    assert "bad.jsonl [line 2]: image: nowhere is neither the id" in refused.stderr
    assert not (tmp_path / "none.parquet").exists()
    newer = run_pipeline("index", *command_of_build, "--if-newer")
    assert "made with this checkpoint already" in newer.stdout
    assert "nothing is new" in run_pipeline("index", *command_of_build).stdout
    for arguments, message in (
        (["--index", index], "--image, --text: give one of them"),
        (["--index", index, "--text", "x", "--html", str(page)], "exists already"),
        (["--index", str(tmp_path), "--text", "x"], "not a finished search index"),
        (command, "answers.parquet exists already"),
    ):
        refused = run_pipeline("search", *arguments)
        assert refused.returncode == 2
        assert message in refused.stderr
    assert run_pipeline("index", "remove", index, name).returncode == 0
    assert "removed 1 part(s)" in run_pipeline("index", "compact", index).stdout
    assert name not in Index.open(index).ids
    assert run_pipeline("index", "inspect", index).returncode == 0
    assert run_pipeline("index", "nothing").returncode == 2


def test_what_was_made_otherwise_is_not_added_to(
    finished_run: Path, corpus: Corpus, tmp_path: Path
) -> None:
    names = sorted(corpus.images)
    some, rest = (
        Corpus({name: corpus.images[name] for name in part}, {}) for part in (names[2:], names[:2])
    )
    output = tmp_path / "index"
    built(finished_run, some, output, stored="fp32")
    before = (output / "manifest.json").read_bytes()
    with pytest.raises(InputError, match=r"was made with stored fp32, not fp16; give its own"):
        built(finished_run, rest, output, keep_others=True)
    assert (output / "manifest.json").read_bytes() == before
    # A segment that is lost is made again.
    (segment,) = output.glob("segment-*")
    shutil.rmtree(segment)
    for lose in (
        lambda: built(finished_run, rest, output, stored="fp32", keep_others=True),
        lambda: without_images(str(output), names[3:4]),
    ):
        with pytest.raises(InputError, match=r"segment-\w+ is not whole; build the index again"):
            lose()
    grown = built(finished_run, some, output, stored="fp32")
    assert grown["embedded"] == len(some.images)
    assert len(answers(output, 3)) == len(queries(output))


def test_a_build_that_was_cut_short_goes_on(finished_run: Path, tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    for number in range(4):
        Image.new("RGB", (30, 30), (60 * number, 0, 9)).save(photos / f"{number}.png")
    (photos / "4.png").write_text("no picture")
    for _ in range(2):  # refused for the picture, not for what the first left
        with pytest.raises(InputError, match=r"4\.png"):
            built(finished_run, read_corpus(Settings().data, str(photos)), output)
    (photos / "4.png").unlink()
    assert built(finished_run, read_corpus(Settings().data, str(photos)), output)["images"] == 4
    assert len(Index.open(str(output))) == 4
    notes = [output / "images-of-mine.txt", output / "segment-notes" / "a.txt"]
    notes[1].parent.mkdir()
    for note in notes:
        note.write_text("mine")
    compacted(str(output))
    assert compacted(str(output)) == (0, 0)
    assert all(note.read_text() == "mine" for note in notes)


def test_metadata_filters(finished_run: Path, corpus: Corpus, tmp_path: Path) -> None:
    names = sorted(corpus.images)
    table = tmp_path / "facts.csv"
    lines = [f"{name},{'ab'[i % 2]},{i}" for i, name in enumerate(names[:6])]
    table.write_text("image_id,maker,year\n" + "\n".join([*lines, "stranger,a,9"]))
    facts = read_metadata(str(table), corpus.images)
    assert facts[names[1]] == {"maker": "b", "year": "1"}
    assert "stranger" not in facts
    built(finished_run, replace(corpus, metadata=facts), tmp_path / "index")
    retriever = Retriever.open(tmp_path / "index")
    found = retriever.ask(text="red", where={"maker": "a"}, top=99)
    assert sorted(answer.image_id for answer in found) == names[:6:2]
    both = retriever.ask(text="red", where={"maker": "a", "year": "2"}, top=99)
    assert [answer.image_id for answer in both] == [names[2]]
    for where, message in (
        ({"colour": "a"}, "column 'colour' is none of the index .*: maker, year"),
        ({"maker": "c"}, "no image of the index .* has maker 'c'"),
    ):
        with pytest.raises(InputError, match=message):
            retriever.ask(text="red", where=where)
    # Other facts of the same images are a new version, for which nothing is embedded.
    facts[names[0]]["maker"] = "c"
    again = built(finished_run, replace(corpus, metadata=facts), tmp_path / "index")
    assert again["embedded"] == 0
    assert len(Retriever.open(tmp_path / "index").ask(text="red", where={"maker": "c"})) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("facts.txt", "image_id", "is none of .parquet, .csv, .jsonl"),
        ("facts.csv", "image,maker\na,b", "has no column image_id"),
        ("facts.csv", "image_id,maker\na,b\na,c", r"\[row 1\]: image 'a' for the second time"),
        ("facts.jsonl", "{", "facts.jsonl"),
        ("facts.parquet", "none", "facts.parquet"),
    ],
)
def test_metadata_that_cannot_be_read(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_metadata(str(tmp_path / name), {"a": "a.png"})


def test_a_real_index_with_faiss_on_ray(
    finished_run: Path, corpus: Corpus, tmp_path: Path, local_ray: str
) -> None:
    """The tasks of a build, as on a cluster; built again, added to, and cut down."""
    faiss = {"kind": "faiss", "factory": "IVF4,SQ8", "recall": 1.0}
    settings = Settings(cluster={"gpus": "none", "embed_batch": 16}, features="off", search=faiss)
    checkpoint = str(finished_run / "checkpoints/train-0003")
    output = str(tmp_path / "index")
    names = sorted(corpus.images)
    part = Corpus({name: corpus.images[name] for name in names[2:]}, {})
    plan = plan_resources(settings.cluster)
    first = build_index(settings, plan, checkpoint, part, output)
    assert first["faiss"]["recall"]["10"] == 1.0
    again = build_index(settings, plan, checkpoint, part, output)
    assert again["embedded"] == 0
    rest = Corpus({name: corpus.images[name] for name in names[:2]}, {})
    grown = build_index(settings, plan, checkpoint, rest, output, keep_others=True)
    assert grown["faiss"]["trained"] == first["faiss"]["trained"]
    assert (len(grown["segments"]), grown["images"]) == (2, len(names))
    opened = Index.open(output)
    query_QD = queries(tmp_path / "index")
    near, exact = (opened.search(query_QD, 5, exact=way) for way in (False, True))
    found = [np.isin(a, b).mean() for a, b in zip(exact.place_QK, near.place_QK, strict=True)]
    assert np.mean(found) > 0.8  # of vectors drawn at random, on which no list was tuned
    without_images(output, names[2:4])
    assert compacted(output)[0] == 2
    assert Index.open(output).search(query_QD, 5).place_QK.shape == (len(query_QD), 5)
    # Lists of another checkpoint's embeddings do not serve.
    other = str(finished_run / "checkpoints/train-0002")
    anew = build_index(settings, plan, other, part, output)
    assert anew["faiss"]["trained"] != first["faiss"]["trained"]
    assert anew["questions"] != first["questions"]
    assert anew["embedded"] == len(part.images)
