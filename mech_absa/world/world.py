"""The built-in review world: a grammar that writes reviews whose every opinion is known.

A review of this world is one sentence about one to three aspects, each judged on its own, with things in between that judge something
else. The grammar has four domains (restaurant, laptop, device, service) after the four data sets of the paper. It is made for causal work:

- **The aspect decides.** Most sentences hold several polarities; a model that judges the sentence is wrong on them.
- **One word decides the aspect.** Every clause has one slot (`{O}` in `FRAMES`) whose word makes the aspect positive, negative or neutral:
  an adjective, a verb, a noun under a negation. Putting a word of another polarity in that slot, and touching nothing else, gives the
  counterfactual: as many words, and, in a tokenizer that knows these words, as many tokens.
- **Neutral is a mention**: "we ordered the pasta", "the pasta was not included", beside the plain "the pasta was ordinary".
- **Test is harder than train.** Its sentences, a part of its frames and connectors (`test=True`) and a part of its aspects (after the
  bar in `DOMAINS`) never occur in train.

The text is lower-cased and blank-separated, like the paper's data. Everything is a function of the seed.
`python -m mech_absa.generate --out DIR --seed 0` rebuilds the files that ship in `assets/world` byte for byte.

`continuations` gives the ordinary sentences that may follow a review and depend on one aspect's sentiment ("my view of the service is
negative"): a language model that continues them rightly has bound opinion to aspect, whether or not it understands the ABSC question.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError, choices
from ..examples import Example, Polarity, Span

Words = Mapping[Polarity, tuple[str, ...]]
"""What may stand in a slot, for each polarity it gives the aspect."""

POS, NEG, NEU = Polarity.POSITIVE, Polarity.NEGATIVE, Polarity.NEUTRAL


def _words(positive: str, negative: str, neutral: str) -> Words:
    return {POS: tuple(positive.split()), NEG: tuple(negative.split()), NEU: tuple(neutral.split())}


# --- the lexicon: slot kind -> words ---------------------------------------------------------------------------------------------------

ADJECTIVES = _words(
    "great good excellent amazing wonderful fantastic superb lovely perfect brilliant outstanding delightful impressive terrific nice",
    "bad terrible awful horrible poor disappointing dreadful lousy weak ugly useless nasty pathetic annoying miserable",
    "ordinary average standard typical usual normal common plain regular basic",
)
LEXICON: dict[str, Words] = {
    "adj": ADJECTIVES,
    # Under "not" the judgement turns round; a neutral "not" denies a fact.
    "not": {
        POS: ("bad", "terrible", "awful", "horrible", "poor", "disappointing", "annoying", "dreadful"),
        NEG: ("great", "good", "amazing", "impressive", "nice", "perfect", "wonderful", "excellent"),
        NEU: ("included", "mentioned", "changed", "listed", "shown", "tested", "needed", "counted"),
    },
    "liked": _words(
        "loved liked enjoyed adored praised admired",
        "hated disliked despised regretted cursed loathed",
        "tried used saw noticed mentioned chose",
    ),
    "felt": _words(
        "happy pleased delighted satisfied thrilled",
        "unhappy upset annoyed disappointed frustrated",
        "done finished busy familiar occupied",
    ),
    "struck": _words(
        "impressed pleased amazed delighted charmed",
        "annoyed disappointed bothered frustrated insulted",
        "reached awaited involved followed concerned",
    ),
    "would": _words("recommend praise applaud keep", "avoid skip criticize dump", "describe mention explain locate"),
    "will": _words("love adore enjoy like", "hate dislike regret despise", "see use find notice"),
    "nobody": _words("disliked hated regretted despised", "liked loved enjoyed praised", "tried used saw mentioned"),
    "no": _words("complaints problems regrets issues", "compliments praises cheers thanks", "news details questions notes"),
    "never": _words("better finer nicer", "worse poorer uglier", "other similar such"),
    "did": _words("shined excelled triumphed sparkled", "failed flopped stank disappointed", "arrived existed changed started"),
    "things": _words("nice wonderful kind lovely", "nasty bad harsh awful", "other more further usual"),
    "marks": _words("full high top", "low poor bad", "average medium standard"),
}  # fmt: skip


# --- the frames: one aspect, one opinion ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """A clause about one aspect.

    Attributes:
        text: `{A}` the aspect, `{O}` the deciding word, `{be}` and the like filled by agreement; `<` and `>` enclose the opinion
            expression where it is more than `{O}`.
        slot: the kind of `{O}`, a key of `LEXICON`.
        test: occurs in test files only.
    """

    text: str
    slot: str
    test: bool = False


FRAMES: tuple[Frame, ...] = (
    Frame("the {A} {be} {O}", "adj"),
    Frame("the {A} {be} {O}", "adj"),
    Frame("the {A} {be} < {degree} {O} >", "adj"),
    Frame("the {A} {is} {O}", "adj"),
    Frame("{A} {be} {O}", "adj"),
    Frame("the {A} {be} < not {O} >", "not"),
    Frame("the {A} {is} < not {O} > at all", "not"),
    Frame("the {A} turned out {O}", "adj"),
    Frame("as for the {A} , {it} {be} {O}", "adj"),
    Frame("the {A} ? {O}", "adj"),
    Frame("{who} {O} the {A}", "liked"),
    Frame("{who} {O} the {A} a lot", "liked"),
    Frame("i was {O} with the {A}", "felt"),
    Frame("the {A} {O} {us}", "struck"),
    Frame("i would {O} the {A}", "would"),
    Frame("you will {O} the {A}", "will"),
    Frame("< nobody {O} > the {A}", "nobody"),
    Frame("there were < no {O} > about the {A}", "no"),
    Frame("we < never had {O} > {A}", "never"),
    Frame("the {A} {O}", "did"),
    Frame("i have {O} things to say about the {A}", "things"),
    Frame("{O} marks for the {A}", "marks"),
    Frame("{O} {A}", "adj"),
    Frame("i noticed the {O} {A}", "adj"),
    Frame("then there {be} the {O} {A}", "adj"),
    Frame("the {A} , again , {be} {O}", "adj", test=True),
    Frame("{who} found the {A} {O}", "adj", test=True),
    Frame("to be honest the {A} {be} {O}", "adj", test=True),
    Frame("say what you want , the {A} {be} < not {O} >", "not", test=True),
    Frame("what stood out {be} the {O} {A}", "adj", test=True),
    Frame("{who} honestly {O} the {A}", "liked", test=True),
    Frame("i can only {O} the {A}", "would", test=True),
)

# {slot}: (singular, plural) or a free choice.
AGREEMENT = {"be": ("was", "were"), "is": ("is", "are"), "it": ("it", "they")}
FREE = {
    "degree": ("really", "very", "so", "quite", "rather", "truly"),
    "who": (
        "i",
        "we",
        "everyone",
        "my wife",
        "my brother",
        "my friends",
        "the kids",
        "my mother",
        "the whole family",
    ),
    "us": ("me", "us"),
}

# Opinions about what nobody asks: their words come from the same lexicon, so that a bag of words is misled.
DISTRACTORS = (
    "the {D} was {O}",
    "my {P} said the {D} was {O}",
    "we talked about the {O} {D}",
    "my {P} had a day that was {O}",
)
DISTRACTOR_NOUNS = (
    "weather",
    "traffic",
    "film",
    "weekend",
    "concert",
    "football game",
    "news report",
    "train ride",
    "garden party",
)
PEOPLE = ("boss", "neighbor", "cousin", "uncle", "colleague", "doctor")

JOINS_SAME = (" , and ", " , and ", " ; ", " , plus ", " and ")
JOINS_DIFFERENT = (
    " , but ",
    " , but ",
    " but ",
    " , yet ",
    " ; ",
    " , while ",
    " , and ",
    " , though ",
)
JOINS_TEST = (" , whereas ", " , even though ")
OPENERS_DIFFERENT = ("although ", "while ", "though ")


# --- the domains -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Aspects of one kind and the adjectives that suit only them. A plural aspect ends in `/s`."""

    aspects: tuple[str, ...]
    test_aspects: tuple[str, ...]
    adjectives: Words


@dataclass(frozen=True)
class Domain:
    """A name, the kinds of aspects, what may stand before and after the clauses, and how often each polarity is drawn."""

    name: str
    groups: tuple[Group, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    weights: tuple[float, float, float] = (0.44, 0.32, 0.24)


def _group(aspects: str, positive: str, negative: str, neutral: str) -> Group:
    both, _, test = aspects.partition("|")
    names = [tuple(a.strip() for a in part.split(",") if a.strip()) for part in (both, test)]
    return Group(names[0], names[1], _words(positive, negative, neutral))


DOMAINS: dict[str, Domain] = {
    d.name: d
    for d in (
        Domain(
            "restaurant",
            (
                _group(
                    "pasta, pizza, soup, salad, steak, wine, dessert, bread, sushi, chicken, burger, coffee, beer/s, fries/s, "
                    "noodles/s, "
                    "oysters/s, wine list, lunch special, tuna roll, chocolate cake, spring rolls/s, fried rice, goat cheese salad, "
                    "house red wine "
                    "| curry, shrimp, dumplings/s, onion soup, lobster bisque, grilled fish",
                    "tasty delicious fresh juicy", "bland stale soggy greasy", "italian seasonal local warm",
                ),
                _group(
                    "service, staff, waiter, waitress, manager, chef, bartender, wait staff, host at the door | owner, hostess, busboy",
                    "friendly attentive polite", "rude careless impatient", "young quiet new",
                ),
                _group(
                    "place, decor, music, patio, bathroom, tables/s, menu, prices/s, dining room, outdoor seating, price of the "
                    "drinks "
                    "| ambience, portions/s, garden terrace",
                    "charming pleasant cozy", "dirty shabby dull", "large central round",
                ),
            ),
            ("we went there on friday and ", "after a long walk , ", "it was our second visit ; ", "for my birthday dinner , ",
             "on a busy night , ", "i came with five friends and "),
            ("as we sat near the window", "before the bill came", "on that evening", "when we visited in june", "at our table"),
            (0.45, 0.31, 0.24),
        ),
        Domain(
            "laptop",
            (
                _group(
                    "screen, keyboard, battery, trackpad, hinge, speakers/s, webcam, fan, charger, hard drive, graphics card, usb "
                    "ports/s, display panel, "
                    " power cord, touch screen display, lid, case, processor, built in camera "
                    "| memory, mouse pad, cooling fan, optical drive",
                    "fast sturdy sharp reliable", "slow flimsy noisy faulty", "black silver removable wide",
                ),
                _group(
                    "windows, operating system, software, boot time, setup, word processor, drivers/s, updates/s, trial version, "
                    "web browser, "
                    " photo editor, start menu | programs/s, recovery disk, video player",
                    "smooth quick stable", "buggy sluggish confusing", "preinstalled optional older",
                ),
                _group(
                    "price, warranty, design, weight, size, tech support, shipping, resolution, battery life, sound quality, "
                    "startup speed "
                    "| packaging, finish, help desk",
                    "generous elegant fair", "dreary shoddy unfair", "similar moderate yearly",
                ),
            ),
            ("i bought it last month and ", "after a week of use , ", "it replaced my old machine ; ",
             "i use it for school and ", "compared with my desktop , ", "for work and travel , "),
            ("from the first day", "after the last update", "when i use it at home", "on this model", "since i opened the box"),
            (0.42, 0.35, 0.23),
        ),
        Domain(
            "device",
            (
                _group(
                    "camera, phone, player, router, lens, zoom, flash, antenna, earbuds/s, headphones/s, buttons/s, remote control, "
                    "memory card, lcd screen, "
                    " scroll wheel, battery pack, viewfinder, belt clip, carrying case, volume knob "
                    "| tripod mount, dial, speakerphone, front panel",
                    "crisp durable handy", "fragile blurry clumsy", "metal compact white",
                ),
                _group(
                    "pictures/s, photos/s, ringtones/s, firmware, reception, auto focus, sound, voice dialing, picture mode, "
                    "transfer rate, alarm, "
                    " video clips/s, signal strength, color balance | playlists/s, night mode, radio tuner",
                    "clear vivid accurate", "grainy distorted unreliable", "digital manual automatic",
                ),
                _group(
                    "manual, instructions/s, customer service, look, feel, accessories/s, installation, plan, size of the buttons"
                    "| user guide, rebate, price tag",
                    "helpful simple affordable", "useless complicated expensive", "printed separate spanish",
                ),
            ),
            ("i have owned it for a year and ", "out of the box , ", "this is my third one ; ", "i took it on vacation and ",
             "after two months , ", "as a gift for my dad , "),
            ("in daily use", "after a few weeks", "for this kind of gadget", "when i tested it outside", "out of the package"),
            (0.36, 0.41, 0.23),
        ),
        Domain(
            "service",
            (
                _group(
                    "agent, driver, representative, cashier, technician, receptionist, nurse, delivery man, support team, front "
                    "desk, call center, "
                    " sales people/s, crew | supervisor, repair guy, branch manager",
                    "helpful courteous prompt", "arrogant clueless hostile", "bilingual local female",
                ),
                _group(
                    "website, app, checkout, booking, delivery, refund, return policy, payment page, search tool, order form, phone "
                    "line, billing system, "
                    " online chat, terms of use, account page | tracking page, mobile site, loyalty card",
                    "easy secure speedy", "broken tedious insecure", "monthly online paperless",
                ),
                _group(
                    "fees/s, insurance, course, lectures/s, hotel room, parking, lobby, breakfast, pool, tour, rental car, shuttle "
                    "bus, interest rate, "
                    " class material | flight, homework, gym, airport lounge",
                    "valuable worthwhile relaxing", "worthless pointless boring", "annual weekly public",
                ),
            ),
            ("i called them twice and ", "last summer , ", "we used this company again ; ", "i signed up in may and ",
             "for a family trip , ", "as a new customer , "),
            ("during our stay", "from start to end", "when i needed it", "in the past year", "for our group"),
            (0.30, 0.45, 0.25),
        ),
    )
}  # fmt: skip


# --- a review -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mention:
    """One judged aspect, in words `[start, end)` of its review.

    Attributes:
        aspect: where the aspect stands.
        opinion: where the opinion expression stands.
        slot: index of the one word that decides.
        polarity: what it decides.
        swaps: the word that would stand in the slot for each polarity.
    """

    aspect: Span
    opinion: Span
    slot: int
    polarity: Polarity
    swaps: Mapping[Polarity, str]


@dataclass(frozen=True)
class Review:
    """One sentence of the world: its words and its judged aspects."""

    words: tuple[str, ...]
    mentions: tuple[Mention, ...]
    domain: str

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def characters(self, span: Span) -> Span:
        """Words `[start, end)` as characters of `text`."""
        start = sum(len(w) + 1 for w in self.words[: span[0]])
        return start, start + len(" ".join(self.words[slice(*span)]))

    def name(self, mention: Mention) -> str:
        """The aspect's words."""
        return " ".join(self.words[slice(*mention.aspect)])

    def swapped(self, mention: Mention, polarity: Polarity) -> Review:
        """This review with one word changed, so that the mention has another polarity and all else is equal."""
        words = list(self.words)
        words[mention.slot] = mention.swaps[polarity]
        mentions = tuple(
            replace(m, polarity=polarity) if m is mention else m for m in self.mentions
        )
        return replace(self, words=tuple(words), mentions=mentions)

    def example(self, index: int) -> Example:
        """The `index`-th mention as an example, with a counterfactual for each other polarity."""
        m = self.mentions[index]
        bare = self._bare(index)
        others = tuple(self.swapped(m, p)._bare(index) for p in Polarity if p != m.polarity)
        return replace(bare, counterfactuals=others)

    def _bare(self, index: int) -> Example:
        m = self.mentions[index]
        return Example(
            self.text,
            self.name(m),
            m.polarity,
            self.characters(m.aspect),
            self.characters(m.opinion),
            self.domain,
        )


def review(
    rng: random.Random, domain: Domain, aspects: int, split: str = "train", distractor: float = 0.3
) -> Review:
    """One review with that many judged aspects.

    Args:
        aspects: 1 to 3.
        split: `train`; or `test`, which may also use the frames, connectors and aspects that are kept for it.
        distractor: chance of a clause that judges something nobody asks about.
    """
    test = split == "test"
    chosen = _aspects(rng, domain, aspects, test)
    polarities = _polarities(rng, domain, aspects)
    clauses = [
        _clause(rng, a, group, p, test) for (a, group), p in zip(chosen, polarities, strict=True)
    ]
    tones: list[Polarity | None] = [*polarities]
    if rng.random() < distractor:
        at = rng.randrange(len(clauses) + 1)
        clauses.insert(at, _distractor(rng))
        tones.insert(at, None)
    return _joined(rng, domain, clauses, tones, test)


def _aspects(rng: random.Random, domain: Domain, n: int, test: bool) -> list[tuple[str, Group]]:
    """`n` aspects that share no word, so that each is found by its own words."""
    pool = [(a, g) for g in domain.groups for a in g.aspects + (g.test_aspects if test else ())]
    if test:  # half of the draws go to the aspects that train never saw
        kept = [(a, g) for g in domain.groups for a in g.test_aspects]
        pool = kept * max(1, len(pool) // (2 * len(kept))) + pool if kept else pool
    while True:
        chosen = [rng.choice(pool) for _ in range(n)]
        seen = [w for a, _ in chosen for w in a.removesuffix("/s").split()]
        if len(set(seen)) == len(seen):
            return chosen


def _polarities(rng: random.Random, domain: Domain, n: int) -> list[Polarity]:
    """Drawn by the domain's weights, once more where they all agree: mixed sentences are what the task is about."""
    draw = rng.choices(tuple(Polarity), domain.weights, k=n)
    if n > 1 and len(set(draw)) == 1:
        draw = rng.choices(tuple(Polarity), domain.weights, k=n)
    return draw


_Clause = tuple[list[str], list[Mention]]


def _clause(
    rng: random.Random, aspect: str, group: Group, polarity: Polarity, test: bool
) -> _Clause:
    kept = [f for f in FRAMES if f.test]
    frame = rng.choice(kept if test and rng.random() < 0.4 else [f for f in FRAMES if not f.test])
    lexicon = LEXICON[frame.slot]
    own = frame.slot == "adj" and rng.random() < 0.4
    swaps = {p: rng.choice((group.adjectives if own else lexicon)[p]) for p in Polarity}
    plural = aspect.endswith("/s")
    words: list[str] = []
    opens = closes = None
    where: Span = (0, 0)
    slot = 0
    for piece in frame.text.split():
        if piece == "<":
            opens = len(words)
        elif piece == ">":
            closes = len(words)
        elif piece == "{A}":
            name = aspect.removesuffix("/s").split()
            where = len(words), len(words) + len(name)
            words += name
        elif piece == "{O}":
            slot = len(words)
            words.append(swaps[polarity])
        elif (key := piece.strip("{}")) in AGREEMENT and piece != key:
            words.append(AGREEMENT[key][plural])
        elif piece != key:
            words += rng.choice(FREE[key]).split()
        else:
            words.append(piece)
    opinion = (slot, slot + 1) if opens is None or closes is None else (opens, closes)
    return words, [Mention(where, opinion, slot, polarity, swaps)]


def _distractor(rng: random.Random) -> _Clause:
    word = rng.choice(ADJECTIVES[rng.choice((POS, NEG))])
    text = rng.choice(DISTRACTORS).format(
        D=rng.choice(DISTRACTOR_NOUNS), P=rng.choice(PEOPLE), O=word
    )
    return text.split(), []


def _joined(
    rng: random.Random,
    domain: Domain,
    clauses: list[_Clause],
    tones: Sequence[Polarity | None],
    test: bool,
) -> Review:
    words: list[str] = []
    mentions: list[Mention] = []

    def add(clause: _Clause) -> None:
        base = len(words)
        words.extend(clause[0])
        for m in clause[1]:
            aspect, opinion = ((start + base, end + base) for start, end in (m.aspect, m.opinion))
            mentions.append(replace(m, aspect=aspect, opinion=opinion, slot=m.slot + base))

    differ = len(tones) > 1 and tones[0] != tones[1]
    if rng.random() < 0.25:
        words += rng.choice(domain.openings).split()
    elif len(clauses) == 2 and differ and rng.random() < 0.2:
        words += rng.choice(OPENERS_DIFFERENT).split()
        add(clauses.pop(0))
        words.append(",")
        tones = tones[1:]
    for i, clause in enumerate(clauses):
        if i:
            joins: tuple[str, ...] = JOINS_DIFFERENT if tones[i] != tones[i - 1] else JOINS_SAME
            if test and rng.random() < 0.25:
                joins = JOINS_TEST
            if i < len(clauses) - 1:
                joins = (" , ", " ; ")
            words += rng.choice(joins).split()
        add(clause)
    if rng.random() < 0.15:
        words += rng.choice(domain.closings).split()
    words.append(rng.choice((".", ".", ".", ".", "!")))
    return Review(tuple(words), tuple(mentions), domain.name)


ASPECTS_A_SENTENCE = ((1, 2, 3), (0.22, 0.45, 0.33))


def examples(
    domain: str, split: str, n: int, seed: int = 0, without: Collection[str] = ()
) -> list[Example]:
    """At least `n` examples, every judged aspect of every sentence asked once; no sentence twice.

    Args:
        domain: a key of `DOMAINS`.
        split: `train` or `test`.
        without: sentences that must not occur, as texts.

    Raises:
        ConfigError: an unknown domain or split.
    """
    for flag, got, known in (("domain", domain, DOMAINS), ("split", split, SPLITS)):
        if got not in known:
            raise ConfigError(f"the built-in world has no {flag} {got!r}; it has {choices(known)}")
    rng = random.Random(f"{domain}/{split}/{seed}")
    seen = set(without)
    found: list[Example] = []
    while len(found) < n:
        r = review(rng, DOMAINS[domain], rng.choices(*ASPECTS_A_SENTENCE)[0], split)
        texts = {r.text} | {r.swapped(m, p).text for m in r.mentions for p in Polarity}
        if seen & texts:  # a counterfactual of one split must not be a sentence of the other either
            continue
        seen |= texts
        for i in range(len(r.mentions)):
            e = r.example(i)
            id = f"{domain}-{split}-{len(found):04d}"
            cf = tuple(replace(c, id=f"{id}-{c.polarity.value}") for c in e.counterfactuals)
            found.append(replace(e, id=id, counterfactuals=cf))
    return found


# --- what may follow a review -----------------------------------------------------------------------------------------------------------


class Continuation(NamedTuple):
    """A text that ends just before a word that depends on one aspect's sentiment.

    Attributes:
        text: the review and the beginning of what follows.
        answer: the right next word, with its leading blank.
        choices: the word for positive, negative and neutral, in this order.
    """

    text: str
    answer: str
    choices: tuple[str, str, str]


CONTINUATIONS: tuple[tuple[str, tuple[str, str, str]], ...] = (
    ("my view of the {A} is", ("positive", "negative", "neutral")),
    ("my feelings about the {A} are", ("positive", "negative", "neutral")),
    ("stars for the {A} :", ("5", "1", "3")),
    ("as for the {A} , i would call it", ("good", "bad", "okay")),
    ("would i take the {A} again ?", ("yes", "no", "maybe")),
)
"""What may follow, up to the word that depends on the aspect; the words for positive, negative and neutral."""


def continuations(example: Example) -> list[Continuation]:
    """Every `CONTINUATIONS` of an example: what a language model should say next if it bound the opinion to the aspect."""
    order = tuple(Polarity).index(example.polarity)
    found = []
    for text, words in CONTINUATIONS:
        blanked = (f" {words[0]}", f" {words[1]}", f" {words[2]}")
        found.append(
            Continuation(
                f"{example.sentence} {text.format(A=example.aspect)}", blanked[order], blanked
            )
        )
    return found


def vocabulary() -> list[str]:
    """Every word the world can write, sorted: what a tokenizer for it should know."""
    texts = (
        [f.text for f in FRAMES]
        + list(DISTRACTORS)
        + [
            *DISTRACTOR_NOUNS,
            *PEOPLE,
            *JOINS_SAME,
            *JOINS_DIFFERENT,
            *JOINS_TEST,
            *OPENERS_DIFFERENT,
        ]
    )
    texts += [w for table in (*AGREEMENT.values(), *FREE.values()) for w in table]
    texts += [w for words in LEXICON.values() for ws in words.values() for w in ws]
    for d in DOMAINS.values():
        texts += [*d.openings, *d.closings]
        for g in d.groups:
            texts += [a.removesuffix("/s") for a in g.aspects + g.test_aspects] + [
                w for ws in g.adjectives.values() for w in ws
            ]
    texts += [t for t, _ in CONTINUATIONS] + [w for _, ws in CONTINUATIONS for w in ws]
    pieces = {w for t in texts for w in t.split() if not (w.startswith("{") or w in "<>")}
    return sorted(pieces | {".", "!"})


# --- the files --------------------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "test")
SIZES = {"train": 1200, "test": 640}
WORLD = Path(__file__).parents[1] / "assets" / "world"


def record(example: Example) -> dict:
    """An example of the world as one JSON line: `text, aspect, from, to, polarity, opinion, domain, id, counterfactuals`."""

    def bare(e: Example) -> dict:
        assert e.span is not None and e.opinion is not None
        return {
            "from": e.span[0],
            "to": e.span[1],
            "polarity": e.polarity.value,
            "opinion": list(e.opinion),
        }

    return {
        "text": example.sentence, "aspect": example.aspect, **bare(example), "domain": example.domain, "id": example.id,
        "counterfactuals": [{"text": c.sentence, **bare(c)} for c in example.counterfactuals],
    }  # fmt: skip


def write_world(out: Path, seed: int = 0) -> list[Path]:
    """The files `out/{domain}/{train,test}.jsonl`; the same bytes for the same seed.

    Returns:
        the files written.
    """
    written = []
    for domain in DOMAINS:
        taken: set[str] = set()
        for split in SPLITS:
            found = examples(domain, split, SIZES[split], seed, without=taken)
            taken |= {e.sentence for e in found} | {
                c.sentence for e in found for c in e.counterfactuals
            }
            path = out / domain / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                "".join(json.dumps(record(e)) + "\n" for e in found), encoding="utf-8", newline="\n"
            )
            written.append(path)
    return written


def builtin_path(name: str) -> Path:
    """The shipped file that `name`, such as `restaurant/test`, means.

    Raises:
        DataError: there is no such file; the message lists those there are.
    """
    known = [f"{d}/{s}" for d in DOMAINS for s in SPLITS]
    if name.removesuffix(".jsonl") not in known:
        raise DataError(f"no built-in examples {name!r}; there are {choices(known)}")
    return WORLD / f"{name.removesuffix('.jsonl')}.jsonl"


def stream(
    seed: int | str, domain: Domain, aspects: Sequence[int], split: str = "train"
) -> Iterator[Review]:
    """Endless reviews of a domain, each with a number of judged aspects drawn from `aspects`."""
    rng = random.Random(seed)
    while True:
        yield review(rng, domain, rng.choice(aspects), split)
