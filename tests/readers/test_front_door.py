"""`load_examples`: which reader a source gets, the built-in world, and what is refused before any reader looks."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from mech_absa.errors import ConfigError, DataError
from mech_absa.readers import load_examples
from mech_absa.readers.rows import guess_domain

PAPER = '{"sentence": "my tea", "aspect": "tea", "label": "Pos"}\n'
TSA = json.dumps(
    [
        {
            "text": "my tea",
            "targets": [
                {"text": "tea", "location": {"begin": 3, "end": 6}, "sentiment": "positive"}
            ],
        }
    ]
)
TERM = '<aspectTerm term="tea" polarity="positive" from="3" to="6"/>'
XML = f"<sentences><sentence><text>my tea</text><aspectTerms>{TERM}</aspectTerms></sentence></sentences>"
ONE_OF_EACH = {
    "jsonl": PAPER,
    "array": f"[{PAPER}]",
    "tsa": TSA,
    "xml": XML,
    "seg": "my $T$\ntea\n1\n",
    "csv": "text,aspect,label\nmy tea,tea,pos\n",
}


@pytest.mark.parametrize(
    ("name", "content"),
    [(n, c) for n in ("x.txt", "x") for c in ONE_OF_EACH]
    + [(n, c) for n in ("x.json", "X.JSON") for c in ("jsonl", "array", "tsa", "xml")],
)
def test_the_content_decides_where_the_name_does_not(write, name, content):
    (e,) = load_examples(
        write(name, "\ufeff\n" + ONE_OF_EACH[content] if content != "xml" else ONE_OF_EACH[content])
    )
    assert (e.sentence, e.aspect, e.span, e.polarity) == ("my tea", "tea", (3, 6), "positive")


def test_a_format_given_beats_the_name(write):
    assert load_examples(write("x.csv", XML), format="semeval")[0].span == (3, 6)


def test_limit_keeps_the_first_after_all_were_checked(write):
    path = write("x.json", PAPER * 5)
    assert [e.line for e in load_examples(path, limit=2, head=True)] == [1, 2]
    assert load_examples(path, limit=2).sha256 == load_examples(path).sha256
    assert len(load_examples(path, limit=99)) == 5
    with pytest.raises(DataError, match=r"y\.json:6"):
        load_examples(write("y.json", PAPER * 5 + "{\n"), limit=2)


def test_domains_are_guessed_from_whole_words(tmp_path):
    guesses = {
        "rest_train.json": "restaurant", "ABSA16_Laptops_Train_SB1.xml": "laptop", "Restaurants_Test_Gold.xml": "restaurant",
        "mams/test.xml": "restaurant", "device/train.jsonl": "device", "service_test.json": "service",
        "interest/forest.csv": "", "x.json": "",
    }  # fmt: skip
    assert {name: guess_domain(tmp_path / name) for name in guesses} == guesses


# --- the built-in world -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def world():
    from mech_absa.world import builtin_path

    if not builtin_path("restaurant/test").is_file():
        pytest.skip("the built-in world has not been written yet")


def test_builtin_by_domain_and_split(world):
    one = load_examples("builtin:restaurant/test")
    assert {e.domain for e in one} == {"restaurant"} and {e.source for e in one} == {
        "builtin:restaurant/test"
    }
    assert all(e.span and e.opinion and e.counterfactuals for e in one)
    assert one.left_out == {} and one.problems == ()


def test_builtin_joined(world):
    part, joined = (
        load_examples("builtin:laptop/test"),
        load_examples("builtin:restaurant+laptop/test"),
    )
    assert joined.source == "builtin:restaurant+laptop/test" and [e.domain for e in joined[:1]] == [
        "restaurant"
    ]
    assert [(e.source, e.line, e.sentence) for e in joined[-len(part) :]] == [
        (e.source, e.line, e.sentence) for e in part
    ]
    assert len({e.id for e in joined}) == len(joined) and joined.sha256 != part.sha256


def test_a_split_alone_is_that_of_every_domain(tmp_path, monkeypatch):
    import mech_absa.world as generate

    (tmp_path / "x.jsonl").write_text(PAPER)
    monkeypatch.setattr(generate, "builtin_path", lambda name: tmp_path / "x.jsonl")
    sources = [f"builtin:{d}/train" for d in ("restaurant", "laptop", "device", "service")]
    assert [e.source for e in load_examples("builtin:train")] == sources


def test_joining_tells_shared_ids_apart_and_adds_the_accounts(tmp_path, monkeypatch):
    import mech_absa.world as generate

    row = {"id": "a", "text": "my tea , tea", "aspect": "tea", "polarity": "positive"}
    for name in ("laptop", "device"):
        bad = json.dumps({**row, "polarity": "conflict"})
        (tmp_path / f"{name}.jsonl").write_text(
            f"{json.dumps(row)}\n{bad}\n{{\n" + json.dumps({**row, "id": name})
        )
    monkeypatch.setattr(
        generate, "builtin_path", lambda name: tmp_path / f"{name.split('/')[0]}.jsonl"
    )
    joined = load_examples("builtin:laptop+device/test", skip_bad=True)
    assert [e.id for e in joined] == [
        "builtin:laptop/test:a",
        "laptop",
        "builtin:device/test:a",
        "device",
    ]
    assert joined.left_out == {"conflict": 2, "bad line": 2} and joined.ambiguous == 6
    assert [p.split(" ")[0] for p in joined.problems] == [
        "builtin:laptop/test:3:",
        "builtin:device/test:3:",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "builtin:",
        "builtin:hotel/test",
        "builtin:laptop",
        "builtin:laptop/dev",
        "builtin:laptop+laptop/test",
        "builtin:laptop/test/x",
    ],
)
def test_builtin_names_that_are_none(name):
    with pytest.raises(
        DataError,
        match=rf"{re.escape(name)}: there are no such built-in examples; accepted: builtin:DOMAINS/SPLIT .*restaurant.*train or test",
    ):
        load_examples(name)


# --- refused at the door ------------------------------------------------------------------------------------------------------------------


def test_a_missing_file_offers_its_neighbours(write, tmp_path):
    write("laptop_test.json", PAPER)
    missing = str(tmp_path / "laptop_tset.json")
    with pytest.raises(
        DataError,
        match=r"laptop_tset\.json: there is no such file; near it there is laptop_test\.json$",
    ):
        load_examples(missing)
    with pytest.raises(
        DataError, match=r"there is no such file; there is no folder .*nowhere either"
    ):
        load_examples(tmp_path / "nowhere" / "x.json")
    with pytest.raises(
        DataError,
        match=r"no-owner/no-name: there is no such file; .*; a data set on the hub is written hf:no-owner/no-name$",
    ):
        load_examples("no-owner/no-name")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"the folder .*void is empty"):
        load_examples(tmp_path / "void" / "x.json")


@pytest.mark.parametrize("content", [b"", b" \n\r\n\t", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".xml", ".seg", ".csv", ".tsv", ""])
def test_an_empty_file_is_named(write, content, suffix):
    path = write(f"x{suffix}", content)
    with pytest.raises(DataError) as caught:
        load_examples(path, skip_bad=True)
    assert str(caught.value) == f"{path}: the file is empty; at least one example is needed"


@pytest.mark.parametrize("suffix", [".seg", ".csv", ".txt", ".json"])
def test_bytes_that_are_not_utf8_are_named(write, suffix):
    path = write(f"x{suffix}", b"text,aspect,label\nok,ok,1\ncaf\xe9 $T$,b,c\n")
    with pytest.raises(
        DataError, match="3: the byte 0xe9 is not UTF-8; only UTF-8 text is accepted"
    ):
        load_examples(path)


def test_a_format_that_cannot_be_told_is_named(write):
    with pytest.raises(
        DataError,
        match=r"the format cannot be told from the name or the content; .* one of jsonl, semeval, seg, table, tsa, triplets, tags or sentihood",
    ):
        load_examples(write("x", "once upon a time, there was tea\n"))


@pytest.mark.parametrize(("options", "why"), [
    ({"format": "xml"}, "there is no format 'xml'; accepted: jsonl, semeval, seg, table, tsa, triplets, tags, sentihood or hf"),
    ({"null_targets": "keep"}, "null_targets is 'keep'; accepted: drop or category"),
    ({"limit": -1}, "limit is -1; a number of examples of at least 1 is accepted"),
    ({"limit": 0}, "limit is 0"),
    ({"split": "test"}, "split is 'test', but only a Hugging Face data set has one"),
    ({"subset": "a"}, "subset is 'a', but only"),
    ({"columns": {"aspect": "x"}, "format": "seg"}, "columns were named, but the format seg has none"),
])  # fmt: skip
def test_options_that_do_not_fit_are_named(write, options, why):
    with pytest.raises(ConfigError, match=re.escape(why)):
        load_examples(write("x.json", PAPER), **options)


def test_a_hub_name_that_says_two_splits():
    with pytest.raises(
        ConfigError, match="hf:a/b:train names the split 'train' and split names 'test'; give one"
    ):
        load_examples("hf:a/b:train", split="test")


def test_reading_needs_neither_torch_nor_datasets(write):
    path = write("x.json", PAPER)
    program = f"import sys; from mech_absa.readers import load_examples; load_examples({path!r})\n"
    program += "print(*sorted({'torch', 'datasets'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
