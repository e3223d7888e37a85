"""The explorer's state: a link opens what it was made from, and nothing else passes."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mech_absa.errors import ConfigError, SiteError
from mech_absa.explore.state import KINDS, METRIC_WORDS, State, place

POLARITIES = ["auto", "positive", "negative", "neutral"]
FIELDS = dict(
    sentence=st.text(max_size=60),
    aspect=st.text(max_size=20),
    start=st.integers(-1, 60),
    gold=st.sampled_from(POLARITIES),
    corruption=st.sampled_from(["edit", "swap", "noise"]),
    edited=st.text(max_size=60),
    other=st.text(max_size=20),
    foil=st.sampled_from(POLARITIES),
    scale=st.floats(0, 1000),
    draws=st.integers(1, 50),
    span=st.sampled_from(["all", "sentence", "aspect", "query"]),
    seed=st.integers(0, 2**32 - 1),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, unique=True).map(tuple),
    metric=st.sampled_from(METRIC_WORDS),
    direction=st.sampled_from(["denoise", "noise", "both"]),
    sites=st.lists(st.sampled_from(["L1.resid_post@query.last", "L2.head3@answer"])).map(tuple),
    epochs=st.integers(1, 50),
    examples=st.integers(8, 5000),
    cell=st.sampled_from(["", "L3.resid_post@12", "L0.head3@0"]),
    layer=st.integers(-1, 40),
)


@settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # a slow machine is no wrong answer
@given(st.fixed_dictionaries(FIELDS))
def test_a_link_opens_the_state_it_was_made_from(fields):
    state = State(**fields)
    assert State.from_link(state.link()) == state
    assert State.of(dataclasses.asdict(state)) == state


def test_a_link_says_only_what_differs():
    assert State().link() == ""
    assert State("good & cheap = fine", "fine").link() == (
        "sentence=good+%26+cheap+%3D+fine&aspect=fine"
    )
    assert State.from_link("kinds=head,mlp_out&draws=3").kinds == ("head", "mlp_out")


@pytest.mark.parametrize(
    ("link", "sentence"),
    [
        ("colour=red", "'colour' is no part of a state; accepted: sentence, aspect"),
        ("draws=3&draws=4", "the link gives a name twice"),
        ("draws", "holds no state of the explorer"),
        ("&".join(f"a{i}=1" for i in range(70)), "holds no state"),
        ("draws=many", "draws is 'many'; accepted: a whole number"),
        ("draws=0", "draws is 0; accepted: 1 to 50"),
        ("draws=1e3", "draws is '1e3'; accepted: a whole number"),
        ("scale=nan", "scale is nan; accepted: 0 to 1000"),
        ("scale=inf", "scale is inf"),
        ("kinds=head,tail", "kinds holds 'tail'; accepted: resid_pre"),
        ("kinds=", "kinds is empty"),
        ("metric=kl", "metric is 'kl'; accepted: prob,"),
        ("gold=happy", "gold is 'happy'; accepted: auto, positive"),
        ("corruption=zero", "unknown corruption 'zero'; accepted: edit, swap or noise"),
        ("direction=up", "unknown direction 'up'"),
        ("sentence=" + "x" * 4001, "sentence has 4,001 characters; at most 4,000"),
        ("sites=" + ",".join(["L1.mlp_out"] * 65), "65 sites were given; at most 64"),
    ],
)
def test_a_bad_link_is_refused_in_a_sentence(link, sentence):
    with pytest.raises(ConfigError) as caught:
        State.from_link(link)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cell", "sites"])
def test_sites_of_a_link_are_parsed(name):
    with pytest.raises(SiteError, match="'<script>' is no site"):
        State.of({name: "<script>"})


@pytest.mark.parametrize("value", [True, None, [1], {"a": 1}, 1.5])
def test_json_of_another_type_is_refused(value):
    with pytest.raises(ConfigError, match=r"draws is .*; accepted: a whole number"):
        State.of({"draws": value})
    with pytest.raises(ConfigError, match=r"sentence is .*; accepted: text"):
        State.of({"sentence": 5})
    with pytest.raises(ConfigError, match=r"kinds is .*; accepted: a list of words"):
        State.of({"kinds": [1]})


def test_the_aspect_is_found_where_it_stands():
    text = "food, and more food"
    assert [place(text, "food", at) for at in (-1, 0, 7, 8, 15, 400)] == [
        (0, 4), (0, 4), (0, 4), (15, 19), (15, 19), (15, 19),
    ]  # fmt: skip
    assert State(text, "food", 15).at == (15, 19)
    for state, sentence in (
        (State(), "there is no review yet"),
        (State(text), "no aspect is marked"),
        (State(text, "wine"), "the aspect 'wine' is not in the text"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            _ = state.at
