"""Take the pictures of docs/img anew with Chromium: `python scripts/pictures.py [explorer] [report]`.

    explorer.png   the explorer with a finished map of a built-in review
    report.png     the report of a small trace of the bundled model

Needs playwright (`pip install -e ".[test]"`) and a Chromium in the path. Look at a picture before it
is kept.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

import mech_absa as ma
from mech_absa.commands.patch import cli as patch
from mech_absa.explore.state import State

IMAGES = Path(__file__).parents[1] / "docs" / "img"
REVIEW = State(
    sentence="Music was weak, but the owner was friendly.",
    aspect="Music",
    gold="negative",
    edited="Music was great, but the owner was friendly.",
)
TRACE = ["--limit", "40", "--by", "role", "--no-figures", "--quiet"]
PATIENCE = 120_000
"""Milliseconds after which a picture is given up."""


def window(browser: Browser, height: int) -> Page:
    """Return a page in light colours, as wide as the pictures are."""
    page = browser.new_page(
        viewport={"width": 1200, "height": height}, color_scheme="light", reduced_motion="reduce"
    )
    page.set_default_timeout(PATIENCE)
    return page


def explorer(browser: Browser, target: Path) -> None:
    """Trace a review in the explorer and save what the page shows when its map is whole."""
    page = window(browser, 1860)
    running = ma.explore(ma.load_model())
    try:
        page.goto(f"{running.url}#main?{REVIEW.link()}")
        for _ in range(2):  # the second map is not the first that the process computes
            expect(page.locator("#go")).to_be_enabled(timeout=PATIENCE)
            page.click("#go")
            expect(page.locator("#status")).to_contain_text("cells in", timeout=PATIENCE)
        expect(page.locator("#maps td.none")).to_have_count(0)
        page.evaluate("() => { document.activeElement.blur(); window.scrollTo(0, 0); }")
        page.screenshot(path=target)
    finally:
        page.close()
        running.close()


def report(browser: Browser, target: Path, folder: Path) -> None:
    """Trace forty reviews and save the top of their report."""
    if patch([*TRACE, "--out", str(folder / "first")]):
        sys.exit("the trace failed")
    page = window(browser, 1440)
    page.goto((folder / "first" / "report.html").as_uri())
    page.wait_for_selector("[data-ready]")
    page.screenshot(path=target)
    page.close()


def main() -> None:
    """Take the pictures that the command line names, or both."""
    wanted = sys.argv[1:] or ["explorer", "report"]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        if "explorer" in wanted:
            explorer(browser, IMAGES / "explorer.png")
        if "report" in wanted:
            report(browser, IMAGES / "report.png", Path(folder))
        browser.close()


if __name__ == "__main__":
    main()
