"""Read TSA JSON (IBM/yaso-tsa): texts with located targets.

    [{"text": "...", "targets": [{"text": "Italian food", "location": {"begin": 10, "end": 22},
                                  "sentiment": "negative"}, ...]}, ...]

The same records are also read one per line. A text without a target is counted.
"""

from __future__ import annotations

from typing import Any

from ..errors import DataError
from .jsonl import json_records
from .rows import Reading, shortened, shown, string, whole


def read(data: bytes, reading: Reading) -> None:
    """Add the targets of every text; ids are `stem:text.target`, both counted from 1; the line is
    that of the record.
    """
    for n, (line, parse) in enumerate(json_records(reading.text(data), reading), 1):
        targets: list[Any] = []
        with reading.at(line):
            record = parse()
            text = string(field(record, "text", "the record"), "text")
            targets = field(record, "targets", "the record")
            if not isinstance(targets, list):
                targets, came = [], targets
                raise DataError(f"'targets' holds {shown(came)}; a list of objects is accepted")
            if not targets:
                reading.left_out["sentence without aspects"] += 1
        for k, target in enumerate(targets, 1):
            with reading.at(line):
                location = field(target, "location", "a target")
                begin, end = (
                    whole(field(location, name, "a location"), name) for name in ("begin", "end")
                )
                term = string(field(target, "text", "a target"), "text")
                reading.add(
                    text,
                    term,
                    field(target, "sentiment", "a target"),
                    (begin, end),
                    line,
                    id=f"{reading.stem}:{n}.{k}",
                )


def field(record: object, name: str, what: str) -> Any:
    """Return a field of a JSON object of a file, or complain about what came instead."""
    if not isinstance(record, dict):
        raise DataError(f"{what} is {shown(record)}; a JSON object is accepted")
    if name not in record:
        raise DataError(
            f"{what} has no field {name!r}; there are: {shortened(', '.join(record) or 'none', 200)}"
        )
    return record[name]
