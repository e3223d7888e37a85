"""The built-in world, checked against hand-worked readings of its sentences and against what a counterfactual must be."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import pytest

import mech_absa.world as g
from mech_absa.commands.generate import cli
from mech_absa.errors import ConfigError, DataError
from mech_absa.examples import Example, Examples, Polarity, leakage, mixed_polarity

FILES = [f"{d}/{s}" for d, s in product(g.DOMAINS, g.SPLITS)]
HARDER = [f"v2/{name}" for name in FILES]

# Read by a person, not by the grammar: opinion expressions and what they say of the aspect.
BY_HAND = {
    "not bad": "positive", "not terrible": "positive", "not good": "negative", "not perfect": "negative", "not included": "neutral",
    "nobody hated": "positive", "nobody liked": "negative", "nobody mentioned": "neutral",
    "no complaints": "positive", "no praises": "negative", "no news": "neutral",
    "never had better": "positive", "never had worse": "negative", "never had similar": "neutral",
    "loved": "positive", "despised": "negative", "tried": "neutral", "recommend": "positive", "avoid": "negative", "mention": "neutral",
    "really great": "positive", "so awful": "negative", "quite ordinary": "neutral", "excellent": "positive", "lousy": "negative",
    "failed": "negative", "arrived": "neutral", "happy": "positive", "upset": "negative", "italian": "neutral", "rude": "negative",
}  # fmt: skip


def shipped(name: str) -> list[Example]:
    found = []
    for number, line in enumerate(g.builtin_path(name).read_text(encoding="utf-8").splitlines(), 1):
        r = json.loads(line)

        def bare(r: dict, aspect: str, number: int = number) -> Example:
            return Example(
                r["text"],
                aspect,
                Polarity(r["polarity"]),
                (r["from"], r["to"]),
                tuple(r["opinion"]),
                line=number,
            )

        cf = tuple(bare(c, r["aspect"]) for c in r["counterfactuals"])
        e = bare(r, r["aspect"])
        found.append(
            Example(
                e.sentence,
                e.aspect,
                e.polarity,
                e.span,
                e.opinion,
                r["domain"],
                name,
                number,
                r["id"],
                cf,
            )
        )
    return found


@pytest.fixture(scope="module")
def world() -> dict[str, list[Example]]:
    return {name: shipped(name) for name in FILES}


@pytest.fixture(scope="module")
def harder() -> dict[str, list[Example]]:
    return {name: shipped(name) for name in HARDER}


@pytest.mark.slow
def test_the_shipped_files_are_what_the_command_writes(tmp_path: Path, capsys):
    assert cli(["--out", str(tmp_path / "w"), "--seed", "0"]) == 0
    *paths, conclusion = capsys.readouterr().out.splitlines()
    named = re.search(r"mech-absa patch --data (\S+) ", conclusion)
    assert named is not None and named[1] in paths
    for name in FILES + HARDER:
        assert (tmp_path / "w" / f"{name}.jsonl").read_bytes() == g.builtin_path(
            name
        ).read_bytes(), name
        assert g.builtin_path(name).stat().st_size < 850_000


def test_another_seed_writes_another_world():
    a, b, c = (g.examples("laptop", "train", 30, seed) for seed in (1, 1, 2))
    assert a == b
    assert not {e.sentence for e in a} & {e.sentence for e in c}


def test_opinions_mean_what_a_reader_says(world):
    seen = Counter()
    for e in (c for items in world.values() for x in items for c in (x, *x.counterfactuals)):
        expression = e.sentence[slice(*e.opinion)]
        if expression in BY_HAND:
            assert e.polarity == BY_HAND[expression], (expression, e)
            seen[expression] += 1
    assert set(seen) == set(BY_HAND)


def test_a_counterfactual_differs_in_one_word_of_the_opinion(world, harder):
    for e in (e for items in (world | harder).values() for e in items):
        assert {e.polarity, *(c.polarity for c in e.counterfactuals)} == set(Polarity)
        assert len(e.counterfactuals) == 2
        words = e.sentence.split(" ")
        first = len(e.sentence[: e.opinion[0]].split())
        inside = range(first, first + len(e.sentence[slice(*e.opinion)].split()))
        for c in e.counterfactuals:
            changed = [
                i
                for i, (a, b) in enumerate(zip(words, c.sentence.split(" "), strict=True))
                if a != b
            ]
            assert len(changed) == 1 and changed[0] in inside, (e, c)
            assert c.aspect == e.aspect and c.sentence[slice(*c.span)] == e.aspect


def test_no_word_of_a_slot_has_two_polarities():
    tables = [
        *g.LEXICON.values(),
        *(group.adjectives for d in g.DOMAINS.values() for group in d.groups),
    ]
    for words in tables:
        for a, b in combinations(Polarity, 2):
            assert not set(words[a]) & set(words[b])
            assert words[a] and words[b]
    # Adjectives meet in one slot whatever group they come from: "useless" may be general and special, but never praise somewhere.
    by_polarity = {
        p: {w for t in (g.ADJECTIVES, *tables[len(g.LEXICON) :]) for w in t[p]} for p in Polarity
    }
    assert not by_polarity[Polarity.POSITIVE] & by_polarity[Polarity.NEGATIVE]


def test_under_a_negation_the_words_of_praise_blame():
    plain, turned = g.LEXICON["adj"], g.LEXICON["not"]
    assert set(turned[Polarity.NEGATIVE]) <= set(plain[Polarity.POSITIVE])
    assert set(turned[Polarity.POSITIVE]) <= set(plain[Polarity.NEGATIVE])


def test_train_and_test_share_no_sentence_frame_or_kept_aspect(world):
    for domain, d in g.DOMAINS.items():
        train, test = world[f"{domain}/train"], world[f"{domain}/test"]
        assert not leakage(train, test).rows
        everything = {e.sentence for e in train} | {
            c.sentence for e in train for c in e.counterfactuals
        }
        assert not everything & {e.sentence for e in test}
        text = "\n".join(e.sentence for e in train)
        for only_test in (
            "to be honest",
            "say what you want",
            "what stood out",
            " , again , ",
            "found the",
            "honestly",
            "can only",
            "whereas",
        ):
            assert only_test not in text, only_test
            assert any(only_test in e.sentence for e in test), only_test
        kept = {a.removesuffix("/s") for group in d.groups for a in group.test_aspects}
        assert not kept & {e.aspect for e in train}
        assert 0.3 < sum(e.aspect in kept for e in test) / len(test) < 0.8


def test_classes_and_mixed_sentences(world, harder):
    world = world | harder
    for name, items in world.items():
        counts = Examples(tuple(items)).counts()
        assert 0.36 < max(counts.values()) / len(items) < 0.5, (name, counts)
        assert min(counts.values()) / len(items) > 0.15, (name, counts)
        sentences = {e.cluster for e in items}
        mixed = {items[i].cluster for i in mixed_polarity(items)}
        assert len(mixed) / len(sentences) >= 0.5
        assert len(items) >= (1000 if name.endswith("train") else 600)
    majority = {
        name: max(c := Examples(tuple(items)).counts(), key=c.get) for name, items in world.items()
    }
    assert majority["restaurant/test"] == "positive" and majority["service/test"] == "negative"


def test_every_aspect_is_found_by_its_words(world, harder):
    world = world | harder
    for e in (e for items in world.values() for e in items):
        assert len(re.findall(rf"(?<!\S){re.escape(e.aspect)}(?!\S)", e.sentence)) == 1, e
        assert e.sentence == " ".join(e.sentence.split()) == e.sentence.lower()


def test_ids_are_unique_and_say_where_from(world, harder):
    world = world | harder
    for name, items in world.items():
        assert len({e.id for e in items}) == len(items)
        assert all(e.id.startswith(name.replace("/", "-")) for e in items)


def test_a_review_worked_by_hand():
    swaps = {Polarity.POSITIVE: "good", Polarity.NEGATIVE: "terrible", Polarity.NEUTRAL: "plain"}
    m = g.Mention(aspect=(1, 3), opinion=(4, 6), slot=5, polarity=Polarity.NEGATIVE, swaps=swaps)
    r = g.Review(("the", "wine", "list", "was", "so", "terrible", "."), (m,), "restaurant")
    e = r.example(0)
    assert (e.sentence, e.aspect, e.span, e.opinion) == (
        "the wine list was so terrible .",
        "wine list",
        (4, 13),
        (18, 29),
    )
    assert [(c.sentence, c.polarity.value, c.opinion) for c in e.counterfactuals] == [
        ("the wine list was so good .", "positive", (18, 25)),
        ("the wine list was so plain .", "neutral", (18, 26)),
    ]


def test_agreement_of_plural_aspects(world):
    text = "\n".join(e.sentence for items in world.values() for e in items)
    assert re.search(r"the fries were", text) and not re.search(
        r"the (fries|photos|tables) (was|is) ", text
    )
    assert re.search(r"the pasta was", text) and not re.search(
        r"the (pasta|screen|agent) (were|are) ", text
    )


def test_the_number_of_aspects_is_the_number_asked_for():
    rng = random.Random(3)
    for n in (1, 2, 3):
        for _ in range(50):
            r = g.review(rng, g.DOMAINS["service"], n)
            assert len(r.mentions) == n
            assert all(r.words[m.slot] == m.swaps[m.polarity] for m in r.mentions)


def test_continuations_ask_about_the_aspect_and_end_before_the_answer():
    e = Example("the soup was cold but the bread was good .", "bread", Polarity.POSITIVE)
    by_text = {c.text: c for c in g.continuations(e)}
    first = by_text["the soup was cold but the bread was good . my view of the bread is"]
    assert first.answer == " positive" and first.choices == (" positive", " negative", " neutral")
    assert (
        by_text["the soup was cold but the bread was good . stars for the bread :"].answer == " 5"
    )
    negative = g.continuations(Example("the soup was cold .", "soup", Polarity.NEGATIVE))
    assert [c.answer for c in negative] == [c.choices[1] for c in negative]


def test_the_vocabulary_covers_every_file(world):
    known = set(g.vocabulary())
    unknown = {w for items in world.values() for e in items for w in e.sentence.split()} - known
    assert not unknown


def test_both_vocabularies_cover_every_file_of_the_second_version(harder):
    known = {*g.vocabulary(), *g.harder_vocabulary()}
    words = {
        w
        for items in harder.values()
        for e in items
        for x in (e, *e.counterfactuals)
        for w in x.sentence.split()
    }
    assert not words - known


def test_unknown_names_are_answered_with_those_there_are(tmp_path: Path):
    with pytest.raises(
        DataError,
        match=r"no built-in examples 'bakery/test'; there are restaurant/train, .*service/test",
    ):
        g.builtin_path("bakery/test")
    with pytest.raises(
        ConfigError, match="no domain 'bakery'; it has restaurant, laptop, device or service"
    ):
        g.examples("bakery", "test", 3)


def test_a_full_folder_is_not_written_into(tmp_path: Path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    assert cli(["--out", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


# --- the second version ---------------------------------------------------------------------------

# Read by a person: a sentence, an aspect of it, and what the author says of the aspect. The deciding
# words are written into frames of the second version by hand.
HARDER_BY_HAND = [
    ("length", "battery life", "long", "positive"),
    ("length", "boot time", "long", "negative"),
    ("length", "wait", "short", "positive"),
    ("level", "price", "high", "negative"),
    ("level", "build quality", "high", "positive"),
    ("size", "hotel room", "small", "negative"),
    ("size", "carrying case", "small", "positive"),
    ("heat", "coffee", "cold", "negative"),
    ("heat", "beer", "cold", "positive"),
]


@pytest.mark.parametrize(("scale", "aspect", "word", "polarity"), HARDER_BY_HAND)
def test_an_ambiguous_word_means_what_a_reader_says_and_the_contrary_under_a_negation(
    scale, aspect, word, polarity
):
    opposite = {"positive": "negative", "negative": "positive"}[polarity]
    tables = [
        s
        for scales in g.SCALES.values()
        for s in scales
        if s.scale == scale and aspect in s.aspects
    ]
    assert tables
    for s in tables:
        assert word in s.words(turned=False)[Polarity(polarity)]
        assert word in s.words(turned=True)[Polarity(opposite)]


# A phrase of the sentence with the aspect and the deciding word left open -> whether a negation
# turns the word round, as a person reads it.
READ_BY_A_PERSON = {
    r"i would not say that the ASPECT (was|were) (\w+)": True,
    r"nobody could say that the ASPECT (was|were) (\w+)": True,
    r"it is not true that the ASPECT (was|were) (\w+)": True,
    r"said that the ASPECT (was|were) (\w+) , but that was wrong": True,
    r"said that the ASPECT (was|were) (\w+) , and that was right": False,
    r"nobody could doubt that the ASPECT (was|were) (\w+)": False,
    r"i do not doubt that the ASPECT (was|were) (\w+)": False,
    r"last year the ASPECT (was|were) \w+ , now (?:it|they) (?:was|were) (\w+)": False,
    r"everyone told me the ASPECT (was|were) \w+ ; to me (?:it|they) (?:was|were) (\w+)": False,
    r"of the ASPECT and the [\w ]+ , the first (was) (\w+) and the second": False,
    r"of the [\w ]+ and the ASPECT , the first was \w+ and the second (was) (\w+)": False,
    r"between the [\w ]+ and the ASPECT , i would (call) the second (\w+)": False,
    r"the ASPECT , next to the \w+ [\w ]+ , (seemed) (\w+)": False,
}
PLAIN = {w: p for p, ws in g.ADJECTIVES.items() for w in ws}


@pytest.mark.slow
def test_clauses_of_the_second_version_mean_what_a_reader_says(harder):
    seen = Counter()
    for e in (c for items in harder.values() for x in items for c in (x, *x.counterfactuals)):
        word = e.sentence[slice(*e.opinion)]
        for phrase, turned in READ_BY_A_PERSON.items():
            m = re.search(phrase.replace("ASPECT", re.escape(e.aspect)), e.sentence)
            if m is None or m.span(2) != e.opinion or word not in PLAIN:
                continue
            swapped = {"positive": "negative", "negative": "positive", "neutral": "neutral"}
            read = swapped[PLAIN[word].value] if turned else PLAIN[word].value
            assert e.polarity == read, (phrase, e)
            seen[phrase] += 1
    assert all(seen[p] > 5 for p in READ_BY_A_PERSON), seen


def test_a_sentence_of_the_second_version_worked_by_hand():
    import mech_absa.world.harder as h

    words: list[str] = []
    swaps = {p: (w,) for p, w in zip(Polarity, ("long", "short", "usual"), strict=True)}
    asked = [
        h._Asked("fries/s", Polarity.NEGATIVE, swaps, {}),
        h._Asked("wine list", Polarity.POSITIVE, swaps, {}),
    ]
    frame = h.Frame("of the {A} and the {B} , the second was {Q} and the first {be} {O}")
    mentions = h._fill(random.Random(0), frame, asked, words)
    assert " ".join(words) == (
        "of the fries and the wine list , the second was long and the first were short"
    )
    r = g.Review((*words, "."), tuple(mentions), "restaurant")
    fries, wine = r.example(0), r.example(1)
    assert (fries.aspect, fries.polarity, fries.sentence[slice(*fries.opinion)]) == (
        "fries",
        "negative",
        "short",
    )
    assert (wine.aspect, wine.polarity, wine.sentence[slice(*wine.opinion)]) == (
        "wine list",
        "positive",
        "long",
    )
    assert wine.counterfactuals[0].sentence.endswith(
        "the second was short and the first were short ."
    )


def test_ambiguous_words_praise_as_often_as_they_blame(harder):
    counts: dict[str, Counter] = {}
    for e in (e for items in harder.values() for e in items):
        counts.setdefault(e.sentence[slice(*e.opinion)], Counter())[e.polarity.value] += 1
    for word in ("long", "short", "high", "low", "big", "small", "hot", "cold"):
        c = counts[word]
        assert 0.3 < c["positive"] / (c["positive"] + c["negative"]) < 0.7, (word, c)


def test_train_and_test_of_the_second_version_share_no_sentence_frame_or_kept_aspect(world, harder):
    for domain in g.DOMAINS:
        train, test = harder[f"v2/{domain}/train"], harder[f"v2/{domain}/test"]
        assert not leakage([*train, *world[f"{domain}/train"]], test).rows
        everything = {x.sentence for e in train for x in (e, *e.counterfactuals)}
        assert not everything & {x.sentence for e in test for x in (e, *e.counterfactuals)}
        text = "\n".join(e.sentence for e in train)
        for only_test in ("it is wrong to say", "i read that", "two words about", "whereas"):
            assert only_test not in text
            assert any(only_test in e.sentence for e in test)
        kept = {a.removesuffix("/s") for s in g.SCALES[domain] for a in s.test_aspects}
        # A name that is kept for test as a scaled aspect may be a plain aspect of train.
        plain = {a.removesuffix("/s") for group in g.DOMAINS[domain].groups for a in group.aspects}
        assert not (kept - plain) & {e.aspect for e in train}
