"""The command and the Python code of a map give the map again; the rule and an edit are those of the commands."""

from __future__ import annotations

import shlex

import numpy as np
import pandas as pd
import pytest
from support import fast
from support.explorer import REVIEW

import mech_absa as ma
from mech_absa.__main__ import main
from mech_absa.errors import ConfigError
from mech_absa.explore import edits
from mech_absa.explore.again import recipe
from mech_absa.explore.ask import Question, pairs_of
from mech_absa.explore.live import sweep
from mech_absa.explore.state import State

STATES = {
    "edit": State(**REVIEW, kinds=("mlp_out",)),
    "swap": State("The food was great but the waiter was rude.", "great", corruption="swap", other="rude", kinds=("mlp_out",)),
    "noise": State("It's \"fine\" food.", "food", corruption="noise", draws=2, seed=5, span="query", kinds=("mlp_out",), direction="both"),
}  # fmt: skip


@pytest.fixture(scope="module")
def question(model):
    return Question(model, ma.PromptTemplate(), ma.Verbalizer())


def nothing(*_):
    """Take an event, or a breath, and do nothing."""


@pytest.fixture(scope="module")
def traced(question):
    """Name of a state -> its effects, as the page gets them."""
    return {
        name: sweep(question.model, pairs_of(question, state), state, nothing, nothing)
        for name, state in STATES.items()
    }


@pytest.mark.parametrize("name", fast(STATES, {"swap"}))
@pytest.mark.slow
def test_the_python_code_gives_the_map_again(question, traced, name):
    code = recipe(question, STATES[name], [], "builtin:restaurant/train")["python"]
    space: dict = {}
    exec(compile(code, "again", "exec"), space)
    mine, again = traced[name].frame, space["effects"].frame
    keys = ["kind", "layer", "position", "role"]
    assert again[keys].equals(mine[keys])
    np.testing.assert_allclose(again["effect"], mine["effect"], atol=2e-6)
    assert mine["effect"].abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", STATES)
def test_the_command_gives_the_map_again(question, traced, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = recipe(question, STATES[name], ["--adapter=none"], "builtin:restaurant/train")
    (tmp_path / told["file"]).write_text(told["data"], encoding="utf-8")
    program, *words = shlex.split(told["command"])
    assert program == "mech-absa"
    assert main([*words, "--out", "run", "--no-report", "--no-figures", "--quiet"]) == 0
    again = pd.read_parquet("run/effects.parquet")
    np.testing.assert_allclose(again["effect"], traced[name].frame["effect"], atol=2e-6)


@pytest.mark.slow
def test_the_training_has_a_command(question):
    state = State(**REVIEW, sites=("L3.resid_post@query.last",), epochs=2, examples=64)
    told = recipe(question, state, ["--adapter=none", "--dtype", "float64"], "builtin:laptop/train")
    assert told["train"] == (
        "mech-absa train --data builtin:laptop/train --limit 64 --epochs 2 --validation 0 "
        "--dtype float64 --sites L3.resid_post@query.last"
    )
    assert recipe(question, STATES["edit"], ["--adapter=none"], "x")["train"] is None


# ---- sites and edits ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train():
    return ma.load_examples("builtin:restaurant/train")


@pytest.mark.slow
def test_an_edit_is_that_of_fit_and_is_told_step_by_step(question, train):
    events = []
    state = State(**REVIEW, sites=("L3.resid_post@query.last",), epochs=1, examples=48)
    held = ma.load_examples("builtin:restaurant/test")
    trained = edits.train_edit(
        question, state, train, held, lambda name, data: events.append((name, data)), nothing
    )
    preset = ma.presets.bundled("L3.resid_post@query.last", epochs=1)
    same = ma.fit(question.model, train.sample(48), preset)
    for mine, theirs in zip(trained.edit.parameters(), same.parameters(), strict=True):
        assert mine.equal(theirs)
    names = [name for name, _ in events]
    assert names == ["plan", "step", "step", "step", "tested"] and events[0][1]["steps"] == 3
    losses = [data["loss"] for name, data in events if name == "step"]
    assert losses == pytest.approx([row["loss"] for row in same.history], rel=1e-3)
    tested = events[-1][1]
    for name, edit in (("base", None), ("edited", same)):
        answers = ma.predict(question.model, held.sample(edits.TESTED), edit)
        assert tested["right"][name] == int(answers.correct.sum())


def test_reviews_that_were_trained_on_are_not_tested_on(question, train):
    edit = ma.fit(
        question.model, train[:16], ma.presets.bundled("L3.resid_post@query.last", epochs=1)
    )
    found = edits.compared(question, edit, train[:16], train[8:24])
    assert found["n"] == 8 and found["left_out"] == 8


def test_an_edit_without_sites_is_refused(question, train):
    with pytest.raises(ConfigError, match="no sites are chosen"):
        edits.train_edit(question, State(**REVIEW), train, train, nothing, nothing)


def test_a_stopped_training_leaves_no_edit(question, train):
    class Enough(Exception):
        pass

    def breathe():
        raise Enough

    state = State(**REVIEW, sites=("L3.resid_post@query.last",), epochs=1, examples=48)
    events = []
    with pytest.raises(Enough):
        edits.train_edit(question, state, train, train, lambda *e: events.append(e[0]), breathe)
    assert events == ["plan", "step"]


@pytest.mark.slow
def test_the_rule_is_that_of_select(question, train):
    events = []
    sites = edits.by_rule(question, train, lambda *e: events.append(e), nothing)
    pairs = edits._pairs_for_rule(question, train)
    effects = ma.trace(question.model, pairs, ["resid_post"], by="role", check=False)
    selection = effects.importance().select()
    name, told = events[-1]
    assert name == "chosen" and sites == selection.sites and told["rule"] == selection.rule
    assert told["sites"] == [str(s) for s in sites] and told["clear"] == selection.clear
    assert not any("control" in s for s in told["sites"])
