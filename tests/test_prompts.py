"""Roles: checked by hand on awkward sentences, and against a second way of finding them; labels; padding."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import byte_level_tokenizer, metaspace_tokenizer
from transformers import AutoTokenizer

from mech_absa.errors import PromptError
from mech_absa.examples import Example, Polarity
from mech_absa.prompts import PromptTemplate, Tokens, Verbalizer, adds_bos, encode
from mech_absa.sites import ROLES

TINY = {"byte-level": byte_level_tokenizer(), "metaspace": metaspace_tokenizer()}
PAPER = (
    "Given the sentence: '{sentence}', what is the sentiment polarity of the aspect term {aspect} ?"
)


@pytest.fixture(scope="module")
def gpt2(shared):
    if not (folder := shared / "tokenizers" / "gpt2").is_dir():
        pytest.skip(f"{folder} is absent")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["gpt2", "stories260K", *TINY])
def tokenizer(request):
    if request.param in TINY:
        return TINY[request.param]
    shared = request.getfixturevalue("shared")
    folder = (
        shared / {"gpt2": "tokenizers/gpt2", "stories260K": "models/stories260K"}[request.param]
    )
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return AutoTokenizer.from_pretrained(folder)


def example(sentence: str, aspect: str, nth: int = 0, opinion: str | None = None) -> Example:
    start = -1
    for _ in range(nth + 1):
        start = sentence.index(aspect, start + 1)
    span = (
        None
        if opinion is None
        else (sentence.index(opinion), sentence.index(opinion) + len(opinion))
    )
    return Example(sentence, aspect, Polarity.NEUTRAL, (start, start + len(aspect)), span)


# ---- by hand, GPT-2 -------------------------------------------------------------------------------------------------------------
# sentence, aspect, occurrence, opinion, then the tokens by hand: the sentence's (` |` between them; the aspect's in [ ], the opinion's
# in < >) and the question's. A character of several bytes is the piece of several tokens, hence repeated.

BY_HAND = [
    ("food was great .", "food", 0, "great", "[food]| was|< great>| .", " food"),
    ("i love the sushi", "sushi", 0, None, "i| love| the|[ sushi]", " sushi"),
    ("the wine list beats the wine", "wine", 0, None, "the|[ wine]| list| beats| the| wine", " wine"),
    ("the wine list beats the wine", "wine", 1, None, "the| wine| list| beats| the|[ wine]", " wine"),
    ("the chicken tikka masala was bland", "chicken tikka masala", 0, "bland",
     "the|[ chicken]|[ t]|[ik]|[ka]|[ mas]|[ala]| was|< bland>", " chicken| t|ik|ka| mas|ala"),
    ("the waiter's tone hurt", "waiter's", 0, None, "the|[ waiter]|['s]| tone| hurt", " waiter|'s"),
    ("bad service,good food", "service", 0, None, "bad|[ service]|,|good| food", " service"),
    ("a déjà vu dinner", "déjà vu", 0, None, "a|[ dé]|[j]|[à]|[ v]|[u]| dinner", " dé|j|à| v|u"),
    ("nice 🍕 here", "🍕", 0, None, "nice|[ 🍕]|[🍕]|[🍕]| here", " 🍕|🍕|🍕"),
    ("这里的服务很好", "服务", 0, "很好", "这|这|里|里|的|[服]|[服]|[务]|[务]|<很>|<很>|<好>|<好>", " 服|服|务|务"),
    ("the barista ran the bar", "bar", 0, None, "the|[ bar]|ista| ran| the| bar", " bar"),
    ("unbelievable wifi", "believ", 0, None, "un|[bel]|[iev]|able| wifi", " belie|v"),
    ("ambience", "ambience", 0, None, "[amb]|[ience]", " amb|ience"),
    ('the "special" roll', '"special"', 0, None, 'the|[ "]|[special]|["]| roll', ' "|special|"'),
    ("the {menu} was {odd}", "{menu}", 0, None, "the|[ {]|[menu]|[}]| was| {|odd|}", " {|menu|}"),
    ("slow  staff  here", "staff", 0, None, "slow| |[ staff]| | here", " staff"),
    ("bad\nstaff\nhere", "staff", 0, None, "bad|\n|[staff]|\n|here", " staff"),
    ("great food", "great food", 0, "great", "[great]|[ food]", " great| food"),
    ("battery-life rocks", "battery-life", 0, "rocks", "[b]|[attery]|[-]|[life]|< rocks>", " battery|-|life"),
    ("(desserts) were ok", "desserts", 0, None, " '(|[d]|[essert]|[s]|)| were| ok", " desserts"),
    ("the ' was '", "'", 1, None, "the| '| was|[ ']", " '"),
    ("loved the cosy cafe", "cosy cafe", 0, "cosy", "l|oved| the|[ cos]|[y]|[ cafe]", " cos|y| cafe"),
]  # fmt: skip


def ends(n: int, name: str) -> list[str]:
    return (
        [f"{name}.last"]
        if n == 1
        else [f"{name}.first", *[f"{name}.middle"] * (n - 2), f"{name}.last"]
    )


@pytest.mark.parametrize(
    ("sentence", "aspect", "nth", "opinion", "inside", "question"),
    BY_HAND,
    ids=[f"{row[0]}-{row[2]}" for row in BY_HAND],
)
def test_roles_by_hand(gpt2, sentence, aspect, nth, opinion, inside, question):
    parts = inside.split("|")
    aspects = [i for i, part in enumerate(parts) if part[0] == "[" and part[-1] == "]"]
    names = [
        "opinion" if part[0] == "<" else "after" if i > aspects[-1] else "before"
        for i, part in enumerate(parts)
    ]
    for i, name in zip(aspects, ends(len(aspects), "aspect"), strict=True):
        names[i] = name
    pieces = [
        part[1:-1] if names[i] in ("opinion",) or i in aspects else part
        for i, part in enumerate(parts)
    ]
    asked = question.split("|")
    expected = [
        *zip(pieces, names, strict=True),
        *zip(asked, ends(len(asked), "query"), strict=True),
        (" ?", "answer"),
    ]

    prompt = PromptTemplate()(example(sentence, aspect, nth, opinion))
    tokens = encode(prompt, gpt2)
    offsets = gpt2(prompt.text, return_offsets_mapping=True)["offset_mapping"]
    found = [
        (prompt.text[a:b], ROLES[r])
        for (a, b), r in zip(offsets, tokens.roles[0].tolist(), strict=True)
    ]
    assert [pair for pair in found if pair[1] != "template"] == expected


def test_no_words_for_the_aspect(tokenizer):
    """SemEval's NULL: the whole sentence is `before`, and the question still names the aspect."""
    tokens = encode(
        PromptTemplate()(Example("never again", "service", Polarity.NEGATIVE)), tokenizer
    )
    names = {ROLES[r] for r in tokens.roles[0].tolist()}
    assert {"before", "query.last", "answer", "template"} <= names
    assert not any(name.startswith("aspect") or name == "after" for name in names)


def test_the_aspect_at_the_end_of_the_prompt_is_the_answer(gpt2):
    tokens = encode(
        PromptTemplate("{sentence} : {aspect}")(example("the pasta dish", "pasta dish")), gpt2
    )
    assert [ROLES[r] for r in tokens.roles[0].tolist()] == [
        "before",
        "aspect.first",
        "aspect.last",
        "template",
        "query.first",
        "answer",
    ]


# ---- a second way ----------------------------------------------------------------------------------------------------------------


def characters(tokens: Tokens, text: str, tokenizer) -> list[tuple[set[int], str]]:
    """The characters of `text` that are no blanks of every token, and its role."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    if tokens.ids.shape[1] > len(offsets):
        offsets = [(0, 0), *offsets]
    assert tokens.ids.shape[1] == tokens.roles.shape[1] == len(offsets)
    return [
        ({i for i in range(a, b) if not text[i].isspace()}, ROLES[r])
        for (a, b), r in zip(offsets, tokens.roles[0].tolist(), strict=True)
    ]


def check(one: Example, tokenizer) -> None:
    """The aspect's tokens are those that hold a visible character of it, likewise the question's; each part runs first, middle.., last."""
    text = (
        PAPER.replace("{sentence}", "\0")
        .replace("{aspect}", one.aspect)
        .replace("\0", one.sentence)
    )
    prompt = PromptTemplate()(one)
    assert prompt.text == text
    shift, question = text.index("'") + 1, len(text) - 2 - len(one.aspect)
    where = {
        "query": {i for i in range(question, question + len(one.aspect)) if not text[i].isspace()},
        "aspect": set(),
    }
    if one.span is not None:
        where["aspect"] = {
            i for i in range(one.span[0] + shift, one.span[1] + shift) if not text[i].isspace()
        }
    seen = characters(encode(prompt, tokenizer), text, tokenizer)
    for name, wanted in where.items():
        mine = [chars for chars, role in seen if role.startswith(f"{name}.") and chars]
        assert all(chars & wanted for chars in mine), (
            f"a token without a character of the {name} has its role"
        )
        assert set().union(*mine) >= wanted, f"a character of the {name} is in no token of its role"
        assert not any(
            chars & wanted
            for chars, role in seen
            if not role.startswith(f"{name}.") and role != "answer"
        )
        if wanted:
            assert [role for _, role in seen if role.startswith(f"{name}.")] == ends(
                sum(role.startswith(f"{name}.") for _, role in seen), name
            )
    sentence = {i for i in range(shift, shift + len(one.sentence)) if not text[i].isspace()}
    for chars, role in seen:
        if role in ("before", "after") and chars:
            assert chars & sentence
            last = max(where["aspect"], default=10**9)
            assert (min(chars) > last) == (role == "after")
    assert seen[-1][1] == "answer" and [role for _, role in seen].count("answer") == 1


@pytest.mark.parametrize("row", BY_HAND, ids=[f"{row[0]}-{row[2]}" for row in BY_HAND])
def test_awkward_sentences_on_every_tokenizer(tokenizer, row):
    check(example(*row[:4]), tokenizer)


LETTERS = st.text(st.sampled_from("abeistw  '\",.-(){}\n\té好🍕́ß0"), min_size=1, max_size=30)


@st.composite
def spans(draw) -> Example:
    sentence = draw(LETTERS)
    start = draw(st.integers(0, len(sentence) - 1))
    end = draw(st.integers(start + 1, len(sentence)))
    if not sentence[start:end].strip():
        return Example(sentence, "food", Polarity.NEUTRAL)
    return Example(sentence, sentence[start:end], Polarity.NEUTRAL, (start, end))


@settings(max_examples=150, deadline=None)
@given(spans())
@pytest.mark.parametrize("kind", TINY)
def test_any_span_of_any_sentence(kind, one):
    check(one, TINY[kind])


@settings(max_examples=150, deadline=None)
@given(spans())
def test_any_span_of_any_sentence_with_the_real_tokenizer(gpt2, one):
    check(one, gpt2)


@settings(max_examples=50, deadline=None)
@given(spans())
@pytest.mark.parametrize("kind", TINY)
def test_a_bos_token_shifts_roles_by_one(kind, one):
    tokenizer, prompt = TINY[kind], PromptTemplate()(one)
    without, with_bos, left_alone = (encode(prompt, tokenizer, bos) for bos in (False, True, None))
    assert with_bos.ids[0].tolist() == [tokenizer.bos_token_id, *without.ids[0].tolist()]
    assert with_bos.roles[0].tolist() == [ROLES.index("template"), *without.roles[0].tolist()]
    assert without.ids[0].tolist() == tokenizer(prompt.text, add_special_tokens=False).input_ids
    assert left_alone.ids[0].tolist() == tokenizer(prompt.text).input_ids
    assert adds_bos(tokenizer) == (kind == "metaspace")


# ---- templates -------------------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_prompt_are_where_it_says():
    one = example("the {menu} was 'odd'", "{menu}", opinion="odd")
    prompt = PromptTemplate("{{Q}} {aspect}? {sentence} -> {aspect}:")(one)
    assert prompt.text == "{Q} {menu}? the {menu} was 'odd' -> {menu}:"
    cut = [
        prompt.text[slice(*span)]
        for span in (prompt.sentence, prompt.aspect, prompt.opinion, *prompt.queries)
    ]
    assert cut == ["the {menu} was 'odd'", "{menu}", "odd", "{menu}", "{menu}"]
    assert prompt.queries[0][0] < prompt.sentence[0] < prompt.queries[1][0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{sentence} ?", "has no field {aspect}; the question must name the aspect at least once"),
        ("{aspect} ?", "has 0 fields {sentence}; exactly one is needed"),
        ("{sentence} {sentence} {aspect}", "has 2 fields {sentence}; exactly one is needed"),
        (
            "{sentence} {aspect} {label}",
            "has an unknown field {label}; accepted: {sentence} and {aspect}",
        ),
        ("{sentence} {aspect} {}", "has an unknown field {}; accepted"),
        ("{sentence:>1000000000} {aspect}", "formats the field {sentence}; accepted"),
        ("{sentence} {aspect!r}", "formats the field {aspect}; accepted"),
        ("{sentence} {aspect} {", "does not parse"),
        ("{sentence} {aspect} }", "does not parse"),
    ],
)
def test_templates_that_cannot_ask(text, sentence):
    with pytest.raises(PromptError, match=re.escape(sentence)) as caught:
        PromptTemplate(text)
    assert repr(text) in str(caught.value)


def test_tokenizers_that_cannot_answer():
    prompt = PromptTemplate()(example("food", "food"))
    with pytest.raises(
        PromptError, match=r"the tokenizer 'slow' gives no character offsets; a fast tokenizer"
    ):
        encode(prompt, SimpleNamespace(is_fast=False, name_or_path="slow", bos_token_id=None))
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = None
    assert not adds_bos(tokenizer)
    with pytest.raises(
        PromptError, match="a BOS token was asked for, but the tokenizer '' has none"
    ):
        encode(prompt, tokenizer, bos=True)


# ---- labels ----------------------------------------------------------------------------------------------------------------------


def test_the_papers_labels(gpt2):
    words = [" positive", " negative", " neutral"]
    assert Verbalizer().label_ids(gpt2) == [tuple(gpt2(word).input_ids) for word in words]
    (only,) = Verbalizer().continuations(gpt2)
    assert only.tokens == () and only.reads == 1
    assert only.labels == tuple((i, (gpt2(word).input_ids[0],)) for i, word in enumerate(words))
    assert [gpt2.decode(ids) for ids in Verbalizer(separator="").label_ids(gpt2)] == [
        "positive",
        "negative",
        "neutral",
    ]


def test_labels_follow_the_prompt_on_every_tokenizer(tokenizer):
    """Prompt ids + label ids are the ids of prompt and label written together."""
    prompt = PromptTemplate()(example("the staff were rude .", "staff")).text
    for separator in (" ", ""):
        for word, ids in zip(
            ("positive", "negative", "neutral"),
            Verbalizer(separator=separator).label_ids(tokenizer),
            strict=True,
        ):
            assert (
                tokenizer(prompt).input_ids + list(ids)
                == tokenizer(prompt + separator + word).input_ids
            )


def test_labels_of_several_tokens(gpt2):
    ids = {word: tuple(gpt2(word).input_ids) for word in (" very good", " very bad", " fine")}
    assert [len(i) for i in ids.values()] == [2, 2, 1]
    found = Verbalizer.of(["very good", "very bad", "fine"]).continuations(gpt2)
    assert [c.tokens for c in found] == [ids[" very good"][:1], ()]
    assert (
        found[0].labels == ((0, ids[" very good"]), (1, ids[" very bad"])) and found[0].reads == 2
    )
    assert found[1].labels == ((2, ids[" fine"]),) and found[1].reads == 1


@pytest.mark.parametrize(
    ("words", "template", "separator", "sentence"),
    [
        (["good", "good", "bad"], None, " ", "the labels 'good' and 'good' tokenise alike (ids "),
        (
            ["good", "good day", "bad"],
            None,
            " ",
            "the labels 'good' and 'good day' cannot be told apart, since the tokens of one begin the other",
        ),
        (["bad", "good day", "good"], None, " ", "'good' and 'good day' cannot be told apart"),
        (
            ["s", "x", "y"],
            "{sentence} {aspect}",
            "",
            "the label 's' melts into the last token of the prompt",
        ),
    ],
)
def test_labels_that_cannot_be_told_apart(gpt2, words, template, separator, sentence):
    with pytest.raises(PromptError, match=re.escape(sentence)):
        Verbalizer.of(words, separator).label_ids(
            gpt2, PromptTemplate(template) if template else None
        )


def test_labels_that_are_none():
    with pytest.raises(PromptError, match="1 label was given; at least two are needed"):
        Verbalizer.of(["good"])
    with pytest.raises(PromptError, match="the label of negative is empty; a word is needed"):
        Verbalizer.of({"positive": "good", "negative": " "})
    with pytest.raises(
        PromptError, match="a label was given for 'happy'; accepted: positive, negative, neutral"
    ):
        Verbalizer.of({"happy": "good", "negative": "bad"})
    two = Verbalizer.of({"negative": "bad", "positive": "good"})
    assert [two.index(p) for p in (Polarity.NEGATIVE, Polarity.POSITIVE)] == [0, 1]
    with pytest.raises(
        PromptError, match="no label for neutral; labels were given for negative, positive"
    ):
        two.index(Polarity.NEUTRAL)


# ---- padding ---------------------------------------------------------------------------------------------------------------------


def test_stack_pads_on_the_right():
    rows = [
        encode(PromptTemplate()(example(s, a)), TINY["metaspace"])
        for s, a in (
            ("food", "food"),
            ("the tikka masala was hot", "tikka masala"),
            ("so so wine", "wine"),
        )
    ]
    batch = Tokens.stack(rows, pad_id=7)
    assert len(batch) == 3 and batch.lengths == tuple(r.lengths[0] for r in rows)
    width = max(batch.lengths)
    for i, row in enumerate(rows):
        n = row.lengths[0]
        assert batch.ids[i].tolist() == row.ids[0].tolist() + [7] * (width - n)
        assert batch.roles[i].tolist() == row.roles[0].tolist() + [-1] * (width - n)
        for at in ("aspect", "query.last", "all", "answer", -1, 2, None):
            assert batch.positions(at, i) == row.positions(at)
    again = Tokens.stack([Tokens.stack(rows[:2], 7), rows[2]], 7)
    assert (
        torch.equal(again.ids, batch.ids)
        and torch.equal(again.roles, batch.roles)
        and again.lengths == batch.lengths
    )


def test_positions():
    names = ["template", "before", "aspect.first", "aspect.last", "after", "query.last", "answer"]
    tokens = Tokens(
        torch.arange(9)[None], torch.tensor([[ROLES.index(n) for n in names] + [-1, -1]]), (7,)
    )
    assert tokens.positions("aspect") == [2, 3]
    assert tokens.positions("aspect.middle") == []
    assert tokens.positions("query") == [5]
    assert tokens.positions("all") == tokens.positions(None) == list(range(7))
    assert (
        tokens.positions(-1),
        tokens.positions(-7),
        tokens.positions(0),
        tokens.positions(6),
    ) == ([6], [0], [0], [6])
    assert tokens.positions(7) == tokens.positions(-8) == [], "padding is no position"
