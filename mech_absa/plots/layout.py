"""Frames of figures: axes, headlines, legends, and the pieces that plots of tables share."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import ConfigError
from .style import COLUMN, CYCLE, INK, MARKERS, SOFT, Picture
from .words import SEPARATOR

TITLE_WIDTH, NOTE_WIDTH = 0.083, 0.0505
"""Inches that a character of the title and of the note takes on average."""
TITLE_LINE, NOTE_LINE = 0.165, 0.135
"""Inches that a line of each takes."""


def new_figure(width: float, height: float, **grid: Any) -> tuple[Picture, Any]:
    """Return a figure of a size in inches and its axes, as `Figure.subplots(**grid)` gives them."""
    figure = Picture(figsize=(width, height), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.04, h_pad=0.04, wspace=0.03, hspace=0.03)
    return figure, figure.subplots(**grid)


def axes_or_new(ax: Axes | None, width: float = COLUMN, height: float = 2.5) -> tuple[Figure, Axes]:
    """Return the axes that were given and their figure, or a new figure with axes of its own."""
    if ax is None:
        return new_figure(width, height)
    figure: Any = ax.get_figure(root=True)
    return figure, ax


def packed(text: str, width: int) -> str:
    """Break a text into lines of at most `width` characters, between facts where possible."""
    lines = []
    for line in text.split("\n"):
        current = ""
        for piece in line.split(SEPARATOR):
            if current and len(current) + len(SEPARATOR) + len(piece) > width:
                lines.append(current)
                current = ""
            current += SEPARATOR * bool(current) + piece
        lines += textwrap.wrap(current, width) if len(current) > width else [current]
    return "\n".join(lines)


def headline(figure: Figure, title: str, note: str = "") -> None:
    """Add a bold title and plain facts under it, in new room above the figure."""
    width, height = map(float, figure.get_size_inches())
    title = "\n".join(textwrap.wrap(title, int(width / TITLE_WIDTH)))
    note = packed(note, int(width / NOTE_WIDTH)) if note else ""
    title_height = TITLE_LINE * (title.count("\n") + 1)
    note_height = NOTE_LINE * (note.count("\n") + 1) if note else 0.0
    total = height + 0.05 + title_height + note_height
    figure.set_size_inches(width, total)
    engine: Any = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0, 0, 1, height / total))
    look: dict[str, Any] = {"ha": "left", "va": "top"}
    x, top = 0.09 / width, 1 - 0.06 / total
    figure.text(x, top, title, fontsize=9, fontweight="bold", color=INK, linespacing=1.25, **look)
    if note:
        figure.text(
            x, top - title_height / total, note, fontsize=6.5, color=SOFT, linespacing=1.35, **look
        )


def finish(
    figure: Figure, ax: Axes, own: bool, title: str, note: str = "", columns: int = 3
) -> Figure:
    """Add the legend and the title: a headline on a figure of its own, a plain title on given axes."""
    names = ax.get_legend_handles_labels()[1]
    if not own:
        ax.set_title(title)
        if names:
            ax.legend(ncols=1)
        return figure
    if names:
        legend_below(figure, ncols=min(columns, len(names)), columnspacing=1.2, handlelength=1.8)
    headline(figure, title, note)
    return figure


def legend_below(figure: Figure, **options: Any) -> None:
    """Put a legend under the axes, left-aligned."""
    figure.legend(loc="outside lower left", borderaxespad=0.3, **options)


# ---- tables -------------------------------------------------------------------------------------


def require_columns(table: pd.DataFrame, *columns: str) -> None:
    """Check that a table has columns and rows.

    Raises:
        ConfigError: it lacks one of the columns, or is empty.
    """
    if missing := [c for c in columns if c not in table]:
        raise ConfigError(
            f"the table for this figure has no column {missing[0]!r}; it needs {', '.join(columns)} "
            f"and has {', '.join(map(str, table.columns))}"
        )
    if table.empty:
        raise ConfigError("the table for this figure has no rows")


def groups_of(table: pd.DataFrame, column: str) -> list[tuple[str, pd.DataFrame]]:
    """Return the rows of each value of a column in order of appearance; one unnamed group without
    it.
    """
    if column not in table:
        return [("", table)]
    return [(str(name), rows) for name, rows in table.groupby(column, sort=False)]


def interval_lengths(rows: pd.DataFrame, value: str) -> Float[np.ndarray, "2 row"] | None:
    """Return the distances from a value down and up to its ends, or None if the table has no ends."""
    low, high = f"{value}_low", f"{value}_high"
    if low not in rows or high not in rows:
        return None
    y = rows[value].to_numpy(float)
    down, up = y - rows[low].to_numpy(float), rows[high].to_numpy(float) - y
    lengths: np.ndarray = np.nan_to_num(np.clip(np.stack([down, up]), 0, None))
    return lengths


def curve(
    ax: Axes,
    x: Float[np.ndarray, " row"],
    rows: pd.DataFrame,
    value: str,
    number: int,
    label: str,
    *,
    factor: float = 1.0,
    band: bool = False,
    breaks: Sequence[int] = (),
) -> None:
    """Draw a line with its interval.

    Args:
        ax: to draw on.
        x: of every row.
        rows: with the column `value` and perhaps its ends.
        value: the column drawn.
        number: of the line; it picks colour, marker and dashes.
        label: for the legend.
        factor: on all values, such as 100 for percent.
        band: draw the interval as a band instead of bars.
        breaks: the line is interrupted before these points.
    """
    y, ends = rows[value].to_numpy(float) * factor, interval_lengths(rows, value)
    colour = CYCLE[number % len(CYCLE)]
    if ends is not None and band:
        low, high = y - ends[0] * factor, y + ends[1] * factor
        ax.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    elif ends is not None:
        ax.errorbar(
            x, y, yerr=ends * factor, fmt="none", ecolor=colour, elinewidth=0.8, capsize=1.5, alpha=0.8
        )  # fmt: skip
    ax.plot(
        np.insert(x, breaks, np.nan),
        np.insert(y, breaks, np.nan),
        linestyle=("-", "--", "-.", ":")[number // len(CYCLE) % 4],
        color=colour,
        marker=MARKERS[number % len(MARKERS)],
        label=label or None,
    )
