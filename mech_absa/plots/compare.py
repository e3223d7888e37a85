"""Selectors side by side: how much better than random places, and how alike they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .cells import colour_bar
from .layout import headline, new_figure, require_columns
from .style import CYCLE, DIVERGING, FAINT, INK, MARKERS, PAGE, SOFT, style

ROW = 0.19
"""Inches of a selector's row."""


def selectors(
    table: pd.DataFrame,
    agreement: pd.DataFrame,
    *,
    title: str = "Places that selectors name, against random places",
    note: str = "",
) -> Figure:
    """Draw each selector's difference from random places with its interval, and the agreement of the selectors.

    Args:
        table: columns `selector, layers, difference, low, high, p_adjusted`; shares, one row per
            selector.
        agreement: columns `selector, other, rho, low, high`, one row per two selectors; NaN is drawn
            grey, and a number whose interval holds 0 stands in brackets.
        title, note: above the figure.

    Raises:
        ConfigError: the table lacks a column, or has no rows.
    """
    require_columns(table, "selector", "layers", "difference", "low", "high", "p_adjusted")
    if len(table) > 1:
        require_columns(agreement, "selector", "other", "rho", "low", "high")
    names = [str(name) for name in table["selector"]]
    with style():
        figure, axes = new_figure(
            PAGE, 0.9 + ROW * len(names), ncols=2, width_ratios=(1.15, 1.0), squeeze=False
        )
        left, right = axes[0]
        _differences(left, table, names)
        _agreement(figure, right, agreement, names)
        headline(figure, title, note)
    return figure


def _differences(ax: Axes, table: pd.DataFrame, names: list[str]) -> None:
    """Draw a dot and its interval per selector; filled where the corrected p-value is below 0.05."""
    y = np.arange(len(names))
    value, low, high = (100 * table[c].to_numpy(float) for c in ("difference", "low", "high"))
    passed = table["p_adjusted"].to_numpy(float) < 0.05
    ax.axvline(0, color=SOFT, linewidth=0.8)
    ax.hlines(y, low, high, color=CYCLE[0], linewidth=1.2)
    for chosen, face, label in (
        (passed, CYCLE[0], "corrected p below 0.05"),
        (~passed, "white", "not"),
    ):
        if chosen.any():
            ax.plot(
                value[chosen], y[chosen], "o", color=CYCLE[0], markerfacecolor=face, label=label
            )  # fmt: skip
    ax.set_yticks(y, [f"{n}  ({places})" for n, places in zip(names, table["layers"], strict=True)])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="x", color=FAINT, linewidth=0.5)
    ax.set_axisbelow(True)
    ax.set_xlabel("accuracy minus that of random places, in points")
    ax.set_title("Selector (layers)")
    ax.legend(loc="lower right")


def _agreement(figure: Figure, ax: Axes, pairs: pd.DataFrame, names: list[str]) -> None:
    """Draw the correlations of layer scores, with numbers."""
    values, clear = (_matrix(pairs, names, of) for of in (lambda r: r.rho, _clear))
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(values), cmap=DIVERGING, vmin=-1, vmax=1, edgecolors="white", linewidth=0.5
    )  # fmt: skip
    ticks = np.arange(len(names)) + 0.5
    ax.set_ylim(len(names), 0)
    ax.set_xticks(ticks, names, rotation=90)
    ax.set_yticks(ticks, [])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for i, j in np.ndindex(values.shape):
        if np.isfinite(values[i, j]) and len(names) <= 20:
            colour = "white" if abs(values[i, j]) > 0.7 else INK
            text = f"{values[i, j]:.1f}".replace("-0.0", "0.0")
            text = text if i == j or clear[i, j] else f"({text})"
            ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=4.5, color=colour)
    ax.set_title("Rank correlation of layer scores")
    colour_bar(figure, mesh, ax, "Spearman's rho (in brackets: its interval holds 0)")


def _clear(row: Any) -> float:
    """Return 1 where the interval of a correlation does not hold 0."""
    return float(row.low > 0 or row.high < 0)


def _matrix(pairs: pd.DataFrame, names: list[str], of: Callable[[Any], float]) -> np.ndarray:
    """Return a symmetric matrix of what `of` says of each row; 1 on the diagonal, NaN where there is none."""
    found = np.full((len(names), len(names)), np.nan)
    np.fill_diagonal(found, 1.0)
    at = {name: i for i, name in enumerate(names)}
    for row in pairs.itertuples(index=False):
        if row.selector in at and row.other in at:
            i, j = at[row.selector], at[row.other]
            found[i, j] = found[j, i] = of(row)
    return found


def _plain_ticks(ax: Axes, values: np.ndarray) -> None:
    """Label a logarithmic axis with plain numbers: the ends, and powers of ten in between."""
    low, high = float(values.min()), float(values.max())
    powers = 10.0 ** np.arange(np.ceil(np.log10(low)), np.floor(np.log10(high)) + 1)
    inside = [float(p) for p in powers if low * 1.5 < p < high / 1.5]
    ticks = list(dict.fromkeys([low, *inside, high]))
    ax.set_xticks(ticks, [f"{t:,.0f}" if t >= 10 else f"{t:.2g}" for t in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(low / 1.6, high * 1.6)


COSTS = {
    "parameters": "parameters",
    "cpu_seconds": "CPU seconds of a training",
    "examples": "training examples",
}
"""Column of the costs -> label of its axis."""


def costs(
    table: pd.DataFrame,
    *,
    title: str = "What a training costs, and what it reaches at random places",
    note: str = "",
) -> Figure:
    """Draw accuracy against parameters, seconds and training examples, a colour per edit.

    Args:
        table: columns `edit, budget, parameters, cpu_seconds, examples, accuracy, low, high, worst,
            best`, one row per edit and budget; accuracies are shares.
        title, note: above the figure.

    Raises:
        ConfigError: the table lacks a column, or has no rows.
    """
    require_columns(table, "edit", "budget", *COSTS, "accuracy", "low", "high", "worst", "best")
    with style():
        figure, axes = new_figure(PAGE, 2.4, ncols=len(COSTS), sharey=True, squeeze=False)
        for ax, (column, label) in zip(axes[0], COSTS.items(), strict=True):
            for i, (edit, rows) in enumerate(table.groupby("edit", sort=False)):
                rows, colour = rows.sort_values(column, kind="stable"), CYCLE[i % len(CYCLE)]
                x, y = rows[column].to_numpy(float), 100 * rows["accuracy"].to_numpy(float)
                ends = [100 * rows[c].to_numpy(float) for c in ("low", "high", "worst", "best")]
                ax.vlines(x, ends[2], ends[3], color=colour, linewidth=3, alpha=0.25)
                ax.vlines(x, ends[0], ends[1], color=colour, linewidth=1.0)
                ax.plot(x, y, MARKERS[i % len(MARKERS)], color=colour, label=str(edit))
            ax.set_xscale("log")
            _plain_ticks(ax, table[column].to_numpy(float))
            ax.set_xlabel(label)
            ax.grid(axis="y", color=FAINT, linewidth=0.5)
            ax.set_axisbelow(True)
        axes[0, 0].set_ylabel("accuracy in percent")
        axes[0, -1].legend(loc="best")
        headline(figure, title, note)
    return figure


__all__ = ["costs", "selectors"]
