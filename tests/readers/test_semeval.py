"""SemEval XML, 2014 to 2016: by hand, against MAMS row by row, and against XML made to hurt."""

from __future__ import annotations

import re
from collections import Counter
from xml.sax.saxutils import escape, quoteattr

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_absa.errors import DataError
from mech_absa.examples import Polarity, mixed_polarity
from mech_absa.readers import load_examples

POS, NEG, NEU = Polarity.POSITIVE, Polarity.NEGATIVE, Polarity.NEUTRAL

Y2014 = """<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<sentences>
    <sentence id="813">
        <text>All the money went into the d&amp;cor, none into the "chefs".</text>
        <aspectTerms>
            <aspectTerm term="d&amp;cor" polarity="neutral" from="28" to="33"/>
            <aspectTerm term="chefs" polarity="conflict"
                        from="50" to="55"/>
        </aspectTerms>
        <aspectCategories><aspectCategory category="food" polarity="negative"/></aspectCategories>
    </sentence>
    <sentence id="814"><text>Nothing to ask.</text></sentence>
    <sentence id="815"><text>food food</text>
        <aspectTerms><aspectTerm term="food" polarity="positive" from="5" to="9"/><aspectTerm
            term="food" polarity="negative" from="0" to="4"/></aspectTerms>
    </sentence>
</sentences>
"""

Y2016 = """<?xml version="1.0" encoding="UTF-8"?>
<Reviews>
  <Review rid="1">
    <sentences>
      <sentence id="1:0">
        <text>The pizza was cold and nobody cared.</text>
        <Opinions>
          <Opinion target="pizza" category="FOOD#QUALITY" polarity="negative" from="4" to="9"/>
          <Opinion target="NULL" category="SERVICE#GENERAL" polarity="negative" from="0" to="0"/>
        </Opinions>
      </sentence>
      <sentence id="1:1" OutOfScope="TRUE"><text>I was born nearby.</text></sentence>
    </sentences>
  </Review>
  <Review rid="2">
    <sentences>
      <sentence id="2:0"><text>Nice plates!</text>
        <Opinions><Opinion category="FOOD#STYLE_OPTIONS" polarity="positive"/></Opinions></sentence>
    </sentences>
  </Review>
</Reviews>
"""


def test_2014_by_hand(write):
    examples = load_examples(write("Restaurants_Train.xml", Y2014))
    assert [(e.aspect, e.span, e.polarity, e.line, e.id) for e in examples] == [
        ("d&cor", (28, 33), NEU, 6, "Restaurants_Train:1.1"),
        ("food", (5, 9), POS, 14, "Restaurants_Train:3.1"),
        ("food", (0, 4), NEG, 14, "Restaurants_Train:3.2"),
    ]
    assert examples.left_out == {"conflict": 1, "aspect category": 1, "sentence without aspects": 1}
    assert {e.domain for e in examples} == {"restaurant"} and examples.ambiguous == 0


def test_2016_by_hand(write):
    examples = load_examples(write("x.xml", Y2016))
    assert [(e.aspect, e.span, e.polarity, e.line, e.id) for e in examples] == [
        ("pizza", (4, 9), NEG, 8, "x:1.1")
    ]
    assert examples.left_out == {"no aspect term": 2, "sentence without aspects": 1}


def test_2015_null_targets_can_be_asked_by_category(write):
    examples = load_examples(write("x.xml", Y2016), null_targets="category")
    assert [(e.aspect, e.span, e.polarity, e.id) for e in examples] == [
        ("pizza", (4, 9), NEG, "x:1.1"),
        ("service", None, NEG, "x:1.2"),
        ("food style options", None, POS, "x:3.1"),
    ]
    assert examples.left_out == {"sentence without aspects": 1}


def test_blanks_that_xml_changes_in_attributes_only(write):
    text = '<sentences><sentence><text>a wine\nlist</text><aspectTerms><aspectTerm term="wine\nlist" polarity="positive" from="2" to="11"/>'
    (e,) = load_examples(write("x.xml", text + "</aspectTerms></sentence></sentences>"))
    assert (e.aspect, e.span) == ("wine\nlist", (2, 11))


def test_other_encodings_that_xml_declares(write):
    text = (
        Y2014.replace("UTF-8", "iso-8859-1")
        .replace("d&amp;cor", "décor")
        .replace('from="28" to="33"', 'from="28" to="33"')
    )
    assert load_examples(write("x.xml", text.encode("latin-1")))[0].aspect == "décor"
    assert (
        load_examples(
            write("y.xml", Y2014.replace("UTF-8", "UTF-16").encode("utf-16")), format="semeval"
        )[0].aspect
        == "d&cor"
    )


printable = st.text(alphabet=st.characters(blacklist_categories=["Cs", "Cc", "Cn"]), max_size=8)


@settings(deadline=None)  # a slow machine is no wrong answer
@given(
    before=printable,
    aspect=printable.filter(str.strip),
    between=printable,
    label=st.sampled_from(Polarity),
    second=st.booleans(),
)
def test_offsets_of_any_text_come_back(tmp_path_factory, before, aspect, between, label, second):
    sentence = before + aspect + between + aspect
    start = len(before + aspect + between) if second else len(before)
    path = tmp_path_factory.mktemp("xml") / "x.xml"
    term = f'term={quoteattr(aspect)} polarity="{label.value}" from="{start}" to="{start + len(aspect)}"'
    path.write_text(
        f"<sentences><sentence><text>{escape(sentence)}</text><aspectTerms><aspectTerm {term}/></aspectTerms></sentence></sentences>",
        encoding="utf-8",
    )
    (e,) = load_examples(path)
    assert (e.sentence, e.aspect, e.span, e.polarity) == (
        sentence,
        aspect,
        (start, start + len(aspect)),
        label,
    )


TERM = '<aspectTerm term="food" polarity="neutral" from="4" to="8"/>'
BAD = [
    (TERM.replace('"8"', '"80"'), "aspect offsets 4..80 do not fit a sentence of 9 characters"),
    (TERM.replace('"4"', '"3"'), "offsets 3..8 give ' food', but the aspect is 'food'"),
    (TERM.replace('"4"', '"-4"'), "aspect offsets -4..8 do not fit"),
    (
        TERM.replace('"4"', '"four"'),
        "the field 'from' holds 'four'; a whole number of characters is accepted",
    ),
    (TERM.replace("neutral", "fine"), "unknown label 'fine'; accepted: positive/pos/1"),
    (
        TERM.replace("term=", "name="),
        "<aspectTerm> has no attribute 'term'; there are: name, polarity, from, to",
    ),
    (
        '<Opinion target="NULL" polarity="neutral"/>',
        "<Opinion> has no attribute 'category'; there are: target, polarity",
    ),
    ('<Opinion target="NULL" category="A#B" polarity="fine"/>', "unknown label 'fine'"),
]


@pytest.mark.parametrize(("element", "why"), BAD, ids=[why for _, why in BAD])
def test_a_bad_element_is_named(write, element, why):
    path = write(
        "x.xml",
        f"<sentences>\n<sentence><text>the food.</text>\n<aspectTerms>\n{element}\n{TERM}</aspectTerms></sentence></sentences>",
    )
    with pytest.raises(DataError) as caught:
        load_examples(path)
    assert str(caught.value).startswith(f"{path}:4: {why}")
    skipped = load_examples(path, skip_bad=True)
    assert (len(skipped), skipped.problems, skipped.left_out) == (
        1,
        (str(caught.value),),
        {"bad line": 1},
    )


def test_a_sentence_without_text_is_named(write):
    path = write(
        "x.xml",
        f"<sentences>\n<sentence>\n<aspectTerms>{TERM}</aspectTerms></sentence></sentences>",
    )
    with pytest.raises(DataError, match=r"x\.xml:3: the sentence has no <text>"):
        load_examples(path)


LAUGHS = """<?xml version="1.0"?>
<!DOCTYPE lolz [
 <!ENTITY lol "lol">
 <!ENTITY lol2 "&lol;&lol;&lol;&lol;&lol;&lol;&lol;&lol;&lol;&lol;">
]>
<sentences><sentence><text>&lol2;</text></sentence></sentences>
"""
WHOLE = [
    (LAUGHS, 3, "the XML declares the entity 'lol'; entities can expand"),
    (LAUGHS.replace(' <!ENTITY lol "lol">', ' <!ENTITY lol SYSTEM "file:///etc/passwd">'), 3, "the XML declares the entity 'lol'"),
    ('<!DOCTYPE s SYSTEM "http://example.org/x.dtd">\n<sentences></sentences>', 1, "the XML refers to a file outside itself"),
    ("<!DOCTYPE s [\n%p;]>\n<sentences><sentence>\n<text>a</text></sentence></sentences>", 2, "the entity '%p' is not known"),
    ("<sentences>\n<sentence><text>a</sentence></sentences>", 2, "broken XML: mismatched tag"),
    ("<sentences>\n<sentence>", 2, "broken XML: no element found"),
    ("<sentences>\n<a>\xff</a>", 2, "broken XML"),
    ("\n\n<html><p>hello</p></html>", 3, "<html> and holds no <sentence>; accepted: SemEval 2014 (<sentences>) and 2015/16"),
    ("plain words", 1, "broken XML: syntax error"),
    ("<sentences><sentence><text>a</text></sentence></sentences>", None, "no example could be read (1 sentence without aspects)"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "why"), WHOLE, ids=[why for *_, why in WHOLE])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_file_that_is_no_sound_xml_is_refused_whole(write, text, line, why, skip_bad):
    path = write("x.xml", text.encode("latin-1"))
    with pytest.raises(DataError, match=re.escape(why)) as caught:
        load_examples(path, skip_bad=skip_bad)
    assert (caught.value.source, caught.value.line) == (path, line)


# --- MAMS ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "positive", "negative", "neutral"),
    [("train", 3380, 2764, 5042), ("val", 403, 325, 604), ("test", 400, 329, 607)],
)
def test_counts_of_mams(shared, name, positive, negative, neutral):
    examples = load_examples(shared / "data" / "mams" / f"{name}.xml")
    assert examples.counts() == {"positive": positive, "negative": negative, "neutral": neutral}
    assert examples.left_out == {} and {e.domain for e in examples} == {"restaurant"}
    assert len({e.id for e in examples}) == len(examples)
    assert len(mixed_polarity(examples)) == len(
        examples
    )  # what MAMS was made for: every sentence holds several polarities


def test_rows_of_mams_exactly(shared):
    examples = load_examples(shared / "data" / "mams" / "test.xml")
    assert [(e.aspect, e.span, e.polarity, e.line, e.id) for e in examples[:6]] == [
        ("food", (4, 8), NEU, 6, "test:1.1"),
        ("served", (13, 19), POS, 7, "test:1.2"),
        ("appetizers", (93, 103), POS, 8, "test:1.3"),
        ("owner", (64, 69), NEU, 14, "test:2.1"),
        ("waitress", (88, 96), NEG, 15, "test:2.2"),
        ("wine", (125, 129), NEU, 16, "test:2.3"),
    ]


def test_every_row_of_mams_stands_on_its_line(shared):
    path = shared / "data" / "mams" / "test.xml"
    lines = path.read_text(encoding="utf-8").split("\n")
    examples = load_examples(path)
    for e in examples:
        start, end = e.span
        written = lines[e.line - 1]
        assert (
            f'from="{start}"' in written
            and f'to="{end}"' in written
            and f'polarity="{e.polarity.value}"' in written
        )
        assert quoteattr(e.aspect) in written
    assert Counter(e.line for e in examples).most_common(1)[0][1] == 1
