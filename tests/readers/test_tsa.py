"""TSA JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_absa.errors import DataError
from mech_absa.examples import Polarity
from mech_absa.readers import load_examples

POS, NEG = Polarity.POSITIVE, Polarity.NEGATIVE


def record(text: str, *targets: tuple[str, int, int, str]) -> dict:
    return {
        "text": text,
        "targets": [
            {"text": t, "location": {"begin": a, "end": b}, "sentiment": s}
            for t, a, b, s in targets
        ],
    }


ROWS = [
    record("Café food , food", ("food", 12, 16, "negative"), ("food", 5, 9, "mixed")),
    record("nothing"),
    record("my 😀 tea", ("tea", 5, 8, "positive")),
]


def test_by_hand(write):
    examples = load_examples(write("x.json", json.dumps(ROWS, indent=1, ensure_ascii=False)))
    assert [(e.aspect, e.span, e.polarity, e.line, e.id) for e in examples] == [
        ("food", (12, 16), NEG, 2, "x:1.1"),
        ("tea", (5, 8), POS, 27, "x:3.1"),
    ]
    assert examples.left_out == {"mixed": 1, "sentence without aspects": 1}


def test_the_same_one_record_a_line(write):
    examples = load_examples(write("x.jsonl", "\n".join(map(json.dumps, ROWS))), format="tsa")
    assert [(e.span, e.line, e.id) for e in examples] == [
        ((12, 16), 1, "x:1.1"),
        ((5, 8), 3, "x:3.1"),
    ]
    assert [e.id for e in load_examples(write("y.json", "\n".join(map(json.dumps, ROWS))))] == [
        "y:1.1",
        "y:3.1",
    ]


words = st.text(alphabet="ab é日😀\u2028\n", min_size=1, max_size=6).filter(str.strip)


@settings(deadline=None)  # a slow machine is no wrong answer
@given(st.lists(words, min_size=1, max_size=4), words, st.sampled_from([POS, NEG]))
def test_offsets_of_any_text_come_back(tmp_path_factory, before, aspect, polarity):
    # The aspect repeats: every one of its places is a target of the same text.
    text = "".join(b + aspect for b in before)
    ends = [sum(len(b + aspect) for b in before[: n + 1]) for n in range(len(before))]
    path = tmp_path_factory.mktemp("tsa") / "x.json"
    path.write_text(
        json.dumps([record(text, *((aspect, e - len(aspect), e, polarity.value) for e in ends))]),
        encoding="utf-8",
    )
    examples = load_examples(path)
    assert [e.span for e in examples] == [(e - len(aspect), e) for e in ends]
    assert {(e.sentence, e.aspect, e.polarity) for e in examples} == {(text, aspect, polarity)}


GOOD = record("my tea", ("tea", 3, 6, "positive"))
BAD = [
    (
        record("my tea", ("tea", 2, 6, "positive")),
        "offsets 2..6 give ' tea', but the aspect is 'tea'",
    ),
    (
        record("my tea", ("tea", 3, 60, "positive")),
        "aspect offsets 3..60 do not fit a sentence of 6 characters",
    ),
    (record("my tea", ("tea", 3, 6, "fine")), "unknown label 'fine'; accepted: positive/pos/1"),
    ({"text": "my tea", "targets": "tea"}, "'targets' holds 'tea'; a list of objects is accepted"),
    ({"text": "my tea", "targets": ["tea"]}, "a target is 'tea'; a JSON object is accepted"),
    ({"targets": []}, "the record has no field 'text'; there are: targets"),
    ({"text": "my tea"}, "the record has no field 'targets'; there are: text"),
    (
        {"text": "my tea", "targets": [{"text": "tea", "location": {"begin": 3}}]},
        "a location has no field 'end'; there are: begin",
    ),
    (7, "7 came; a JSON object with the fields of an example is accepted"),
]


@pytest.mark.parametrize(("bad", "why"), BAD, ids=[why for _, why in BAD])
def test_a_bad_record_is_named(write, bad, why):
    path = write("x.json", "[" + ",\n".join(map(json.dumps, [GOOD, bad, GOOD])) + "]")
    with pytest.raises(DataError) as caught:
        load_examples(path)
    assert str(caught.value).startswith(f"{path}:2: {why}")
    skipped = load_examples(path, skip_bad=True)
    assert ([e.id for e in skipped], skipped.problems) == (["x:1.1", "x:3.1"], (str(caught.value),))


@pytest.mark.parametrize(
    ("name", "positive", "negative", "bare"), [("train", 873, 339, 90), ("dev", 241, 70, 21)]
)
def test_counts_of_the_real_files(shared, name, positive, negative, bare):
    path = shared / "data" / "tsa_md" / f"TSA-MD.{name}.json"
    examples = load_examples(path)
    assert examples.counts() == {"positive": positive, "negative": negative, "neutral": 0}
    assert examples.left_out == {"sentence without aspects": bare}
    assert len({e.id for e in examples}) == len(examples)
    lines = path.read_text(encoding="utf-8").split("\n")
    for e in examples:  # the record's brace, and its text beneath it
        assert (
            lines[e.line - 1] == "  {"
            and json.loads("{" + lines[e.line].strip().rstrip(",") + "}")["text"] == e.sentence
        )
