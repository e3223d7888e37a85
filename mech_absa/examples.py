"""Hold examples: one aspect of one sentence each, with its polarity.

An `Example` is the unit of everything else: a sentence, the characters of it that name the aspect,
and the gold polarity. `Examples` is a list of them, together with what was left out while reading
and why, so that a run can say how many it really saw. The other functions answer what to ask of a
data set before trusting a score on it: how many examples of each class, how many duplicates, how
much of the test file stands in the train file, and how to split without a sentence on both sides.

This module needs no torch: data can be read, checked and split on a machine without a model.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, overload

from .errors import ConfigError, DataError, choices

if TYPE_CHECKING:
    import pandas as pd


class Polarity(str, Enum):
    """Name one of the three classes. Written and compared as its lower-case word.

    Example:
        >>> import mech_absa as ma
        >>> ma.Polarity.parse("positive") is ma.Polarity.POSITIVE
        True
    """

    POSITIVE = "positive"
    NEGATIVE = "negative"
    NEUTRAL = "neutral"

    __str__ = str.__str__

    @classmethod
    def parse(cls, text: str) -> Polarity | None:
        """Return the polarity that a data set means by `text`; None for `conflict` and `mixed`,
        which no single label answers.

        Raises:
            DataError: `text` is none of the spellings in use.
        """
        try:
            return _SPELLINGS[str(text).strip().lower()]
        except KeyError:
            accepted = choices(
                ["positive/pos/1", "negative/neg/-1", "neutral/neu/0", "conflict/mixed (left out)"]
            )
            raise DataError(f"unknown label {text!r}; accepted: {accepted}") from None


_SPELLINGS: dict[str, Polarity | None] = {
    "positive": Polarity.POSITIVE, "pos": Polarity.POSITIVE, "1": Polarity.POSITIVE, "+1": Polarity.POSITIVE,
    "negative": Polarity.NEGATIVE, "neg": Polarity.NEGATIVE, "-1": Polarity.NEGATIVE,
    "neutral": Polarity.NEUTRAL, "neu": Polarity.NEUTRAL, "0": Polarity.NEUTRAL,
    "conflict": None, "mixed": None,
}  # fmt: skip

Span = tuple[int, int]
"""Characters `[start, end)` of a text."""


@dataclass(frozen=True)
class Example:
    """Hold one aspect of one sentence.

    Attributes:
        sentence: the text, as the data set gives it.
        aspect: the aspect term as the question names it.
        polarity: the gold class.
        span: characters of `sentence` that are the aspect; None if the aspect has no words in the
            sentence (SemEval's NULL targets).
        opinion: characters of the opinion expression, if known.
        domain: restaurant, laptop, ...; free text, empty if unknown.
        source: the file, or the name, it was read from.
        line: 1-based line in `source`; 0 if there is none.
        id: unique within its source and the same in every run.
        counterfactuals: the same sentence, minimally edited so that this aspect has another
            polarity.

    Example:
        >>> import mech_absa as ma
        >>> example = ma.Example("The food was great.", "food", ma.Polarity.POSITIVE, (4, 8))
        >>> example.sentence[slice(*example.span)]
        'food'
    """

    sentence: str
    aspect: str
    polarity: Polarity
    span: Span | None = None
    opinion: Span | None = None
    domain: str = ""
    source: str = ""
    line: int = 0
    id: str = ""
    counterfactuals: tuple[Example, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.aspect.strip():
            raise DataError(
                "the aspect is empty; an aspect term of at least one character is needed",
                self.source or None,
                self.line or None,
            )
        for name, span in (("aspect", self.span), ("opinion", self.opinion)):
            if span is None:
                continue
            start, end = span
            if not 0 <= start < end <= len(self.sentence):
                raise DataError(
                    f"{name} offsets {start}..{end} do not fit a sentence of {len(self.sentence)} characters",
                    self.source or None, self.line or None,
                )  # fmt: skip
        if self.span is not None and (found := self.sentence[slice(*self.span)]) != self.aspect:
            raise DataError(
                f"offsets {self.span[0]}..{self.span[1]} give {found!r}, but the aspect is {self.aspect!r}",
                self.source or None, self.line or None,
            )  # fmt: skip

    @property
    def key(self) -> tuple[str, str]:
        """Return what makes two examples the same question: sentence and aspect, without case and
        outer blanks.
        """
        return (normal(self.sentence), normal(self.aspect))

    @property
    def answer(self) -> str:
        """The right class, as a word."""
        return self.polarity.value

    @property
    def cluster(self) -> str:
        """Return the sentence, in the form that is compared. Examples of one sentence are not
        independent, so intervals and splits group by it.
        """
        return normal(self.sentence)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<div>{marked(self)} <small>{escape(self.id)}</small></div>"


def marked(example: Example) -> str:
    """Return an example as a line of HTML: its sentence with the aspect underlined, the aspect, and
    the polarity.
    """
    from html import escape

    s = example.sentence
    text = escape(s)
    if example.span is not None:
        a, b = example.span
        text = f"{escape(s[:a])}<b><u>{escape(s[a:b])}</u></b>{escape(s[b:])}"
    return f"{text} &rarr; <code>{escape(example.aspect)}</code>: <b>{example.polarity.value}</b>"


def normal(text: str) -> str:
    """Return the text in lower case with single blanks, the form in which texts are compared."""
    return " ".join(text.lower().split())


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Hold examples as read from one source, with the account of what was left out.

    Attributes:
        items: the examples, in file order.
        source: where they came from.
        sha256: hash of the bytes read; of the items where they came from no file.
        left_out: reason -> count (`conflict`, `bad line`, `no aspect term`, ...).
        ambiguous: rows without offsets whose aspect occurs more than once in the sentence.
        problems: the messages of bad lines that were skipped on request.

    Example:
        >>> import mech_absa as ma
        >>> examples = ma.load_examples("builtin:restaurant/test")
        >>> len(examples), examples.source
        (642, 'builtin:restaurant/test')
    """

    items: tuple[Example, ...]
    source: str = ""
    sha256: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    ambiguous: int = 0
    problems: tuple[str, ...] = ()

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        return (
            replace(self, items=self.items[index])
            if isinstance(index, slice)
            else self.items[index]
        )

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.items)

    def only(self, keep: Callable[[Example], bool]) -> Examples:
        """Return the examples for which `keep` returns true."""
        return replace(self, items=tuple(e for e in self.items if keep(e)))

    def sample(self, n: int, seed: int = 0) -> Examples:
        """Draw `n` examples without replacement, in file order; all if there are fewer."""
        if n >= len(self.items):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self.items)), n))
        return replace(self, items=tuple(self.items[i] for i in chosen))

    def counts(self) -> dict[str, int]:
        """Return the number of examples of each class; all three classes are named."""
        return class_counts(self.items)

    def account(self) -> dict[str, object]:
        """Return what was read and what was left out, for `run.json`."""
        return {
            "source": self.source, "sha256": self.sha256, "examples": len(self), "classes": self.counts(),
            "left_out": self.left_out, "ambiguous": self.ambiguous, "problems": list(self.problems),
        }  # fmt: skip

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per example."""
        import pandas as pd

        columns = [
            "id",
            "sentence",
            "aspect",
            "polarity",
            "span",
            "opinion",
            "domain",
            "source",
            "line",
        ]
        return pd.DataFrame(
            [
                {c: getattr(e, c) if c != "polarity" else e.polarity.value for c in columns}
                for e in self.items
            ],
            columns=columns,
        )

    def _repr_html_(self) -> str:
        from html import escape

        head = "".join(e._repr_html_() for e in self.items[:5])
        more = f"<div>&hellip; {len(self) - 5} more</div>" if len(self) > 5 else ""
        return f"<div><b>{len(self)} examples</b> from {escape(self.source)}: {self.counts()}</div>{head}{more}"


def content_hash(items: Iterable[Example]) -> str:
    """Return a hash of questions and answers, for examples that came from no file."""
    h = hashlib.sha256()
    for e in items:
        h.update(repr((e.sentence, e.aspect, e.span, e.polarity.value)).encode())
    return h.hexdigest()


def class_counts(items: Iterable[Example]) -> dict[str, int]:
    """Return the number of examples of each class, in the order positive, negative, neutral.

    Example:
        >>> import mech_absa as ma
        >>> sentence = "The food was great but the service was slow."
        >>> food = ma.Example(sentence, "food", ma.Polarity.POSITIVE, (4, 8))
        >>> service = ma.Example(sentence, "service", ma.Polarity.NEGATIVE, (27, 34))
        >>> ma.class_counts([food, service])
        {'positive': 1, 'negative': 1, 'neutral': 0}
    """
    seen = Counter(e.polarity for e in items)
    return {p.value: seen[p] for p in Polarity}


def duplicates(items: Sequence[Example]) -> dict[tuple[str, str], int]:
    """Return the questions (sentence, aspect) that are asked more than once, with their counts.

    Example:
        >>> import mech_absa as ma
        >>> sentence = "The food was great but the service was slow."
        >>> food = ma.Example(sentence, "food", ma.Polarity.POSITIVE, (4, 8))
        >>> service = ma.Example(sentence, "service", ma.Polarity.NEGATIVE, (27, 34))
        >>> list(ma.duplicates([food, service, food]).values())
        [2]
    """
    return {key: n for key, n in Counter(e.key for e in items).items() if n > 1}


@dataclass(frozen=True)
class Leakage:
    """Hold the test rows whose (sentence, aspect) stands in train.

    Attributes:
        rows: indices into the test items.
        same_label: how many of them carry a label that train gives the same question.
        total: test rows in all.
    """

    rows: tuple[int, ...]
    same_label: int
    total: int

    @property
    def share(self) -> float:
        return len(self.rows) / self.total if self.total else 0.0


def leakage(train: Sequence[Example], test: Sequence[Example]) -> Leakage:
    """Find the test rows that were seen in training: the same sentence and aspect, without case and
    outer blanks.

    Example:
        >>> import mech_absa as ma
        >>> sentence = "The food was great but the service was slow."
        >>> food = ma.Example(sentence, "food", ma.Polarity.POSITIVE, (4, 8))
        >>> service = ma.Example(sentence, "service", ma.Polarity.NEGATIVE, (27, 34))
        >>> leak = ma.leakage(train=[food], test=[food, service])
        >>> leak.rows, leak.share
        ((0,), 0.5)
    """
    seen: dict[tuple[str, str], set[Polarity]] = {}
    for e in train:
        seen.setdefault(e.key, set()).add(e.polarity)
    rows = tuple(i for i, e in enumerate(test) if e.key in seen)
    return Leakage(rows, sum(test[i].polarity in seen[test[i].key] for i in rows), len(test))


def mixed_polarity(items: Sequence[Example]) -> tuple[int, ...]:
    """Return the indices of examples whose sentence also has another polarity, so that only the
    aspect can decide.

    Example:
        >>> import mech_absa as ma
        >>> sentence = "The food was great but the service was slow."
        >>> food = ma.Example(sentence, "food", ma.Polarity.POSITIVE, (4, 8))
        >>> service = ma.Example(sentence, "service", ma.Polarity.NEGATIVE, (27, 34))
        >>> ma.mixed_polarity([food, service])
        (0, 1)
    """
    labels: dict[str, set[Polarity]] = {}
    for e in items:
        labels.setdefault(e.cluster, set()).add(e.polarity)
    return tuple(i for i, e in enumerate(items) if len(labels[e.cluster]) > 1)


def split_by_sentence(
    items: Sequence[Example], share: float, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Split into two lists, the second with about `share` of the sentences; no sentence is on both
    sides.

    Raises:
        ConfigError: `share` is not between 0 and 1.

    Example:
        >>> import mech_absa as ma
        >>> examples = ma.load_examples("builtin:restaurant/test")
        >>> most, rest = ma.split_by_sentence(examples, share=0.2)
        >>> len(most) + len(rest) == len(examples)
        True
        >>> {e.sentence for e in most} & {e.sentence for e in rest}
        set()
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"a share of {share} was asked for; it must lie between 0 and 1")
    clusters = sorted({e.cluster for e in items})
    random.Random(seed).shuffle(clusters)
    second = set(clusters[: round(share * len(clusters))])
    return [e for e in items if e.cluster not in second], [e for e in items if e.cluster in second]
