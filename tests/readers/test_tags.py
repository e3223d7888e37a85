"""E2E-TBSA, CoNLL and SentiHood, worked by hand."""

from __future__ import annotations

import json

import pytest

from mech_absa.errors import DataError
from mech_absa.readers import load_examples


def read(examples):
    return [(e.aspect, e.span, e.polarity.value, e.line, e.id) for e in examples]


def test_e2e_tbsa_by_hand(write):
    text = (
        "the hot dog was good .####the=O hot=T-POS dog=T-POS was=O good=O .=O\n"
        "a==b tea cup####a==b=O tea=T-NEG cup=T-NEU\n"
        "so so####so=O so=O\n"
    )
    examples = load_examples(write("x.txt", text))
    assert read(examples) == [
        ("hot dog", (4, 11), "positive", 1, "x:1.1"),
        ("tea", (5, 8), "negative", 2, "x:2.1"),
        ("cup", (9, 12), "neutral", 2, "x:2.2"),
    ]
    assert examples.left_out == {"sentence without aspects": 1}
    assert examples[1].sentence == "a==b tea cup"


def test_conll_by_hand(write):
    bioes = "the O\nhot B-POS\ndog E-POS\ntea S-NEG\ncup S-NEG\n\n\nso O\npan B-NEU\npot B-NEU\n"
    assert read(load_examples(write("x.conll", bioes))) == [
        ("hot dog", (4, 11), "positive", 1, "x:1.1"),
        ("tea", (12, 15), "negative", 1, "x:1.2"),
        ("cup", (16, 19), "negative", 1, "x:1.3"),
        ("pan", (3, 6), "neutral", 8, "x:2.1"),
        ("pot", (7, 10), "neutral", 8, "x:2.2"),
    ]
    three = "the O -999\nhot B-ASP Positive\ndog I-ASP Positive\nend B-ASP -999\n"
    assert [e.aspect for e in load_examples(write("x.dat", three))] == ["hot dog"]


def test_a_tag_that_is_none_is_named(write):
    with pytest.raises(DataError, match=r"x\.conll:1: unknown label 'GREAT'"):
        load_examples(write("x.conll", "the O\ntea B-GREAT\n"))
    with pytest.raises(DataError, match=r"x\.conll:4: 'tea Q' came; a word and its tag"):
        load_examples(write("x.conll", "the O\ntea B-POS\n\ntea Q\n"))


def test_sentihood_by_hand(write):
    record = {
        "id": 7,
        "text": "  LOCATION1 is cheap but not safe",
        "opinions": [
            {"target_entity": "LOCATION1", "aspect": "price", "sentiment": "Positive"},
            {"target_entity": "LOCATION1", "aspect": "general", "sentiment": "Negative"},
        ],
    }
    nothing = {"id": 8, "text": "LOCATION1", "opinions": []}
    examples = load_examples(write("train.json", json.dumps([record, nothing])))
    assert read(examples) == [
        ("price of LOCATION1", None, "positive", 1, "train:1.1"),
        ("LOCATION1", (2, 11), "negative", 1, "train:1.2"),
    ]
    assert examples.left_out == {"sentence without aspects": 1}
    record["opinions"][1]["target_entity"] = "LOCATION2"
    with pytest.raises(DataError, match=r"train\.json:1: the location 'LOCATION2' does not stand"):
        load_examples(write("train.json", json.dumps([record])))
