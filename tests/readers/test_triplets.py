"""ASTE, DMASTE, ASQP and ACOS, worked by hand; DMASTE's files counted another way."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from mech_absa.errors import DataError
from mech_absa.readers import load_examples

ASTE = """the hot dogs were good but cold .####[([1, 2], [4], 'POS'), ([1, 2], [6], 'NEG')]
so good####[([-1], [1], 'POS')]
the tea was good and so fresh####[([1], [-1], 'POS'), ([1], [3], 'POS'), ([1], [5, 6], 'POS')]
nothing####[]
"""


def read(examples):
    return [
        (e.aspect, e.polarity.value, e.opinion and e.sentence[slice(*e.opinion)], e.line, e.id)
        for e in examples
    ]


def test_aste_by_hand(write):
    examples = load_examples(write("x.txt", ASTE))
    assert read(examples) == [
        ("hot dogs", "positive", "good", 1, "x:1.1"),
        ("hot dogs", "negative", "cold", 1, "x:1.2"),
        ("tea", "positive", "good", 3, "x:3.1"),  # the first opinion that has words
    ]
    assert examples[0].span == (4, 12)
    assert examples.left_out == {
        "no aspect term": 1,
        "further opinion on an aspect": 2,
        "sentence without aspects": 1,
    }


def test_dmaste_gives_the_ends_of_a_phrase_and_a_domain_behind(write):
    (e,) = load_examples(write("x.txt", "a b c d e####[([1, 3], [4], 'NEU')]####Home\n"))
    assert (e.aspect, e.sentence[slice(*e.opinion)], e.polarity.value) == ("b c d", "e", "neutral")


def test_asqp_by_hand(write):
    text = (
        "the Tea was good####[['tea', 'drinks quality', 'positive', 'good'], "
        "['NULL', 'service general', 'negative', 'NULL']]\n"
    )
    (e,) = examples = load_examples(write("x.txt", text))
    assert read([e]) == [("Tea", "positive", "good", 1, "x:1.1")]
    assert examples.left_out == {"no aspect term": 1}
    both = load_examples(write("x.txt", text), null_targets="category")
    assert (both[1].aspect, both[1].polarity.value, both[1].span) == (
        "service general",
        "negative",
        None,
    )


@pytest.mark.parametrize("name", ["x.tsv", "x.txt"])
def test_acos_by_hand(write, name):
    text = "the tea was so good\t1,2 DRINKS#QUALITY 2 3,5\t-1,-1 FOOD#GENERAL 0 -1,-1\n"
    examples = load_examples(write(name, text), null_targets="category")
    assert read(examples) == [
        ("tea", "positive", "so good", 1, "x:1.1"),
        ("food", "negative", None, 1, "x:1.2"),
    ]


def test_an_acos_line_whose_numbers_are_too_long(write):
    text = f"the tea was so good\t1,2 DRINKS#QUALITY 2 {'9' * 30},5\n"
    with pytest.raises(DataError, match=r"x\.tsv:1: "):  # no quad, so no file of quads
        load_examples(write("x.tsv", text))


@pytest.mark.parametrize(("rest", "why"), [
    ("[([9], [1], 'POS')]", r"x\.txt:2: the words 9 to 9 do not fit a sentence of 2 words"),
    ("[([0], [1], 'GREAT')]", "unknown label 'GREAT'"),
    ("[([0], [1])]", "accepted: a triplet"),
    ("[print(1)]", "a list of triplets or quads is accepted"),
    ("[['milk', 'x', 'positive', 'good']]", "the aspect 'milk' does not stand in the sentence"),
    ("[([], [1], 'POS')]", r"the word indices \[\] came"),
    ("[([True], [1], 'POS')]", r"the word indices \[True\] came"),
])  # fmt: skip
def test_a_bad_line_is_named(write, rest, why):
    text = f"tea good####[([0], [1], 'POS')]\ntea good####{rest}\n"
    with pytest.raises(DataError, match=why):
        load_examples(write("x.txt", text))
    examples = load_examples(write("x.txt", text), skip_bad=True)
    assert len(examples) == 1 and examples.left_out["bad line"] == 1


@pytest.mark.slow
def test_every_dmaste_file_has_the_aspects_that_counting_its_lists_gives(shared):
    """Counted another way: the lists are JSON once their brackets and quotes are exchanged."""
    folder = shared / "data" / "dmaste"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    files = sorted(folder.glob("*.txt"))
    assert len(files) == 20
    for file in files:
        asked: Counter = Counter()
        implicit = triplets = 0
        for line in file.read_text(encoding="utf-8").split("\n"):
            if not line.strip():
                continue
            lists = line.split("####")[1].replace("(", "[").replace(")", "]").replace("'", '"')
            seen = set()
            for aspect, _, label in json.loads(lists):
                triplets += 1
                implicit += aspect == [-1]
                if aspect != [-1]:
                    seen.add((min(aspect), max(aspect), label))
            asked.update(label for _, _, label in seen)
        examples = load_examples(file)
        names = {"POS": "positive", "NEG": "negative", "NEU": "neutral"}
        assert examples.counts() == {full: asked[short] for short, full in names.items()}, file
        assert examples.left_out["no aspect term"] == implicit
        further = examples.left_out.get("further opinion on an aspect", 0)
        assert len(examples) + implicit + further == triplets
