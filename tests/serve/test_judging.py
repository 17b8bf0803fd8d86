"""A study of two checkpoints, judged by people in a real browser."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import Runner
from playwright.sync_api import Browser, Page, expect
from service import service

from qure_core.base.config import Settings
from qure_core.data import read_split
from qure_core.preferences.judgements import Study
from qure_core.preferences.questions import Asking, Pair, Pairs, draw_questions
from qure_core.preferences.said import what_they_say
from qure_core.runtime.in_process import stages_in_process
from qure_core.runtime.resources import plan_resources
from qure_core.search.build import build_index
from qure_core.search.corpus import Corpus

SETTINGS = Settings(cluster={"in_process": True, "gpus": "none"}, features="off")
SAYS = r"asking about .* queries: (http://\S+)/"
TEXT = '<img src=x onerror="document.title=1"> & in red'


@pytest.fixture(scope="module")
def command(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command's arguments, without where the study goes."""
    folder = tmp_path_factory.mktemp("judging")
    split = read_split(str(finished_run / "data/val"))
    corpus = Corpus(dict(sorted(split.images.items())), {})
    with stages_in_process(SETTINGS.cluster):
        plan = plan_resources(SETTINGS.cluster)
        for epoch in ("0000", "0003"):
            checkpoint = str(finished_run / f"checkpoints/train-{epoch}")
            build_index(SETTINGS, plan, checkpoint, corpus, str(folder / epoch))
    queries = folder / "queries.jsonl"
    rows = [
        {"id": f"n{n}", "image": triplet.reference_id, "text": triplet.text if n else TEXT}
        for n, triplet in enumerate(split.triplets[:8])
    ]
    queries.write_text("\n".join(map(json.dumps, rows)))
    indexes = [str(folder / "0000"), str(folder / "0003")]
    return ["collect", "--indexes", *indexes, "--names", "start", "end", "--queries", str(queries)]


def sent(address: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    asked = urllib.request.Request(address, data, {"content-type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        return json.load(answer)


def begun(page: Page, address: str, name: str) -> None:
    page.goto(address)
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Begin").click()
    expect(page.locator("#question")).to_be_visible()


def answered(page: Page) -> int:
    return int(page.locator("#progress").inner_text().split()[0])


@pytest.mark.job
@pytest.mark.timeout(400)
def test_a_study_from_beginning_to_end(
    command: list[str], browser: Browser, tmp_path: Path, run_pipeline: Runner
) -> None:
    study = tmp_path / "study"
    arguments = [*command, "--output", str(study), "--port", "0", "--people", "2"]
    script = "pipelines/preferences.py"
    with service(*arguments, script=script, says=SAYS) as (address, _):
        ada, bob = (browser.new_context().new_page() for _ in range(2))
        errors: list[str] = []
        for page in (ada, bob):
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda m: errors.append(m.text) if "Content Sec" in m.text else None)
        begun(ada, address, "Ada Lovelace")
        begun(bob, address, "Bob")  # two at once
        total = int(ada.locator("#progress").inner_text().split()[2])
        assert total == 8 + 3 + 3
        expect(ada.locator("#left img")).to_have_count(5)
        expect(ada.locator("#right img")).to_have_count(5)
        ada.wait_for_function("[...document.images].every((i) => i.complete && i.naturalWidth)")
        seen = set()
        for number, way in enumerate(["left", "right", "both", "neither", "skip"]):
            seen.add(ada.locator("#text").inner_text())
            ada.locator(f"[data-choice={way}]").dblclick()  # counts once
            expect(ada.locator("#progress")).to_have_text(f"{number + 1} of {total} answered")
        ada.keyboard.press("u")
        expect(ada.locator("#progress")).to_have_text(f"4 of {total} answered")
        text = ada.locator("#text").inner_text()
        ada.reload()  # in the middle
        expect(ada.locator("#progress")).to_have_text(f"4 of {total} answered")
        assert ada.locator("#text").inner_text() == text
        for number, key in enumerate(["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "s"], 5):
            ada.keyboard.press(key)
            expect(ada.locator("#progress")).to_have_text(f"{number} of {total} answered")
        for number in range(1, total + 1):
            seen.add(bob.locator("#text").inner_text())
            bob.keyboard.press("ArrowLeft")
            if number < total:
                expect(bob.locator("#progress")).to_have_text(f"{number} of {total} answered")
        expect(bob.locator("#end")).to_be_visible()
        assert TEXT in seen  # shown as it is, not as markup
        assert bob.title() == "Which results fit better?"
        token = Study.open(str(study)).participant("Bob")
        refused = {"participant": token, "question": "q9999", "choice": "left", "seconds": 1}
        for change, status in (
            ({}, 404),
            ({"participant": "0123456789abcdef"}, 404),  # who has not begun
            ({"question": "../../x"}, 422),
            ({"participant": "../../x"}, 422),
            ({"choice": "middle"}, 422),
            ({"seconds": -1}, 422),
        ):
            with pytest.raises(urllib.error.HTTPError) as error:
                sent(f"{address}/v1/judge", refused | change)
            assert error.value.code == status
        ada.screenshot(path=str(tmp_path / "wide.png"))
        ada.set_viewport_size({"width": 390, "height": 780})
        assert ada.evaluate("document.documentElement.scrollWidth") <= 390
        ada.screenshot(path=str(tmp_path / "phone.png"))
        assert not errors
        assert len(list((study / "plans").iterdir())) == 2
    # Killed and begun again by the same command, it goes on.
    with service(*arguments, script=script, says=SAYS) as (address, _):
        page = browser.new_context().new_page()
        begun(page, address, "Ada Lovelace")
        expect(page.locator("#progress")).to_have_text(f"9 of {total} answered")
        told = sent(f"{address}/v1/begin", {"name": "Bob"})
        assert (told["question"], told["done"]) == (None, total)
        told = sent(f"{address}/v1/begin", {"name": "Ada Lovelace"})
        assert set(told) == {"participant", "done", "total", "question"}
        assert set(told["question"]) == {"id", "text", "reference", "left", "right"}  # it is blind
        assert str(tmp_path) not in json.dumps(told)
    assert run_pipeline("preferences", "compact", str(study)).returncode == 0
    (file,) = study.glob("judgements-*.parquet")
    rows = pq.read_table(file).to_pylist()
    assert len(rows) == 9 + total
    assert len({(row["participant"], row["question"]) for row in rows}) == len(rows)
    own = Study.open(str(study)).participant("Ada Lovelace")
    choices = [row["choice"] for row in rows if row["participant"] == own]
    assert sorted(choices) == sorted(
        ["left", "right", "both", "neither", "left", "right", "both", "neither", "skip"]
    )
    assert all(0 < row["seconds"] < 400 for row in rows)
    said = what_they_say(Study.open(str(study)).read())
    assert {row["model"] for row in said["strengths"]} == {"start", "end"}
    assert said["consistency"]["of"] >= 3  # Bob's, who always chose the left
    assert said["consistency"]["value"] < 1
    assert run_pipeline("preferences", "forget", str(study), "Ada Lovelace").returncode == 0
    assert own not in "".join(str(file) for file in study.rglob("*"))


def some_pairs(queries: int, **asking: int) -> Pairs:
    pairs = tuple(
        Pair(f"q{n}", f"r{n}", "t", ((f"a{n}", f"b{n}"), (f"c{n}", f"d{n}")))
        for n in range(queries)
    )
    others = tuple(f"x{n}" for n in range(queries))
    return Pairs(("one", "other"), pairs, others, {}, Asking(**asking), "upright", 1, 0)


def test_what_a_participant_is_asked() -> None:
    pairs = some_pairs(40, questions=20, repeats=4, obvious=5)
    asked = draw_questions(pairs, {}, "p1")
    assert draw_questions(pairs, {}, "p1") == asked != draw_questions(pairs, {}, "p2")
    assert [one.question for one in asked] == [f"q{n:04d}" for n in range(29)]
    roles = [one.role for one in asked]
    assert {role: roles.count(role) for role in set(roles)} == {
        "plain": 20,
        "repeat": 4,
        "obvious": 5,
    }
    by_name = {one.question: one for one in asked}
    for one in asked:
        if one.role == "repeat":
            first = by_name[one.repeats]
            assert first.question < one.question
            assert (first.left_ids, first.left_model) == (one.right_ids, one.right_model)
            assert (first.right_ids, first.right_model) == (one.left_ids, one.left_model)
        if one.role == "plain":
            own = {"one": "a{0} b{0}", "other": "c{0} d{0}"}
            for ids, model in ((one.left_ids, one.left_model), (one.right_ids, one.right_model)):
                assert " ".join(ids) == own[model].format(one.query_id[1:])
        if one.role == "obvious":
            right = one.left_ids if one.expected == "left" else one.right_ids
            wrong = one.right_ids if one.expected == "left" else one.left_ids
            number = one.query_id[1:]
            assert {name[1:] for name in right} == {number}
            assert {name[0] for name in wrong} == {"x"}
    sides = {one.left_model for one in asked if one.role == "plain"}
    assert sides == {"one", "other"}


def test_every_query_goes_to_as_many_people() -> None:
    pairs = some_pairs(30, people=2, questions=12, repeats=0, obvious=0)
    counts: dict[str, int] = {}
    for person in range(6):
        asked = draw_questions(pairs, counts, f"p{person}")
        if person < 5:
            assert len(asked) == 12
        for one in asked:
            counts[one.query_id] = counts.get(one.query_id, 0) + 1
    assert set(counts.values()) == {2}
    assert draw_questions(pairs, counts, "p9") == []


def test_a_study_that_cannot_begin_says_why(
    command: list[str], run_pipeline: Runner, tmp_path: Path
) -> None:
    queries = tmp_path / "queries.jsonl"
    same = [command[2], command[2]]
    for words, text, message in (
        ([], "[1]", 'line 1: is not {"image": ID, "text": ...}'),
        ([], '{"image": "nobody", "text": "x"}', "has no image 'nobody'"),
        (["--names", "a", "a"], "", "--names: both are 'a'"),
        (["--top", "0"], "", "--top: 0 is less than 1"),
        (["--indexes", *same], None, "both find the same for every query"),
    ):
        chosen = [*command, *words, "--output", str(tmp_path / "study")]
        if text is not None:
            queries.write_text(text)
            chosen += ["--queries", str(queries)]
        began = time.monotonic()
        refused = run_pipeline("preferences", *chosen)
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert message in refused.stderr
        assert time.monotonic() - began < 100
        assert not (tmp_path / "study").exists()
