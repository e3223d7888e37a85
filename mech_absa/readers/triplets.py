"""Read triplets and quads: aspect, opinion and polarity of a sentence, one sentence per line.

ASTE (ASTE-Data) and DMASTE give words by their index, or -1 if there are no words. The list of a
phrase holds all its indices, or its first and last:

    the pasta was good####[([1], [3], 'POS')]
    good for the price####[([-1], [0], 'POS')]####Home

ASQP and ACOS quads also have a category. ASQP gives the words themselves, or NULL if there are
none. ACOS gives word ranges without the end, `-1,-1` if there are none, and 0, 1, 2 for negative,
neutral, positive, in columns split by tabs:

    the pasta was good####[['pasta', 'food quality', 'positive', 'good']]
    the pasta was good<TAB>1,2 FOOD#QUALITY 2 3,4

The opinion words become the span `Example.opinion`. If several opinions give an aspect the same
polarity, it is asked about once, with the first opinion that has words; the others are counted as
`further opinion on an aspect`. Aspects without words are counted as `no aspect term`. With
`null_targets="category"` the question names their category, if there is one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from ..examples import Span
from .rows import NULL, Reading, occurrences, shown

SEPARATOR = "####"
ACOS = re.compile(r"(-?\d{1,9},-?\d{1,9}) (\S+) (\S+) (-?\d{1,9},-?\d{1,9})")
ACOS_POLARITY = {"0": "negative", "1": "neutral", "2": "positive"}


@dataclass(frozen=True)
class Judgement:
    """Hold one triplet or quad. Spans are None if there are no words."""

    aspect: Span | None
    opinion: Span | None
    label: str
    category: str = ""


def read(data: bytes, reading: Reading) -> None:
    """Add the aspects of every line; ids are `stem:line.aspect`, counted from 1."""
    for n, line in enumerate(reading.text(data).split("\n"), 1):
        if not line.strip():
            continue
        sentence, judgements = "", list[Judgement]()
        with reading.at(n):
            sentence, judgements = parse(line.rstrip("\r"))
            if not judgements:
                reading.left_out["sentence without aspects"] += 1
        for k, j in enumerate(_merged(judgements, reading), 1):
            with reading.at(n):
                _add(sentence, j, n, f"{reading.stem}:{n}.{k}", reading)


def is_line(line: str) -> bool:
    """Return whether `line` looks like one of this module."""
    acos = all(ACOS.fullmatch(cell.strip()) for cell in line.split("\t")[1:]) and "\t" in line
    return acos or line.partition(SEPARATOR)[2].lstrip().startswith("[")


def parse(line: str) -> tuple[str, list[Judgement]]:
    """Return the sentence of a line and its opinions on aspects.

    Raises:
        DataError: the line has none of the forms.
    """
    if SEPARATOR in line:
        sentence, rest = line.split(SEPARATOR)[:2]
        return sentence, [_judgement(sentence, x) for x in _literal(rest)]
    sentence, *cells = line.split("\t")
    return sentence, [_quad(sentence, cell.strip()) for cell in cells if cell.strip()]


def _literal(text: str) -> list[Any]:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise DataError(
            f"{shown(text.strip())} follows {SEPARATOR}; a list of triplets or quads is accepted, "
            "such as [([1], [3], 'POS')]"
        )
    return value


def _judgement(sentence: str, value: object) -> Judgement:
    if isinstance(value, (tuple, list)) and len(value) == 3 and isinstance(value[2], str):
        aspect, opinion = (_indices(sentence, v) for v in value[:2])
        return Judgement(aspect, opinion, value[2])
    if (
        isinstance(value, (tuple, list))
        and len(value) == 4
        and all(isinstance(v, str) for v in value)
    ):
        term, category, label, said = value
        return Judgement(
            _place(sentence, term, True), _place(sentence, said, False), label, category
        )
    raise DataError(
        f"{shown(value)} came; accepted: a triplet ([1], [3], 'POS') or a quad "
        "['pasta', 'food quality', 'positive', 'good']"
    )


def _quad(sentence: str, cell: str) -> Judgement:
    if (m := ACOS.fullmatch(cell)) is None:
        raise DataError(f"{shown(cell)} came; a quad such as '1,2 FOOD#QUALITY 2 3,4' is accepted")
    aspect, category, label, opinion = m.groups()
    if label not in ACOS_POLARITY:
        raise DataError(f"the polarity {shown(label)} came; accepted: 0, 1 or 2")
    spans = []
    for part in (aspect, opinion):
        start, end = (int(x) for x in part.split(","))
        spans.append(None if start == end == -1 else _words(sentence, start, end - 1))
    return Judgement(spans[0], spans[1], ACOS_POLARITY[label], category)


def _indices(sentence: str, value: object) -> Span | None:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if not numbers or not all(isinstance(i, int) and not isinstance(i, bool) for i in numbers):
        raise DataError(
            f"the word indices {shown(value)} came; a list of whole numbers is accepted"
        )
    return None if list(numbers) == [-1] else _words(sentence, min(numbers), max(numbers))


def _words(sentence: str, first: int, last: int) -> Span:
    """Return the characters of the words `first` to `last`, both included."""
    words = [m.span() for m in re.finditer(r"[^ ]+", sentence)]
    if not 0 <= first <= last < len(words):
        raise DataError(
            f"the words {shown(first)} to {shown(last)} do not fit a sentence of {len(words)} words"
        )
    return words[first][0], words[last][1]


def _place(sentence: str, term: str, needed: bool) -> Span | None:
    if term.strip() in ("", NULL) or term.strip().lower() == "none":
        return None
    places = occurrences(sentence, term) or occurrences(sentence, term, ignore_case=True)
    if not places and needed:
        raise DataError(
            f"the aspect {shown(term)} does not stand in the sentence {shown(sentence)}"
        )
    return places[0] if places else None


def _merged(judgements: list[Judgement], reading: Reading) -> Iterator[Judgement]:
    """Yield one judgement per aspect, category and label, with the first opinion that has words."""
    groups: dict[tuple[Any, ...], list[Judgement]] = {}
    for j in judgements:
        # The category matters only where nothing else names the aspect.
        key = (j.aspect, j.label) if j.aspect else (None, j.category, j.label, len(groups))
        groups.setdefault(key, []).append(j)
    for same in groups.values():
        if len(same) > 1:
            reading.left_out["further opinion on an aspect"] += len(same) - 1
        yield next((j for j in same if j.opinion), same[0])


def _add(sentence: str, j: Judgement, line: int, id: str, reading: Reading) -> None:
    if j.aspect is not None:
        term = sentence[slice(*j.aspect)]
        reading.add(sentence, term, j.label, j.aspect, line, id=id, opinion=j.opinion)
    elif j.category:
        reading.add_null_target(sentence, j.category, j.label, line, id)
    else:
        reading.polarity(j.label)
        reading.left_out["no aspect term"] += 1
