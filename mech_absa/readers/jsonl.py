"""Read JSON lines, one record per line: the paper's format and this project's.

The paper's files (hunter-lee1/ME-ABSC) have no offsets:

    {"aspect": "screen", "label": "Neg", "sentence": "the screen is easily scratched ."}

This project's files do. They may also hold the opinion, the domain and minimal edits (all on one
line):

    {"id": "d7", "domain": "device", "text": "the screen is bright", "aspect": "screen", "from": 4,
     "to": 10, "polarity": "positive", "opinion": [14, 20],
     "counterfactuals": [{"text": "the screen is dim", "from": 4, "to": 10,
                          "polarity": "negative", "opinion": [14, 17]}]}

Offsets count characters, `[from, to)`. If `from` and `to` are null, the aspect has no words in the
sentence. One file may hold both kinds.

An array of such records is read as well, and so is an object of records, `{id: record, ...}`, as in
ARTS and BERT-for-ABSA; the key becomes the id of a record that has none. Both may be on one line or
indented. `write_jsonl` writes the second kind of record, and reading them gives the same examples.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..examples import Example, Span
from ..records import write_text
from .rows import Reading, shortened, shown, string, whole


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
    """Yield each record of a JSON file: its line, and a call that returns a dict or raises
    `DataError`.

    The file may hold one record per line, an array of records, an object of records, or one record.
    """
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[" or (
        text[start : start + 1] == "{" and _holds_records(text, start)
    ):
        yield from _members(text, start, reading)
    elif text[start : start + 1] == "{" and (record := _single(text, start)) is not None:
        yield text.count("\n", 0, start) + 1, lambda: record
    else:
        # Not splitlines: it also splits at characters such as U+2028 that may stand in a string.
        for n, raw in enumerate(text.split("\n"), 1):
            if raw.strip():
                yield n, lambda raw=raw: _object(_parse(raw))


def _holds_records(text: str, start: int) -> bool:
    """Return whether the object that begins at `start` maps ids to records and is the whole
    file.
    """
    head = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{').match(text, start)
    if head is None:
        return False
    # JSON lines may begin with a field that holds an object too, but then they do not end there.
    line, _, rest = text[start:].partition("\n")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return True
    return all(isinstance(v, dict) for v in value.values()) and not rest.strip()


def _single(text: str, start: int) -> dict[str, Any] | None:
    """Return the one record that a file holds over several lines, or None."""
    if text.find("\n", start) < 0:
        return None
    try:
        value, end = _decoder.raw_decode(text, start)
    except (ValueError, RecursionError, DataError):
        return None
    return value if isinstance(value, dict) and not text[end:].strip() else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; reject a name that comes twice, of which JSON would silently keep the
    last.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the field {shortened(twice)!r} comes twice in one record; give it once")
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_unique)


def _members(text: str, start: int, reading: Reading) -> Iterator[tuple[int, Any]]:
    """Yield the records of the array or of the object of records that begins at `start`.

    They are decoded one by one, so that each knows its line. A syntax error ends the reading,
    because nothing after it can be trusted.
    """
    line_of = _Lines(text)
    keyed = text[start] == "{"
    close = "}" if keyed else "]"

    def broken(problem: str, at: int) -> DataError:
        return DataError(f"broken JSON: {problem}", reading.source, line_of(at))

    def decode(at: int) -> tuple[Any, int]:
        try:
            return _decoder.raw_decode(text, at)
        except json.JSONDecodeError as e:
            raise broken(f"{e.msg}, at column {e.colno}", e.pos) from None
        except (ValueError, RecursionError):
            raise broken("a number or a nesting beyond all bounds", at) from None
        except DataError as e:
            raise DataError(e.problem, reading.source, line_of(at)) from None

    at = _skip(text, start + 1)
    if text[at : at + 1] == close:
        return
    while True:
        key, begins = None, at
        if keyed:
            key, at = decode(at)
            at = _skip(text, at)
            if not isinstance(key, str) or text[at : at + 1] != ":":
                raise broken("an id in quotes and ':' are needed before a record", begins)
            at = _skip(text, at + 1)
        value, at = decode(at)
        yield line_of(begins), lambda value=value, key=key: _with_id(_object(value), key)
        at = _skip(text, at)
        if text[at : at + 1] == close:
            if rest := text[at + 1 :].strip():
                what = "object" if keyed else "array"
                problem = f"{shortened(rest)!r} follows the end of the JSON {what}"
                raise DataError(problem, reading.source, line_of(at))
            return
        if text[at : at + 1] != ",":
            what = "object of records" if keyed else "array"
            raise broken(f"',' or '{close}' is needed after a record of the {what}", at)
        at = _skip(text, at + 1)


class _Lines:
    """Find the lines of places in a text, which are asked for in increasing order."""

    def __init__(self, text: str):
        self.text, self.seen, self.line = text, 0, 1

    def __call__(self, at: int) -> int:
        at = max(at, self.seen)
        self.line += self.text.count("\n", self.seen, at)
        self.seen = at
        return self.line


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _with_id(record: dict[str, Any], key: str | None) -> dict[str, Any]:
    return record if key is None or record.get("id") is not None else {**record, "id": key}


def _parse(raw: str) -> Any:
    try:
        return json.loads(raw, object_pairs_hook=_unique)
    except json.JSONDecodeError as e:
        raise DataError(
            f"broken JSON: {e.msg}, at column {e.colno} of {shortened(raw.strip())!r}; one JSON object per line is accepted"
        ) from None
    except (ValueError, RecursionError):
        raise DataError(
            "broken JSON: a number or a nesting beyond all bounds; one JSON object per line is accepted"
        ) from None


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{shown(value)} came; a JSON object with the fields of an example is accepted"
        )
    return value


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"'counterfactuals' holds {shown(value)}; a list of objects is accepted")
    return value


def _pair(value: object, name: str) -> Span | None:
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2):
        raise DataError(f"{name!r} holds {shown(value)}; a pair of offsets [from, to] is accepted")
    return (whole(value[0], name), whole(value[1], name))


def _counterfactual(value: object, reading: Reading, line: int) -> Example:
    """Return an edited sentence. Its aspect is the text at its own offsets."""
    row = _object(value)
    names = reading.resolve(tuple(row), required=("sentence", "polarity", "from", "to"))
    text = string(row[names["sentence"]], names["sentence"])
    start, end = (whole(row[names[f]], names[f]) for f in ("from", "to"))
    polarity = reading.polarity(row[names["polarity"]])
    if polarity is None:
        raise DataError(
            f"a counterfactual has the label {shown(row[names['polarity']])}; a single polarity is accepted"
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
    """Write `examples` as JSON lines with offsets. The file appears complete or not at all.

    Raises:
        DataError: a counterfactual has no span, and so no aspect of its own.

    Example:
        >>> import mech_absa as ma
        >>> import tempfile, pathlib
        >>> example = ma.Example("The food was great.", "food", ma.Polarity.POSITIVE, (4, 8))
        >>> path = ma.write_jsonl([example], pathlib.Path(tempfile.mkdtemp()) / "one.jsonl")
        >>> len(ma.load_examples(path))
        1
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
