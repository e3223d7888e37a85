"""Three-line files."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech_absa.errors import DataError
from mech_absa.examples import Polarity
from mech_absa.readers import load_examples

POS, NEG, NEU = Polarity.POSITIVE, Polarity.NEGATIVE, Polarity.NEUTRAL


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_by_hand(write, end):
    text = "$T$ is super fast , says café .\nboot time \n1\n\nno new $T$\nwindows 8\n-1\na $T$ , b\nlid\n0"
    examples = load_examples(write("laptop_test.seg", text.replace("\n", end)))
    assert [(e.sentence, e.aspect, e.span, e.polarity, e.line, e.id) for e in examples] == [
        ("boot time is super fast , says café .", "boot time", (0, 9), POS, 1, "laptop_test:1"),
        ("no new windows 8", "windows 8", (7, 16), NEG, 5, "laptop_test:5"),
        ("a lid , b", "lid", (2, 5), NEU, 8, "laptop_test:8"),
    ]
    assert examples.ambiguous == 0 and {e.domain for e in examples} == {"laptop"}


def test_the_mark_chooses_among_repeated_aspects(write):
    examples = load_examples(write("x.seg", "food , $T$ , food\nfood\n1\n$T$ and $T$\nfood\n-1\n"))
    assert [(e.sentence, e.span) for e in examples] == [
        ("food , food , food", (7, 11)),
        ("food and food", (0, 4)),
    ]
    assert examples.ambiguous == 1


def test_the_format_is_told_from_the_content(write):
    assert load_examples(write("train.raw", "nice $T$\nfood\n1\n"))[0].span == (5, 9)


plain = st.text(alphabet="ab é日😀'-\u2028", max_size=8)


@settings(deadline=None)  # a slow machine is no wrong answer
@given(
    st.lists(
        st.tuples(plain, plain.map(str.strip).filter(bool), plain, st.sampled_from([-1, 0, 1])),
        min_size=1,
        max_size=4,
    )
)
def test_offsets_of_any_text_come_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("seg") / "x.seg"
    path.write_text(
        "".join(
            f"{before}$T${after}\n{aspect}\n{label}\n" for before, aspect, after, label in rows
        ),
        encoding="utf-8",
    )
    for e, (before, aspect, after, label) in zip(load_examples(path), rows, strict=True):
        assert e.sentence == before + aspect + after and e.span == (
            len(before),
            len(before + aspect),
        )
        assert e.polarity is {-1: NEG, 0: NEU, 1: POS}[label]


GOOD = "nice $T$\nfood\n1\n"
BAD = [
    (
        "bad $T$\nfood\n",
        "the record that begins here has 2 of the three lines; it is a sentence with $T$, the aspect, and -1, 0 or 1",
    ),
    ("bad $T$\nfood\n1\nstray\n", "the record that begins here has 4 of the three lines"),
    ("bad $T$\nfood\n2\n", "unknown label '2'; accepted: positive/pos/1"),
]


@pytest.mark.parametrize(("record", "why"), BAD)
def test_a_bad_record_is_named_and_the_next_one_found(write, record, why):
    path = write("x.seg", GOOD + record + GOOD)
    with pytest.raises(DataError) as caught:
        load_examples(path)
    assert str(caught.value).startswith(f"{path}:4: {why}")
    skipped = load_examples(path, skip_bad=True)
    assert (len(skipped), skipped.problems) == (2, (str(caught.value),))


def test_a_file_without_marks_is_named(write):
    with pytest.raises(
        DataError, match=r"x\.seg:1: 'nice food' has no \$T\$; a record is a sentence with \$T\$"
    ):
        load_examples(write("x.seg", "nice food\nfood\n1\n"))
