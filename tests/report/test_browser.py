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

import numpy as np
import pandas as pd
import pytest
from support import fast
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "kind",
    fast(("trace", "train", "evaluate", "matrix", "comparison"), ("comparison",)),
)
def test_a_page_opens_cleanly(pages, kind, tmp_path):
    opened = open_page(pages[kind], tmp_path, "?theme=dark&all")
    assert " data-ready" in opened.dom, "its script came to its end"
    assert not opened.console
    assert not opened.requests
    assert 'data-theme="dark"' in opened.dom
    assert "<title>owned" not in opened.dom
    body = re.sub(r"<script.*?</script>", "", opened.dom, flags=re.S)
    grids = {"trace": 4, "train": 0, "evaluate": 0, "matrix": 0}.get(kind, 9)
    assert len(re.findall(r'class="grid( opens)?"', body)) == grids, (
        "and the difference of two traces"
    )
    if kind in ("trace", "evaluate"):
        assert NASTY in unescape(body) and NASTY not in body, "shown, as text"


@pytest.mark.slow
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
      const found = holder.querySelector('.picker .soft').textContent, shown = holder.querySelector('.example').textContent;
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
    assert got["found"] == "1 of 1 (6 in all)" and got["shown"], "the place among the matches"
    assert got["turned"] and not opened.console


@pytest.mark.slow
def test_a_slider_steps_through_the_examples(pages, tmp_path):
    """Each place of the slider is the example of that place in the list; a search shortens both."""
    script = """
      const holder = document.querySelector('[data-examples]'), which = holder.querySelector('select.which');
      const slide = holder.querySelector('input[type="range"]'), search = holder.querySelector('input[type="search"]');
      const shown = () => DATA.runs[0].examples.list.find(e => holder.querySelector('.example').textContent.includes(e.id + ':')).id;
      const inOrder = [...which.options].map(o => DATA.runs[0].examples.list[Number(o.value)].id);
      const seen = [];
      for (let i = 1; i <= Number(slide.max); i++) { slide.value = i; slide.dispatchEvent(new Event('input')); seen.push(shown()); }
      const hash = location.hash;
      holder.querySelector('button[aria-label="previous example"]').click();
      const back = Number(slide.value);
      search.value = inOrder[2]; search.dispatchEvent(new Event('input'));
      return {inOrder, seen, hash, back, max: Number(slide.max), disabled: slide.disabled};
    """
    opened = open_page(with_script(pages["trace"], tmp_path, script), tmp_path)
    got = answer(opened)
    assert len(got["seen"]) == 6 and got["seen"] == got["inOrder"]
    assert got["back"] == 5 and f"run0.ex={got['inOrder'][5].replace(':', '%3A')}" in got["hash"]
    assert got["max"] == 1 and got["disabled"] and not opened.console


def test_a_cell_opens_its_examples_and_the_address_keeps_them(pages, runs, tmp_path):
    """Click a cell: examples are sorted by their effect there; the same address opens the same example and cell."""
    script = """
      const cell = [...document.querySelectorAll('[data-average] .grid td')].find(td => td.dataset.at === '4,3');
      cell.click();
      const holder = document.querySelector('[data-examples]');
      const which = holder.querySelector('select.which');
      const order = [...which.options].map(o => DATA.runs[0].examples.list[Number(o.value)].id);
      holder.querySelector('button[aria-label="next example"]').click();
      return {order, sorted: holder.querySelector('.sorted code').textContent, hash: location.hash, second: which.selectedIndex};
    """
    got = answer(open_page(with_script(pages["trace"], tmp_path, script), tmp_path))
    table = pd.read_parquet(runs["trace"] / "effects.parquet")
    cell = re.match(r"L(\d+)\.resid_post@(.+)", got["sorted"])
    here = table[
        (table["kind"] == "resid_post")
        & (table["layer"] == int(cell[1]))
        & (table["role"] == cell[2])
    ]
    size = here.groupby("example_id")["effect"].mean()
    in_order = size[got["order"]].to_numpy()
    assert len(in_order) == 6 and (np.diff(in_order) <= table["effect"].abs().max() / 100).all(), (
        "largest first, to a byte"
    )
    assert (
        got["second"] == 1
        and "run0.cell=" in got["hash"]
        and f"run0.ex={got['order'][1].replace(':', '%3A')}" in got["hash"]
    )
    again = """
      const holder = document.querySelector('[data-examples]');
      return [holder.querySelector('.sorted code').textContent, holder.querySelector('.example').textContent.includes(ID)];
    """.replace("ID", json.dumps(got["order"][1]))
    back = open_page(with_script(pages["trace"], tmp_path, again), tmp_path, "?all" + got["hash"])
    assert answer(back) == [got["sorted"], True]


@pytest.mark.slow
def test_fixed_and_broken_rows_are_those_of_the_table(pages, runs, tmp_path):
    script = """
      const holder = document.querySelector('[data-predictions]'), show = holder.querySelector('select[aria-label="which rows"]');
      const ids = () => [...holder.querySelectorAll('.answers tbody tr')].map(r => r.querySelector('.soft').textContent.split(' · ')[0]);
      const result = {};
      for (const name of ['wrong', 'fixed', 'broken', 'onlywrong']) { show.value = name; show.dispatchEvent(new Event('input')); result[name] = ids(); }
      return {...result, hash: location.hash};
    """
    got = answer(open_page(with_script(pages["evaluate"], tmp_path, script), tmp_path))
    table = pd.read_parquet(runs["evaluate"] / "predictions.parquet")
    right = table.pivot(index="id", columns="system", values="correct").astype(bool)
    assert set(got["fixed"]) == set(right.index[~right["base"] & right["paper"]])
    assert set(got["broken"]) == set(right.index[right["base"] & ~right["paper"]])
    wrong = set(right.index[~right["paper"]])
    assert set(got["onlywrong"]) == wrong and set(got["wrong"][: len(wrong)]) == wrong, (
        "wrong ones first"
    )
    assert "run0.show=onlywrong" in got["hash"]


@pytest.mark.slow
def test_the_difference_map_subtracts_the_averages_of_two_runs(pages, runs, tmp_path):
    script = """
      const map = [...document.querySelectorAll('[data-compare] .map')].pop(), td = map.querySelector('td[data-at="0,2"]');
      td.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));
      return {title: map.querySelector('h4').textContent, words: document.getElementById('tip').textContent};
    """
    got = answer(open_page(with_script(pages["comparison"], tmp_path, script), tmp_path))
    a, b = (pd.read_csv(runs[k] / "importance.csv") for k in ("trace", "trace2"))
    at = {"kind": "resid_post", "layer": 2, "role": "template"}
    x, y = (float(t[(t[list(at)] == pd.Series(at)).all(axis=1)]["aie"].iloc[0]) for t in (a, b))
    assert got["title"] == "trace − trace2" and got["words"].startswith("L2.resid_post@template")
    number = float(got["words"].split("\n")[1].split(" = ")[0].replace("−", "-"))
    assert number == pytest.approx(x - y, rel=1e-2)


@pytest.mark.slow
def test_downloads_hold_what_is_shown(pages, runs, tmp_path):
    """The CSV of a map is the table's rows; a text that a spreadsheet would run is quoted; the picture is a PNG."""
    script = """
      const made = [];
      URL.createObjectURL = blob => { made.push(blob); return '#'; };
      const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));  // at once, where the browser's own encoder takes its time
      HTMLCanvasElement.prototype.toBlob = function (done) { done(new Blob([bytes(this.toDataURL('image/png').split(',')[1])])); };
      const gets = document.querySelector('[data-average] .gets');
      gets.querySelectorAll('button').forEach(b => b.click());
      const head = [...new Uint8Array(await made[1].arrayBuffer()).slice(0, 8)];
      return {csv: await made[0].text(), head, formula: csvOf([['=1+1', '-2', '-x', 'a"b,c']])};
    """
    got = answer(open_page(with_script(pages["trace"], tmp_path, script), tmp_path))
    table = pd.read_csv(runs["trace"] / "importance.csv")
    own = table[table["kind"] == "resid_post"]
    lines = [line.split(",") for line in got["csv"].splitlines()]
    assert lines[0][:5] == ["kind", "layer", "head", "role", "aie"] and len(lines) == len(own) + 1
    kept = {(int(r[1]), r[3]): float(r[4]) for r in lines[1:]}
    for row in own.itertuples():
        assert kept[row.layer, row.role] == pytest.approx(row.aie, rel=1e-3)
    assert bytes(got["head"]) == b"\x89PNG\r\n\x1a\n"
    assert got["formula"] == '\'=1+1,-2,\'-x,"a""b,c"\n'


@pytest.mark.parametrize("theme", fast(("light", "dark"), ("dark",)))
def test_the_legend_has_the_colours_of_the_cells(pages, tmp_path, theme):
    """A cell of 0.29 and the legend at 0.29 of its half are one colour, on the screen."""
    from PIL import Image

    page = tmp_path / "legend.html"
    text = pages["trace"].read_text(encoding="utf-8")
    style = re.search(r"<style>.*?</style>", text, re.S)[0]
    values = (0.0, 0.29, 0.6, 0.97)
    cells = "".join(
        f'<td class="{look}" style="--v:{v};--w:60px;height:60px"></td>'
        for look in ("", "neg")
        for v in values
    )
    bar = '<i style="width:400px;height:40px;border-radius:0;box-shadow:none"></i>'
    at = "position:absolute;left:0;margin:0"
    page.write_text(
        f'<!doctype html><html data-theme="{theme}">{style}<body><div class="scale" style="{at};gap:0;top:0">{bar}</div>'
        f'<table class="grid" style="{at};top:60px"><tr>{cells}</tr></table>',
        encoding="utf-8",
    )
    picture = tmp_path / "legend.png"
    subprocess.run(
        [str(BROWSER), *FLAGS, "--window-size=800,300", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", f"file://{page}"],
        capture_output=True, timeout=240, check=True, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    image = Image.open(picture).convert("RGB")
    for i, value in enumerate((0.0, 0.29, 0.6, 0.97, 0.0, -0.29, -0.6, -0.97)):
        legend = image.getpixel((min(399, round(200 + 200 * value)), 20))
        cell = image.getpixel((1 + 61 * i + 30, 90))
        assert max(abs(a - b) for a, b in zip(legend, cell, strict=True)) <= 4, (
            value,
            legend,
            cell,
        )


def test_a_fresh_page_begins_at_its_top_and_jumps_end_below_the_bar(pages, tmp_path):
    """The title of a comparison takes two lines on a phone; the first lines once began behind the bar."""
    script = """
        await new Promise(done => addEventListener("load", () => setTimeout(done, 300)));
        const fresh = [scrollY, location.hash], bar = document.querySelector("header");
        const link = [...document.querySelectorAll('nav a')].at(-1);
        link.click();
        const section = document.querySelector(link.getAttribute("href"));
        return {fresh, above: section.getBoundingClientRect().top - bar.getBoundingClientRect().bottom,
                end: innerHeight + scrollY >= document.body.scrollHeight - 2};
    """
    page = with_script(pages["comparison"], tmp_path, script)
    got = answer(open_page(page, tmp_path, query="", size="400,900"))
    assert got["fresh"] == [0, ""]
    assert got["above"] >= 0 or got["end"], got


@pytest.mark.parametrize("kind", fast(("trace", "evaluate", "matrix", "comparison"), ("evaluate",)))
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
    assert wide <= room and grids == {"matrix": 0, "evaluate": 0, "trace": 4}.get(kind, 9)
