"""Prompt pairs of one's own: two texts, the token that answers the first, and one to compare with.

Reviews are the built-in task. A `PromptPair` brings any other: facts, indirect objects, agreement.
Its named spans become the roles of the map, so that importance, selection, report and figures work
as for reviews. `mech_absa.prompt_pairs` turns them into runs of a model.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, overload

from .errors import DataError
from .examples import Example, Span, normal
from .sites import vocabulary
from .words import shown


@dataclass(frozen=True, eq=False)
class PromptPair:
    """Two prompts that differ in what decides the answer.

    Attributes:
        clean: the prompt that is answered.
        corrupted: another prompt of as many tokens; None where noise or an ablation takes its place.
        answer: the token that continues `clean`, with its blank: `" Paris"`.
        foil: the token it is compared with: what continues `corrupted`, or any other.
        spans: name -> words of `clean`, or their characters (start, end) where they stand in it more
            than once. The tokens of a span `subject` have the roles `subject.first`,
            `subject.middle` and `subject.last`.
        id: for tables; made from the source and the row where it is empty.
        source, line: where it was read.

    Raises:
        DataError: a text is empty, or a span is not in `clean`.
        SiteError: the name of a span is no word, or a role of reviews.

    Example:
        >>> import mech_absa as ma
        >>> pair = ma.PromptPair(
        ...     "The Louvre is in", "The Prado is in", " Paris", " Madrid", {"subject": "Louvre"}
        ... )
        >>> pair.where
        {'subject': (4, 10)}
    """

    clean: str
    corrupted: str | None
    answer: str
    foil: str
    spans: Mapping[str, str | Span] = field(default_factory=dict)
    id: str = ""
    source: str = ""
    line: int = 0

    def __post_init__(self) -> None:
        for name in ("clean", "corrupted", "answer", "foil"):
            text = getattr(self, name)
            if not (isinstance(text, str) and text) and not (name == "corrupted" and text is None):
                raise self._error(f"{name} is {shown(text)}; a text is needed")
        if self.answer == self.foil:
            raise self._error(f"answer and foil are both {self.answer!r}; two tokens are compared")
        vocabulary(self.spans)
        _ = self.where

    def _error(self, problem: str) -> DataError:
        return DataError(problem, self.source or None, self.line or None)

    @cached_property
    def where(self) -> dict[str, Span]:
        """Characters `[start, end)` of every span in `clean`."""
        return {name: self._place(name, words) for name, words in self.spans.items()}

    def _place(self, name: str, words: object) -> Span:
        if isinstance(words, str):
            times = self.clean.count(words) if words else 0
            if times != 1:
                raise self._error(
                    f"the span {name!r} is {words!r}, which stands {times} times in the prompt "
                    f"{shown(self.clean)}; give words that stand there once, or their characters "
                    "[start, end]"
                )
            start = self.clean.index(words)
            return start, start + len(words)
        if isinstance(words, Sequence) and len(words) == 2 and all(type(n) is int for n in words):
            start, end = words
            if 0 <= start < end <= len(self.clean):
                return start, end
        raise self._error(
            f"the span {name!r} is {shown(words)}; words of the prompt are accepted, or characters "
            f"[start, end] between 0 and {len(self.clean)}"
        )

    # ---- what tables and noise ask of an example ----------------------------------------------------

    @property
    def sentence(self) -> str:
        """Return the clean prompt."""
        return self.clean

    @property
    def aspect(self) -> str:
        """Return the words of the first span; empty where none is named."""
        return next((self.clean[a:b] for a, b in self.where.values()), "")

    @property
    def domain(self) -> str:
        """Return nothing: own prompts have no domain."""
        return ""

    @property
    def cluster(self) -> str:
        """Return what pairs must differ in to count as independent: the clean prompt."""
        return normal(self.clean)

    @property
    def counterfactuals(self) -> tuple[str, ...]:
        """Return the corrupted prompt, if there is one."""
        return () if self.corrupted is None else (self.corrupted,)

    def _repr_html_(self) -> str:
        from html import escape

        text, end = "", 0
        for name, (a, b) in sorted(self.where.items(), key=lambda item: item[1]):
            if a >= end:
                inner = f"<b title='{name}'><u>{escape(self.clean[a:b])}</u></b>"
                text, end = text + escape(self.clean[end:a]) + inner, b
        text += escape(self.clean[end:])
        other = (
            "" if self.corrupted is None else f"<div><small>{escape(self.corrupted)}</small></div>"
        )
        return (
            f"<div>{text} &rarr; <b>{escape(self.answer)}</b>, not {escape(self.foil)}</div>{other}"
        )


Asked = Example | PromptPair
"""What a pair of runs is made from."""


@dataclass(frozen=True)
class PromptPairs(Sequence[PromptPair]):
    """Prompt pairs of one source, each with an id of its own.

    Attributes:
        items: the pairs, in order.
        source: where they came from.
        sha256: hash of the bytes read; of the pairs where they came from no file.
        left_out, ambiguous, problems: as in `Examples`; a file of prompt pairs is read whole or not at all.

    Example:
        >>> import mech_absa as ma
        >>> pair = ma.PromptPair("The Louvre is in", "The Prado is in", " Paris", " Madrid")
        >>> [p.id for p in ma.PromptPairs.of([pair, pair])]
        ['pair-0', 'pair-1']
    """

    items: tuple[PromptPair, ...]
    source: str = "prompt pairs"
    sha256: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    ambiguous: int = 0
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, pairs: Sequence[PromptPair], source: str = "prompt pairs") -> PromptPairs:
        """Return pairs with ids and a hash.

        Raises:
            DataError: two have the same id.
        """
        if isinstance(pairs, PromptPairs):
            return pairs
        items = [p if p.id else replace(p, id=f"pair-{i}") for i, p in enumerate(pairs)]
        repeated = [name for name, n in Counter(p.id for p in items).items() if n > 1]
        if repeated:
            raise DataError(f"the id {repeated[0]!r} is given to two prompt pairs; ids must differ")
        h = hashlib.sha256()
        for p in items:
            h.update(
                repr((p.clean, p.corrupted, p.answer, p.foil, sorted(p.where.items()))).encode()
            )
        return cls(tuple(items), source, h.hexdigest())

    @overload
    def __getitem__(self, index: int) -> PromptPair: ...
    @overload
    def __getitem__(self, index: slice) -> PromptPairs: ...
    def __getitem__(self, index: int | slice) -> PromptPair | PromptPairs:
        if isinstance(index, slice):
            return replace(self, items=self.items[index])
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[PromptPair]:
        return iter(self.items)

    def sample(self, n: int, seed: int = 0) -> PromptPairs:
        """Return `n` of them drawn without replacement, in order; all where there are fewer."""
        if n >= len(self.items):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self.items)), n))
        return replace(self, items=tuple(self.items[i] for i in chosen))

    def only(self, keep: Callable[[PromptPair], bool]) -> PromptPairs:
        """Return those that `keep` says yes to."""
        return replace(self, items=tuple(p for p in self.items if keep(p)))

    @property
    def spans(self) -> tuple[str, ...]:
        """Return the names of all spans, in the order in which they come."""
        return tuple(dict.fromkeys(name for p in self.items for name in p.spans))

    def counts(self) -> dict[str, int]:
        """Return how often each answer is the right one."""
        return dict(Counter(p.answer for p in self.items))

    def account(self) -> dict[str, Any]:
        """Return what `run.json` says of the data."""
        return {
            "source": self.source, "sha256": self.sha256, "examples": len(self), "classes": self.counts(),
            "left_out": self.left_out, "ambiguous": self.ambiguous, "problems": list(self.problems),
        }  # fmt: skip
