"""The grammar of the built-in world: it writes reviews in which every opinion is known.

A review is one sentence about one to three aspects, each judged on its own, with clauses in between
that judge something else. It is made for causal work:

- **The aspect decides.** Most sentences hold several polarities, so judging the whole sentence
  gives wrong answers.
- **One word decides the polarity of an aspect**: an adjective, a verb, a noun under a negation.
  Exchanging this word alone gives the counterfactual: the same number of words and, in a tokenizer
  that knows these words, the same number of tokens.
- **Neutral is a mention**: "we ordered the pasta", "the pasta was not included", or a plain word
  such as "ordinary".
- **Test is harder than train**: some frames, connectors and aspects occur in test only.

The text is lower-cased with blanks between all words, like the data of the paper. Everything is a
function of the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..errors import ConfigError, choices
from ..examples import Example, Polarity, Span
from .lexicon import (
    ADJECTIVES,
    AGREEMENT,
    CONTINUATIONS,
    DISTRACTOR_NOUNS,
    DISTRACTORS,
    DOMAINS,
    FRAMES,
    FREE,
    JOINS_DIFFERENT,
    JOINS_SAME,
    JOINS_TEST,
    LEXICON,
    NEG,
    OPENERS_DIFFERENT,
    PEOPLE,
    POS,
    Domain,
    Group,
)

SPLITS = ("train", "test")

# --- a review -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mention:
    """One judged aspect, in words `[start, end)` of its review.

    Attributes:
        aspect: words of the aspect.
        opinion: words of the opinion expression.
        slot: index of the word that decides the polarity.
        polarity: the polarity that this word gives.
        swaps: polarity -> the word that gives it in the same slot.
    """

    aspect: Span
    opinion: Span
    slot: int
    polarity: Polarity
    swaps: Mapping[Polarity, str]


@dataclass(frozen=True)
class Review:
    """One sentence of the world: its words and its judged aspects.

    Examples:
        >>> import random
        >>> from mech_absa.world import DOMAINS, review
        >>> len(review(random.Random(0), DOMAINS["laptop"], aspects=2).mentions)
        2
    """

    words: tuple[str, ...]
    mentions: tuple[Mention, ...]
    domain: str

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def characters(self, span: Span) -> Span:
        """Return the characters of `text` that the words `[start, end)` cover."""
        start = sum(len(w) + 1 for w in self.words[: span[0]])
        return start, start + len(" ".join(self.words[slice(*span)]))

    def name(self, mention: Mention) -> str:
        """Return the words of the aspect."""
        return " ".join(self.words[slice(*mention.aspect)])

    def swapped(self, mention: Mention, polarity: Polarity) -> Review:
        """Return this review with one word exchanged, which gives the mention another polarity."""
        words = list(self.words)
        words[mention.slot] = mention.swaps[polarity]
        mentions = tuple(
            replace(m, polarity=polarity) if m is mention else m for m in self.mentions
        )
        return replace(self, words=tuple(words), mentions=mentions)

    def example(self, index: int) -> Example:
        """Return the `index`-th mention as an example, with a counterfactual per other polarity."""
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
    """Write one review with that many judged aspects.

    Args:
        aspects: 1 to 3.
        split: `train` or `test`; only `test` uses the frames, connectors and aspects kept for it.
        distractor: chance of a clause that judges something that is never asked about.
    """
    test = split == "test"
    chosen = _aspects(rng, domain, aspects, test)
    polarities = draw_polarities(rng, domain, aspects)
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
    """Draw `n` aspects that share no word, so that the words of each name it alone."""
    pool = [(a, g) for g in domain.groups for a in g.aspects + (g.test_aspects if test else ())]
    if test:  # half of the draws are aspects that train never uses
        kept = [(a, g) for g in domain.groups for a in g.test_aspects]
        pool = kept * max(1, len(pool) // (2 * len(kept))) + pool if kept else pool
    while True:
        chosen = [rng.choice(pool) for _ in range(n)]
        seen = [w for a, _ in chosen for w in a.removesuffix("/s").split()]
        if len(set(seen)) == len(seen):
            return chosen


def draw_polarities(rng: random.Random, domain: Domain, n: int) -> list[Polarity]:
    """Draw polarities by the weights of the domain, twice where all agree: mixed sentences matter
    most.
    """
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
    """Write at least `n` examples: one per judged aspect of each sentence, and no sentence twice.

    Args:
        domain: a key of `DOMAINS`.
        split: `train` or `test`.
        without: texts that must not occur, neither as sentences nor as counterfactuals.

    Raises:
        ConfigError: an unknown domain or split.
    """
    for flag, got, known in (("domain", domain, DOMAINS), ("split", split, SPLITS)):
        if got not in known:
            raise ConfigError(f"the built-in world has no {flag} {got!r}; it has {choices(known)}")
    rng = random.Random(f"{domain}/{split}/{seed}")
    return collect(
        lambda: review(rng, DOMAINS[domain], rng.choices(*ASPECTS_A_SENTENCE)[0], split),
        f"{domain}-{split}",
        n,
        without,
    )


def collect(
    draw: Callable[[], Review], stem: str, n: int, without: Collection[str]
) -> list[Example]:
    """Draw reviews until they give `n` examples, and none whose texts were drawn before.

    Args:
        stem: the beginning of every id.
        without: texts that must not occur.
    """
    seen = set(without)
    items: list[Example] = []
    while len(items) < n:
        r = draw()
        texts = {r.text} | {r.swapped(m, p).text for m in r.mentions for p in Polarity}
        # A counterfactual of one split must not be a sentence of the other either.
        if seen & texts:
            continue
        seen |= texts
        for i in range(len(r.mentions)):
            e = r.example(i)
            id = f"{stem}-{len(items):04d}"
            cf = tuple(replace(c, id=f"{id}-{c.polarity.value}") for c in e.counterfactuals)
            items.append(replace(e, id=id, counterfactuals=cf))
    return items


# --- what may follow a review ---------------------------------------------------------------------


class Continuation(NamedTuple):
    """A text that ends just before a word that depends on the sentiment of one aspect.

    Attributes:
        text: the review and the beginning of what follows.
        answer: the right next word, with its leading blank.
        choices: the word for positive, negative and neutral, in this order.
    """

    text: str
    answer: str
    choices: tuple[str, str, str]


def continuations(example: Example) -> list[Continuation]:
    """Return every continuation of an example, with the word that a model should predict next.

    A language model that continues rightly has bound the opinion to the aspect, whether or not it
    understands the question of the task.
    """
    order = tuple(Polarity).index(example.polarity)
    written = []
    for text, words in CONTINUATIONS:
        blanked = (f" {words[0]}", f" {words[1]}", f" {words[2]}")
        written.append(
            Continuation(
                f"{example.sentence} {text.format(A=example.aspect)}", blanked[order], blanked
            )
        )
    return written


def vocabulary() -> list[str]:
    """Return every word that the grammar can write, sorted."""
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
