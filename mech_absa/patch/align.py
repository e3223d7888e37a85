"""Align two prompts of other lengths by the named spans of the first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import AlignmentError
from ..prompts import Tokenised
from ..sites import spans_of


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of the clean prompt.

    Attributes:
        span: the name of the span they are; empty for what stands between spans.
        positions: where they stand.
        ids: the tokens.
    """

    span: str
    positions: tuple[int, ...]
    ids: tuple[int, ...]


def first_difference(clean: Tokenised, corrupted: Tokenised) -> int:
    """Return the first position at which two prompts differ.

    Example:
        >>> a, b = (Tokenised.of(x, ["template"] * len(x)) for x in ([5, 6, 7], [5, 8, 9, 7]))
        >>> first_difference(a, b)
        1
    """
    both = zip(clean.token_ids, corrupted.token_ids, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))


def partners(name: str, clean: Tokenised, corrupted: Tokenised, tokenizer: Any) -> tuple[int, ...]:
    """Return the position in the corrupted prompt that each clean token is aligned with.

    What stands between the named spans has to be the same in both prompts. A span of the corrupted
    prompt is what stands there between the same words. Tokens of a span are counted from its right
    end; where the corrupted span is shorter, its first token is the partner of all that it lacks.

    Args:
        name: of the pair, for errors.
        clean: the clean prompt, with its roles.
        corrupted: the other one; its roles are not looked at.
        tokenizer: to spell the token that breaks the alignment.

    Raises:
        AlignmentError: the prompts differ outside the spans, or can be aligned in several ways.

    Example:
        >>> clean = Tokenised.of([5, 6, 7, 8], ["template", "x.first", "x.last", "answer"])
        >>> partners("a", clean, Tokenised.of([5, 9, 8], ["template"] * 3), None)
        (0, 1, 1, 2)
    """
    pieces, ids = _pieces(clean), corrupted.token_ids
    lengths = f"{name}: the clean prompt has {clean.length} tokens and the corrupted one {len(ids)}"
    if touching := [(a.span, b.span) for a, b in itertools.pairwise(pieces) if a.span and b.span]:
        a, b = touching[0]
        raise AlignmentError(
            f"{lengths}; they cannot be aligned by the spans {a!r} and {b!r}, which touch"
        )
    gaps = pieces[::2]  # spans stand between them
    ways = list(itertools.islice(_ways([g.ids for g in gaps], ids), 2))
    if not ways:
        i, j = _break(gaps, ids)
        texts = [tokenizer.decode([x[at]]) if at < len(x) else "" for x, at in
                 ((clean.token_ids, i), (ids, j))]  # fmt: skip
        outside = "outside the named spans, " if len(gaps) > 1 else ""
        raise AlignmentError(
            f"{lengths}; {outside}they part at token {i}, {texts[0]!r} and {texts[1]!r}; both need as "
            "many tokens, or must differ in named spans alone"
        )
    if len(ways) > 1:
        raise AlignmentError(
            f"{lengths}; what stands around the named spans stands in the corrupted one more than "
            "once, so that they can be aligned in several ways; give prompts of as many tokens"
        )
    starts = ways[0]
    aligned: list[int] = []
    for k, gap in enumerate(gaps):
        if k:
            size, begin = len(pieces[2 * k - 1].ids), starts[k - 1] + len(gaps[k - 1].ids)
            aligned += [max(begin, starts[k] - size + i) for i in range(size)]
        aligned += range(starts[k], starts[k] + len(gap.ids))
    return tuple(aligned)


def _pieces(clean: Tokenised) -> list[Piece]:
    """Cut a prompt at its spans; what comes first and last stands between spans, and may be empty."""
    names = [next(iter(spans_of([role])), "") for role in clean.role_names]
    pieces = []
    for name, at in itertools.groupby(range(clean.length), names.__getitem__):
        where = tuple(at)
        pieces.append(Piece(name, where, tuple(clean.token_ids[i] for i in where)))
    return [Piece("", (), ()), *pieces] if pieces[0].span else pieces


def _ways(
    gaps: Sequence[tuple[int, ...]], ids: tuple[int, ...], at: int = 0, first: bool = True
) -> Iterator[tuple[int, ...]]:
    """Yield where the gaps can stand, in order, with at least one token between any two."""
    if not gaps:
        if at == len(ids):
            yield ()
        return
    gap, rest = gaps[0], gaps[1:]
    for start in (0,) if first else range(at + 1, len(ids) - len(gap) + 1):
        if ids[start : start + len(gap)] == gap:
            for more in _ways(rest, ids, start + len(gap), first=False):
                yield (start, *more)


def _break(gaps: Sequence[Piece], ids: tuple[int, ...]) -> tuple[int, int]:
    """Return the first token of the gaps that has no counterpart, and what stands in its place."""
    at, end = 0, len(ids)
    for k, gap in enumerate(gaps):
        places = [0] if k == 0 else range(at + 1, end)
        if k and k == len(gaps) - 1:
            places = [max(at + 1, end - len(gap.ids))]
        alike, start = max((_alike(gap.ids, ids[start:]), -start) for start in (places or [end]))
        start = -start
        if alike < len(gap.ids):
            return gap.positions[alike], start + alike
        at = start + len(gap.ids)
    return gaps[-1].positions[-1], end


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with in common."""
    return sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    )


__all__ = ["first_difference", "partners"]
