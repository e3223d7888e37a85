"""The explorer in a real browser: type, trace, stop, click a cell, train, download, open the link again.

Skipped where playwright or Chromium is not installed.
"""

from __future__ import annotations

import csv
import json
import shutil

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
expect = sync_api.expect
PATIENCE = 60_000
"""Milliseconds after which a test gives up; nothing is timed."""
NASTY = "The <img src=x onerror=alert(1)> food was great & </script> cheap."


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, explorer):
    """A page whose console, dialogs and requests are watched."""
    context = chromium.new_context(accept_downloads=True, viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    page, seen = context.new_page(), []
    page.on("console", lambda m: seen.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: seen.append(str(e)))
    page.on("dialog", lambda d: (seen.append("dialog " + d.message), d.dismiss()))
    here = f"http://127.0.0.1:{explorer.port}/"
    page.on(
        "request",
        lambda r: None if r.url.startswith((here, "data:", "blob:")) else seen.append(r.url),
    )
    yield page
    # A review that is half typed is refused in a sentence; the browser notes the status.
    assert [x for x in seen if "status of 400" not in x] == []
    context.close()


def ready(page):
    """Wait until the model has answered and a map can be traced."""
    expect(page.locator("#go")).to_be_enabled(timeout=PATIENCE)


def traced(page):
    """Trace and wait for the whole map."""
    page.click("#go")
    expect(page.locator("#status")).to_contain_text("cells in", timeout=PATIENCE)


def faults(page):
    """Return what axe-core finds on the page: (impact, rule, element)."""
    options = {"resultTypes": ["violations"], "iframes": False}  # CircuitsVis draws in the frame
    found = axe.Axe().run(page, options=options).response["violations"]
    return [(v["impact"], v["id"], n["html"][:160]) for v in found for n in v["nodes"]]


def saved(page, button):
    """Return the path of what a button downloads."""
    with page.expect_download() as download:
        button.click()
    return download.value.path()


def test_a_whole_visit(page, explorer):
    page.goto(explorer.url)
    ready(page)  # a review stands there from the start

    # Type a review, mark its aspect by selecting it, change a word of the corrupted run.
    page.fill("#sentence", "The food was great but the waiter was rude.")
    page.locator("#sentence").evaluate("box => box.setSelectionRange(4, 8)")
    page.click("#mark")
    expect(page.locator("#aspect")).to_have_value("food")
    page.fill("#edited", "The food was awful but the waiter was rude.")
    expect(page.locator("#pair mark")).to_have_text("awful", timeout=PATIENCE)
    expect(page.locator("#clean .probs tr")).to_have_count(3)
    ready(page)

    # Trace by the keyboard; the largest cell is the changed word in layer 0.
    page.uncheck("[value=attn_out]")
    page.uncheck("[value=mlp_out]")
    page.wait_for_timeout(400)
    ready(page)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("cells in", timeout=PATIENCE)
    cells = page.locator("#maps td")
    expect(page.locator("#maps td.none")).to_have_count(0)
    strengths = cells.evaluate_all("all => all.map(td => Number(td.style.getPropertyValue('--v')))")
    assert max(strengths) == 1.0

    # Open a cell by the keyboard: what restoring it does to every label.
    best = cells.nth(strengths.index(1.0))
    best.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#cell h3")).to_contain_text("resid_post")
    rows = page.locator("#cell tbody tr")
    expect(rows).to_have_count(3)
    name = page.locator("#cell h3").inner_text().split(":")[0]
    assert page.locator("#maps td.chosen").count() == 1

    # Download what is on the screen.
    with saved(page, page.locator("#maps .get", has_text="CSV")).open(encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert table[0][:2] == ["token", "role"] and len(table) == 1 + len(strengths) // (
        len(table[0]) - 2
    )
    record = json.loads(
        saved(page, page.locator("#views .get", has_text="JSON")).read_text(encoding="utf-8")
    )
    assert record["whole"] and len(record["rows"]) == len(strengths)
    assert record["state"]["edited"] == "The food was awful but the waiter was rude."
    picture = saved(page, page.locator("#maps .get", has_text="PNG")).read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 2000
    expect(page.locator("#recipe")).to_contain_text("ma.trace(")

    # Train at the cell's role and two others, compare, and see the edit's answer to this review.
    page.click("#cell button")
    page.fill("#site", "L3.resid_post@query.last")
    page.keyboard.press("Enter")
    expect(page.locator("#sites li")).to_have_count(2)
    page.fill("#epochs", "1")
    page.fill("#examples", "64")
    page.click("#train")
    expect(page.locator("#tested h3")).to_contain_text("of 50", timeout=PATIENCE)
    expect(page.locator("#curve polyline")).to_have_count(2)
    expect(page.locator("#clean .probs")).to_have_count(2, timeout=PATIENCE)
    page.select_option("#tested select", "fixed")

    # The link opens the same state, the same map and the same cell.
    link, said = page.url, page.locator("#cell").inner_text()
    page.goto("about:blank")
    page.goto(link)
    expect(page.locator("#status")).to_contain_text("cells in", timeout=PATIENCE)
    expect(page.locator("#cell h3")).to_contain_text(name)
    assert page.locator("#cell").inner_text() == said
    expect(page.locator("#sites li")).to_have_count(2)


def test_stop_keeps_what_is_there(page, explorer, held_back):
    page.goto(explorer.url)
    ready(page)
    page.click("#go")
    expect(page.locator("#stop")).to_be_enabled()
    held_back.wait(PATIENCE / 1000)
    page.click("#stop")
    expect(page.locator("#status")).to_contain_text("stopped")
    expect(page.locator("#go")).to_be_enabled()
    assert page.locator("#maps td.none").count() > 0
    explorer.session.ask(lambda: None).result(PATIENCE / 1000)  # the thread is free again


def test_text_of_the_user_is_only_ever_text(page, explorer):
    page.goto(explorer.url)
    ready(page)
    page.fill("#sentence", NASTY)
    page.fill("#aspect", "food")
    page.fill("#edited", NASTY.replace("great", "awful"))
    expect(page.locator("#clean .tokens")).to_contain_text("onerror", timeout=PATIENCE)
    ready(page)
    traced(page)
    page.locator("#maps td").first.click()
    page.select_option("#layer", "2")
    frame = page.frame_locator("#patterns iframe")
    expect(frame.locator("body")).to_contain_text("L2H0", timeout=PATIENCE)
    assert page.locator("main img").count() == 0
    assert frame.locator("img[src=x]").count() == 0


@pytest.mark.parametrize(("scheme", "width"), [("light", 400), ("dark", 400), ("dark", 1280)])
def test_it_can_be_read_and_used_in_every_window(chromium, explorer, scheme, width):
    """Nothing sticks out, and axe-core finds nothing wrong, with everything of the page in view."""
    context = chromium.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(explorer.url)
    ready(page)
    assert faults(page) == []
    page.fill("#epochs", "1")
    page.fill("#examples", "16")
    page.wait_for_timeout(400)
    ready(page)
    traced(page)
    page.locator("#maps td").first.click()
    page.click("#cell button")
    page.click("#train")
    expect(page.locator("#tested h3")).to_contain_text("of 50", timeout=PATIENCE)
    page.select_option("#layer", "2")
    expect(page.locator("#patterns iframe")).to_have_count(1)
    page.locator("#pair summary").click()
    expect(page.locator("#recipe")).to_contain_text("ma.trace(")
    assert page.locator("html").get_attribute("data-theme") == scheme
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    assert faults(page) == []
    context.close()


def test_two_browsers_in_turn(chromium, explorer, held_back):
    """The second is told that one is before it; it begins when the first window is closed."""
    first, second = chromium.new_page(), chromium.new_page()
    for page in (first, second):
        page.set_default_timeout(PATIENCE)
        page.goto(explorer.url)
        ready(page)
    first.click("#go")
    assert held_back.wait(PATIENCE / 1000)
    job = explorer.session.running
    second.click("#go")
    expect(second.locator("#status")).to_contain_text("1 before you")
    first.close()
    expect(second.locator("#status")).to_contain_text("of", timeout=PATIENCE)
    expect(second.locator("#maps td").first).to_be_visible()
    assert job.stopped and explorer.session.running is not job
    second.click("#stop")
    expect(second.locator("#status")).to_contain_text("stopped")
    second.close()


def test_a_bad_link_says_what_is_wrong(chromium, explorer):
    page = chromium.new_page()
    page.goto(explorer.url + "#main?sentence=Good+food&aspect=food&draws=0")
    expect(page.locator("#problem")).to_contain_text(
        "draws is 0; accepted: 1 to 50", timeout=PATIENCE
    )
    expect(page.locator("#go")).to_be_disabled()
    page.close()
