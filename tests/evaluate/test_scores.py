"""Scores against tables worked out by hand, scikit-learn, and the bootstrap computed the long way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import accuracy_score, f1_score
from support.small_cases import NEG, NEU, POS, example

from mech_absa import stats
from mech_absa.errors import ConfigError
from mech_absa.evaluate import Predictions, aggregate, compare, score
from mech_absa.evaluate.predictions import check_call
from mech_absa.examples import Polarity

GOLD = [POS, POS, POS, POS, NEG, NEG, NEG, NEU, NEU]
ANSWERS = [POS, POS, NEG, None, NEG, NEG, POS, NEU, NEG]


def rows(gold, answers, sentences=None, name="s", **more) -> Predictions:
    """Predictions of those classes; a sentence a row unless told."""
    sentences = sentences or range(len(gold))
    made = tuple(
        example(f"sentence {s} about a thing{i}", f"thing{i}", g)
        for i, (s, g) in enumerate(zip(sentences, gold, strict=True))
    )
    return Predictions(made, tuple(answers), name, "hand", **more)


def test_a_table_worked_out_by_hand():
    q = score(rows(GOLD, ANSWERS)).all
    assert q.confusion.tolist() == [[2, 1, 0, 1], [1, 2, 0, 0], [0, 1, 1, 0]]
    assert q.accuracy.value == pytest.approx(5 / 9)
    by_class = {c.label: (c.precision, c.recall, c.f1, c.support, c.answered) for c in q.classes}
    assert by_class["positive"] == pytest.approx((2 / 3, 1 / 2, 4 / 7, 4, 3))
    assert by_class["negative"] == pytest.approx((1 / 2, 2 / 3, 4 / 7, 3, 4))
    assert by_class["neutral"] == pytest.approx((1, 1 / 2, 2 / 3, 2, 1))
    assert q.macro_f1.value == pytest.approx((4 / 7 + 4 / 7 + 2 / 3) / 3)
    assert (q.majority, q.majority_class, q.unanswered, q.n) == (4 / 9, "positive", 1, 9)
    table = q.confusion_table()
    assert (
        table.loc["neutral", "negative"] == 1
        and table.loc["positive", "none"] == 1
        and table.to_numpy().sum() == 9
    )


def test_a_class_that_no_row_has_is_no_part_of_macro_f1():
    """Device has no neutral row: the mean is over two classes, and answering neutral costs recall."""
    q = score(rows([POS, POS, NEG, NEG], [POS, NEU, NEG, NEG])).all
    assert q.macro_f1.value == pytest.approx((2 / 3 + 1) / 2)


classes = st.sampled_from(list(Polarity))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(classes, st.one_of(st.none(), classes)), min_size=1, max_size=30))
def test_accuracy_and_f1_are_scikit_learns(pairs):
    gold, answers = [g for g, _ in pairs], [a for _, a in pairs]
    q = score(rows(gold, answers), draws=5).all
    named = [g.value for g in gold], ["none" if a is None else a.value for a in answers]
    assert q.accuracy.value == pytest.approx(accuracy_score(*named))
    present = sorted({g.value for g in gold})
    assert q.macro_f1.value == pytest.approx(
        f1_score(*named, labels=present, average="macro", zero_division=0)
    )


def test_intervals_are_the_cluster_bootstrap_computed_the_long_way():
    rng = np.random.default_rng(3)
    gold = [list(Polarity)[i] for i in rng.integers(0, 3, 60)]
    answers = [g if rng.random() < 0.7 else POS for g in gold]
    p = rows(gold, answers, sentences=[i // 3 for i in range(60)])
    for i, e in enumerate(
        p.examples
    ):  # three aspects a sentence would be one cluster only if the sentence were the same
        object.__setattr__(e, "sentence", f"sentence {i // 3}")
    q = score(p, draws=200, seed=5).all
    assert q.sentences == 20
    correct = [a is g for a, g in zip(answers, gold, strict=True)]
    clusters = [i // 3 for i in range(60)]
    names = np.unique([f"sentence {c}" for c in clusters], return_inverse=True)[
        1
    ]  # the same order of clusters
    expected = stats.cluster_bootstrap(correct, names, draws=200, seed=5)
    assert (q.accuracy.low, q.accuracy.high) == (float(expected.low), float(expected.high))
    g, a = np.array([x.value for x in gold]), np.array([x.value for x in answers])

    def f1(chosen):
        return f1_score(
            g[chosen],
            a[chosen],
            labels=[c.value for c in Polarity],
            average="macro",
            zero_division=0,
        )

    expected = stats.bootstrap_statistic(f1, names, 60, draws=200, seed=5)
    assert q.macro_f1.low == pytest.approx(expected.low) and q.macro_f1.high == pytest.approx(
        expected.high
    )
    alone = score(rows(gold, answers), draws=200, seed=5).all
    assert alone.accuracy.value == q.accuracy.value and alone.sentences == 60


def test_calibration_by_hand():
    p = np.array([[0.4, 0.1, 0.0], [0.1, 0.1, 0.2]]) + 1e-300
    q = score(rows([POS, NEU], [POS, NEU], scores=np.log(p))).all
    assert q.gold_probability == pytest.approx((0.8 + 0.5) / 2)
    assert q.nll == pytest.approx(-(np.log(0.8) + np.log(0.5)) / 2)
    assert q.label_mass == pytest.approx((0.5 + 0.4) / 2)
    assert np.isnan(
        score(rows([POS], [POS])).all.nll
    )  # nothing is known of a system that gives answers only
    never = score(rows([NEG], [POS], scores=np.array([[-1.0, -2000.0, -3.0]]))).all
    assert never.nll == pytest.approx(
        2000 - 1 + np.log1p(np.exp(-2.0)), rel=1e-9
    )  # far beyond what exp can hold


def test_leaked_and_mixed_rows_are_scored_apart(examples):
    answers = [POS, NEG, POS, POS, POS, NEG, POS, NEG]  # wrong at 3, 4, 6, 7
    p = Predictions(tuple(examples), tuple(answers), "s")
    train = [
        example("The food was GREAT but the service was dreadful .", "food", NEG),
        examples[7],
        example("other food", "food", POS),
    ]
    s = score(p, train=train, draws=20)
    assert s.leaked == 2 and s.unseen.n == 6 and s.unseen.accuracy.value == pytest.approx(3 / 6)
    assert s.mixed.n == 5 and s.mixed.accuracy.value == pytest.approx(3 / 5)
    assert s.accuracy == 4 / 8
    assert score(p, train=list(examples), draws=20).unseen is None
    assert score(p, draws=20).leaked is None
    assert score(p.take([5, 6, 7]), draws=20).mixed is None
    table = s.to_pandas()
    assert table["subset"].tolist() == ["all", "unseen", "mixed"] and table[
        "accuracy"
    ].tolist() == pytest.approx([0.5, 0.5, 0.6])
    assert "unseen" in s._repr_html_()


def test_questions_asked_twice_count_once(examples):
    asked = [examples[5], examples[6], examples[5], examples[5], examples[7]]
    s = score(Predictions(tuple(asked), (NEG, NEG, POS, POS, POS), "s"), draws=20)
    assert (
        s.accuracy == 2 / 5
        and s.distinct.n == 3
        and s.distinct.accuracy.value == pytest.approx(2 / 3)
    )
    assert score(Predictions(tuple(examples), (POS,) * 8, "s"), draws=20).distinct is None


def test_two_systems_on_the_same_rows():
    gold = [POS] * 12
    a = rows(gold, [POS] * 9 + [NEG] * 3, sentences=[i // 2 for i in range(12)], name="a")
    b = rows(
        gold, [NEG] * 4 + [POS] * 6 + [NEG, NEU], sentences=[i // 2 for i in range(12)], name="b"
    )
    c = compare(a, b, draws=999, seed=1)
    assert (c.accuracy_first, c.accuracy_second) == (9 / 12, 6 / 12)
    assert (c.mcnemar.b, c.mcnemar.c) == (4, 1)
    assert c.mcnemar.p == pytest.approx(scipy_stats.binomtest(1, 5, 0.5).pvalue)
    assert c.agreement == pytest.approx(6 / 12)  # rows 5 to 9 both positive, row 11 both negative
    expected = stats.paired_bootstrap_difference(
        a.correct.astype(float), b.correct.astype(float), a.clusters, draws=999, seed=1
    )
    assert c.difference == expected and c.difference.value == pytest.approx(0.25)
    itself = compare(a, a, draws=50)
    assert (
        itself.difference.value,
        itself.difference.low,
        itself.difference.high,
        itself.agreement,
    ) == (0, 0, 0, 1)
    assert itself.macro_f1.low == itself.macro_f1.high == 0
    assert c.to_pandas()["p_mcnemar"][0] == c.mcnemar.p


def test_systems_on_different_rows_are_not_compared():
    a = rows([POS, NEG], [POS, NEG], name="a")
    with pytest.raises(
        ConfigError, match="a answered 2 examples and b 1; the same rows are needed"
    ):
        compare(a, rows([POS], [POS], name="b"))
    with pytest.raises(ConfigError, match="row 2 of a asks about"):
        compare(a, rows([POS, POS], [POS, NEG], name="b"))


def test_seeds_are_put_together_by_hand():
    gold = [POS] * 4 + [NEG] * 4
    runs = [score(rows(gold, [POS] * k + [NEG] * (8 - k)), draws=50) for k in (4, 5, 7)]
    values = [r.accuracy for r in runs]
    assert values == [1.0, 7 / 8, 5 / 8]
    a = aggregate(runs, "method", draws=300, seed=2)
    assert (a.name, a.seeds) == ("method", 3)
    assert a.accuracy.mean == pytest.approx(np.mean(values)) and a.accuracy.sd == pytest.approx(
        np.std(values, ddof=1)
    )
    low, high = scipy_stats.t.interval(0.95, 2, loc=np.mean(values), scale=scipy_stats.sem(values))
    assert (a.accuracy.low, a.accuracy.high) == pytest.approx((low, high))
    assert (
        a.sampling.value == pytest.approx(np.mean(values))
        and a.sampling.low < a.sampling.value < a.sampling.high
    )
    single = aggregate(runs[:1])
    assert single.accuracy.mean == 1.0 and np.isnan(single.accuracy.sd)
    with pytest.raises(ConfigError, match="no runs"):
        aggregate([])
    with pytest.raises(ConfigError, match="the same rows"):
        aggregate([runs[0], score(rows([POS], [POS]))])


def test_a_class_without_a_label_is_refused():
    with pytest.raises(
        ConfigError, match="rows are neutral, but the system can only answer positive, negative"
    ):
        score(rows([POS, NEU], [POS, POS], labels=(POS, NEG)))


def test_scores_compare_with_other_scores_and_with_predictions(examples):
    """The method is the function, on the same rows; the sign turns with the order."""
    right = Predictions(tuple(examples), tuple(e.polarity for e in examples), "right")
    positive = Predictions(tuple(examples), (POS,) * len(examples), "positive")
    first, second = (score(p, draws=10) for p in (right, positive))
    comparison = first.compare(second, draws=50)
    assert comparison == compare(right, positive, draws=50) == first.compare(positive, draws=50)
    share = sum(e.polarity is not POS for e in examples) / len(examples)
    assert comparison.difference.value == pytest.approx(share)
    assert second.compare(first, draws=50).difference.value == pytest.approx(-share)
    with pytest.raises(ConfigError, match=r"Scores.compare\(other=...\) got 'right'"):
        first.compare("right")


def test_wrong_types_get_one_sentence(model, examples):
    """The types of `evaluate` itself are checked in tests, so its own check is called."""
    for arguments, sentence in [
        ((model, "builtin:restaurant/test", None), r"evaluate\(examples=...\) got 'builtin:"),
        (
            (model, list(examples), "bundled"),
            r"evaluate\(edit=...\) got 'bundled'; accepted: an edit",
        ),
        (
            ("bundled", list(examples), None),
            r"evaluate\(model=...\) got 'bundled'; accepted: a Model",
        ),
        ((model, ["a sentence"], None), r"evaluate\(examples=...\) holds 'a sentence'"),
        ((model, [], None), "the data holds no examples"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            check_call("evaluate", *arguments)
