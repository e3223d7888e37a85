"""Read CSV and TSV with a header: columns by name, recognised or given.

The names in `rows.FIELDS` are recognised in any case. Others are given as `columns={"aspect":
"Term", ...}`. Offsets (`from`, `to`) are used if both columns are there. If a row's offsets are
empty, its aspect is searched, as for rows without offsets. The delimiter is the one among comma,
semicolon, tab and bar that occurs most often in the header. Quotes are those of CSV. If they do not
add up in a tab-separated file, it is read once more with quotes as plain characters, because many
such files were never quoted.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Literal

from ..errors import DataError
from .rows import Reading


def read(data: bytes, reading: Reading) -> None:
    """Add every row; its line is the one on which it begins."""
    text = reading.text(data)
    delimiter = delimiter_of(text.lstrip().partition("\n")[0])
    try:
        rows = list(_rows(text, reading, delimiter, csv.QUOTE_MINIMAL))
    except DataError:
        if delimiter != "\t":
            raise
        rows = list(_rows(text, reading, delimiter, csv.QUOTE_NONE))
    if not rows:
        return
    _, header = rows[0]
    names = [name.strip() for name in header]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(
            f"the header names a column {sorted(repeated)[0]!r} more than once",
            reading.source,
            rows[0][0],
        )
    try:
        reading.resolve(tuple(names))
    except DataError as e:
        raise DataError(
            e.problem, reading.source, rows[0][0]
        ) from None  # the header is wrong for every row: nothing can be skipped
    for line, cells in rows[1:]:
        with reading.at(line):
            if len(cells) != len(names):
                raise DataError(
                    f"{len(cells)} cells came, but the header names {len(names)} columns: {', '.join(names)}"
                )
            reading.add_row(dict(zip(names, cells, strict=True)), line)


def delimiter_of(header: str) -> str:
    """Return the one among comma, semicolon, tab and bar that occurs most often in `header`."""
    return max(",;\t|", key=header.count)


def _rows(
    text: str, reading: Reading, delimiter: str, quoting: Literal[0, 3]
) -> Iterator[tuple[int, list[str]]]:
    """Yield the non-empty rows with their first lines; a quoted cell may span several lines."""
    rows = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True
    )
    begins = 1
    try:
        for cells in rows:
            if any(cell.strip() for cell in cells):
                yield begins, cells
            begins = rows.line_num + 1
    except csv.Error as e:
        raise DataError(
            f"broken table: {e}, in the row that begins here", reading.source, begins
        ) from None
