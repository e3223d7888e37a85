"""Widgets hold everything they need, show what they were given, and leave no hook behind."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.tiny_models import tiny_folder

from mech_absa.errors import ConfigError, DataError, SiteError
from mech_absa.examples import Example, Polarity
from mech_absa.model import load_model
from mech_absa.model.hooks import live_hooks
from mech_absa.patch.effects import COLUMNS, Effects
from mech_absa.scoring import question
from mech_absa.widgets import (
    NEGATIVE,
    POSITIVE,
    attention,
    coloured_tokens,
    patterns,
    without_script,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """CircuitsVis asks the internet whether it is there; here nobody may ask."""

    def refuse(*_):
        raise AssertionError("a widget asked for the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def given(widget) -> dict:
    """What the script is called with."""
    call = widget._repr_html_().rpartition("CircuitsVis.render(")[2]
    return json.loads(re.search(r"\{.*\}", call, re.S)[0])


def test_tokens_and_values_arrive():
    drawn = given(coloured_tokens(["The", " food"], [0.5, -2]))
    assert drawn["tokens"] == ["The", " food"] and drawn["values"] == [0.5, -2.0]
    assert (drawn["minValue"], drawn["maxValue"]) == (-2.0, 2.0), "a scale symmetric about 0"
    assert given(coloured_tokens(["a"], np.array([np.nan])))["values"] == [0.0]


def test_a_token_cannot_end_the_script():
    nasty = ["</script><script>alert(1)</script>", "<!--", 'circuits-vis-"']
    html = coloured_tokens(nasty, [1, 2, 3])._repr_html_()
    assert [unescape(t) for t in given(coloured_tokens(nasty, [1, 2, 3]))["tokens"]] == nasty
    assert html.count("</script>") == 1 and "<!--" not in html.rpartition("CircuitsVis.render(")[2]


def test_a_widget_is_the_same_every_time_and_needs_nothing():
    first, second = (coloured_tokens(["a", "b"], [1, 2])._repr_html_() for _ in range(2))
    assert first == second
    assert coloured_tokens(["a", "b"], [1, 3])._repr_html_() != first
    name = re.search(r'<div id="([^"]+)"', first)[1]
    assert first.count(f'"{name}"') == 2, "the place, and the call that fills it"
    assert (
        "import {" not in first
        and " src=" not in first.partition("<script")[0]
        and "unpkg.com" not in first
    )


def effects_of(by: str):
    """One prompt of three tokens: 0.4 and -0.2 in two layers at `food`, 0.1 at the others."""
    tokens, roles = ["<b>", " food", " ?"], ["template", "aspect.last", "template"]
    places = (
        [(-1, r) for r in ("template", "aspect.last")] if by == "role" else list(enumerate(roles))
    )
    rows = [
        ("e", "resid_post", layer, -1, at, role, 0.9, 0.1, 0.0, (0.4, -0.2)[layer] if role == "aspect.last" else 0.1, 0.0)
        for at, role in places
        for layer in (0, 1)
    ]  # fmt: skip
    pairs = {
        "example_id": ["e"], "sentence": ["s"], "aspect": ["<food>"], "polarity": ["positive"], "tokens": [tokens],
        "roles": [roles], "clean": [0.9], "corrupted": [0.1],
    }  # fmt: skip
    about = {"unit": "probability of the gold label", "by": by}
    return Effects(pd.DataFrame(rows, columns=list(COLUMNS)), pd.DataFrame(pairs), about)


@pytest.mark.parametrize("by", ["token", "role"])
def test_a_prompts_effects_have_a_title_a_scale_and_a_caption(by):
    html = without_script(effects_of(by).show("e").html)
    assert "&lt;food&gt;: positive" in html and "clean run 0.9, corrupted run 0.1" in html
    assert "-0.4 <span" in html and "0.4 probability of the gold label" in html
    titles = re.findall(r'title="([^"]*)"', html)
    assert titles == ["0.1", "0.4", "0.1"], "the largest effect over layers of every token"
    shared = "all tokens of a role were restored together"
    assert (shared in html) == (by == "role")
    if by == "role":
        cells = re.findall(r"<tr><td>(.*?)</td><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td></tr>", html)
        assert cells == [("template", "2", "0.1000"), ("aspect.last", "1", "0.4000")]


def test_a_kind_that_was_not_traced_is_refused():
    with pytest.raises(
        DataError, match=r"no effects of kind 'mlp_out'; it was traced at resid_post"
    ):
        effects_of("token").show("e", "mlp_out")


def test_tokens_without_values_are_refused():
    with pytest.raises(ConfigError, match="2 tokens"):
        coloured_tokens(["a", "b"], [1.0])


def test_attention_is_the_pattern_of_the_model():
    model = load_model(str(tiny_folder("gpt2")))
    example = Example("the food was great", "food", Polarity.POSITIVE, (4, 8))
    drawn = given(attention(model, example, layer=1))
    ids = question(model, example).ids
    _, cache = model.hooked.run_with_cache(ids)
    np.testing.assert_allclose(drawn["attention"], cache["pattern", 1][0].numpy(), atol=1e-4)
    assert (
        "".join(drawn["tokens"]).startswith("Given the sentence")
        and len(drawn["tokens"]) == ids.shape[1]
    )
    assert drawn["attentionHeadNames"][0] == "L1H0"
    assert not live_hooks(model.hooked)
    with pytest.raises(SiteError, match="layer 99"):
        attention(model, example, layer=99)


class Still(HTMLParser):
    """What shows of a widget where no script runs."""

    def __init__(self, html: str):
        super().__init__()
        self.spans: list[tuple[str, str]] = []
        self.images: list[bytes] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.add(tag)
        if tag == "span":
            self.spans.append((re.search(r"background:(#\w{6})", given["style"])[1], ""))
        if tag == "img":
            self.images.append(
                base64.b64decode(given["src"].removeprefix("data:image/png;base64,"))
            )

    def handle_data(self, data):
        if self.spans and not self.spans[-1][1]:
            self.spans[-1] = (self.spans[-1][0], data)


def test_without_its_script_a_prompt_still_has_its_colours():
    nasty = "</div><script>alert(1)</script>&amp;"
    whole = coloured_tokens(["up", nasty, "none", " half"], [2.0, -2.0, 0.0, 1.0]).html
    still = without_script(whole)
    shown = Still(still)
    assert "script" not in shown.tags and len(still) < 2000 < len(whole)
    assert [text for _, text in shown.spans] == ["up", nasty, "none", " half"]
    half = "#" + "".join(
        f"{round((255 + int(POSITIVE[i : i + 2], 16)) / 2):02x}" for i in (1, 3, 5)
    )
    assert [colour for colour, _ in shown.spans] == [POSITIVE, NEGATIVE, "#ffffff", half]


def test_without_its_script_attention_is_a_picture_a_head():
    import io

    from matplotlib.image import imread

    model = load_model(str(tiny_folder("gpt2")))
    example = Example("the food was great", "food", Polarity.POSITIVE, (4, 8))
    texts, pattern = patterns(model, example, 1)
    shown = Still(without_script(attention(model, example, 1).html))
    assert "script" not in shown.tags and len(shown.images) == len(pattern) == model.n_heads
    for png, head in zip(shown.images, pattern, strict=True):
        grey = imread(io.BytesIO(png))[..., :3].sum(-1)
        assert grey.shape == head.shape == (len(texts), len(texts))
        above = np.triu(np.ones_like(head), 1) > 0
        assert (grey[above] == grey.max()).all(), "no token reads what comes after it"
        assert grey[~above][head[~above].argmax()] == grey.min(), (
            "the strongest link is the darkest pixel"
        )


def test_html_of_others_is_left_alone():
    assert without_script("<p>a</p><script>1</script>") == "<p>a</p><script>1</script>"


def drawn_by_a_browser(html: str, folder: Path) -> str:
    """The page as it stands after its scripts have run."""
    browser = next(
        (b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None
    )
    if browser is None:
        pytest.skip("no Chromium is installed: what a script makes of a token cannot be seen")
    page = folder / "widget.html"
    page.write_text(f"<meta charset=utf-8><body>{html}", encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=3000",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'id="circuits-vis-.*?(?=<script)', done.stdout, re.S)
    assert found, done.stderr[-500:]
    return found[0]


def test_drawn_by_its_script_a_token_is_text_and_the_still_picture_is_gone(tmp_path):
    tag = "<img\tsrc=x>"
    dom = drawn_by_a_browser(
        coloured_tokens([tag, " a&amp;b <b>c</b>"], [1.0, -1.0]).html, tmp_path
    )
    assert "colored-tokens" in dom and "pre-wrap" not in dom
    assert "<img" not in dom and "<b>" not in dom
    assert "&lt;img" in dom and escape("a&amp;b", quote=False) in dom
