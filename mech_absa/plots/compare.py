"""Selectors side by side: how much better than random places, and how alike they are."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cells import colour_bar
from .layout import headline, new_figure, require_columns
from .style import CYCLE, DIVERGING, FAINT, INK, PAGE, SOFT, style

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
        agreement: rank correlations, selector by selector; NaN is drawn grey.
        title, note: above the figure.

    Raises:
        ConfigError: the table lacks a column, or has no rows.
    """
    require_columns(table, "selector", "layers", "difference", "low", "high", "p_adjusted")
    names = [str(name) for name in table["selector"]]
    with style():
        figure, axes = new_figure(
            PAGE, 0.9 + ROW * len(names), ncols=2, width_ratios=(1.15, 1.0), squeeze=False
        )
        left, right = axes[0]
        _differences(left, table, names)
        _agreement(figure, right, agreement.reindex(index=names, columns=names), names)
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


def _agreement(figure: Figure, ax: Axes, matrix: pd.DataFrame, names: list[str]) -> None:
    """Draw the correlations of layer scores, with numbers."""
    values = matrix.to_numpy(float)
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
            ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=4.5, color=colour)
    ax.set_title("Rank correlation of layer scores")
    colour_bar(figure, mesh, ax, "Spearman's rho")


__all__ = ["selectors"]
