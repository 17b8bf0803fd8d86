"""The report in a real headless browser."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from qure_core.base.config import Settings
from qure_core.data import read_split
from qure_core.data.schema import Triplet
from qure_core.job.layout import committed
from qure_core.job.metrics_log import read_metrics
from qure_core.report.build import build_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")
def test_report_renders_without_errors(finished_run: Path, tmp_path: Path) -> None:
    page_file = finished_run / "report" / "index.html"
    errors: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("request", lambda r: requests.append(r.url))
        page.goto(page_file.as_uri())
        images = page.evaluate(
            "Array.from(document.images).map(i => [i.alt, i.complete && i.naturalWidth > 0])"
        )
        headings = page.locator("h2").all_inner_texts()
        names = page.locator("#metrics tbody td:first-child").all_inner_texts()
        rounds = page.locator("#rounds tbody tr").count()
        targets = page.locator("figure.target").count()
        page.screenshot(path=tmp_path / "report.png", full_page=True)
        browser.close()
    assert not errors
    # Self-contained: nothing but the file and its own data: URIs is asked for.
    assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
    assert len(images) > 40
    assert all(shown for _, shown in images), [alt for alt, shown in images if not shown]
    assert names == ["start", "end of warm-up", "end"]
    assert rounds == 1
    assert targets >= 4
    assert headings == [
        "Val metrics",
        "Curves",
        "Mined sets",
        "Hard negatives of example queries",
        "Val queries before and after",
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")
def test_hostile_captions_and_names_stay_text(finished_run: Path, tmp_path: Path) -> None:
    """In a real browser: no script runs, nothing is fetched, and people see what was written."""
    copy = tmp_path / "run"
    shutil.copytree(finished_run, copy)
    hostile = (
        '</span><script>window.hit = 1</script>"><img src="http://127.0.0.1:9/x" '
        "onerror='window.hit = 2'>{{ 7 * 7 }}<svg onload=window.hit=3>"
    )
    settings = Settings(
        run={"dir": str(copy)},
        model={"pretrained": hostile},
        report={"examples": 100},
        train={"epochs": 3, "warmup_epochs": 2, "mining_definitions": 3},
    )
    train, val = (read_split(str(copy / "data" / name)) for name in ("train", "val"))
    odd = val.triplets[0].reference_id
    renamed = f"{hostile}{odd}"

    def changed(triplet: Triplet) -> Triplet:
        reference = renamed if triplet.reference_id == odd else triplet.reference_id
        return dataclasses.replace(triplet, text=hostile, category=hostile, reference_id=reference)

    val = dataclasses.replace(
        val,
        triplets=tuple(changed(triplet) for triplet in val.triplets),
        images=val.images | {renamed: val.images[odd]},
    )
    evaluations, rounds = (committed(str(copy), name) for name in ("evaluations", "rounds"))
    lines = read_metrics(str(copy))
    page_file = Path(build_report(settings, train, val, evaluations, rounds, lines))
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        page.on("request", lambda r: requests.append(r.url))
        page.on("dialog", lambda d: requests.append(f"dialog {d.message}"))
        page.goto(page_file.as_uri())
        hit = page.evaluate("window.hit")
        scripts = page.evaluate("document.querySelectorAll('script, svg').length")
        shown = page.locator("section.query span").all_inner_texts()
        names = page.locator("figcaption").all_text_contents()
        alts = page.evaluate("Array.from(document.images).map(i => i.alt)")
        browser.close()
    assert (hit, scripts) == (None, 0)
    assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
    assert f"“{hostile}”" in shown
    assert hostile in shown
    assert renamed in names
    assert renamed in alts
