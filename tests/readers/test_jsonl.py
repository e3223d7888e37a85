"""JSON lines: the paper's files and this project's, by hand, by round trip, and against the counts published with the data."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import fast

from mech_absa.errors import ConfigError, DataError
from mech_absa.examples import Example, Polarity, leakage
from mech_absa.readers import load_examples, write_jsonl
from mech_absa.readers.rows import is_whole_term, occurrences

POS, NEG, NEU = Polarity.POSITIVE, Polarity.NEGATIVE, Polarity.NEUTRAL


def paper(*rows: tuple[str, str, str]) -> str:
    return "".join(json.dumps({"sentence": s, "aspect": a, "label": p}) + "\n" for s, a, p in rows)


def test_the_papers_rows_by_hand(write):
    path = write(
        "laptop_test.json",
        paper(
            ("the screen is dim .", "screen", "Neg"),
            ("great keyboard", "keyboard", "Pos"),
            ("a hinge", "hinge", "Neu"),
        ),
    )
    examples = load_examples(path)
    assert [(e.aspect, e.span, e.polarity, e.line, e.id) for e in examples] == [
        ("screen", (4, 10), NEG, 1, "laptop_test:1"),
        ("keyboard", (6, 14), POS, 2, "laptop_test:2"),
        ("hinge", (2, 7), NEU, 3, "laptop_test:3"),
    ]
    assert {e.domain for e in examples} == {"laptop"} and {e.source for e in examples} == {path}
    assert examples.counts() == {"positive": 1, "negative": 1, "neutral": 1}
    assert examples.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_nth_row_takes_the_nth_whole_term(write):
    sentence = "foods : the food was good , but food is not all seafood"
    examples = load_examples(
        write(
            "x.json",
            paper((sentence, "food", "Pos"), (sentence, "food", "Neu"), (sentence, "food", "Neg")),
        )
    )
    # "foods" and "seafood" hold the characters, not the term; a third row has no third term to take.
    assert [e.span for e in examples] == [(12, 16), (32, 36), (32, 36)]
    assert examples.ambiguous == 3


def test_a_term_in_no_word_of_its_own_is_still_found(write):
    examples = load_examples(
        write(
            "x.json",
            paper(("unreliable macbook", "book", "Neg"), ("这家餐厅的服务很好", "服务", "Pos")),
        )
    )
    assert [e.span for e in examples] == [(14, 18), (5, 7)]
    assert examples.ambiguous == 0


def test_the_nth_place_also_where_no_term_is_whole(write):
    rows = [("notebooks and macbooks", "book", p) for p in ("Pos", "Neg", "Neu")]
    assert [e.span for e in load_examples(write("x.json", paper(*rows)))] == [
        (4, 8),
        (17, 21),
        (17, 21),
    ]


@pytest.mark.parametrize(("sentence", "span"), [
    ("cafe\u0301 or cafe", (9, 13)),  # an accent that stands by itself belongs to its letter
    ("cafe_x or cafe", (10, 14)),
    ("cafe2 or cafe", (9, 13)),
    ("cafe's or cafe", (0, 4)),
    ("cafe-bar or cafe", (0, 4)),
])  # fmt: skip
def test_what_ends_a_word(write, sentence, span):
    assert load_examples(write("x.json", paper((sentence, "cafe", "Pos"))))[0].span == span


def test_other_sentences_do_not_advance_the_count(write):
    rows = [
        ("the bar by the bar", "bar", "Pos"),
        ("another bar , no bar", "bar", "Pos"),
        ("the bar by the bar", "bar", "Neg"),
    ]
    assert [e.span for e in load_examples(write("x.json", paper(*rows)))] == [
        (4, 7),
        (8, 11),
        (15, 18),
    ]


def test_conflict_is_left_out_counted_and_keeps_its_place(write):
    rows = [
        ("food and food", "food", "conflict"),
        ("food and food", "food", "Pos"),
        ("a b", "a", "mixed"),
    ]
    examples = load_examples(write("x.json", paper(*rows)))
    assert [(e.span, e.line) for e in examples] == [((9, 13), 2)]
    assert examples.left_out == {"conflict": 1, "mixed": 1}


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\n\n \n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_blank_lines_and_byte_order_mark(write, separator, mark):
    rows = paper(
        ("café ☕ 😀 déjà vu", "déjà vu", "Pos"), ("odd\u2028break\x85here", "here", "Neg")
    )
    examples = load_examples(write("x.jsonl", mark + rows.replace("\n", separator).encode()))
    assert [e.span for e in examples] == [(9, 16), (10, 14)]
    assert [e.line for e in examples] == [1, 1 + separator.count("\n")]


def test_raw_unicode_line_breaks_stay_inside_a_record(write):
    path = write(
        "x.jsonl", '{"text": "odd\u2028break \x85here", "aspect": "here", "polarity": "neutral"}\n'
    )
    assert load_examples(path)[0].span == (11, 15)


OFFSETS = {
    "id": "d7", "domain": "device", "text": "the screen is bright", "aspect": "screen", "from": 4, "to": 10, "polarity": "positive",
    "opinion": [14, 20],
    "counterfactuals": [{"text": "the screen is dim", "from": 4, "to": 10, "polarity": "negative", "opinion": [14, 17]}],
}  # fmt: skip


def test_the_row_with_offsets_by_hand(write):
    (e,) = load_examples(write("x.jsonl", json.dumps(OFFSETS)))
    assert (e.span, e.opinion, e.domain, e.id, e.polarity) == (
        (4, 10),
        (14, 20),
        "device",
        "d7",
        POS,
    )
    (c,) = e.counterfactuals
    assert (c.sentence, c.aspect, c.span, c.opinion, c.polarity) == (
        "the screen is dim",
        "screen",
        (4, 10),
        (14, 17),
        NEG,
    )
    assert (c.id, c.domain, c.line) == ("d7~1", "device", 1)


def test_offsets_choose_the_place_and_are_not_ambiguous(write):
    rows = [
        {"text": "bar bar bar", "aspect": "bar", "from": i, "to": i + 3, "label": "Pos"}
        for i in (8, 0)
    ]
    examples = load_examples(write("x.jsonl", "\n".join(map(json.dumps, rows))))
    assert [e.span for e in examples] == [(8, 11), (0, 3)] and examples.ambiguous == 0


def test_null_offsets_mean_no_words(write):
    row = {
        "text": "the food was cold",
        "aspect": "food",
        "from": None,
        "to": None,
        "polarity": "negative",
    }
    assert load_examples(write("x.jsonl", json.dumps(row)))[0].span is None


def test_an_array_reads_as_lines_do_and_knows_its_lines(write):
    rows = [("the food", "food", "Pos"), ("a table", "table", "Neg")]
    array = "[\n" + ",\n\n".join(paper(r).strip() for r in rows) + "\n]"
    assert [(e.span, e.line) for e in load_examples(write("x.json", array))] == [
        ((4, 8), 2),
        ((2, 7), 4),
    ]


def test_repeated_ids_are_told_apart(write):
    rows = [{**OFFSETS, "counterfactuals": None}] * 3
    assert [e.id for e in load_examples(write("x.jsonl", "\n".join(map(json.dumps, rows))))] == [
        "d7",
        "d7.2",
        "d7.3",
    ]


# --- offsets, for any text ----------------------------------------------------------------------------------------------------------------

letters = st.text(alphabet="ab é\u0301ß日😀_-'.\t\u2028\u00a0", max_size=6)
terms = st.text(alphabet="abé日😀\u0301", min_size=1, max_size=3).filter(str.strip)


@st.composite
def examples_with_repeats(draw):
    """An example whose aspect may stand in its sentence several times."""
    aspect = draw(terms)
    parts = draw(st.lists(letters, min_size=2, max_size=5))
    which = draw(st.integers(0, len(parts) - 2))
    start = len(aspect.join(parts[: which + 1]))
    sentence = aspect.join(parts)
    opinion = draw(st.none() | st.integers(0, len(sentence) - 1).map(lambda i: (i, len(sentence))))
    return Example(
        sentence,
        aspect,
        draw(st.sampled_from(Polarity)),
        (start, start + len(aspect)),
        opinion,
        draw(st.sampled_from(["", "food"])),
    )


@settings(deadline=None)  # a slow machine is no wrong answer
@given(st.lists(examples_with_repeats(), min_size=1, max_size=5))
def test_what_is_written_reads_back(tmp_path_factory, items):
    path = write_jsonl(items, tmp_path_factory.mktemp("round") / "trip.jsonl")
    again = load_examples(path)
    for e, a in zip(items, again, strict=True):
        assert (a.sentence, a.aspect, a.span, a.polarity, a.opinion, a.domain) == (
            e.sentence,
            e.aspect,
            e.span,
            e.polarity,
            e.opinion,
            e.domain,
        )
    assert len({a.id for a in again}) == len(items)


@settings(deadline=None)  # a slow machine is no wrong answer
@given(st.lists(examples_with_repeats(), min_size=1, max_size=5))
def test_without_offsets_every_span_gives_its_aspect(tmp_path_factory, items):
    path = tmp_path_factory.mktemp("paper") / "x.json"
    path.write_text(paper(*[(e.sentence, e.aspect, "Pos") for e in items]), encoding="utf-8")
    for e in load_examples(path):
        assert e.span is not None and e.sentence[slice(*e.span)] == e.aspect
        assert is_whole_term(e.sentence, e.span) or not any(
            is_whole_term(e.sentence, p) for p in occurrences(e.sentence, e.aspect)
        )


@settings(deadline=None)  # a slow machine is no wrong answer
@given(terms, letters)
def test_occurrences_are_those_found_by_looking_everywhere(aspect, filler):
    sentence = filler + aspect + filler + aspect
    n = len(aspect)
    assert occurrences(sentence, aspect) == [
        (i, i + n) for i in range(len(sentence)) if sentence[i : i + n] == aspect
    ]


def test_counterfactuals_ids_and_missing_spans_read_back(tmp_path):
    edited = Example("no food", "food", NEG, (3, 7))
    items = [
        Example("my food", "food", POS, (3, 7), id="a", counterfactuals=(edited,)),
        Example("it was slow", "service", NEG, None, id="b"),
    ]
    again = load_examples(write_jsonl(items, tmp_path / "x.jsonl"))
    assert [(e.id, e.span) for e in again] == [("a", (3, 7)), ("b", None)]
    assert [(c.sentence, c.span, c.polarity, c.id) for c in again[0].counterfactuals] == [
        ("no food", (3, 7), NEG, "a~1")
    ]


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("before")
    broken = Example(
        "my food", "food", POS, (3, 7), counterfactuals=(Example("slow", "service", NEG),)
    )
    with pytest.raises(DataError, match=r"'slow' has no span"):
        write_jsonl([broken], path)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["x.jsonl"]


# --- what is refused, and in which words --------------------------------------------------------------------------------------------------


def edited(counterfactual: dict) -> str:
    return json.dumps({**OFFSETS, "counterfactuals": [counterfactual]})


GOOD = paper(("the food", "food", "Pos"))
BAD = [
    ('{"sentence": "the fo', "broken JSON", "one JSON object per line is accepted"),
    ("[" * 100_000, "nesting beyond all bounds", "accepted"),
    ("7", "7 came", "a JSON object with the fields of an example is accepted"),
    ('{"sentence": "the food", "label": "Pos"}', "'aspect' is missing; there are: sentence, label", "accepted names: aspect"),
    ('{"aspect": "x", "label": "Pos"}', "field 'sentence' is missing", "accepted names: sentence, text"),
    ('{"aspect": "x", "sentence": "x"}', "field 'polarity' is missing", "polarity, label or sentiment"),
    ('{"sentence": "a", "text": "b", "aspect": "a", "label": "Pos"}', "sentence or text could be", "columns={'sentence':"),
    (paper(("the food", "wine", "Pos")), "the aspect 'wine' does not stand in the sentence 'the food'", ""),
    (paper(("the Food", "food", "Pos")), "only 'Food' does, which --ignore-case (ignore_case=True) accepts", ""),
    (paper(("the food", " ", "Pos")), "the aspect is empty", "at least one character"),
    (paper(("the food", "food", "meh")), "unknown label 'meh'", "accepted: positive/pos/1, negative/neg/-1, neutral/neu/0"),
    ('{"sentence": "a", "aspect": "a", "label": null}', "unknown label None", "a word or a number is accepted"),
    ('{"sentence": 5, "aspect": "a", "label": "Pos"}', "the field 'sentence' holds 5", "a string is accepted"),
    (r'{"sentence": "a \ud83d", "aspect": "a", "label": "Pos"}', "half of a surrogate pair", "whole characters are accepted"),
    (json.dumps({**OFFSETS, "to": 99}), "aspect offsets 4..99 do not fit a sentence of 20 characters", ""),
    (json.dumps({**OFFSETS, "from": -1}), "aspect offsets -1..10 do not fit", ""),
    (json.dumps({**OFFSETS, "from": 10, "to": 4}), "aspect offsets 10..4 do not fit", ""),
    (json.dumps({**OFFSETS, "from": 3}), "offsets 3..10 give ' screen', but the aspect is 'screen'", ""),
    (json.dumps({**OFFSETS, "from": 4.5}), "the field 'from' holds 4.5", "a whole number of characters is accepted"),
    (json.dumps({**OFFSETS, "from": "9" * 5000}), "the field 'from' holds '999", "whole number"),
    (json.dumps({**OFFSETS, "from": True}), "the field 'from' holds True", "whole number"),
    (json.dumps({k: v for k, v in OFFSETS.items() if k != "to"}), "offsets need both 'from' and 'to'; only from came", ""),
    (json.dumps({**OFFSETS, "opinion": [14, 99]}), "opinion offsets 14..99 do not fit", ""),
    (json.dumps({**OFFSETS, "opinion": "bright"}), "'opinion' holds 'bright'", "a pair of offsets [from, to] is accepted"),
    (json.dumps({**OFFSETS, "counterfactuals": {}}), "'counterfactuals' holds {}", "a list of objects is accepted"),
    (json.dumps({**OFFSETS, "polarity": "negative"}), "a counterfactual is as negative as its example", "another polarity is accepted"),
    (edited({"text": "dim", "from": 1, "to": 9, "polarity": "neg"}), "1..9 of a counterfactual do not fit", ""),
    (edited({"text": "dim", "from": 0, "to": 1, "polarity": "conflict"}), "label 'conflict'", "single polarity"),
    (edited({"text": "dim", "to": 9, "polarity": "neg"}), "field 'from' is missing", "accepted names: from"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "came", "accepted"), BAD, ids=[came for _, came, _ in BAD])
def test_a_bad_line_is_named(write, line, came, accepted):
    path = write("x.jsonl", GOOD + "\n" + line.strip() + "\n" + GOOD)
    with pytest.raises(DataError) as caught:
        load_examples(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and came in message and accepted in message
    assert "\n" not in message and len(message) < 500
    assert (caught.value.source, caught.value.line) == (path, 3)

    skipped = load_examples(path, skip_bad=True)
    assert [e.line for e in skipped] == [1, 4]
    assert skipped.problems == (message,) and skipped.left_out == {"bad line": 1}


HALVES = [
    """{"sentence":"Good food","aspect":"food","polarity":"\\ud800"}""",
    """{"\\ud800":1}""",
    """{"sentence":"Good food","aspect":"\\ud800","polarity":"positive"}""",
    """{"sentence":"Good food","aspect":"food","polarity":"positive","id":"\\udfff"}""",
]


@pytest.mark.parametrize("line", HALVES)
def test_half_of_a_surrogate_pair_is_counted_and_its_message_can_be_written(write, line):
    path = write("x.jsonl", GOOD + "\n" + line + "\n")
    examples = load_examples(path, skip_bad=True)
    assert len(examples) == 1 and examples.left_out == {"bad line": 1}
    json.dumps(examples.account(), ensure_ascii=False).encode("utf-8")
    (problem,) = examples.problems
    assert problem.startswith(f"{path}:3: ") and "\\ud" in problem


def test_nothing_but_bad_lines_is_an_error_even_when_skipping(write):
    path = write("x.jsonl", "{\n{\n")
    with pytest.raises(
        DataError,
        match=r"no example could be read \(2 bad line\); at least one is needed; the first: .*x.jsonl:1: broken JSON",
    ):
        load_examples(path, skip_bad=True)


def test_nothing_but_conflict_is_an_error(write):
    with pytest.raises(DataError, match=r"no example could be read \(1 conflict\)"):
        load_examples(write("x.jsonl", paper(("a", "a", "conflict"))))


@pytest.mark.parametrize(("text", "line", "why"), [
    ('[\n{"a": 1},\n{"a": }\n]', 3, "broken JSON: Expecting value"),
    ('[{"sentence": "a", "aspect": "a", "label": "Pos"}\n{}]', 2, "',' or ']' is needed"),
    ('[{"sentence": "a", "aspect": "a", "label": "Pos"}]\n[]', 1, "'[]' follows the end"),
    ("[]", None, "no example could be read (there are no records)"),
])  # fmt: skip
def test_a_broken_array_is_named(write, text, line, why):
    path = write(
        "x.json", text.replace('{"a": 1}', '{"sentence": "a", "aspect": "a", "label": "Pos"}')
    )
    with pytest.raises(DataError) as caught:
        load_examples(path, skip_bad=True)
    assert why in str(caught.value) and caught.value.line == line and caught.value.source == path


def test_text_that_is_not_utf8_is_named(write):
    path = write("x.json", GOOD.encode() + '{"sentence": "café"'.encode("latin-1"))
    with pytest.raises(DataError, match=r"x\.json:2: the byte 0xe9 is not UTF-8"):
        load_examples(path)


# --- labels that are numbers --------------------------------------------------------------------------------------------------------------


def test_numbers_are_believed_where_a_minus_one_is_among_them(write):
    rows = "".join(
        json.dumps({"sentence": "a", "aspect": "a", "label": n}) + "\n" for n in (1, 0, -1, "1")
    )
    assert [e.polarity for e in load_examples(write("x.jsonl", rows))] == [POS, NEU, NEG, POS]


def test_numbers_that_could_mean_anything_are_refused_and_can_be_explained(write):
    path = write(
        "x.jsonl",
        "".join(json.dumps({"sentence": "a", "aspect": "a", "label": n}) + "\n" for n in (0, 1)),
    )
    with pytest.raises(
        DataError, match=r"bare numbers \(0 or 1\) and none is -1, .*meaning=\{'0': 'negative'"
    ):
        load_examples(path)
    assert [e.polarity for e in load_examples(path, meaning={"0": "negative", "1": "neutral"})] == [
        NEG,
        NEU,
    ]
    older = load_examples(path, labels={"0": "negative", "1": "neutral"})
    assert [e.polarity for e in older] == [NEG, NEU]
    with pytest.raises(ConfigError, match="meaning and labels were given, which are one thing"):
        load_examples(path, meaning={"0": "negative"}, labels={"1": "neutral"})


# --- the real files -----------------------------------------------------------------------------------------------------------------------

# positive, negative, neutral, unique sentences, rows whose aspect stands in the sentence more than once: as published with the data
REAL = {
    "device_train": (896, 498, 0, None, None), "device_test": (476, 215, 0, 478, 33),
    "laptop_train": (984, 859, 454, None, None), "laptop_test": (338, 129, 164, 409, 12),
    "rest_train": (2590, 1034, 663, None, None), "rest_test": (1498, 495, 259, 1392, 102),
    "service_train": (1031, 697, 112, None, None), "service_test": (505, 320, 61, 720, 39),
}  # fmt: skip


@pytest.mark.parametrize("name", fast(REAL, ["laptop_test", "service_test"]))
def test_counts_of_the_papers_files(shared, name):
    positive, negative, neutral, sentences, ambiguous = REAL[name]
    path = shared / "data" / "me_absc" / f"{name}.json"
    examples = load_examples(path)
    assert examples.counts() == {"positive": positive, "negative": negative, "neutral": neutral}
    assert (
        len(examples)
        == positive + negative + neutral
        == len(path.read_text(encoding="utf-8").splitlines())
    )
    assert len({e.id for e in examples}) == len(examples) and examples[6].id == f"{name}:7"
    assert {e.domain for e in examples} == {name.split("_")[0].replace("rest", "restaurant")}
    assert all(e.span is not None and is_whole_term(e.sentence, e.span) for e in examples)
    if sentences is not None:
        assert (len({e.sentence for e in examples}), examples.ambiguous) == (sentences, ambiguous)


def test_the_leak_of_the_papers_restaurant_split(shared):
    train, test = (
        load_examples(shared / "data" / "me_absc" / f"rest_{s}.json") for s in ("train", "test")
    )
    assert len(train) == 4287
    found = leakage(train, test)
    assert (len(found.rows), found.same_label, found.total) == (532, 530, 2252)
    assert found.share == pytest.approx(0.236, abs=5e-4)
