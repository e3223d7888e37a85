"""The domain matrix: trained here, tested there."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cells import colour_bar, outline_cells
from .layout import axes_or_new, finish, require_columns
from .style import COLUMN, INK, SEQUENTIAL, style

LEAST_RANGE = 20.0
"""Points that the colour scale spans at least, so that seeds' noise does not fill it."""


def domains(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    metric: str = "accuracy",
    title: str = "Trained here, tested there",
    note: str = "",
) -> Figure:
    """Draw the score of every training and test domain, the number in its cell; in-domain cells are
    framed.

    Each cell gives the mean and, if there are several rows of a pair, their standard deviation. The
    colour scale spans at least 20 points: differences of the size of the seeds' noise look like it.

    Args:
        table: columns `train`, `test` and `metric` (0 to 1).
        ax: to draw on; default a figure of its own.
        metric: the column drawn; several rows of one pair (seeds) are averaged.
        title, note: above the figure.
    """
    require_columns(table, "train", "test", metric)
    rows = list(dict.fromkeys(table["train"]))
    tested = list(dict.fromkeys(table["test"]))
    columns = [r for r in rows if r in tested] + [c for c in tested if c not in rows]
    groups = table.assign(**{metric: 100 * table[metric]}).groupby(["train", "test"])[metric]
    means, spreads = (
        s.unstack("test").reindex(index=rows, columns=columns).to_numpy(float)
        for s in (groups.mean(), groups.std(ddof=1))
    )
    high = min(100.0, float(np.nanmax(means)))
    low = max(0.0, min(float(np.nanmin(means)), high - LEAST_RANGE))
    with style():
        figure, on = axes_or_new(ax, COLUMN + 0.6, 0.7 + 0.42 * len(rows))
        mesh = on.pcolormesh(
            np.ma.masked_invalid(means), cmap=SEQUENTIAL, vmin=low, vmax=high, edgecolors="white", linewidth=1
        )  # fmt: skip
        on.set_ylim(len(rows), 0)
        on.spines[:].set_visible(False)
        on.tick_params(length=0)
        on.set_xticks(np.arange(len(columns)) + 0.5, [str(c) for c in columns])
        on.set_yticks(np.arange(len(rows)) + 0.5, [str(r) for r in rows])
        for i, j in np.ndindex(means.shape):
            colour = "white" if means[i, j] > (low + high) / 2 else INK
            _print_cell(on, i, j, means[i, j], spreads[i, j], colour)
        outline_cells(on, np.array([[r == c for c in columns] for r in rows]))
        on.set_xlabel("tested on")
        on.set_ylabel("trained on")
        several = np.isfinite(spreads).any()
        label = f"{metric.replace('_', ' ')} (%)"
        colour_bar(figure, mesh, [on], f"{label}, mean over seeds" if several else label)
        if several:
            note = f"{note}\nsmall print: standard deviation over seeds".strip()
        return finish(figure, on, ax is None, title, note)


def _print_cell(ax: Axes, i: int, j: int, mean: float, spread: float, colour: str) -> None:
    """Write a mean and its spread into a cell."""
    if np.isnan(mean):
        ax.text(j + 0.5, i + 0.5, "–", ha="center", va="center", fontsize=7, color=INK)
        return
    has_spread = np.isfinite(spread)
    y = i + (0.4 if has_spread else 0.5)
    ax.text(j + 0.5, y, f"{mean:.1f}", ha="center", va="center", fontsize=7, color=colour)
    if has_spread:
        ax.text(j + 0.5, i + 0.72, f"± {spread:.1f}", ha="center", va="center", fontsize=5, color=colour)  # fmt: skip
