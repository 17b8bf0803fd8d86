"""The report in a real headless browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from qure_core.config import Settings
from qure_core.data import read_split
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


def test_captions_are_escaped(finished_run: Path, tmp_path: Path) -> None:
    import dataclasses

    copy = tmp_path / "run"
    shutil.copytree(finished_run, copy)
    settings = Settings(
        run={"dir": str(copy)},
        report={"examples": 100},
        train={"epochs": 3, "warmup_epochs": 2, "mining_definitions": 3},
    )
    train, val = (read_split(str(copy / "data" / name)) for name in ("train", "val"))
    hostile = '<script>alert(1)</script> "><img src=x onerror=alert(2)>'
    val = dataclasses.replace(
        val, triplets=tuple(dataclasses.replace(t, text=hostile) for t in val.triplets)
    )
    page = Path(build_report(settings, train, val)).read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
