"""Files that nobody means well with: the right result, or one bounded sentence with file and line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mech_absa.errors import DataError
from mech_absa.examples import Examples
from mech_absa.readers import FORMATS, load_examples
from mech_absa.readers.rows import LONGEST, Reading
from mech_absa.records import write_json

ROW = '{"sentence": "the tea was good", "aspect": "tea", "label": "Pos"}'
ARTS = {
    "7_1": {"sentence": "the tea was good", "term": "tea", "polarity": "positive", "id": "7_1"},
    "8": {"sentence": "the cup was bad", "term": "cup", "polarity": "negative"},
}


@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_of_records_is_read_on_one_line_and_indented(write, indent):
    examples = load_examples(write("arts.json", json.dumps(ARTS, indent=indent)))
    lines = [1, 1] if indent is None else [2, 8]
    assert [(e.aspect, e.id, e.line) for e in examples] == [
        ("tea", "7_1", lines[0]),
        ("cup", "8", lines[1]),
    ]


def test_one_bad_record_of_an_object_is_one_bounded_message(write):
    records = {str(i): {"sentence": "x " * 5000, "term": "tea"} for i in range(500)}
    for indent in (None, 1):
        with pytest.raises(DataError) as caught:
            load_examples(write("a.json", json.dumps(records, indent=indent)))
        assert len(str(caught.value)) < LONGEST + 200 and "--columns polarity=NAME" in str(
            caught.value
        )
    with pytest.raises(DataError, match=r"a\.json:1: broken JSON: ',' or '}' is needed"):
        load_examples(write("a.json", f'{{"1": {ROW} "2": {ROW}}}'))


def test_json_lines_may_begin_with_a_field_that_holds_an_object(write):
    row = '{"meta": {"a": 1}, "sentence": "the tea", "aspect": "tea", "label": "Pos"}\n'
    assert len(load_examples(write("x.json", row * 2))) == 2
    assert len(load_examples(write("x.json", row))) == 1


def test_one_record_over_several_lines_is_read(write):
    assert load_examples(write("x.json", json.dumps(json.loads(ROW), indent=2)))[0].aspect == "tea"


BAD = {
    "sentences inside sentences": (
        "x.xml",
        "<sentences>" + "<sentence><text>a</text>" * 30 + "</sentence>" * 30 + "</sentences>",
        "inside another <sentence>",
    ),
    "a sentence of gigabytes": (
        "x.seg",
        "$T$ " * 100_000 + "\n" + "a" * 100 + "\n1\n",
        "100000 times",
    ),
    "an encoding that expat has not": (
        "x.xml",
        '<?xml version="1.0" encoding="gb2312"?><sentences/>',
        "UTF-8 is accepted",
    ),
    "idna": ("x.xml", '<?xml version="1.0" encoding="idna"?><sentences/>', "UTF-8 is accepted"),
    "punycode": (
        "x.xml",
        '<?xml version="1.0" encoding="punycode"?><sentences/>',
        "UTF-8 is accepted",
    ),
    "nothing but NBSP": ("x", "\u00a0\u00a0\n", "the file is empty"),
    "nothing but line separators": ("x.seg", "\u2028\u2028", "the file is empty"),
    "deep nesting": ("x.jsonl", "[" * 991 + "]" * 991, "nest|JSON object"),
    "deep nesting in a field": (
        "x.jsonl",
        '{"sentence": ' + "[" * 991 + "]" * 991 + ', "aspect": "a", "label": "Pos"}',
        "nest|a string is accepted",
    ),
    "half a pair in the id": (
        "x.jsonl",
        ROW[:-1] + ', "id": "\\ud800"}',
        "half of a surrogate pair",
    ),
    "half a pair in the domain": (
        "x.jsonl",
        ROW[:-1] + ', "domain": "\\udfff"}',
        "half of a surrogate pair",
    ),
    "a field twice": ("x.jsonl", ROW[:-1] + ', "aspect": "was"}', "'aspect' comes twice"),
    "two signs": (
        "x.jsonl",
        ROW[:-1] + ', "from": "--5", "to": "7"}',
        "a whole number of characters is accepted",
    ),
    "superscript": ("x.jsonl", ROW[:-1] + ', "from": "²", "to": "7"}', "a whole number"),
    "an aspect of megabytes": ("x.jsonl", ROW.replace('"tea"', f'"{"t" * 10**6}"'), "stand in"),
    "a label of megabytes": ("x.jsonl", ROW.replace("Pos", "P" * 10**7), "unknown label"),
    "a key of megabytes": ("x.jsonl", ROW.replace("label", "l" * 10**7), "is missing"),
    "a cell of megabytes": ("x.csv", "sentence,aspect,label\n" + "a" * 10**6 + ",a,1\n", "x.csv:2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_hostile_files_give_one_bounded_sentence(write, case):
    name, text, why = BAD[case]
    with pytest.raises(DataError, match=why) as caught:
        load_examples(write(name, text))
    message = str(caught.value)
    assert len(message) < LONGEST + 200 and "\n" not in message and name in message


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"x\.jsonl: no regular file"):
        load_examples(tmp_path / "x.jsonl")


def test_carriage_returns_alone_end_lines(write):
    examples = load_examples(write("x.jsonl", f"{ROW}\r{ROW}\r"))
    assert [e.line for e in examples] == [1, 2]
    assert len(load_examples(write("x.seg", "$T$ was good\rtea\r1\r"))) == 1


class Counted(set):
    """A set that counts how often it is asked for a member."""

    asked = 0

    def __contains__(self, item: object) -> bool:
        self.asked += 1
        return super().__contains__(item)


def test_one_id_for_all_rows_takes_work_that_grows_with_their_number(write, monkeypatch):
    """Twice the rows took four times as long: each row asked for all numbers that were given before."""
    ids = Counted()
    init = Reading.__post_init__
    monkeypatch.setattr(Reading, "__post_init__", lambda r: (init(r), setattr(r, "_ids", ids)))
    row = ROW[:-1] + ', "id": "same"}\n'
    examples = load_examples(write("x.jsonl", row * 2_000))
    assert [e.id for e in examples[:3]] == ["same", "same.2", "same.3"]
    assert len({e.id for e in examples}) == 2_000 == len(ids)
    assert ids.asked <= 2 * 2_000


def test_a_file_name_that_is_no_utf8_can_be_read_and_recorded(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.jsonl"
    with open(path, "w") as f:
        f.write(ROW)
    for source in (os.fsdecode(path), Path(os.fsdecode(path))):
        examples = load_examples(source)
        write_json(tmp_path / "run.json", examples.account())
        assert "\\udcff" in examples.source and examples[0].id.endswith(":1")


def test_case_may_differ_where_that_is_asked_for(write):
    row = {"sentence": "the Tea was good", "aspect": "tea", "label": "Pos"}
    located = {**row, "from": 4, "to": 7}
    for r in (row, located):
        path = write("x.jsonl", json.dumps(r))
        with pytest.raises(DataError, match="ignore_case=True"):
            load_examples(path)
        (e,) = load_examples(path, ignore_case=True)
        assert (e.aspect, e.span) == ("Tea", (4, 7))


def test_case_is_compared_without_shifting_offsets(write):
    # The lower case of this letter has two characters.
    row = {"sentence": "\u0130\u0130 Tea", "aspect": "tea", "label": "Pos"}
    (e,) = load_examples(write("x.jsonl", json.dumps(row)), ignore_case=True)
    assert e.span == (3, 6)


def test_what_a_label_means_can_be_said_and_the_message_says_how(write):
    path = write("x.jsonl", ROW.replace("Pos", "happy"))
    with pytest.raises(DataError, match="--meaning happy=negative"):
        load_examples(path)
    assert load_examples(path, labels={"happy": "positive"})[0].polarity == "positive"


WHOLE = """<Reviews><Review rid="1"><sentences><sentence id="1:0"><text>Good tea.</text></sentence>
<sentence id="1:1"><text>Bad cups.</text></sentence></sentences>
<Opinions><Opinion category="FOOD#GENERAL" polarity="positive"/></Opinions></Review></Reviews>"""
CATEGORIES = """<sentences><sentence id="1"><text>Good tea.</text><aspectCategories>
<aspectCategory category="food" polarity="positive"/></aspectCategories></sentence></sentences>"""


@pytest.mark.parametrize(("text", "reason", "sentence"), [
    (WHOLE, "opinion on a whole text", "Good tea. Bad cups."),
    (CATEGORIES, "aspect category", "Good tea."),
])  # fmt: skip
def test_opinions_without_words_are_named_and_can_be_asked_about(write, text, reason, sentence):
    path = write("x.xml", text)
    with pytest.raises(DataError, match=rf"\(1 {reason}\).*--null-targets category"):
        load_examples(path)
    (e,) = load_examples(path, null_targets="category")
    assert (e.sentence, e.aspect, e.span, e.polarity.value) == (sentence, "food", None, "positive")


def test_a_limit_is_drawn_over_everything_that_was_read():
    examples = load_examples("builtin:restaurant+laptop/test", limit=40, seed=1)
    domains = [e.domain for e in examples]
    assert domains.count("restaurant") > 8 and domains.count("laptop") > 8
    everything = load_examples("builtin:restaurant+laptop/test")
    assert list(examples) == list(everything.sample(40, 1))
    assert list(examples) != list(load_examples("builtin:restaurant+laptop/test", limit=40, seed=2))
    head = load_examples("builtin:restaurant+laptop/test", limit=40, head=True)
    assert list(head) == list(everything[:40])


# --- mutations of good files ----------------------------------------------------------------------

GOOD = {
    "x.jsonl": ROW + "\n" + ROW.replace("tea", "cup"),
    "x.json": json.dumps(ARTS, indent=1),
    "x.xml": CATEGORIES.replace(
        "<aspectCategories>",
        '<aspectTerms><aspectTerm term="tea" polarity="positive" from="5" to="8"/></aspectTerms>'
        "<aspectCategories>",
    ),
    "x.seg": "the $T$ was good\ntea\n1\n",
    "x.csv": 'sentence,aspect,polarity\n"the tea, good",tea,positive\n',
    "tsa.json": json.dumps([{"text": "the tea", "targets": [
        {"text": "tea", "location": {"begin": 4, "end": 7}, "sentiment": "positive"}]}]),
    "x.txt": "the tea was good####[([1], [3], 'POS')]\n",
    "q.txt": "the tea was good####[['tea', 'food', 'positive', 'good']]\n",
    "x.tsv": "the tea was good\t1,2 FOOD#QUALITY 2 3,4\n",
    "x.conll": "the O\ntea B-POS\nwas O\n",
    "e.txt": "the tea####the=O tea=T-POS\n",
    "s.json": json.dumps([{"id": 1, "text": "LOCATION1 ok", "opinions": [
        {"target_entity": "LOCATION1", "aspect": "general", "sentiment": "Positive"}]}]),
}  # fmt: skip
PIECES = ["", "\0", "\ud7ff", '"', "[", "]", "{", "}", "(", ")", "<", ">", "&", "'", "\t", "\n", "\r",
          "-1", "9" * 30, "1e999", "NaN", "null", "####", "$T$", "=", ",", "O", "\\ud800", "é", "\u2028"]  # fmt: skip
edit = st.tuples(st.floats(0, 1), st.integers(0, 12), st.sampled_from(PIECES))


def mutated(name: str, edits) -> bytes:
    text = GOOD[name]
    for where, length, piece in edits:
        at = int(where * len(text))
        text = text[:at] + piece + text[at + length :]
    return text.encode()


def check(folder, name: str, data: bytes, **options) -> None:
    path = folder / name
    path.write_bytes(data)
    try:
        examples = load_examples(path, **options)
    except DataError as e:
        assert str(path) in str(e) and len(str(e)) < LONGEST + 400, str(e)
        return
    assert isinstance(examples, Examples) and len(examples)
    for e in examples:
        assert e.span is None or e.sentence[slice(*e.span)] == e.aspect
    json.dumps(examples.account(), ensure_ascii=False).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def test_the_good_files_of_the_mutations_are_good(folder):
    for name, text in GOOD.items():
        (folder / name).write_bytes(text.encode())
        assert len(load_examples(folder / name)) >= 1, name


options = st.fixed_dictionaries({
    "skip_bad": st.booleans(), "ignore_case": st.booleans(),
    "null_targets": st.sampled_from(["drop", "category"]),
    "format": st.sampled_from([None, None, None, *FORMATS]),
})  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(GOOD)), st.lists(edit, min_size=1, max_size=4), options)
@pytest.mark.slow
def test_a_mutated_file_gives_examples_or_one_bounded_sentence(folder, name, edits, options):
    check(folder, name, mutated(name, edits), **options)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(GOOD)), st.lists(edit, min_size=1, max_size=6), options)
def test_many_mutated_files(folder, name, edits, options):
    check(folder, name, mutated(name, edits), **options)
