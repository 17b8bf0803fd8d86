"""The service as it runs: what it answers, what it refuses, and what it survives."""

from __future__ import annotations

import io
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from service import service

from qure_core.base.config import Settings
from qure_core.data import read_split
from qure_core.runtime.in_process import stages_in_process
from qure_core.runtime.resources import plan_resources
from qure_core.search import Retriever
from qure_core.search.build import build_index
from qure_core.search.corpus import Corpus

pytestmark = pytest.mark.job
SETTINGS = Settings(cluster={"in_process": True, "gpus": "none"}, features="off")
BAD_NAME = '<img src=x onerror="document.title=1">'


def built(run: Path, corpus: Corpus, output: Path, **options: Any) -> None:
    with stages_in_process(SETTINGS.cluster):
        checkpoint = str(run / "checkpoints/train-0003")
        plan = plan_resources(SETTINGS.cluster)
        build_index(SETTINGS, plan, checkpoint, corpus, str(output), **options)


@pytest.fixture(scope="module")
def pictures(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Images of the run's data, and one whose name is markup, in a folder of their own."""
    folder = tmp_path_factory.mktemp("secret-place")
    val = read_split(str(finished_run / "data/val"))
    found = {}
    for name, uri in sorted(val.images.items()):
        place = folder / f"{name}.png"
        place.write_bytes(Path(uri).read_bytes())
        found[name] = str(place)
    Image.new("RGB", (60, 30), "#c33").save(folder / "odd.png")
    return found | {BAD_NAME: str(folder / "odd.png")}


@pytest.fixture(scope="module")
def index(
    finished_run: Path, pictures: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("served") / "index"
    names = sorted(pictures)
    corpus = Corpus(
        pictures,
        {name: ("left", "right")[i % 2] for i, name in enumerate(names)},
        {name: {"maker": f"m{i % 3}"} for i, name in enumerate(names)},
    )
    built(finished_run, corpus, output)
    return output


Started = tuple[str, subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def started(index: Path) -> Iterator[Started]:
    with service("--index", str(index), "--poll", "0.5", "--shares", "1") as found:
        yield found


@pytest.fixture(scope="module")
def served(started: Started) -> str:
    return started[0]


@pytest.fixture(scope="module")
def client(served: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served, timeout=60) as made:
        yield made


def asked(client: httpx.Client, files: Any = None, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/search", data=fields, files=files)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_it_answers_as_the_retriever_does(
    client: httpx.Client, index: Path, pictures: dict[str, str]
) -> None:
    retriever = Retriever.open(index, device="cpu")
    name = sorted(pictures)[3]
    upload = {"image": ("x", Path(pictures[name]).read_bytes())}
    for fields, files, question in (
        ({"image_id": name, "text": "is red"}, None, {"image": name, "text": "is red"}),
        ({"text": "is red"}, upload, {"image": pictures[name], "text": "is red"}),
        ({"text": "a red circle"}, None, {"text": "a red circle"}),
        ({"image_id": name}, None, {"image": name}),
        ({"image_id": name, "category": "left"}, None, {"image": name, "category": "left"}),
        ({"image_id": name, "where": "maker=m1"}, None, {"image": name, "where": {"maker": "m1"}}),
        ({"text": "big", "exclude": [name]}, None, {"text": "big", "exclude": [name]}),
    ):
        expected = retriever.ask(**question, top=200)
        found = asked(client, files, top=200, **fields)
        assert [one["id"] for one in found["results"]] == [one.image_id for one in expected]
        scores = [one["score"] for one in found["results"]]
        assert scores == pytest.approx([one.score for one in expected], abs=1e-6)
        assert [one["rank"] for one in found["results"]] == list(range(1, len(expected) + 1))
        assert 1 <= found["likely"] <= 50
        pages = [asked(client, files, top=7, offset=at, **fields)["results"] for at in (0, 7, 14)]
        assert list(chain.from_iterable(pages)) == found["results"][:21]


def test_pictures_and_where_the_model_looked(
    client: httpx.Client, pictures: dict[str, str]
) -> None:
    found = asked(client, text="a red circle", top=5, explain=True)["results"]
    for one in found:
        picture = client.get(one["image"], params={"side": 64})
        assert picture.headers["content-type"] == "image/jpeg"
        assert max(Image.open(io.BytesIO(picture.content)).size) <= 64
        again = client.get(
            one["image"], params={"side": 64}, headers={"if-none-match": picture.headers["etag"]}
        )
        assert again.status_code == 304
        looked = client.get(
            one["image"].replace("images", "attention"), params={"token": one["token"]}
        )
        grid = looked.json()["grid"]
        assert len(grid) == len(grid[0]) > 1
        assert max(map(max, grid)) == pytest.approx(1)
        assert 0 < looked.json()["share"] <= 1
    wide = client.get(f"/v1/attention/{BAD_NAME}", params={"token": 0}).json()
    assert wide["box"] == pytest.approx([0.1, -0.3, 0.8, 1.6])
    drawn = client.get("/v1/images", params={"count": 5, "seed": 3, "category": "right"}).json()
    assert len({one["id"] for one in drawn}) == 5
    assert (
        drawn
        == client.get("/v1/images", params={"count": 5, "seed": 3, "category": "right"}).json()
    )


def test_what_is_wrong_is_said_in_words_and_names_no_file(
    client: httpx.Client, pictures: dict[str, str]
) -> None:
    big = io.BytesIO()
    Image.new("1", (9000, 9000)).save(big, "PNG")
    name = next(iter(pictures))
    for fields, files, status, words in (
        ({}, None, 422, "give an image, a text, or both"),
        ({"text": "  "}, None, 422, "give an image, a text, or both"),
        ({"image_id": "nobody"}, None, 404, "the index has no image 'nobody'"),
        ({"image_id": "../../etc/passwd"}, None, 404, "the index has no image"),
        ({"text": "x", "category": "hats"}, None, 404, "the index has no category 'hats'"),
        ({"text": "x", "where": "maker"}, None, 422, "is not column=value"),
        ({"text": "x", "where": "maker=none"}, None, 404, "no image has 'maker' 'none'"),
        ({"text": "x", "exclude": ["nobody"]}, None, 404, "the index has no image 'nobody'"),
        ({"text": "x" * 2001}, None, 422, "at most 2000"),
        ({"text": "x", "top": "0"}, None, 422, "greater than or equal to 1"),
        ({"text": "x", "top": "600", "offset": "600"}, None, 422, "no more than 1000 answers"),
        ({"image_id": name}, {"image": ("x", b"x")}, 422, "not both"),
        ({}, {"image": ("a.png", b"")}, 422, "the file is empty"),
        ({}, {"image": ("../../a.png", b"no picture")}, 422, "the image: cannot be decoded"),
        ({}, {"image": ("a.svg", b"<svg/>")}, 422, "another text in angle brackets"),
        ({}, {"image": ("a.png", big.getvalue())}, 422, "9000 x 9000 pixels"),
        ({}, {"image": ("a.png", b"0" * (21 * 2**20))}, 413, "may send 20 MB"),
    ):
        answer = client.post("/v1/search", data=fields, files=files)
        assert (answer.status_code, words in answer.text) == (status, True), answer.text
        assert "secret-place" not in answer.text
    for path in (
        "/v1/images/nobody",
        "/v1/images/..%2f..%2fetc%2fpasswd",
        "/../setup.cfg",
        "/page/../x",
    ):
        assert client.get(path).status_code == 404
    assert client.get("/v1/index", headers={"host": "evil.example"}).status_code == 421
    odd = client.post(
        "/v1/search",
        content=b"--x\r\nnonsense",
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert odd.status_code in (400, 422)


def test_a_picture_that_has_gone_is_said(client: httpx.Client, pictures: dict[str, str]) -> None:
    name = sorted(pictures)[5]
    place = Path(pictures[name])
    held = place.read_bytes()
    place.unlink()
    try:
        for answer in (
            client.get(f"/v1/images/{name}"),
            client.get(f"/v1/attention/{name}", params={"token": 0}),
            client.post("/v1/search", data={"image_id": name}),
        ):
            assert answer.status_code in (404, 422)
            assert "cannot be read" in answer.text
            assert "secret-place" not in answer.text
    finally:
        place.write_bytes(held)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(max_size=300),
    image=st.binary(max_size=300) | st.none(),
    header=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=50),
)
def test_nonsense_is_answered_and_nothing_fails(
    client: httpx.Client, text: str, image: bytes | None, header: str
) -> None:
    files = None if image is None else {"image": (header or "x", image)}
    answer = client.post(
        "/v1/search", data={"text": text}, files=files, headers={"x-odd": header.strip()}
    )
    assert answer.status_code in (200, 400, 422)
    assert "secret-place" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_machines_are_told(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json()["ready"] is True
    text = client.get("/metrics").text
    assert f"qure_images {float(client.get('/v1/index').json()['images'])}" in text
    assert 'qure_seconds_count{part="total"}' in text
    spec = client.get("/openapi.json").json()
    assert set(spec["paths"]) == {
        "/v1/index",
        "/v1/images",
        "/v1/images/{image_id}",
        "/v1/attention/{image_id}",
        "/v1/search",
    }
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_a_new_version_is_taken_up_and_no_request_fails(
    client: httpx.Client, served: str, finished_run: Path, index: Path, tmp_path: Path
) -> None:
    statuses: list[int] = []
    stop = threading.Event()

    def keep_asking() -> None:
        with httpx.Client(base_url=served, timeout=60) as mine:
            while not stop.is_set():
                statuses.append(mine.post("/v1/search", data={"text": "red", "top": 3}).status_code)

    threads = [threading.Thread(target=keep_asking) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        before = client.get("/v1/index").json()
        Image.new("RGB", (50, 50), "#0f0").save(tmp_path / "green.png")
        built(
            finished_run,
            Corpus({"green": str(tmp_path / "green.png")}, {}),
            index,
            keep_others=True,
        )
        end = time.monotonic() + 60
        while (now := client.get("/v1/index").json())["version"] == before["version"]:
            assert time.monotonic() < end
            time.sleep(0.2)
        assert now["images"] == before["images"] + 1
        assert "green" in [one["id"] for one in asked(client, text="x", top=1000)["results"]]
        asked_before = len(statuses)
        while len(statuses) < asked_before + 5:
            time.sleep(0.1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200}


def test_a_killed_replica_costs_what_it_held_alone(client: httpx.Client, started: Started) -> None:
    (encoder,) = [
        child
        for child in psutil.Process(started[1].pid).children(recursive=True)
        if "-0:encoders" in " ".join(child.cmdline())
    ]
    encoder.send_signal(signal.SIGKILL)
    end = time.monotonic() + 90
    while True:
        answer = client.post("/v1/search", data={"text": "red"})
        if answer.status_code == 200:
            break
        assert answer.status_code in (500, 503, 504)
        assert time.monotonic() < end
        time.sleep(0.5)
    assert {client.post("/v1/search", data={"text": "red"}).status_code for _ in range(20)} == {200}


# The page.


@pytest.fixture
def page(browser: Browser, served: str) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    opened = context.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda m: errors.append(m.text) if "Content Security" in m.text else None)
    elsewhere: list[str] = []
    opened.on(
        "request",
        lambda r: elsewhere.append(r.url) if not r.url.startswith((served, "blob:")) else None,
    )
    opened.goto(served)
    expect(opened.locator(".hit").first).to_be_visible(timeout=30_000)
    yield opened
    assert not errors
    assert not elsewhere
    context.close()


def names(page: Page) -> list[str]:
    return [
        title or ""
        for title in page.locator(".hit").evaluate_all("all => all.map(one => one.title)")
    ]


def test_one_searches_clicks_through_and_goes_back(page: Page, client: httpx.Client) -> None:
    expect(page.locator("#said")).to_contain_text("choose one to begin from")
    first = names(page)[0]
    page.locator(".hit").first.focus()
    page.keyboard.press("Enter")  # by keyboard alone
    expect(page.locator("#said")).to_contain_text("the best first")
    expect(page.locator("#reference img")).to_have_attribute("alt", f"Reference: {first}")
    page.keyboard.press("/")
    page.keyboard.type("is red")
    page.keyboard.press("Enter")
    expect(page.locator("nav button")).to_have_count(3)
    expect(page.locator(".facts").first).to_contain_text("1. ")
    found = asked(client, image_id=first, text="is red", top=40)
    assert names(page)[:40] == [one["id"] for one in found["results"]]
    expect(page.locator(".ends")).to_have_text("likely matches above")
    above = page.locator("main > *").evaluate_all(
        "all => all.findIndex(one => one.className === 'ends')"
    )
    assert above == found["likely"]
    second = names(page)[1]
    page.locator(".hit").nth(1).click()
    expect(page.locator("nav button")).to_have_count(4)
    expect(page.locator("#reference img")).to_have_attribute("alt", f"Reference: {second}")
    expect(page.locator("#text")).to_have_value("")
    page.go_back()
    expect(page.locator("#text")).to_have_value("is red")
    expect(page.locator(".facts").first).to_contain_text("1. ")
    assert names(page)[:40] == [one["id"] for one in found["results"]]
    page.locator("nav button").first.click()
    expect(page.locator("#said")).to_contain_text("choose one to begin from")


def test_answers_load_as_one_scrolls(page: Page, client: httpx.Client) -> None:
    page.fill("#text", "a red circle")
    page.keyboard.press("Enter")
    whole = client.get("/v1/index").json()["images"]
    for _ in range(40):
        page.mouse.wheel(0, 4000)
        page.wait_for_timeout(100)
        if page.locator(".hit").count() == whole:
            break
    found = asked(client, text="a red circle", top=1000)["results"]
    assert names(page) == [one["id"] for one in found]
    assert len(found) == whole > 40


def test_a_picture_is_dropped_pasted_or_chosen(page: Page, pictures: dict[str, str]) -> None:
    name = sorted(pictures)[2]
    page.set_input_files("#file", pictures[name])
    expect(page.locator("#reference img")).to_have_attribute("alt", f"Reference: {name}.png")
    expect(page.locator("#said")).to_contain_text("the best first")
    assert name not in names(page)  # the same bytes are not found
    give = """([kind, bytes]) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], "given.png", {type: "image/png"}));
      const options = {bubbles: true, cancelable: true};
      const event = kind === "drop" ? new DragEvent("drop", {...options, dataTransfer: data})
        : new ClipboardEvent("paste", {...options, clipboardData: data});
      document.body.dispatchEvent(event);
    }"""
    content = list(Path(pictures[name]).read_bytes())
    for kind, steps in (("drop", 3), ("paste", 4)):
        page.evaluate(give, [kind, content])
        expect(page.locator("nav button")).to_have_count(steps)
        expect(page.locator("#reference img")).to_have_attribute("alt", "Reference: given.png")
        expect(page.locator("#said")).to_contain_text("the best first")


def test_what_goes_wrong_is_said_on_the_page(
    page: Page, pictures: dict[str, str], tmp_path: Path
) -> None:
    page.keyboard.press("/")
    page.keyboard.press("Enter")
    expect(page.locator("#wrong")).to_have_text("Choose a picture, or type what you look for.")
    (tmp_path / "bad.png").write_text("no picture")
    page.set_input_files("#file", tmp_path / "bad.png")
    expect(page.locator("#wrong")).to_contain_text("The image: cannot be decoded")
    page.click("#clear")
    expect(page.locator("#wrong")).to_be_hidden()
    page.fill("#text", "odd")
    page.select_option("#category", "left")
    expect(page.locator("#said")).to_contain_text("the best first")
    # A name that is markup is shown as text, and a picture that cannot be read has its place.
    place = Path(pictures[sorted(pictures)[4]])
    held = place.read_bytes()
    place.unlink()
    try:
        page.route("**/v1/images/**", lambda route: route.abort())
        page.click("#clear")
        page.fill("#text", "something")
        page.keyboard.press("Enter")
        expect(page.locator(".missing").first).to_contain_text("no picture: ")
        assert page.title() == "Search by picture and words"
    finally:
        place.write_bytes(held)
    page.unroute_all()
    page.route("**/v1/search", lambda route: route.abort())
    page.fill("#text", "more")
    page.keyboard.press("Enter")
    expect(page.locator("#wrong")).to_contain_text("The service does not answer")


def test_it_shows_where_the_model_looked(page: Page) -> None:
    page.check("#why")
    page.fill("#text", "a red circle")
    page.keyboard.press("Enter")
    expect(page.locator("#about")).to_be_visible()
    expect(page.locator(".facts").first).to_contain_text("1. ")
    page.locator(".hit").first.hover()
    seen = page.locator(".hit").first.locator(".seen canvas")
    expect(seen).to_be_visible()
    picture = page.locator(".hit img").first.bounding_box()
    over = page.locator(".hit .seen").first.bounding_box()
    assert picture is not None
    assert over is not None
    assert over == pytest.approx(picture, abs=1)


def test_on_a_phone_in_the_dark(browser: Browser, served: str, tmp_path: Path) -> None:
    context = browser.new_context(
        viewport={"width": 360, "height": 740}, color_scheme="dark", has_touch=True
    )
    phone = context.new_page()
    phone.goto(served)
    expect(phone.locator(".hit").first).to_be_visible(timeout=30_000)
    phone.locator(".hit").first.tap()
    expect(phone.locator("#said")).to_contain_text("the best first")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    dark = phone.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in dark[4:-1].split(",")) < 60
    phone.screenshot(path=tmp_path / "phone.png")
    context.close()
