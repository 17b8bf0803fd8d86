"""Judgements are kept once each, on a disk and an object store, and come out as they went in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import s3fs
from conftest import Runner
from hypothesis import given
from hypothesis import strategies as st
from s3_server import s3_server

from qure_core import storage
from qure_core.base.errors import InputError
from qure_core.evaluation.protocols.hp_fashioniq import parse_hp_fashioniq
from qure_core.preferences.exchange import read_judgements, to_jsonl, to_released
from qure_core.preferences.judgements import (
    CHOICES,
    Judgement,
    Study,
    judgement_of,
    write_all,
)

NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
IDS = st.lists(TEXTS, min_size=1, max_size=5).map(tuple)
JUDGEMENTS = st.builds(
    Judgement,
    participant=NAMES,
    question=NAMES,
    query_id=TEXTS,
    reference_id=TEXTS,
    text=TEXTS,
    left_ids=IDS,
    right_ids=IDS,
    choice=st.sampled_from(CHOICES),
    left_model=TEXTS,
    right_model=TEXTS,
    role=st.sampled_from(["plain", "repeat"]),
    repeats=NAMES,
    seconds=st.none() | st.floats(0, 1e6),
    time=TEXTS,
)
ONE = Judgement("p1", "q1", "query", "ref", "in red", ("a", "b"), ("c", "d"), "left")


@pytest.fixture(params=["disk", "object store"], scope="module")
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path_factory.mktemp("studies"))
        return
    s3fs.S3FileSystem.clear_instance_cache()  # of another module's server
    with s3_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield "s3://bucket/studies"


@given(st.lists(JUDGEMENTS, max_size=8, unique_by=lambda one: (one.participant, one.question)))
def test_lines_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, some: list[Judgement]
) -> None:
    file = tmp_path_factory.mktemp("lines") / "judgements.jsonl"
    file.write_bytes(to_jsonl(some))
    assert read_judgements(str(file), Study("nowhere", "00")) == some


def test_each_question_counts_once(place: str) -> None:
    study = Study.planned(f"{place}/once").begin({"what": "a test"})
    assert Study.planned(f"{place}/once").begin({"what": "another"}).salt == study.salt
    with ThreadPoolExecutor(8) as pool:  # a double click, and two replicas that were both asked
        list(pool.map(study.write, [ONE] * 16))
    study.write(replace(ONE, question="q2", choice="both"))
    study.write(replace(ONE, choice="right"))  # taken back and answered anew
    assert {one.question: one.choice for one in study.read()} == {"q1": "right", "q2": "both"}
    study.take_back("p1", "q2")
    study.take_back("p1", "q2")
    assert [one.question for one in study.answered("p1")] == ["q1"]
    assert study.answered("nobody") == []


def test_compacted_is_what_was_answered(place: str) -> None:
    study = Study.planned(f"{place}/compacted").begin({})
    some = [replace(ONE, participant=f"p{n % 3}", question=f"q{n}", seconds=n) for n in range(30)]
    assert write_all(study, some) == 30
    first, count = study.compacted()
    assert count == 30
    assert study.compacted()[0] == first  # the same judgements, the same file
    with storage.filesystem(first)[0].open(first) as file:
        rows = pq.read_table(file).to_pylist()
    assert {(r["participant"], r["question"]): judgement_of(r, "row") for r in rows} == {
        (one.participant, one.question): one for one in some
    }
    study.write(replace(ONE, participant="p9"))
    second, count = study.compacted()
    assert (count, storage.exists(first)) == (31, False)
    assert study.forget("p1") == 10
    assert (study.forget("p1"), len(study.read())) == (0, 21)
    assert not storage.exists(second)  # nor does the file of all keep them
    manifest = storage.read_json(f"{study.uri}/manifest.json")
    assert manifest["judgements"] == 21
    # A `forget` that was killed before it came to the file of all is ended by the next.
    study.take_back("p9", "q1")
    assert study.forget("p9") == 0
    assert storage.read_json(f"{study.uri}/manifest.json")["judgements"] == 20
    # Compacted, it takes further judgements.
    assert write_all(Study.planned(study.uri).begin({}), [ONE]) == 1
    assert len(study.read()) == 21


def test_a_strangers_file_stays(tmp_path: Path) -> None:
    study = Study.planned(str(tmp_path / "study")).begin({})
    study.write(ONE)
    mine = [tmp_path / "study/judgements/p1/notes.txt", tmp_path / "study/plans/mine.txt"]
    mine[1].parent.mkdir()
    for file in mine:
        file.write_text("mine")
    study.compacted()
    assert study.forget("p1") == 1
    assert study.read() == []
    listed = tmp_path / "study/judgements/p1/list.json"
    listed.write_text("[1]")
    study.write(ONE)
    for work in (study.read, study.compacted, lambda: study.forget("p1")):
        with pytest.raises(InputError, match=r"list\.json: a judgement is an object"):
            work()
    assert listed.read_text() == "[1]"
    assert [file.read_text() for file in mine] == ["mine"] * 2


def test_a_name_is_not_kept(tmp_path: Path) -> None:
    study = Study.planned(str(tmp_path / "study")).begin({})
    hashed = study.participant("Ada Lovelace")
    assert hashed == study.participant(" Ada Lovelace ") != study.participant("ada lovelace")
    study.write(replace(ONE, participant=hashed))
    study.compacted()
    whole = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"Ada" not in whole
    assert Study.planned(str(tmp_path / "other")).begin({}).participant("Ada Lovelace") != hashed


def test_the_released_form_comes_in_and_goes_out(tmp_path: Path) -> None:
    rows = {
        "ref_img_paths": ["/-/image_data/shirt/R1.jpg", "/-/image_data/dress/R2.jpg"],
        "sentences": ["is red dotmark", "has stripes"],
        "retrieved_set1": [{"img_path": ["/x/A.jpg", "/x/B.jpg"]}, {"img_path": ["/x/C.jpg"]}],
        "retrieved_set2": [{"img_path": ["/x/D.jpg", "/x/E.jpg"]}, {"img_path": ["/x/F.jpg"]}],
        "preferred set": ["2", "1"],
    }
    file = tmp_path / "hpfiq.json"
    file.write_text(json.dumps({"user_1": {"question_set_1": rows}}))
    study = Study.planned(str(tmp_path / "study")).begin({})
    found = read_judgements(str(file), study)
    assert [(one.choice, one.left_ids, one.text) for one in found] == [
        ("right", ("A", "B"), "is red ."),
        ("left", ("C",), "has stripes"),
    ]
    assert {one.participant for one in found} == {study.participant("user_1")}
    tie = replace(found[0], question="q9", choice="both")
    data, left = to_released([*found, tie])
    assert left == 1
    before = parse_hp_fashioniq(json.loads(file.read_text()), "")
    after = parse_hp_fashioniq(json.loads(data), "")
    assert [replace(pair, participant="") for pair in after] == [
        replace(pair, participant="") for pair in before
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choice": "middle"}, "line 1: choice 'middle' is not one of left, right"),
        ({"participant": "../x"}, "participant '../x' has to be 1 to 64 letters"),
        ({"left_ids": []}, "left_ids has to be a list of image ids"),
        ({"left_ids": "abc"}, "left_ids has to be a list of image ids"),
        ({"seconds": "soon"}, "seconds has to be a number"),
        ({"text": 3}, "text has to be text"),
        ({"mood": "good"}, "'mood' is no part of a judgement"),
        ({"query_id": None}, "missing 1 required positional argument: 'query_id'"),
        ({"role": "obvious"}, "an obvious question says which side is expected"),
    ],
)
def test_a_line_that_is_no_judgement_is_named(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "judgements.jsonl"
    file.write_text(json.dumps(asdict(ONE) | changes))
    with pytest.raises(InputError, match=message):
        read_judgements(str(file), Study(str(tmp_path), "00"))


def test_the_commands(run_pipeline: Runner, tmp_path: Path) -> None:
    study, lines = str(tmp_path / "study"), tmp_path / "in.jsonl"
    models = {"left_model": "old", "right_model": "new"}
    some = [replace(ONE, participant=f"p{n % 4}", question=f"q{n}", **models) for n in range(12)]
    lines.write_bytes(to_jsonl(some))
    for _ in range(2):
        assert "12 judgements" in run_pipeline("preferences", "import", study, str(lines)).stdout
    done = run_pipeline("preferences", "report", study)
    assert "12 judgements of 4 participants" in done.stdout
    assert done.stdout.index("old ") < done.stdout.index("new ")
    plain = json.loads(run_pipeline("preferences", "report", study, "--json").stdout)
    assert plain["strengths"][0]["model"] == "old"
    assert "12 judgements" in run_pipeline("preferences", "compact", study).stdout
    out = tmp_path / "out.jsonl"
    assert run_pipeline("preferences", "export", study, str(out)).returncode == 0
    assert sorted(out.read_bytes().splitlines()) == sorted(lines.read_bytes().splitlines())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_bytes(b"x")
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(to_jsonl(some[:1]) + b"{")
    for command, message in (
        (["export", study, str(out)], "exists already"),
        (["export", study, "out.csv"], "has to end in .json"),
        (["report", str(tmp_path / "mine")], "no study.json"),
        (["import", str(tmp_path / "mine"), str(lines)], "not part of a preference study"),
        (["import", study, str(tmp_path / "none.jsonl")], "is not there"),
        (["forget", study, "nobody"], "has nothing of 'nobody'"),
        (["import", str(tmp_path / "new"), str(bad)], "bad.jsonl, line 2: is no JSON"),
    ):
        refused = run_pipeline("preferences", *command)
        assert (refused.returncode, message in refused.stderr) == (2, True), refused.stderr
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["photo.jpg"]
    assert not (tmp_path / "new").exists()
