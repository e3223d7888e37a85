"""JSON lines: one record a line; the paper's own format and this project's.

The paper's files (hunter-lee1/ME-ABSC) give no offsets:

    {"aspect": "screen", "label": "Neg", "sentence": "the screen is easily scratched ."}

This project's do, and may know the opinion, the domain and minimal edits too:

    {"id": "d7", "domain": "device", "text": "the screen is bright", "aspect": "screen", "from": 4, "to": 10, "polarity": "positive",
     "opinion": [14, 20],
     "counterfactuals": [{"text": "the screen is dim", "from": 4, "to": 10, "polarity": "negative", "opinion": [14, 17]}]}

(on one line). Offsets count characters, `[from, to)`. A `from` and `to` of null say that no words of the sentence stand for the aspect.
One file may hold both kinds; an array of such records is read as well. `write_jsonl` writes the second kind, and what it writes reads
back as the same examples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..examples import Example, Span
from ..records import write_text
from .rows import Reading, shortened, string, whole


def read(data: bytes, reading: Reading) -> None:
    """Add the records of JSON lines, or of one JSON array."""
    for line, parse in json_records(reading.text(data), reading):
        with reading.at(line):
            row = parse()
            more = {
                "opinion": _pair(row.get("opinion"), "opinion"),
                "counterfactuals": tuple(
                    _counterfactual(c, reading, line) for c in _list(row.get("counterfactuals"))
                ),
            }
            id = row.get("id")
            reading.add_row(row, line, "" if id is None else str(id), **more)


def json_records(text: str, reading: Reading) -> Iterator[tuple[int, Any]]:
    """Each record of JSON lines or of a JSON array: its line, and a call that gives it as a dict or raises `DataError`."""
    if text.lstrip().startswith("["):
        yield from _array(text, reading)
        return
    # Not splitlines: it also splits at characters such as U+2028 that may stand inside a JSON string.
    for n, raw in enumerate(text.split("\n"), 1):
        if raw.strip():
            yield n, lambda raw=raw: _object(_parse(raw))


def _array(text: str, reading: Reading) -> Iterator[tuple[int, Any]]:
    """One record after the other, so that each knows its line. A break in the syntax ends the reading: nothing behind it can be trusted."""
    decoder = json.JSONDecoder()
    seen, line = 0, 1

    def skip(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    def line_of(at: int) -> int:
        nonlocal seen, line
        line += text.count("\n", seen, at)
        seen = at
        return line

    at = skip(text.index("[") + 1)
    if text[at : at + 1] == "]":
        return
    while True:
        start = line_of(at)
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as e:
            raise DataError(
                f"broken JSON: {e.msg}, at column {e.colno}", reading.source, e.lineno
            ) from None
        except (ValueError, RecursionError):
            raise DataError(
                "broken JSON: a number or a nesting beyond all bounds", reading.source, start
            ) from None
        yield start, lambda value=value: _object(value)
        at = skip(at)
        if text[at : at + 1] == "]":
            if rest := text[at + 1 :].strip():
                raise DataError(
                    f"{shortened(rest)!r} follows the end of the JSON array",
                    reading.source,
                    line_of(at),
                )
            return
        if text[at : at + 1] != ",":
            raise DataError(
                "broken JSON: ',' or ']' is needed after a record of the array",
                reading.source,
                line_of(at),
            )
        at = skip(at + 1)


def _parse(raw: str) -> Any:
    try:
        return json.loads(raw)
    except json.JSONDecodeError as e:
        raise DataError(
            f"broken JSON: {e.msg}, at column {e.colno} of {shortened(raw.strip())!r}; one JSON object a line is accepted"
        ) from None
    except (ValueError, RecursionError):
        raise DataError(
            "broken JSON: a number or a nesting beyond all bounds; one JSON object a line is accepted"
        ) from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{shortened(json.dumps(value))} came; a JSON object with the fields of an example is accepted"
        )
    return value


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(
            f"'counterfactuals' holds {shortened(repr(value))}; a list of objects is accepted"
        )
    return value


def _pair(value: Any, name: str) -> Span | None:
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2):
        raise DataError(
            f"{name!r} holds {shortened(repr(value))}; a pair of offsets [from, to] is accepted"
        )
    return (whole(value[0], name), whole(value[1], name))


def _counterfactual(row: Any, reading: Reading, line: int) -> Example:
    """An edited sentence: its aspect is what its own offsets give."""
    names = reading.resolve(tuple(_object(row)), required=("sentence", "polarity", "from", "to"))
    text = string(row[names["sentence"]], names["sentence"])
    start, end = (whole(row[names[f]], names[f]) for f in ("from", "to"))
    polarity = reading.polarity(row[names["polarity"]])
    if polarity is None:
        raise DataError(
            f"a counterfactual has the label {row[names['polarity']]!r}; a single polarity is accepted"
        )
    if not 0 <= start < end <= len(text):
        raise DataError(
            f"aspect offsets {start}..{end} of a counterfactual do not fit its text of {len(text)} characters"
        )
    opinion = _pair(row.get("opinion"), "opinion")
    return Example(
        text, text[start:end], polarity, (start, end), opinion, source=reading.source, line=line
    )


def write_jsonl(examples: Iterable[Example], path: str | os.PathLike[str]) -> Path:
    """Write `examples` as JSON lines with offsets. The file appears whole or not at all.

    Raises:
        DataError: a counterfactual has no span, and so no aspect of its own.
    """
    write_text(
        path := Path(path),
        "".join(json.dumps(_row(e), ensure_ascii=False) + "\n" for e in examples),
    )
    return path


def _row(e: Example) -> dict[str, Any]:
    start, end = e.span or (None, None)
    row: dict[str, Any] = {"id": e.id} if e.id else {}
    row |= {
        "text": e.sentence,
        "aspect": e.aspect,
        "from": start,
        "to": end,
        "polarity": e.polarity.value,
    }
    if e.opinion:
        row["opinion"] = list(e.opinion)
    if e.domain:
        row["domain"] = e.domain
    if e.counterfactuals:
        row["counterfactuals"] = [_edited(c) for c in e.counterfactuals]
    return row


def _edited(c: Example) -> dict[str, Any]:
    if c.span is None:
        raise DataError(
            f"the counterfactual {shortened(c.sentence)!r} has no span; its aspect's characters must be known"
        )
    row: dict[str, Any] = {
        "text": c.sentence,
        "from": c.span[0],
        "to": c.span[1],
        "polarity": c.polarity.value,
    }
    if c.opinion:
        row["opinion"] = list(c.opinion)
    return row
