"""The pages in a real browser with the network off: no error on the console, no request to the outside, and they work.

Skipped where no Chromium is installed. The browser is asked for the page as its scripts leave it; a short script is added to the copies
that are pressed and clicked. `?all` has everything drawn while the page is read, so that nothing here depends on when frames are painted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import NamedTuple

import pytest
from support.made_runs import NASTY

BROWSER = next(
    (
        b
        for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
        if b
    ),
    None,
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium is installed, so pages cannot be opened"
)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--proxy-server=127.0.0.1:9", "--enable-logging=stderr", "--v=0",
    "--virtual-time-budget=3000",
)  # fmt: skip


class Opened(NamedTuple):
    """A page after its scripts: its elements as text, what the console said, what was asked of the network."""

    dom: str
    console: list[str]
    requests: list[str]


def open_page(page: Path, folder: Path, query: str = "?all", size: str = "1200,16000") -> Opened:
    log = folder / "net.json"
    done = subprocess.run(
        [str(BROWSER), *FLAGS, f"--window-size={size}", f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--dump-dom", f"file://{page}{query}"],
        capture_output=True, text=True, timeout=240, env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    said = log.read_text(encoding="utf-8")
    # Only what a page asks for has an initiator of its own; the browser's housekeeping has none.
    asked = re.findall(r'"initiator":"(?:file://|null)".*?"url":"([^"]+)"', said)
    return Opened(done.stdout, console, [u for u in asked if not u.startswith(("data:", "file:"))])


def with_script(page: Path, folder: Path, script: str) -> Path:
    """A copy of a page that runs a script at its end and leaves what it returns in the title, as JSON."""
    text = page.read_text(encoding="utf-8")
    copy = folder / "pressed.html"
    run = f"(async () => {{ {script} }})().then(r => document.title = JSON.stringify(r), e => document.title = String(e))"
    copy.write_text(text.replace("</body>", f"<script>{run}</script></body>"), encoding="utf-8")
    return copy


def answer(opened: Opened):
    title = re.search(r"<title>(.*?)</title>", opened.dom, re.S)
    assert title is not None
    return json.loads(unescape(title[1]))


def test_the_watch_sees_what_a_bad_page_does(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><title>x</title><img src='http://127.0.0.1:9/x.png'><script>nothing.at.all()</script>"
    )
    opened = open_page(page, tmp_path)
    assert (
        opened.requests == ["http://127.0.0.1:9/x.png"] * len(opened.requests) and opened.requests
    )
    assert any("nothing is not defined" in line for line in opened.console)


@pytest.mark.parametrize("kind", ("trace", "train", "evaluate", "matrix", "comparison"))
def test_a_page_opens_cleanly(pages, kind, tmp_path):
    opened = open_page(pages[kind], tmp_path, "?theme=dark&all")
    assert " data-ready" in opened.dom, "its script came to its end"
    assert not opened.console
    assert not opened.requests
    assert 'data-theme="dark"' in opened.dom
    assert "<title>owned" not in opened.dom
    body = re.sub(r"<script.*?</script>", "", opened.dom, flags=re.S)
    assert body.count('class="grid"') == {"trace": 4, "train": 0, "evaluate": 0, "matrix": 0}.get(
        kind, 8
    )
    if kind in ("trace", "evaluate"):
        assert NASTY in unescape(body) and NASTY not in body, "shown, as text"


def test_maps_are_walked_by_keys_and_examples_are_searched(pages, tmp_path):
    script = """
      const first = document.querySelector('[data-average] .grid td');
      first.focus();
      const press = key => document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}));
      press('ArrowRight'); press('ArrowDown'); press('ArrowLeft'); press('ArrowUp'); press('End'); press('ArrowRight');
      const at = document.activeElement.dataset.at, tip = document.getElementById('tip').textContent;
      const stops = document.querySelector('[data-average] .grid').querySelectorAll('td[tabindex="0"]').length;
      const holder = document.querySelector('[data-examples]');
      const search = holder.querySelector('input');
      search.value = 'made:3'; search.dispatchEvent(new Event('input'));
      const found = holder.querySelector('.soft').textContent, shown = holder.querySelector('.example').textContent;
      const before = document.documentElement.dataset.theme;
      document.getElementById('theme').click();
      return {at, tip, stops, found, shown: shown.includes('made:3'), turned: before !== document.documentElement.dataset.theme};
    """
    opened = open_page(with_script(pages["trace"], tmp_path, script), tmp_path)
    got = answer(opened)
    assert (
        got["at"] == "0,5"
        and got["tip"].startswith("L5.resid_post@template")
        and "AIE" in got["tip"]
    )
    assert got["stops"] == 1, "one tab stop a map"
    assert got["found"] == "1 of 6" and got["shown"]
    assert got["turned"] and not opened.console


@pytest.mark.parametrize("kind", ("trace", "matrix", "comparison"))
def test_nothing_sticks_out_of_a_narrow_page(pages, kind, tmp_path):
    # A window of a browser is never narrower than 500 px, a frame is.
    frame = tmp_path / "frame.html"
    text = json.dumps(pages[kind].read_text(encoding="utf-8")).replace("</", "<\\/")
    frame.write_text(
        "<!doctype html><title>x</title><iframe width=400 height=40000 id=f></iframe><script>"
        f"f.onload = () => {{ const d = f.contentDocument.documentElement;"
        f"document.title = JSON.stringify([d.scrollWidth, d.clientWidth, d.querySelectorAll('.grid').length]) }}; f.srcdoc = {text}</script>",
        encoding="utf-8",
    )
    wide, room, grids = answer(open_page(frame, tmp_path))
    assert wide <= room and grids == (0 if kind == "matrix" else 4 if kind == "trace" else 8)
