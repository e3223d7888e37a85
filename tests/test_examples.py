"""Examples and the questions asked of them: worked out by hand, and by looking at every pair."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_absa.errors import ConfigError, DataError
from mech_absa.examples import (
    Example,
    Examples,
    Polarity,
    class_counts,
    content_hash,
    duplicates,
    leakage,
    mixed_polarity,
    normal,
    split_by_sentence,
)

POS, NEG, NEU = Polarity.POSITIVE, Polarity.NEGATIVE, Polarity.NEUTRAL


def ask(sentence: str, aspect: str, polarity: Polarity = POS) -> Example:
    return Example(sentence, aspect, polarity)


# a: asked twice, once in other letters and blanks; b: two aspects that disagree; c: two that agree; d: alone
A1, A2 = ask("The tea  was hot", "tea"), ask(" the tea was HOT ", "Tea ", NEG)
B1, B2 = ask("good cup , bad lid", "cup"), ask("good cup , bad lid", "lid", NEG)
C1, C2 = ask("old desk and old lamp", "desk", NEU), ask("old desk and old lamp", "lamp", NEU)
D = ask("nice", "nice")
ALL = [A1, B1, C1, A2, D, C2, B2]


@pytest.mark.parametrize(("text", "polarity"), [
    ("Pos", POS), (" POSITIVE ", POS), ("1", POS), ("+1", POS), ("neg", NEG), ("Negative", NEG), ("-1", NEG),
    ("Neu", NEU), ("neutral", NEU), ("0", NEU), ("conflict", None), ("mixed", None),
])  # fmt: skip
def test_spellings_of_a_label(text, polarity):
    assert Polarity.parse(text) is polarity


@pytest.mark.parametrize("text", ["", "2", "good", "posneg", "none", "-"])
def test_what_is_no_label_is_named_with_what_is(text):
    with pytest.raises(DataError) as caught:
        Polarity.parse(text)
    assert (
        str(caught.value)
        == f"unknown label {text!r}; accepted: positive/pos/1, negative/neg/-1, neutral/neu/0 or conflict/mixed (left out)"
    )


def test_a_polarity_is_written_as_its_word():
    assert f"{POS}" == str(POS) == POS == "positive"


@pytest.mark.parametrize(("span", "why"), [
    ((4, 99), "x.json:7: aspect offsets 4..99 do not fit a sentence of 11 characters"),
    ((-1, 3), "x.json:7: aspect offsets -1..3 do not fit a sentence of 11 characters"),
    ((4, 4), "x.json:7: aspect offsets 4..4 do not fit a sentence of 11 characters"),
    ((0, 3), "x.json:7: offsets 0..3 give 'the', but the aspect is 'tea'"),
])  # fmt: skip
def test_offsets_that_are_wrong_cannot_become_an_example(span, why):
    with pytest.raises(DataError) as caught:
        Example("the tea hot", "tea", POS, span, source="x.json", line=7)
    assert str(caught.value) == why


def test_offsets_count_characters_not_bytes():
    assert Example("😀é tea", "tea", POS, (3, 6)).span == (3, 6)


def test_opinion_offsets_and_empty_aspects_are_checked_too():
    with pytest.raises(DataError, match=r"opinion offsets 8\.\.99 do not fit"):
        Example("the tea hot", "tea", POS, (4, 7), (8, 99))
    with pytest.raises(DataError, match="the aspect is empty"):
        Example("the tea", " ", POS)


def test_counts_name_every_class():
    assert class_counts(ALL) == {"positive": 3, "negative": 2, "neutral": 2}
    assert (
        list(class_counts([])) == ["positive", "negative", "neutral"]
        and sum(class_counts([]).values()) == 0
    )
    assert Examples(tuple(ALL)).counts() == class_counts(ALL)


def test_duplicates_by_hand():
    assert duplicates(ALL) == {("the tea was hot", "tea"): 2}
    assert duplicates([D, D, D, B1]) == {("nice", "nice"): 3}
    assert duplicates([B1, B2]) == {}


def test_leakage_by_hand():
    # A2 asks what A1 asked, with another answer; B1 stands in train itself; B2 is another question about a known sentence.
    found = leakage([A1, B1, C1], [A2, B1, B2, D])
    assert (found.rows, found.same_label, found.total, found.share) == ((0, 1), 1, 4, 0.5)
    assert leakage([], [D]).rows == () and leakage([D], []).share == 0.0


def test_a_question_train_answers_both_ways_counts_as_the_same_label():
    found = leakage(
        [A1, A2], [ask("the tea was hot", "tea", NEG), ask("the tea was hot", "tea", NEU)]
    )
    assert (found.rows, found.same_label) == ((0, 1), 1)


words = st.sampled_from(["a b", "A  b", "b", " b", "c", "c d", "é", "É"])
asked = st.builds(ask, words, words, st.sampled_from(Polarity))


@settings(deadline=None)  # a slow machine is no wrong answer
@given(st.lists(asked, max_size=8), st.lists(asked, max_size=8))
def test_leakage_is_what_comparing_every_pair_finds(train, test):
    def same(x: Example, y: Example) -> bool:
        return (normal(x.sentence), normal(x.aspect)) == (normal(y.sentence), normal(y.aspect))

    rows = [i for i, y in enumerate(test) if any(same(x, y) for x in train)]
    agree = sum(
        any(same(x, test[i]) and x.polarity == test[i].polarity for x in train) for i in rows
    )
    found = leakage(train, test)
    assert (list(found.rows), found.same_label, found.total) == (rows, agree, len(test))


def test_mixed_polarity_by_hand():
    assert mixed_polarity(ALL) == (0, 1, 3, 6)  # both a's, which disagree, and both b's
    assert mixed_polarity([C1, C2, D]) == ()


@settings(deadline=None)  # a slow machine is no wrong answer
@given(st.lists(asked, max_size=12), st.floats(0, 1), st.integers(0, 5))
def test_a_split_keeps_every_sentence_on_one_side_and_loses_none(items, share, seed):
    first, second = split_by_sentence(items, share, seed)
    assert not {e.cluster for e in first} & {e.cluster for e in second}
    assert sorted(map(id, first + second)) == sorted(map(id, items))
    assert [e for e in items if any(e is s for s in second)] == second  # order of the file
    assert len({e.cluster for e in second}) == round(share * len({e.cluster for e in items}))


def test_a_split_is_a_function_of_its_seed_and_not_of_the_order():
    items = [ask(f"sentence {i // 2}", "sentence") for i in range(40)]
    first, second = split_by_sentence(items, 0.3, seed=1)
    assert len(second) == 12
    assert split_by_sentence(items, 0.3, seed=1) == (first, second)
    assert {e.cluster for e in split_by_sentence(items[::-1], 0.3, seed=1)[1]} == {
        e.cluster for e in second
    }
    assert {e.cluster for e in split_by_sentence(items, 0.3, seed=2)[1]} != {
        e.cluster for e in second
    }


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_named(share):
    with pytest.raises(
        ConfigError, match=rf"a share of {share} was asked for; it must lie between 0 and 1"
    ):
        split_by_sentence(ALL, share)


def test_examples_are_a_sequence_that_keeps_its_account():
    examples = Examples(tuple(ALL), "x", "hash", {"conflict": 2}, ambiguous=1, problems=("p",))
    assert len(examples) == 7 and examples[0] is A1 and list(examples[1:3]) == [B1, C1]
    for part in (examples[1:3], examples.only(lambda e: e.polarity is NEG), examples.sample(3)):
        assert (part.source, part.sha256, part.left_out, part.ambiguous, part.problems) == (
            "x",
            "hash",
            {"conflict": 2},
            1,
            ("p",),
        )
    assert list(examples.only(lambda e: e.polarity is NEG)) == [A2, B2]


@settings(deadline=None)  # a slow machine is no wrong answer
@given(st.integers(1, 9), st.integers(0, 9))
def test_a_sample_is_drawn_without_replacement_in_file_order(n, seed):
    drawn = Examples(tuple(ALL)).sample(n, seed)
    places = [ALL.index(e) for e in drawn]
    assert places == sorted(set(places)) and len(places) == min(n, len(ALL))
    assert list(Examples(tuple(ALL)).sample(n, seed)) == list(drawn)


def test_different_seeds_draw_differently():
    assert len({tuple(e.cluster for e in Examples(tuple(ALL)).sample(3, s)) for s in range(20)}) > 5


@pytest.mark.parametrize(
    "changed",
    [
        ask("the Tea", "Tea"),
        ask("the tea", "tea", NEG),
        Example("the tea", "tea", POS, (4, 7)),
        ask("the tea", "the"),
    ],
)
def test_the_hash_is_of_the_question_and_its_answer(changed):
    same = Example("the tea", "tea", POS, source="x", line=3, id="y")
    assert content_hash([ask("the tea", "tea")]) == content_hash([same]) != content_hash([changed])
    assert content_hash([A1, B1]) != content_hash([B1, A1])


def test_a_table_of_them_has_one_row_each():
    table = Examples((B1, B2)).to_pandas()
    assert list(table["polarity"]) == ["positive", "negative"] and list(table["aspect"]) == [
        "cup",
        "lid",
    ]


def test_the_notebook_view_marks_the_aspect_and_escapes_the_text():
    shown = Example("<b> tea & tea", "tea", POS, (10, 13))._repr_html_()
    assert "&lt;b&gt; tea &amp; <b><u>tea</u></b>" in shown and "<b> tea" not in shown
    assert (
        "2 more" in Examples(tuple(ALL), "<x>")._repr_html_()
        and "&lt;x&gt;" in Examples(tuple(ALL), "<x>")._repr_html_()
    )
