"""Tables on a terminal: aligned, and never cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
    """Print rows under their columns.

    The first column is aligned to the left, the others to the right. A cell is never cut: where the table is wider than the terminal,
    the terminal wraps its lines.
    """
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*("-" if _none(cell) else str(cell) for cell in row))
    console = Console(markup=False, highlight=False)
    needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    Console(width=max(console.width, needed), markup=False, highlight=False).print(table)


def print_frame(frame: pd.DataFrame, title: str = "") -> None:
    """Print a pandas table."""
    print_table([str(c) for c in frame.columns], frame.itertuples(index=False), title)


def _none(cell: object) -> bool:
    """Return whether a cell holds no value: None or NaN."""
    return cell is None or (isinstance(cell, float) and cell != cell)
