"""Corruptions: words, wrong types, and the two swaps on real sentences, worked by hand."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from support.jobs import EXAMPLES, TEMPLATE, example, pairs_of, tiny

import mech_absa as ma
from mech_absa.errors import ConfigError, DataError, PromptTooLong
from mech_absa.examples import Example, Polarity
from mech_absa.patch.corruption import (
    WORDS,
    AspectSwap,
    Counterfactual,
    GaussianNoise,
    Lexicon,
    MeanAblation,
    NoiseSpan,
    OpinionSwap,
    as_corruption,
)
from mech_absa.patch.pairs import make_pairs
from mech_absa.prompts import Verbalizer

P = Polarity
LABELS = Verbalizer.of(["staff", "was", "the"])


@pytest.mark.parametrize("word", [w for w in WORDS if w != "opinion-swap"])
def test_every_word_is_its_class(word):
    assert as_corruption(word) == WORDS[word]() and as_corruption(word).word == word


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (GaussianNoise, "the class GaussianNoise was given as a corruption; an instance is needed"),
        (MeanAblation, "the class MeanAblation was given"),
        ("banana", "'banana' is no corruption; accepted: noise, counterfactual"),
        (42, "42 is no corruption"),
        ("opinion-swap", "needs a lexicon"),
    ],
)
def test_what_is_no_corruption_is_refused_in_one_sentence(value, words):
    with pytest.raises(ConfigError) as error:
        as_corruption(value)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, 1e300])
def test_a_noise_scale_is_a_finite_number(scale):
    with pytest.raises(ConfigError, match="a finite number, 0 or more"):
        GaussianNoise(scale=scale)


def test_spans_are_words_with_a_sentence():
    assert GaussianNoise(span="aspect") == GaussianNoise(span=NoiseSpan.ASPECT)
    assert all(span.sentence for span in NoiseSpan)
    with pytest.raises(
        ConfigError, match="unknown noise span 'x y'; accepted: all, sentence, aspect"
    ):
        GaussianNoise(span="x y")


def test_pairs_of_another_model_are_refused():
    one, other = tiny("gpt2"), tiny("llama")
    pairs = pairs_of(one, GaussianNoise(draws=1))
    with pytest.raises(ConfigError, match=f"the pairs were made on {one.name}"):
        ma.trace(other, pairs)
    assert len(repr(pairs)) < 250 and "4 pairs, 4 sentences" in repr(pairs)


CALLS = """
import mech_absa as ma
model = ma.load_model()
examples = ma.load_examples("builtin:restaurant/test")[:2]
for call in (
    lambda: ma.trace(model, examples),
    lambda: ma.make_pairs("gpt2", examples),
    lambda: ma.make_pairs(model, "reviews.csv"),
    lambda: ma.make_pairs(model, examples, ma.GaussianNoise),
    lambda: ma.GaussianNoise(scale="3"),
    lambda: ma.fit(model, examples, "both"),
    lambda: ma.evaluate(model, examples, "bundled"),
    lambda: ma.attention(model, "text"),
    lambda: ma.load_model(3),
    lambda: ma.load_examples(3),
    lambda: ma.load_edit("bundled", "model"),
    lambda: ma.compare("a", "b"),
    lambda: ma.make_pairs(model, examples, "noise", limit="ten"),
    lambda: ma.make_pairs(model, examples, "noise", template="{sentence} {aspect}"),
    lambda: ma.fit(model, examples, ma.presets.bundled("L3.resid_post@query.last"), verbalizer=("a", "b")),
):
    try:
        print("accepted", call())
    except ma.MechAbsaError as error:
        print(error)
"""


@pytest.mark.slow  # imports and loads everything in a process of its own
def test_wrong_types_are_named():
    """In another process, since the tests check types on their own before the package can."""
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, check=True)
    starts = (
        "trace(pairs=...) got an Examples; accepted: Pairs",
        "make_pairs(model=...) got 'gpt2'; accepted: a Model",
        "make_pairs(examples=...) got 'reviews.csv'",
        "the class GaussianNoise was given as a corruption",
        "a noise scale of '3' was given",
        "fit(preset=...) got 'both'; accepted: a Preset",
        "evaluate(edit=...) got 'bundled'; accepted: an edit",
        "attention(example=...) got 'text'; accepted: one Example",
        "load_model(model=...) got 3; accepted: bundled, a folder",
        "load_examples(source=...) got 3; accepted: a file",
        "load_edit(model=...) got 'model'; accepted: a Model",
        "compare(first=...) got 'a'; accepted: Predictions",
        "make_pairs(limit=...) got 'ten'; accepted: a whole number",
        "make_pairs(template=...) got '{sentence} {aspect}'; accepted: a PromptTemplate",
        "fit(verbalizer=...) got",
    )
    lines = done.stdout.strip().splitlines()
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start), line


def test_a_prompt_that_is_too_long_is_dropped_and_counted_or_refused():
    model = tiny("gpt2")
    long = example(
        "long", "The food was fine" + " and the food was bad" * model.n_ctx, "food", P.POSITIVE
    )
    kwargs = {"template": TEMPLATE, "verbalizer": LABELS, "keep": "all"}
    pairs = make_pairs(model, [*EXAMPLES, long], "mean", **kwargs)
    assert [p.id for p in pairs] == [e.id for e in EXAMPLES]
    assert pairs.dropped == {"prompt longer than the model reads": 1}
    with pytest.raises(PromptTooLong, match="the prompt of 'long' has"):
        make_pairs(model, [*EXAMPLES, long], "mean", strict=True, **kwargs)


# ---- the swaps ----------------------------------------------------------------------------------------------------------------

BOTH = "The food was fine and the staff was bad"
FOOD = Example(BOTH, "food", P.POSITIVE, (4, 8), (13, 17), id="food")
STAFF = Example(BOTH, "staff", P.NEGATIVE, (26, 31), (36, 39), id="staff")


def test_an_aspect_swap_changes_the_question_alone():
    model = tiny("gpt2")
    length = {w: len(model.tokenizer(" " + w).input_ids) for w in ("food", "staff", "bad", "fine")}
    other = next(w for w in ("staff", "bad", "fine") if length[w] == length["food"])
    start = BOTH.index(other)
    partner = Example(BOTH, other, P.NEGATIVE, (start, start + len(other)), id="other")
    alike = replace(partner, polarity=P.POSITIVE, id="alike")
    pairs = pairs_of(model, AspectSwap(), examples=[FOOD, alike, partner])
    p = pairs[0]
    assert p.id == "food" and p.other.id == "other" and (p.gold, p.foil) == (0, 1)
    text = TEMPLATE(partner).text
    assert p.corrupted.token_ids == tuple(model.tokenizer(text).input_ids)
    differs = [i for i in range(p.length) if p.clean.token_ids[i] != p.corrupted.token_ids[i]]
    assert differs and {p.clean.role_names[i][:5] for i in differs} == {"query"}
    assert p.first == differs[0] and p.corrupted.role_names == p.clean.role_names


def test_aspects_of_other_lengths_and_lone_aspects_are_counted():
    model = tiny("gpt2")
    whole = Example(BOTH, "staff was bad", P.NEGATIVE, (26, 39), id="long")
    lone = example("lone", "The food was fine", "food", P.POSITIVE)
    with pytest.raises(DataError, match=r"another number of tokens.*no aspect of another polarity"):
        pairs_of(model, AspectSwap(), examples=[FOOD, whole, lone])


def test_an_opinion_swap_keeps_everything_else():
    lexicon = Lexicon((("bad", P.NEGATIVE), ("not good", P.NEGATIVE), ("fine", P.POSITIVE)))
    swap = OpinionSwap(lexicon)
    assert [(o.sentence, o.polarity) for o in swap.corrupted(FOOD, {})] == [
        ("The food was bad and the staff was bad", P.NEGATIVE)
    ]  # not the expression of two words
    before = Example("Fine was the staff", "staff", P.POSITIVE, (13, 18), (0, 4), id="b")
    (swapped,) = swap.corrupted(before, {})
    assert swapped.sentence == "Bad was the staff" and swapped.span == (12, 17)
    assert not list(swap.corrupted(replace(FOOD, opinion=None), {}))
    assert not list(swap.corrupted(replace(FOOD, opinion=FOOD.span), {}))


def test_a_lexicon_keeps_what_is_said_of_one_polarity():
    def one(word, polarity):
        return Example(f"food {word}", "food", polarity, (0, 4), (5, 5 + len(word)))

    lexicon = Lexicon.of(
        [
            one("Long", P.POSITIVE),
            one("long", P.NEGATIVE),
            one("bad", P.NEGATIVE),
            one("BAD", P.NEGATIVE),
        ]
    )
    assert (
        lexicon.expressions == (("bad", P.NEGATIVE),)
        and repr(lexicon) == "Lexicon(0 positive, 1 negative, 0 neutral)"
    )
    with pytest.raises(DataError, match="no example marks an opinion expression"):
        Lexicon.of([example("x", "The food was fine", "food", P.POSITIVE)])


def test_a_swap_whose_answer_does_not_follow_is_counted():
    """A random model answers the same whatever the opinion; such pairs are dropped unless everything is kept."""
    model = tiny("gpt2")
    lexicon = Lexicon((("bad", P.NEGATIVE), ("bad", P.POSITIVE)))
    examples = [
        replace(FOOD, id=f"{i}", polarity=p)
        for i, p in enumerate((P.POSITIVE, P.NEGATIVE, P.NEUTRAL))
    ]
    kwargs = {"template": TEMPLATE, "verbalizer": LABELS}
    every = make_pairs(model, examples, OpinionSwap(lexicon), keep="all", **kwargs)
    kept, reasons = 0, {"clean run wrong": 0, "answer does not follow the swap": 0}
    for p in every:
        clean, corrupted = int(p.clean_scores.argmax()), int(p.corrupted_scores[0].argmax())
        if clean != p.gold:
            reasons["clean run wrong"] += 1
        elif corrupted != p.foil:
            reasons["answer does not follow the swap"] += 1
        else:
            kept += 1
    reasons = {k: n for k, n in reasons.items() if n}
    if kept:
        assert make_pairs(model, examples, OpinionSwap(lexicon), **kwargs).dropped == reasons
    else:
        with pytest.raises(DataError) as error:
            make_pairs(model, examples, OpinionSwap(lexicon), **kwargs)
        assert all(f"{n} {reason}" in str(error.value) for reason, n in reasons.items())
        assert "keep='all'" in str(error.value)


@pytest.mark.slow
def test_aspect_swaps_on_mams(shared):
    """Every MAMS sentence holds two polarities, so that most examples have a partner; and the text never changes."""
    examples = ma.load_examples(str(shared / "data/mams/test.xml"))[:60]
    model = ma.load_model()
    pairs = make_pairs(model, examples, "aspect-swap", keep="all")
    assert len(pairs) + sum(pairs.dropped.values()) == 60 and len(pairs) >= 15
    for p in pairs:
        assert p.other.sentence == p.example.sentence and p.other.polarity != p.example.polarity
    assert Counterfactual().corrupted(examples[0], {}) == ()


@pytest.mark.slow
def test_the_lexicon_of_dmaste_has_the_opinions_of_its_training_part(shared):
    """Its triplets, read another way: the commonest opinion of one polarity is one that stands there so."""
    path = shared / "data/dmaste/electronics_train.txt"
    if not path.exists():
        path = sorted((shared / "data/dmaste").glob("*_train.txt"))[0]
    by_hand: dict[str, Counter[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        sentence, triplets, *_ = line.split("####")
        words, seen = sentence.split(), set()
        for aspect, opinion, label in ast.literal_eval(triplets):
            known = tuple(aspect) in seen  # one opinion stands for an aspect, its first
            seen.add(tuple(aspect))
            if not known and -1 not in opinion and -1 not in aspect:
                text = " ".join(words[opinion[0] : opinion[-1] + 1]).lower()
                by_hand.setdefault(text, Counter())[label] += 1
    lexicon = dict(Lexicon.of(ma.load_examples(path), least=3).expressions)
    assert len(lexicon) > 20
    short = {P.POSITIVE: "POS", P.NEGATIVE: "NEG", P.NEUTRAL: "NEU"}
    for text, polarity in lexicon.items():
        counts = by_hand[text]
        assert counts[short[polarity]] >= 0.8 * counts.total() and counts.total() >= 3, text
