"""Read seg files: three lines per example, namely the sentence with `$T$` for the aspect, the
aspect, and -1, 0 or 1.

    $T$ is super fast , around anywhere from 35 seconds to 1 minute .
    boot time
    1

Much ABSA code keeps SemEval and Twitter data in this form. If `$T$` occurs more than once, each of
them becomes the aspect, the first one is its span, and the row counts as ambiguous. Blank lines are
skipped. An example begins at a line with `$T$`, so after a record of the wrong length reading goes
on at the next one.
"""

from __future__ import annotations

from ..errors import DataError
from .rows import Reading, shortened

MARK = "$T$"
LONGEST_SENTENCE = 1_000_000


def read(data: bytes, reading: Reading) -> None:
    """Add every three-line record; its line is that of the sentence."""
    reading.signed = True
    lines = [
        (n, text)
        for n, raw in enumerate(reading.text(data).split("\n"), 1)
        if (text := raw.rstrip("\r")).strip()
    ]
    starts = [i for i, (_, text) in enumerate(lines) if MARK in text]
    if not lines:
        return
    if not starts or starts[0] > 0:
        starts.insert(0, 0)  # what stands before the first mark is a record too, and a bad one
    for here, after in zip(starts, [*starts[1:], len(lines)], strict=True):
        line = lines[here][0]
        with reading.at(line):
            _add([text for _, text in lines[here:after]], line, reading)


def _add(record: list[str], line: int, reading: Reading) -> None:
    if MARK not in record[0]:
        raise DataError(
            f"{shortened(record[0])!r} has no {MARK}; a record is a sentence with {MARK}, the aspect, and -1, 0 or 1"
        )
    if len(record) != 3:
        raise DataError(
            f"the record that begins here has {len(record)} of the three lines; it is a sentence with {MARK}, the aspect, and -1, 0 or 1"
        )
    sentence, aspect, label = record[0], record[1].strip(), record[2]
    if sentence.count(MARK) * len(aspect) > LONGEST_SENTENCE:
        raise DataError(
            f"{sentence.count(MARK)} times {MARK} and an aspect of {len(aspect)} characters would make "
            f"a sentence beyond {LONGEST_SENTENCE:,} characters; write the aspect where it stands"
        )
    start = sentence.index(MARK)
    before = len(reading.items)
    reading.add(
        sentence.replace(MARK, aspect), aspect, label.strip(), (start, start + len(aspect)), line
    )
    reading.ambiguous += sentence.count(MARK) > 1 and len(reading.items) > before
