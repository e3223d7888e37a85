"""The second version of the built-in world, in which the nearest opinion word often misleads.

In the first version (`grammar.py`) the opinion expression that stands nearest to an aspect gives its
polarity in 96 % of the cases. Here it mostly does not, for five reasons:

- **Ambiguous words**: "long" praises a warranty and blames a wait. `SCALES` lists the aspects of
  each domain for which more is better, and those for which less is better.
- **Opinions nearer to another aspect**: "the soup , next to the awful bread , seemed good".
- **Ordinals**: "of the soup and the bread , the first was good and the second was awful".
- **Negation and hedges over clauses**: "i would not say that the soup was good", and beside it
  "nobody could doubt that the soup was good", which does not turn the polarity round.
- **Other opinions of the same aspect**: what was expected, what others said, how it was last year.
  The present opinion of the author counts.

What was true of the first version still holds: one word decides the polarity of each aspect, and
exchanging it gives the counterfactual with the same number of tokens in the bundled tokenizer. Some
frames and aspects occur in test only. Every word is a token of the bundled tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..errors import ConfigError, choices
from ..examples import Example, Polarity, Span
from .grammar import SPLITS, Mention, Review, collect, draw_polarities
from .lexicon import (
    ADJECTIVES,
    DISTRACTOR_NOUNS,
    DOMAINS,
    LEXICON,
    NEG,
    NEU,
    PEOPLE,
    POS,
    Domain,
    Words,
)

# --- ambiguous words ------------------------------------------------------------------------------

SCALE_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "length": (("long",), ("short",), ("usual", "normal", "average", "typical")),
    "level": (("high",), ("low",), ("average", "normal", "typical", "usual")),
    "size": (("big", "huge"), ("small",), ("average", "normal", "ordinary", "standard")),
    "heat": (("hot",), ("cold",), ("ordinary", "usual", "typical", "plain")),
}
"""Scale -> words for much of it, for little of it, and for neither."""


@dataclass(frozen=True)
class Scaled:
    """Aspects of a domain whose polarity is the place on one scale.

    Attributes:
        scale: a key of `SCALE_WORDS`.
        more_is_better: whether the words for much of it praise.
        aspects: their names; a plural ends in `/s`.
        test_aspects: names that occur in test only.
    """

    scale: str
    more_is_better: bool
    aspects: tuple[str, ...]
    test_aspects: tuple[str, ...]

    def words(self, turned: bool) -> Words:
        """Return the words per polarity; under a negation (`turned`) the two ends are exchanged."""
        much, little, neither = SCALE_WORDS[self.scale]
        if turned:
            neither = LEXICON["not"][NEU]
        if self.more_is_better != turned:
            return {POS: much, NEG: little, NEU: neither}
        return {POS: little, NEG: much, NEU: neither}


def _scaled(scale: str, more: str, less: str) -> tuple[Scaled, Scaled]:
    def names(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        train, _, test = text.partition("|")
        return tuple(a.strip() for a in train.split(",")), tuple(a.strip() for a in test.split(","))

    return Scaled(scale, True, *names(more)), Scaled(scale, False, *names(less))


SCALES: dict[str, tuple[Scaled, ...]] = {
    "restaurant": (
        *_scaled(
            "length",
            "happy hour, wine list, opening hours/s | lunch menu",
            "wait, line at the door, walk from the parking lot | wait for the bill",
        ),
        *_scaled(
            "level",
            "quality of the bread, level of service | quality of the fish",
            "prices/s, bill, sound level | price of the wine",
        ),
        *_scaled(
            "size",
            "portions/s, steak, burger, dining room | dessert",
            "cover price, problems with the bill/s | wait list",
        ),
        *_scaled("heat", "coffee, soup, pizza, fries/s | onion soup", "beer, salad, white wine | house wine"),
    ),
    "laptop": (
        *_scaled(
            "length",
            "battery life, warranty, support hours/s | power cord",
            "boot time, startup time, shipping time | update time",
        ),
        *_scaled(
            "level",
            "resolution, build quality, screen quality | sound quality",
            "price, fan speed, power use | return rate",
        ),
        *_scaled(
            "size",
            "screen, hard drive, mouse pad | keyboard",
            "charger, power pack, start menu | power adapter",
        ),
    ),
    "device": (
        *_scaled(
            "length",
            "battery life, talk time, play time | warranty",
            "installation, start time, shutter time | wait between pictures",
        ),
        *_scaled(
            "level",
            "picture quality, signal strength, transfer rate | sound quality",
            "price, monthly cost, return rate | price of the plan",
        ),
        *_scaled(
            "size",
            "lcd screen, memory card, buttons/s | viewfinder",
            "carrying case, battery pack, antenna | belt clip",
        ),
    ),
    "service": (
        *_scaled(
            "length",
            "free trial, tour, opening hours/s | breakfast hours/s",
            "wait, hold time, order form | flight",
        ),
        *_scaled(
            "level",
            "success rate, level of support | quality of the class",
            "fees/s, interest rate, insurance price | hotel bill",
        ),
        *_scaled(
            "size",
            "hotel room, pool, refund, lobby | gym",
            "bill, fine print, parking price | line at the desk",
        ),
        *_scaled("heat", "breakfast, coffee | soup", "beer, drinks/s | wine"),
    ),
}  # fmt: skip


# --- the frames -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """A sentence part about one or two aspects.

    Attributes:
        text: `{A}` and `{B}` are aspects, `{O}` and `{Q}` the words that decide them; `{be}`, `{it}`
            and `{them}` agree with `{A}`, `{beB}` with `{B}`. `{X}` is an opinion that does not
            count, `{D}` a thing that is never asked about, `{P}` a person.
        turned: the letters of those deciding words that stand under a negation.
        test: occurs in test files only.
    """

    text: str
    turned: str = ""
    test: bool = False


ONE: tuple[Frame, ...] = (
    Frame("i would not say that the {A} {be} {O}", "O"),
    Frame("nobody could say that the {A} {be} {O}", "O"),
    Frame("it is not true that the {A} {be} {O}", "O"),
    Frame("my {P} said that the {A} {be} {O} , but that was wrong", "O"),
    Frame("i do not believe that the {A} {be} {O}", "O"),
    Frame("we never thought that the {A} {be} {O}", "O"),
    Frame("i can not say that the {A} {be} {O} at all", "O", test=True),
    Frame("it is wrong to say that the {A} {be} {O}", "O", test=True),
    Frame("nobody could doubt that the {A} {be} {O}"),
    Frame("it is true that the {A} {be} {O}"),
    Frame("my {P} said that the {A} {be} {O} , and that was right"),
    Frame("i do not doubt that the {A} {be} {O}"),
    Frame("it is not wrong to say that the {A} {be} {O}", test=True),
    Frame("last year the {A} {be} {X} , now {it} {be} {O}"),
    Frame("the {A} used to be {X} , now i call {them} {O}"),
    Frame("everyone told me the {A} {be} {X} ; to me {it} {be} {O}"),
    Frame("they call the {A} {X} online ; what i got was {O}"),
    Frame("i expected the {A} to be {X} , and what we got was {O}"),
    Frame("my {P} finds the {A} {X} ; i find {them} {O}"),
    Frame("i read that the {A} {be} {X} , and in my opinion {it} {be} {O}", test=True),
    Frame("before my visit i thought of the {A} as {X} , now i think of {them} as {O}", test=True),
    Frame("the {A} , which we got after the {D} was {X} , {be} {O}"),
    Frame("the {A} that my {P} with the {X} {D} told us about {be} {O}"),
    Frame("the {A} , on a day when the {D} was {X} , {be} {O}"),
    Frame("about the {A} , which we tried after the {X} {D} , i can say that {it} {be} {O}"),
    Frame("the {A} , although my {P} talked about the {X} {D} , {be} {O}", test=True),
)
"""Frames with one aspect."""

TWO: tuple[Frame, ...] = (
    Frame("the {A} and the {B} were {O} and {Q} , in this order"),
    Frame("of the {A} and the {B} , the first was {O} and the second was {Q}"),
    Frame("of the {A} and the {B} , the second was {Q} and the first was {O}"),
    Frame("between the {A} and the {B} , i would call the second {Q} and the first {O}"),
    Frame("i came for the {A} and the {B} ; {O} was the first , {Q} the second"),
    Frame("the {A} , next to the {Q} {B} , seemed {O}"),
    Frame("the {A} that came after the {Q} {B} {be} {O}"),
    Frame("the {A} , unlike the {Q} {B} , {be} {O}"),
    Frame("compared with the {Q} {B} , which we had first , the {A} {be} {O}"),
    Frame("to me {O} {be} the {A} , {Q} the {B}"),
    Frame("the {A} came with the {B} , and nobody could call the first {O} ; the second was {Q}", "O"),
    Frame("we talked about the {A} and the {B} ; i would not call the second {Q} , and the first was {O}", "Q"),
    Frame("after the {A} came the {B} , the second {Q} and the first {O}", test=True),
    Frame("the {A} and the {B} ? {O} and {Q}", test=True),
    Frame("i found the {A} , which was not like the {Q} {B} , {O}", test=True),
    Frame("two words about the {A} and the {B} : {O} and {Q} , in this order", test=True),
)  # fmt: skip
"""Frames with two aspects."""

AGREEMENT = {"be": ("was", "were"), "it": ("it", "they"), "them": ("it", "them")}
JOINS = (" ; ", " , and ", " , while ")
TEST_JOINS = (" , whereas ",)


# --- a review -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """One aspect, the polarity it gets, and what may give it a polarity."""

    aspect: str
    polarity: Polarity
    plain: Words
    turned: Words


def harder_review(rng: random.Random, domain: Domain, split: str = "train") -> Review:
    """Write one review of the second version: a frame with two aspects, with one, or two with one.

    Args:
        split: `train` or `test`; only `test` uses the frames and aspects kept for it.
    """
    test = split == "test"
    aspects = rng.choices((1, 2, 3), (0.25, 0.5, 0.25))[0]
    parts = {1: [ONE], 2: [TWO] if rng.random() < 0.6 else [ONE, ONE], 3: [TWO, ONE]}[aspects]
    rng.shuffle(parts)
    asked = _draw(rng, domain, aspects, test)
    words: list[str] = []
    mentions: list[Mention] = []
    for i, frames in enumerate(parts):
        if i:
            words += rng.choice(JOINS + TEST_JOINS if test else JOINS).split()
        frame = _frame(rng, frames, test)
        here = [asked.pop() for _ in range(2 if frames is TWO else 1)]
        mentions += _fill(rng, frame, here, words)
    if rng.random() < 0.15:
        words += rng.choice(domain.closings).split()
    words.append(".")
    return Review(tuple(words), tuple(mentions), domain.name)


def _frame(rng: random.Random, frames: tuple[Frame, ...], test: bool) -> Frame:
    kept = test and rng.random() < 0.4
    return rng.choice([f for f in frames if f.test == kept])


def _draw(rng: random.Random, domain: Domain, n: int, test: bool) -> list[_Asked]:
    """Draw `n` aspects that share no word, about half of them with ambiguous words."""
    while True:
        drawn = [_aspect(rng, domain, test) for _ in range(n)]
        seen = [w for name, _, _ in drawn for w in set(name.removesuffix("/s").split()) - {"the"}]
        if len(set(seen)) == len(seen):
            break
    polarities = draw_polarities(rng, domain, n)
    return [_Asked(a, p, *words) for (a, *words), p in zip(drawn, polarities, strict=True)]


def _aspect(rng: random.Random, domain: Domain, test: bool) -> tuple[str, Words, Words]:
    kept = test and rng.random() < 0.5
    if rng.random() < 0.55:
        scaled = rng.choice(SCALES[domain.name])
        name = rng.choice(scaled.test_aspects if kept else scaled.aspects)
        return name, scaled.words(False), scaled.words(True)
    group = rng.choice(domain.groups)
    name = rng.choice(group.test_aspects if kept else group.aspects)
    own = group.adjectives if rng.random() < 0.4 else ADJECTIVES
    return name, own, LEXICON["not"]


def _fill(rng: random.Random, frame: Frame, asked: list[_Asked], words: list[str]) -> list[Mention]:
    """Append the words of a frame to `words`; return its mentions."""
    place: dict[str, Span] = {}
    of = dict(zip("AB", asked, strict=False))
    swaps: dict[str, Mapping[Polarity, str]] = {}
    for letter, a in zip("OQ", asked, strict=False):
        table = a.turned if letter in frame.turned else a.plain
        swaps[letter] = {p: rng.choice(table[p]) for p in Polarity}
    free = {
        "X": rng.choice(ADJECTIVES[rng.choice((POS, NEG, POS, NEG, NEU))]),
        "D": rng.choice(DISTRACTOR_NOUNS),
        "P": rng.choice(PEOPLE),
    }
    for piece in frame.text.split():
        key = piece.strip("{}")
        start = len(words)
        if piece == key:
            words.append(piece)
        elif key in of:
            words += of[key].aspect.removesuffix("/s").split()
        elif key in swaps:
            words.append(swaps[key][asked["OQ".index(key)].polarity])
        elif key in free:
            words += free[key].split()
        else:
            words.append(AGREEMENT[key][asked[0].aspect.endswith("/s")])
        place[key] = (start, len(words))
    return [
        Mention(place[x], place[o], place[o][0], a.polarity, swaps[o])
        for x, o, a in zip("AB", "OQ", asked, strict=False)
    ]


def harder_examples(
    domain: str, split: str, n: int, seed: int = 0, without: Collection[str] = ()
) -> list[Example]:
    """Write at least `n` examples of the second version, as `grammar.examples` does of the first.

    Raises:
        ConfigError: an unknown domain or split.
    """
    for flag, got, known in (("domain", domain, DOMAINS), ("split", split, SPLITS)):
        if got not in known:
            raise ConfigError(f"the built-in world has no {flag} {got!r}; it has {choices(known)}")
    rng = random.Random(f"v2/{domain}/{split}/{seed}")
    return collect(
        lambda: harder_review(rng, DOMAINS[domain], split), f"v2-{domain}-{split}", n, without
    )


def harder_vocabulary() -> list[str]:
    """Return every word that only the second version can write or shares with the first, sorted."""
    texts = [f.text for f in (*ONE, *TWO)] + [*JOINS, *TEST_JOINS, *DISTRACTOR_NOUNS, *PEOPLE]
    texts += [w for table in AGREEMENT.values() for w in table]
    texts += [w for ends in SCALE_WORDS.values() for ws in ends for w in ws]
    texts += [
        a.removesuffix("/s")
        for scales in SCALES.values()
        for s in scales
        for a in s.aspects + s.test_aspects
    ]
    return sorted({w for t in texts for w in t.split() if not w.startswith("{")} | {"."})
