"""Read SentiHood: texts about one or two locations, with opinions on their aspects.

    [{"id": 1, "text": "LOCATION1 is cheap but not safe", "opinions": [
        {"target_entity": "LOCATION1", "aspect": "price", "sentiment": "Positive"},
        {"target_entity": "LOCATION1", "aspect": "safety", "sentiment": "Negative"}]}]

The question is about the aspect of the location, "price of LOCATION1". It has no span, because the
text need not contain such words. The aspect `general` is the location itself, with its span.
"""

from __future__ import annotations

from typing import Any

from ..errors import DataError
from .jsonl import json_records
from .rows import Reading, occurrences, shown, string
from .tsa import field


def read(data: bytes, reading: Reading) -> None:
    """Add the opinions of every text; ids are `stem:text.opinion`, both counted from 1."""
    for n, (line, parse) in enumerate(json_records(reading.text(data), reading), 1):
        opinions: list[Any] = []
        with reading.at(line):
            record = parse()
            text = string(field(record, "text", "the record"), "text")
            given = field(record, "opinions", "the record")
            if not isinstance(given, list):
                raise DataError(f"'opinions' holds {shown(given)}; a list of objects is accepted")
            opinions = given
            if not opinions:
                reading.left_out["sentence without aspects"] += 1
        for k, opinion in enumerate(opinions, 1):
            with reading.at(line):
                target, aspect = (
                    string(field(opinion, name, "an opinion"), name)
                    for name in ("target_entity", "aspect")
                )
                label, id = field(opinion, "sentiment", "an opinion"), f"{reading.stem}:{n}.{k}"
                if aspect != "general":
                    name = f"{aspect} of {target}"
                    reading.add(text, name, label, None, line, id=id)
                    continue
                places = occurrences(text, target)
                if not target.strip() or not places:
                    problem = f"the location {shown(target)} does not stand in {shown(text)}"
                    raise DataError(problem)
                reading.add(text, target, label, places[0], line, id=id)
