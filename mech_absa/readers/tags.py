"""Read words with tags: E2E-TBSA lines, and CoNLL files with one word per line.

E2E-TBSA has one sentence per line, its words with their tags after `####`:

    the pasta was good .####the=O pasta=T-POS was=O good=O .=O

CoNLL has one word per line, a blank line after each sentence, and the tag in the last column:

    the O                     the O -999
    pasta B-POS               pasta B-ASP Positive
    was O                     was O -999

A tag is `O`; or `B-`, `I-`, `E-`, `S-` or `T-` and a polarity; or, with one more column, `B-ASP`
and `I-ASP`, whose polarity stands in the last column. Neighbouring words with the same `T-` tag are
one aspect. Words are joined by blanks, and spans are those of the joined sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..errors import DataError
from ..examples import Span
from .rows import Reading, shown

SEPARATOR = "####"
TAG = re.compile(r"O|[BIEST]-\S+")
NO_POLARITY = ("-999", "-100", "")

Token = tuple[str, str, str]
"""A word, its tag without the polarity (`O`, `B`, `I`, `E`, `S`, `T`), and the polarity."""


def read(data: bytes, reading: Reading) -> None:
    """Add the aspects of every sentence; ids are `stem:sentence.aspect`, both counted from 1."""
    for n, (line, rows) in enumerate(_sentences(reading.text(data)), 1):
        aspects: list[tuple[Span, str]] = []
        with reading.at(line):
            tokens = [_token(row) for row in rows]
            aspects = _aspects(tokens)
            if not aspects:
                reading.left_out["sentence without aspects"] += 1
        for k, ((first, end), label) in enumerate(aspects, 1):
            with reading.at(line):
                words = [w for w, _, _ in tokens]
                start = sum(len(w) + 1 for w in words[:first])
                term = " ".join(words[first:end])
                span = (start, start + len(term))
                id = f"{reading.stem}:{n}.{k}"
                reading.add(" ".join(words), term, label, span, line, id=id)


def is_line(line: str) -> bool:
    """Return whether `line` looks like one of this module."""
    after = line.partition(SEPARATOR)[2].split()
    if after:
        return all(TAG.fullmatch(cell.rpartition("=")[2]) for cell in after)
    cells = line.split()
    return 2 <= len(cells) <= 4 and any(TAG.fullmatch(c) for c in cells[1:])


def _sentences(text: str) -> Iterator[tuple[int, list[list[str]]]]:
    """Yield each sentence: its first line, and the columns of each of its words."""
    rows: list[list[str]] = []
    begins = 0
    for n, line in enumerate([*text.split("\n"), ""], 1):
        if SEPARATOR in line:
            cells = line.partition(SEPARATOR)[2].split()
            yield n, [list(cell.rpartition("=")[::2]) for cell in cells]
        elif line.strip():
            begins = begins or n
            rows.append(line.split())
        elif rows:
            yield begins, rows
            rows, begins = [], 0


def _token(row: list[str]) -> Token:
    word, *rest = row
    place = next((i for i, cell in enumerate(rest) if TAG.fullmatch(cell)), None)
    if not word or place is None:
        raise DataError(
            f"{shown(' '.join(row))} came; a word and its tag are accepted, such as 'pasta B-POS'"
        )
    tag, _, polarity = rest[place].partition("-")
    if polarity.upper() in ("ASP", "ASPECT"):
        polarity = rest[place + 1] if place + 1 < len(rest) else ""
        if polarity in NO_POLARITY:
            return word, "O", ""
    return word, tag, polarity


def _aspects(tokens: list[Token]) -> list[tuple[Span, str]]:
    """Return the word ranges of the aspects with their labels."""
    aspects: list[tuple[Span, str]] = []
    for i, (_, tag, label) in enumerate(tokens):
        if tag == "O":
            continue
        before = tokens[i - 1] if i else ("", "O", "")
        goes_on = tag in "IE" or (tag == "T" and before[1:] == (tag, label))
        if goes_on and before[1] != "O" and before[1] not in "ES" and before[2] == label:
            (first, _), _ = aspects[-1]
            aspects[-1] = ((first, i + 1), label)
        elif tag == "T" or tag in "BIES":
            aspects.append(((i, i + 1), label))
    return aspects
