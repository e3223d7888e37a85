"""Baselines: worked by hand on single sentences, and their scores on the built-in worlds."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mech_absa.errors import ConfigError
from mech_absa.evaluate import baselines as b
from mech_absa.examples import Example, Polarity
from mech_absa.readers import load_examples

POS, NEG, NEU = Polarity.POSITIVE, Polarity.NEGATIVE, Polarity.NEUTRAL


def example(sentence: str, aspect: str, polarity: Polarity, opinion: str = "") -> Example:
    at = sentence.index(aspect)
    said = (sentence.index(opinion), sentence.index(opinion) + len(opinion)) if opinion else None
    return Example(sentence, aspect, polarity, (at, at + len(aspect)), said)


TRAIN = [
    example("the tea was good", "tea", POS, "good"),
    example("the tea was not good", "tea", NEG, "not good"),
    example("the cup was bad", "cup", NEG, "bad"),
    example("the cup was bad , long ago", "cup", NEG, "long"),
    example("the road is long", "road", POS, "long"),
    example("the tea is long", "tea", NEG, "long"),
]


def test_the_lexicon_holds_each_expression_with_its_usual_polarity():
    assert b.opinion_lexicon(TRAIN) == {
        ("good",): POS,
        ("not", "good"): NEG,
        ("bad",): NEG,
        ("long",): NEG,  # twice negative, once positive
    }


@pytest.mark.parametrize(
    ("sentence", "aspect", "near", "in_clause"),
    [
        ("the tea was good", "tea", POS, POS),
        ("the tea was not good", "tea", NEG, NEG),  # the longer expression
        ("good tea and bad cups", "tea", POS, POS),
        ("bad tea good", "tea", POS, POS),  # equally near: the one that follows
        ("the good , bad road of the tea", "tea", NEG, NEG),
        # Two words lie between "bad" and tea, three between tea and "good", which is in the clause.
        ("bad , the tea really was so good", "tea", NEG, POS),
        ("the tea", "tea", NEG, NEG),  # no expression: the majority of train
        ("the goodness of tea", "tea", NEG, NEG),  # whole words only
    ],
)
def test_the_nearest_expression_answers(sentence, aspect, near, in_clause):
    test = [example(sentence, aspect, POS)]
    assert b.nearest_opinion(TRAIN, test).answers == (near,)
    assert b.nearest_opinion(TRAIN, test, in_clause=True).answers == (in_clause,)


def test_majority_is_that_of_train_and_not_of_test():
    test = [example("the tea was good", "tea", POS)] * 3
    answers = b.majority(TRAIN, test)
    assert answers.answers == (NEG,) * 3 and not answers.correct.any()


def test_the_regression_learns_a_word_at_a_fixed_place_and_only_there():
    # The word right after the aspect decides; every sentence holds both words.
    words = {POS: ("fine", "poor"), NEG: ("poor", "fine")}
    train = [
        example(f"{d} {n} {p[0]} with {p[1]}", n, polarity)
        for n in ("tea", "cup", "lid", "jar", "pot", "mug", "tin", "bowl")
        for d in ("the", "one", "my")
        for polarity, p in words.items()
    ]
    test = [
        example("your pan fine with poor", "pan", POS),
        example("your pan poor with fine", "pan", NEG),
    ]
    assert b.words_around(train, test).answers == (POS, NEG)


def test_train_of_one_class_gives_this_class():
    train = [example("the tea was good", "tea", NEU)] * 3
    assert b.words_around(train, train).answers == (NEU,) * 3


def test_without_opinion_spans_their_baselines_are_left_out():
    bare = [Example(e.sentence, e.aspect, e.polarity, e.span) for e in TRAIN]
    names = [p.name for p in b.baseline_predictions(bare, bare)]
    assert names == ["majority", "words around the aspect"]
    with pytest.raises(ConfigError, match="the test data of the baselines are empty"):
        b.baseline_predictions(TRAIN, [])


def test_the_best_wording_is_chosen_on_train_alone(monkeypatch):
    asked = []

    def predict(model, items, *, template):
        asked.append((len(items), template))
        right = template == "second {sentence} {aspect}" and len(items) == len(TRAIN)
        return b._answers(items, [e.polarity if right else None for e in items], "x")

    monkeypatch.setattr(b, "predict", predict)
    wordings = ("first {sentence} {aspect}", "second {sentence} {aspect}")
    test = TRAIN[:2]
    answers = b.best_wording(SimpleNamespace(), TRAIN, test, wordings=wordings)
    assert answers.name == "base, best wording: second {sentence} {aspect}"
    assert asked == [(6, wordings[0]), (6, wordings[1]), (2, wordings[1])]


@pytest.mark.slow
def test_the_nearest_opinion_solves_the_first_version_and_not_the_second():
    """The reason for the second version: proximity and a lexicon stay below 75 % there."""
    for version, least, most in (("", 0.93, 1.0), ("v2/", 0.3, 0.75)):
        train = load_examples(f"builtin:{version}restaurant+service/train")
        test = load_examples(f"builtin:{version}restaurant+service/test")
        for in_clause in (False, True):
            right = b.nearest_opinion(train, test, in_clause=in_clause).correct.mean()
            assert least < right < most, (version, in_clause, right)


def test_the_table_has_a_row_per_baseline_with_its_interval():
    train = load_examples("builtin:restaurant/train")[:200]
    test = load_examples("builtin:restaurant/test")[:60]
    table = b.baselines(train, test, draws=200)
    assert list(table["system"]) == [p.name for p in b.baseline_predictions(train, test)]
    answers = b.nearest_opinion(train, test)
    row = table[table["system"] == "nearest opinion"].iloc[0]
    assert row["accuracy"] == np.mean(
        [a is e.polarity for a, e in zip(answers.answers, test, strict=True)]
    )
    assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]


@pytest.mark.slow
def test_a_built_in_test_file_is_scored_beside_what_its_own_train_file_teaches():
    test = load_examples("builtin:v2/restaurant/test")
    small = test[:40]
    scores = {s.name: s for s in b.beside([small], draws=100)}
    train = load_examples("builtin:v2/restaurant/train")
    assert scores["majority"].accuracy == b.majority(train, small).correct.mean()
    right = b.nearest_opinion(train, small).correct.mean()
    assert scores["nearest opinion"].accuracy == right
    assert b._own_train("builtin:test").source == "builtin:train"
    assert b._own_train("builtin:v2/test").source == "builtin:v2/train"
    assert b._own_train("builtin:laptop/train") is None and b._own_train("mine/test") is None
    other = small[:]
    assert b.beside([other.__class__(other.items, "mine.jsonl")]) == []
