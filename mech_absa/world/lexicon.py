"""The words of the built-in world: lexicon, clause frames, and the four domains.

Every clause frame has one slot, `{O}`. The word in this slot decides the polarity of the aspect. A
table of the lexicon lists the words that may stand in one kind of slot, per polarity, so exchanging
the word changes the polarity and nothing else. A part of the frames and connectors (`test=True`)
and a part of the aspects (after the bar in `DOMAINS`) occur in test files only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..examples import Polarity

Words = Mapping[Polarity, tuple[str, ...]]
"""Polarity -> the words that give the aspect this polarity."""

POS, NEG, NEU = Polarity.POSITIVE, Polarity.NEGATIVE, Polarity.NEUTRAL


def words(positive: str, negative: str, neutral: str) -> Words:
    """Return a table of blank-separated words per polarity."""
    return {POS: tuple(positive.split()), NEG: tuple(negative.split()), NEU: tuple(neutral.split())}


# --- the lexicon: slot kind -> words --------------------------------------------------------------

ADJECTIVES = words(
    "great good excellent amazing wonderful fantastic superb lovely perfect brilliant outstanding delightful impressive terrific nice",
    "bad terrible awful horrible poor disappointing dreadful lousy weak ugly useless nasty pathetic annoying miserable",
    "ordinary average standard typical usual normal common plain regular basic",
)
LEXICON: dict[str, Words] = {
    "adj": ADJECTIVES,
    # "not" reverses a judgement; a neutral "not" denies a fact.
    "not": {
        POS: ("bad", "terrible", "awful", "horrible", "poor", "disappointing", "annoying", "dreadful"),
        NEG: ("great", "good", "amazing", "impressive", "nice", "perfect", "wonderful", "excellent"),
        NEU: ("included", "mentioned", "changed", "listed", "shown", "tested", "needed", "counted"),
    },
    "liked": words(
        "loved liked enjoyed adored praised admired",
        "hated disliked despised regretted cursed loathed",
        "tried used saw noticed mentioned chose",
    ),
    "felt": words(
        "happy pleased delighted satisfied thrilled",
        "unhappy upset annoyed disappointed frustrated",
        "done finished busy familiar occupied",
    ),
    "struck": words(
        "impressed pleased amazed delighted charmed",
        "annoyed disappointed bothered frustrated insulted",
        "reached awaited involved followed concerned",
    ),
    "would": words("recommend praise applaud keep", "avoid skip criticize dump", "describe mention explain locate"),
    "will": words("love adore enjoy like", "hate dislike regret despise", "see use find notice"),
    "nobody": words("disliked hated regretted despised", "liked loved enjoyed praised", "tried used saw mentioned"),
    "no": words("complaints problems regrets issues", "compliments praises cheers thanks", "news details questions notes"),
    "never": words("better finer nicer", "worse poorer uglier", "other similar such"),
    "did": words("shined excelled triumphed sparkled", "failed flopped stank disappointed", "arrived existed changed started"),
    "things": words("nice wonderful kind lovely", "nasty bad harsh awful", "other more further usual"),
    "marks": words("full high top", "low poor bad", "average medium standard"),
}  # fmt: skip


# --- the frames: one aspect, one opinion ----------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """A clause about one aspect.

    Attributes:
        text: `{A}` is the aspect, `{O}` the deciding word; `{be}` and the like agree with the
            aspect. `<` and `>` enclose the opinion expression where it is more than `{O}`.
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

# {name} in a frame -> (singular, plural).
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

# Opinions on things that are never asked about. They use the same words, which misleads a bag of words.
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


# --- the domains ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Aspects of one kind and the adjectives that suit only them. A plural aspect ends in `/s`."""

    aspects: tuple[str, ...]
    test_aspects: tuple[str, ...]
    adjectives: Words


@dataclass(frozen=True)
class Domain:
    """A domain: its groups of aspects, texts before and after the clauses, and weights of
    polarities.
    """

    name: str
    groups: tuple[Group, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    weights: tuple[float, float, float] = (0.44, 0.32, 0.24)


def _group(aspects: str, positive: str, negative: str, neutral: str) -> Group:
    both, _, test = aspects.partition("|")
    names = [tuple(a.strip() for a in part.split(",") if a.strip()) for part in (both, test)]
    return Group(names[0], names[1], words(positive, negative, neutral))


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


# --- what may follow a review ---------------------------------------------------------------------

CONTINUATIONS: tuple[tuple[str, tuple[str, str, str]], ...] = (
    ("my view of the {A} is", ("positive", "negative", "neutral")),
    ("my feelings about the {A} are", ("positive", "negative", "neutral")),
    ("stars for the {A} :", ("5", "1", "3")),
    ("as for the {A} , i would call it", ("good", "bad", "okay")),
    ("would i take the {A} again ?", ("yes", "no", "maybe")),
)
"""Texts that may follow a review, up to the word that depends on the sentiment of one aspect; and
this word for positive, negative and neutral."""
