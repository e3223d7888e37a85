"""CSV and TSV."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_absa.errors import ConfigError, DataError
from mech_absa.examples import Polarity
from mech_absa.readers import load_examples

POS, NEG, NEU = Polarity.POSITIVE, Polarity.NEGATIVE, Polarity.NEUTRAL


def test_csv_by_hand(write):
    text = 'Text,Aspect Term,Label,domain\n"good, cheap food",food,positive,rest\n\n'
    text += '"two\nlines of wine",wine,Neg,\nplain tea,tea,0,\nno tea,tea,-1,\n'
    examples = load_examples(write("laptop.csv", text))
    assert [(e.sentence, e.span, e.polarity, e.line, e.id, e.domain) for e in examples] == [
        ("good, cheap food", (12, 16), POS, 2, "laptop:2", "rest"),
        ("two\nlines of wine", (13, 17), NEG, 4, "laptop:4", "laptop"),
        ("plain tea", (6, 9), NEU, 6, "laptop:6", "laptop"),
        ("no tea", (3, 6), NEG, 7, "laptop:7", "laptop"),
    ]


def test_offsets_where_given_and_the_nth_place_where_not(write):
    rows = "sentence,aspect,from,to,polarity\ntea tea tea,tea,8,11,pos\ntea tea tea,tea,,,neg\ntea tea tea,tea,,,neu\n"
    examples = load_examples(write("x.csv", rows))
    assert [e.span for e in examples] == [(8, 11), (0, 3), (4, 7)] and examples.ambiguous == 2


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_told_from_the_header(write, delimiter):
    rows = [["sentence", "aspect", "polarity"], ["a tea, b; c | d", "tea", "pos"]]
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(rows)
    assert load_examples(write("x.csv", out.getvalue()))[0].sentence == "a tea, b; c | d"
    assert load_examples(write("y.txt", out.getvalue()))[0].span == (2, 5)


def test_null_targets_in_a_table(write):
    path = write(
        "x.csv",
        "text,target,category,polarity\nslow,NULL,SERVICE#GENERAL,negative\na NULL tea,NULL,FOOD#QUALITY,neutral\n",
    )
    dropped = load_examples(path)
    assert [e.span for e in dropped] == [(2, 6)] and dropped.left_out == {"no aspect term": 1}
    assert [(e.aspect, e.span) for e in load_examples(path, null_targets="category")] == [
        ("service", None),
        ("NULL", (2, 6)),
    ]


def test_tsv_that_was_never_quoted(write):
    examples = load_examples(
        write("x.tsv", 'text\taspect\tlabel\n"typical" food , 5" wide\tfood\tneg\n')
    )
    assert (examples[0].sentence, examples[0].span) == ('"typical" food , 5" wide', (10, 14))


def test_columns_by_name(write):
    path = write("x.csv", "Comment,What,Sent,text,key\nmy tea,tea,pos,unused,k1\n")
    (e,) = load_examples(
        path, columns={"sentence": "Comment", "aspect": "What", "polarity": "Sent", "id": "key"}
    )
    assert (e.sentence, e.aspect, e.polarity, e.id) == ("my tea", "tea", POS, "k1")
    with pytest.raises(
        DataError,
        match=r"x\.csv:1: the field 'Words', given with --columns as the sentence, is missing; there are: Comment, What, Sent, text, key",
    ):
        load_examples(path, columns={"sentence": "Words"})
    with pytest.raises(
        DataError, match=r"x\.csv:1: the field 'no', given with --columns as the id, is missing"
    ):
        load_examples(
            path, columns={"sentence": "Comment", "aspect": "What", "polarity": "Sent", "id": "no"}
        )
    with pytest.raises(
        ConfigError, match="columns names a field 'sentense'; accepted: sentence, aspect"
    ):
        load_examples(path, columns={"sentense": "Comment"})


cells = st.text(alphabet="ab,;\"'\t\n é日😀\u2028|", max_size=8)


@settings(deadline=None)  # a slow machine is no wrong answer
@given(
    st.lists(
        st.tuples(cells, cells.filter(str.strip), cells, st.sampled_from(Polarity)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([",", "\t"]),
)
def test_offsets_of_any_text_come_back(tmp_path_factory, rows, delimiter):
    path = tmp_path_factory.mktemp("table") / "x.csv"
    with open(path, "w", encoding="utf-8", newline="") as f:
        out = csv.writer(f, delimiter=delimiter)
        out.writerow(["text", "aspect", "from", "to", "polarity"])
        for before, aspect, after, p in rows:
            out.writerow(
                [before + aspect + after, aspect, len(before), len(before + aspect), p.value]
            )
    for e, (before, aspect, after, p) in zip(load_examples(path), rows, strict=True):
        assert (e.sentence, e.aspect, e.span, e.polarity) == (
            before + aspect + after,
            aspect,
            (len(before), len(before + aspect)),
            p,
        )


HEADER = "sentence,aspect,label\nmy tea,tea,pos\n"
BAD = [
    ("my tea,tea", "2 cells came, but the header names 3 columns: sentence, aspect, label"),
    ("my tea,tea,pos,,", "5 cells came, but the header names 3 columns"),
    ("my tea,milk,pos", "the aspect 'milk' does not stand in the sentence 'my tea'"),
    ("my tea,,pos", "the aspect is empty"),
    ("my tea,tea,", "unknown label ''; accepted: positive/pos/1"),
]


@pytest.mark.parametrize(("row", "why"), BAD)
def test_a_bad_row_is_named(write, row, why):
    path = write("x.csv", HEADER + row + "\nmy tea,tea,neg\n")
    with pytest.raises(DataError) as caught:
        load_examples(path)
    assert str(caught.value).startswith(f"{path}:3: {why}")
    skipped = load_examples(path, skip_bad=True)
    assert ([e.line for e in skipped], skipped.problems) == ([2, 4], (str(caught.value),))


@pytest.mark.parametrize(("text", "line", "why"), [
    ("sentence,label\nmy tea,pos\n", 1, "the field 'aspect' is missing; there are: sentence, label; accepted names: aspect, aspect_term"),
    ("sentence,aspect,label,label\n", 1, "the header names a column 'label' more than once"),
    ("sentence,aspect,label,polarity\n", 1, "label or polarity could be the polarity; name one, as in columns={'polarity': 'label'}"),
    ('sentence,aspect,label\n"my tea,tea,pos\n', 2, "broken table: unexpected end of data, in the row that begins here"),
    ("sentence,aspect,label\n", None, "no example could be read (there are no records)"),
])  # fmt: skip
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_table_that_is_none_is_refused_whole(write, text, line, why, skip_bad):
    path = write("x.csv", text)
    with pytest.raises(DataError) as caught:
        load_examples(path, skip_bad=skip_bad)
    assert why in str(caught.value) and (caught.value.source, caught.value.line) == (path, line)


def test_line_ends_inside_a_cell_are_kept_for_offsets_count_them(write):
    (e,) = load_examples(
        write("x.csv", 'text,aspect,from,to,label\r\n"two\r\nlines",lines,5,10,pos\r\n')
    )
    assert e.sentence == "two\r\nlines"
