"""Who may use the explorer, and that what it sends are the numbers of `ma.trace`."""

from __future__ import annotations

import json
import re
import socket
import threading

import numpy as np
import pytest
from support import fast
from support.explorer import REVIEW

import mech_absa as ma
from mech_absa.errors import ConfigError
from mech_absa.explore import guard, live, server
from mech_absa.explore.session import Session

pytestmark = pytest.mark.timeout(900)  # a stream that never ends fails here
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 'food'"


# ---- who may use it -------------------------------------------------------------------------------


def test_the_token_opens_the_page(client):
    answer = client.request("GET", f"/?token={client.token}", headers={})
    page = answer.read().decode()
    assert answer.status == 200 and "<h1>Explorer: bundled</h1>" in page
    policy = answer.getheader("content-security-policy")
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)[1]
    assert page.count(f'nonce="{nonce}"') == page.count("<script") == 2
    assert policy.startswith("default-src 'none'") and "connect-src 'self'" in policy
    assert answer.getheader("referrer-policy") == "no-referrer"
    assert answer.getheader("cache-control") == "no-store"
    assert 'id="go" class="main" disabled' in page  # nothing is traced before the first answer
    assert not re.search(r"https?:(?!//(www\.w3\.org|127\.0\.0\.1))//", page)  # asks nobody else


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {}),
        ("/?token=wrong", {}),
        ("/?token=", {}),
        ("/?token=%C3%A4", {}),
        ("/", {"authorization": "Bearer wrong"}),
        ("/", {"authorization": "Basic TOKEN"}),
        ("/", {"cookie": "token=TOKEN"}),
        ("/api/look", {}),
    ],
)
def test_without_the_token_nothing_is_answered(client, path, headers):
    headers = {k: v.replace("TOKEN", client.token) for k, v in headers.items()}
    answer = client.request("GET", path, headers=headers)
    assert answer.status == 403
    text = answer.read().decode()
    assert "the token is missing or wrong" in text and client.token not in text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:PORT", "127.0.0.1:1", "0.0.0.0:PORT"]
)
def test_another_host_is_refused_even_with_the_token(client, host):
    headers = {"host": host.replace("PORT", str(client.port))}
    answer = client.request("GET", f"/?token={client.token}", headers=headers)
    assert answer.status == 421 and "does not answer as" in answer.read().decode()


def test_hosts():
    own = guard.allowed_hosts("127.0.0.1", 80)
    assert own("127.0.0.1:80") and own("localhost:80") and not own("10.0.0.1:80") and not own("")
    everywhere = guard.allowed_hosts("0.0.0.0", 80)
    assert everywhere("10.0.0.1:80") and everywhere("[::1]:80")
    assert not everywhere("evil.example:80") and not everywhere("10.0.0.1:81")


def test_large_and_damaged_messages_are_refused(client):
    for body, status, sentence in (
        ("{", 400, "the message is no JSON object"),
        ("[1]", 400, "the message is no JSON object"),
        ('{"client": "a"}', 400, "the message is no JSON object"),
        ('{"client": "", "state": {}}', 400, "1 to 64 characters"),
        ('{"client": "a", "state": [1]}', 400, "the state of a message is an object"),
        ('{"client": "a", "state": {"draws": 0}}', 400, "draws is 0; accepted: 1 to 50"),
        ('{"client": "a", "state": "draws=x"}', 400, "draws is 'x'"),
    ):
        answer = client.request("POST", "/api/look", body)
        told = json.loads(answer.read())
        assert answer.status == status and sentence in told["error"]
    headers = {"authorization": f"Bearer {client.token}"}
    for size in (str(guard.MOST_BYTES + 1), "-1", "many"):  # said before a byte of it is sent
        answer = client.request("POST", "/api/look", None, headers | {"content-length": size})
        assert answer.status in (400, 413)


# ---- what it answers --------------------------------------------------------------------------------


def test_text_of_the_user_stays_text(model, browser):
    """Reviews stand in the page as data, and no character of them ends the script that holds them."""
    examples = ma.Examples((ma.Example(NASTY, "food", ma.Polarity.NEUTRAL, (68, 72)),))
    explorer = ma.explore(model, examples, examples)
    try:
        client = browser(explorer.url)
        page = client.request("GET", "/").read().decode()
        assert page.count("<script") == 2 and "<img" not in page
        data = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1]
        assert json.loads(data)["reviews"][0]["sentence"] == NASTY
        status, seen = client.ask("/api/look", {"sentence": NASTY, "aspect": "food"})
        assert status == 200 and "".join(seen["tokens"]).count("onerror") == 1
    finally:
        explorer.close()


def test_labels_at_once(client, model):
    status, seen = client.ask("/api/look")
    assert status == 200 and seen["problem"] == ""
    example = ma.Example(REVIEW["sentence"], "food", ma.Polarity.NEUTRAL, (4, 8))
    answers = ma.predict(model, ma.Examples((example,)))
    expected = np.exp(answers.scores[0])
    np.testing.assert_allclose(seen["clean"], expected, rtol=1e-4)
    labels = ["positive", "negative", "neutral"]
    assert seen["gold"] == labels[int(np.argmax(expected))]
    assert seen["foil"] != seen["gold"] and seen["tokens"][seen["first"]].strip() == "great"


def test_texts_that_do_not_line_up_are_shown_and_named(client):
    state = REVIEW | {"edited": "The food was great and very cheap but the waiter was rude."}
    status, seen = client.ask("/api/look", state)
    assert status == 200 and seen["corrupted"] is None
    n, m = len(seen["other"]), len(seen["tokens"])
    assert seen["problem"].startswith(f"the corrupted run has {n} tokens and the clean run {m}")
    for change, sentence in (
        ({"edited": REVIEW["sentence"]}, "both runs read the same text"),
        ({"edited": "The soup was awful."}, "the aspect 'food' is not in the text"),
        ({"corruption": "swap"}, "no other aspect is given"),
        ({"corruption": "swap", "other": "food"}, "both runs ask about 'food'"),
        ({"gold": "negative", "foil": "negative"}, "both runs are to answer negative"),
    ):
        status, seen = client.ask("/api/look", REVIEW | change)
        assert status == 200 and seen["problem"].startswith(sentence)
    assert client.ask("/api/look", {"sentence": "Fine."}) == (
        400, {"error": "no aspect is marked; type words of the review, such as food"},
    )  # fmt: skip


def test_an_aspect_moves_with_the_words_before_it(client):
    state = {
        "sentence": "Nice place , good food .", "aspect": "food", "start": 18,
        "edited": "Poor place , awful food .",
    }  # fmt: skip
    status, seen = client.ask("/api/look", state)
    assert status == 200 and (seen["problem"] == "" or "tokens" in seen["problem"])


def cells_of(events):
    """Return (direction, kind, layer, head, position) -> effect and label probabilities."""
    told, cells = dict(events[:1]), {}
    components = told["start"]["components"]
    for name, data in events:
        if name == "cells":
            for c, at, effect, *p in data["cells"]:
                key = (data["direction"], *components[c], at)
                assert key not in cells
                cells[key] = (effect, p)
    return cells


CHANGES = {
    "edit": {},
    "noise": {"direction": "both", "corruption": "noise", "draws": 2, "span": "aspect", "kinds": "head,resid_post"},
    "swap": {"corruption": "swap", "aspect": "great", "other": "rude", "metric": "logit_diff"},
}  # fmt: skip


@pytest.mark.parametrize("name", fast(CHANGES, {"edit"}))
@pytest.mark.slow
def test_the_numbers_are_those_of_trace(client, model, name):
    change = CHANGES[name]
    state = REVIEW | {"kinds": "resid_post,mlp_out"} | change
    _, seen = client.ask("/api/look", state)
    if seen["problem"]:
        pytest.fail(seen["problem"])
    events = list(client.follow("/api/trace", state))
    assert events[0][0] == "start" and [name for name, _ in events[-2:]] == ["done", "end"]
    cells = cells_of(events)
    span = (state["sentence"].index(state["aspect"]), len(state["aspect"]))
    span = (span[0], sum(span))
    polarity = ma.Polarity.parse
    held = (state["sentence"], state["aspect"], polarity(seen["gold"]), span)
    if state.get("corruption") == "noise":
        examples = [ma.Example(*held, id="review")]
        corruption = ma.GaussianNoise(3.0, 2, "aspect")
    elif state.get("corruption") == "swap":
        at = state["sentence"].index(state["other"])
        other = ma.Example(state["sentence"], state["other"], polarity(seen["foil"]), (at, at + len(state["other"])), id="b")  # fmt: skip
        examples, corruption = [ma.Example(*held, id="review"), other], ma.AspectSwap()
    else:
        other = ma.Example(state["edited"], "food", polarity(seen["foil"]), span)
        examples, corruption = [ma.Example(*held, id="review", counterfactuals=(other,))], ma.Counterfactual()  # fmt: skip
    pairs = ma.make_pairs(model, examples, corruption, keep="all", limit=1)
    direction, metric = state.get("direction", "denoise"), state.get("metric", "prob")
    effects = ma.trace(model, pairs, state["kinds"].split(","), direction=direction, metric=metric)
    frame = effects.frame.fillna({"head": -1, "position": -1})  # the page has -1 for none
    if "direction" not in frame:
        frame = frame.assign(direction=direction)
    keys = list(frame[["direction", "kind", "layer", "head", "position"]].itertuples(index=False, name=None))  # fmt: skip
    assert set(keys) == set(cells) and len(keys) == len(cells)
    theirs = frame["effect"].to_numpy()
    np.testing.assert_allclose([cells[k][0] for k in keys], theirs, rtol=1e-4, atol=2e-5)
    assert np.abs(theirs).max() > 0.01
    if metric == "prob":  # the label probabilities of a cell are those that its effect is made of
        gold = ["positive", "negative", "neutral"].index(seen["gold"])
        base = {data["direction"]: data["p"][gold] for name, data in events if name == "base"}
        sign = {"denoise": 1, "noise": -1}
        for key, (effect, p) in cells.items():
            assert effect == pytest.approx(sign[key[0]] * (p[gold] - base[key[0]]), abs=2e-5)


def test_a_map_fills_in(client):
    parts = [d for name, d in client.follow("/api/trace") if name == "cells"]
    assert [d["done"] for d in parts] == sorted(d["done"] for d in parts)
    assert parts[-1]["done"] == parts[-1]["total"] == sum(len(d["cells"]) for d in parts)


def test_a_refused_trace_ends_with_its_sentence(client):
    events = list(client.follow("/api/trace", REVIEW | {"edited": ""}))
    assert [name for name, _ in events] == ["error", "end"]
    assert events[0][1]["sentence"].startswith("both runs read the same text")


# ---- turns, and browsers that go ----------------------------------------------------------------------


@pytest.fixture
def held_up(monkeypatch):
    """Hold every sweep at its first cells until it is let go on; nothing here waits for a clock."""
    gate, reached = threading.Event(), threading.Event()
    take = live.Board.seen

    def slow(self, part):
        reached.set()
        while not gate.is_set():
            self.breathe()
            threading.Event().wait(0.002)
        take(self, part)

    monkeypatch.setattr(live.Board, "seen", slow)
    yield gate, reached
    gate.set()


def test_a_closed_browser_frees_the_sweep_and_the_next_gets_its_turn(explorer, browser, held_up):
    gate, reached = held_up
    first, second = browser(explorer.url, "first"), browser(explorer.url, "second")
    events = first.follow("/api/trace")
    assert next(events)[0] == "start" and reached.wait(60)
    status, seen = browser(explorer.url, "third").ask("/api/look")
    assert status == 200 and seen["clean"]  # short questions do not wait for the sweep
    others = second.follow("/api/trace")
    assert next(others) == ("waiting", {"ahead": 1})
    job = explorer.session.running
    first.leave()
    assert next(others)[0] == "start"  # only once the first sweep has ended
    assert job.stopped and explorer.session.running is not job
    gate.set()
    assert [name for name, _ in others][-2:] == ["done", "end"]


def test_a_new_sweep_of_a_browser_takes_the_place_of_its_old_one(explorer, browser, held_up):
    gate, reached = held_up
    old = browser(explorer.url, "same").follow("/api/trace")
    assert next(old)[0] == "start" and reached.wait(60)
    new = browser(explorer.url, "same").follow("/api/trace")
    assert next(new)[0] in ("waiting", "start")
    names = [name for name, _ in old]
    assert names[-2:] == ["stopped", "end"]
    gate.set()
    assert "done" in [name for name, _ in new]


def test_closing_ends_streams_and_the_thread(model, browser, held_up):
    _, reached = held_up
    explorer = ma.explore(model)
    events = browser(explorer.url).follow("/api/trace")
    assert next(events)[0] == "start" and reached.wait(60)
    explorer.close()
    assert [name for name, _ in events][-1] == "end"
    assert not explorer.session._thread.is_alive() and not explorer._thread.is_alive()


# ---- in Python ----------------------------------------------------------------------------------------


def test_a_notebook_shows_it_in_a_frame(explorer, browser):
    html = explorer._repr_html_()
    assert f'<iframe src="{explorer.url}"' in html and "127.0.0.1" in repr(explorer)
    policy = browser(explorer.url).request("GET", "/").getheader("content-security-policy")
    assert "frame-ancestors http://localhost:*" in policy


def test_wrong_arguments_are_refused(model, explorer):
    with pytest.raises((ConfigError, TypeError)):  # types are checked in every call while tests run
        ma.explore("gpt2")
    with pytest.raises(ConfigError, match=r"cannot listen at 127.0.0.1:\d+ \(.*in use"):
        server._listen("127.0.0.1", explorer.port)
    with pytest.raises(ConfigError, match=r"cannot listen at no\.such\.host:0"):
        server._listen("no.such.host", 0)
    assert isinstance(explorer.session, Session)


def test_an_address_that_is_opened_at_once_waits_and_is_not_refused():
    """The command prints its address before the server is up."""
    with server._listen("127.0.0.1", 0) as waiting:
        address = waiting.getsockname()
        with socket.create_connection(address, timeout=60) as early:
            assert early.getpeername() == address
