"""Plots that only the figures of this folder need: scores over places, sizes and ranks, and checks
of the method.

They take tables, draw on the `ax` they are given or on a figure of their own, and return the
figure. Intervals are drawn wherever the table has them, and no axis of lengths is cut: scores are
dots with intervals, not bars.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from mech_absa.errors import ConfigError
from mech_absa.plots.cells import place_column
from mech_absa.plots.layout import (
    axes_or_new,
    curve,
    finish,
    groups_of,
    headline,
    interval_lengths,
    legend_below,
    new_figure,
    require_columns,
)
from mech_absa.plots.style import COLUMN, CYCLE, FAINT, GRID, MARKERS, PAGE, SOFT, style
from mech_absa.plots.words import facts, method_words
from mech_absa.sites import parse_layers
from mech_absa.stats import spearman_interval

if TYPE_CHECKING:
    from mech_absa.patch.importance import ImportanceMap


def _percent_label(metric: str) -> str:
    return f"{metric.replace('_', ' ')} (%)"


# ---- scores over places -------------------------------------------------------------------------


def layer_ranges(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    metric: str = "accuracy",
    title: str = "Which layers to edit",
    note: str = "",
) -> Figure:
    """Draw the score over the edited range of layers, one line per data set or method (Li et al.
    2025, Figure 4).

    The line is interrupted where the number of layers changes: points on its two sides are no
    neighbours.

    Args:
        table: columns `layers` (such as `10-15`, in the order of the axis) and `metric` (0 to 1);
            optional `<metric>_low`, `<metric>_high`, and `data` or `method` to tell lines apart.
        ax: to draw on; default a figure of its own.
        metric: the column drawn.
        title, note: above the figure.
    """
    require_columns(table, "layers", metric)
    with style():
        figure, on = axes_or_new(ax, COLUMN + 0.7, 2.2)
        names = [str(x) for x in dict.fromkeys(table["layers"])]
        for i, (name, rows) in enumerate(groups_of(table, "data" if "data" in table else "method")):
            widths = [_width(str(x)) for x in rows["layers"]]
            breaks = [j for j in range(1, len(widths)) if widths[j] != widths[j - 1]]
            x = np.array([names.index(str(x)) for x in rows["layers"]], float)
            curve(on, x, rows, metric, i, name, factor=100.0, breaks=breaks)
        on.set_xticks(range(len(names)), names, rotation=30 if len(names) > 6 else 0)
        on.set_xlabel("edited layers")
        on.set_ylabel(_percent_label(metric))
        return finish(figure, on, ax is None, title, note)


def _width(layers: str) -> int | str:
    """Return how many layers a range has; its name where it is no range."""
    return len(parse_layers(layers, 10**6)) if re.fullmatch(r"[\d,-]+", layers) else layers


def dots(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    place: str = "position",
    metric: str = "accuracy",
    title: str = "Which token to edit",
    note: str = "",
) -> Figure:
    """Draw one row per place: a dot with its interval for every data set, and all single values as
    faint points.

    Args:
        table: columns `place` and `metric` (0 to 1); optional `<metric>_low`, `<metric>_high`,
            `data`, and `single` (a list of single values, such as seeds).
        ax: to draw on; default a figure of its own.
        place: the column of the rows' names.
        metric: the column drawn.
        title, note: above the figure.
    """
    require_columns(table, place, metric)
    groups, names = groups_of(table, "data"), [str(x) for x in dict.fromkeys(table[place])]
    with style():
        figure, on = axes_or_new(ax, COLUMN + 1.2, 0.5 + 0.13 * len(names) * (len(groups) + 0.6))
        step = 0.62 / max(1, len(groups))
        for i, (name, rows) in enumerate(groups):
            y = np.array([names.index(str(p)) for p in rows[place]], float)
            y += (i - (len(groups) - 1) / 2) * step
            x, ends = 100 * rows[metric].to_numpy(float), interval_lengths(rows, metric)
            look: dict[str, Any] = {"color": CYCLE[i % len(CYCLE)]}
            if "single" in rows:
                for at, values in zip(y, rows["single"], strict=True):
                    on.scatter(
                        100 * np.asarray(values), np.full(len(values), at), s=5, alpha=0.35, linewidths=0, **look
                    )  # fmt: skip
            on.errorbar(
                x, y, xerr=None if ends is None else 100 * ends, fmt=MARKERS[i % len(MARKERS)], markersize=4,
                elinewidth=1.0, capsize=2, label=name or None, **look,
            )  # fmt: skip
        for row in range(1, len(names)):
            on.axhline(row - 0.5, color=GRID, linewidth=0.6, zorder=0)
        on.set_yticks(range(len(names)), names)
        on.set_ylim(len(names) - 0.5, -0.5)
        on.tick_params(axis="y", length=0)
        on.set_xlabel(_percent_label(metric))
        return finish(figure, on, ax is None, title, note)


def place_grid(
    table: pd.DataFrame,
    intervals: Sequence[tuple[str, str, str]],
    *,
    value: str = "accuracy",
    unit: str = "accuracy (%)",
    title: str = "Which place to edit",
    note: str = "",
) -> Figure:
    """Draw places as rows of small panels, one panel per budget: epochs from left to right,
    examples from top down.

    Args:
        table: columns `budget`, `epochs`, `place` and `value` (0 to 1), and the ends of the
            intervals; NaN where there is none.
        intervals: (words, column of the low end, column of the high end) of every kind of interval,
            side by side.
        value: the column drawn.
        unit: for the axis.
        title, note: above the figure.
    """
    require_columns(table, "budget", "epochs", "place", value)
    budgets, epochs = (list(dict.fromkeys(table[c])) for c in ("budget", "epochs"))
    names = [str(p) for p in dict.fromkeys(table["place"])]
    height = (0.35 + 0.16 * len(names)) * len(budgets) + 0.3
    with style():
        figure, axes = new_figure(
            PAGE,
            height,
            nrows=len(budgets),
            ncols=len(epochs),
            sharex=True,
            sharey=True,
            squeeze=False,
        )
        for (i, budget), (j, n) in product(enumerate(budgets), enumerate(epochs)):
            ax = axes[i, j]
            rows = table[(table["budget"] == budget) & (table["epochs"] == n)]
            y = np.array([names.index(str(p)) for p in rows["place"]], float)
            x = 100 * rows[value].to_numpy(float)
            if value == "difference":
                ax.axvline(0, color=SOFT, linewidth=0.6)
            for k, (words, low, high) in enumerate(intervals):
                ends = np.nan_to_num(
                    np.clip(
                        np.stack([x - 100 * rows[low], 100 * rows[high] - x]).astype(float), 0, None
                    )
                )
                has = (rows[low].notna() & np.isfinite(x)).to_numpy()
                at = y + 0.3 * (k - (len(intervals) - 1) / 2)
                label = words if i == j == 0 else None
                ax.errorbar(
                    x[has], at[has], xerr=ends[:, has], fmt=MARKERS[k], color=CYCLE[k], markersize=3.5, elinewidth=0.9,
                    capsize=1.5, label=label,
                )  # fmt: skip
            ax.set_title(f"{budget} examples, {n} epoch{'s' * (n != 1)}", fontsize=7)
            ax.set_yticks(range(len(names)), names)
            ax.set_ylim(len(names) - 0.5, -0.5)
            ax.tick_params(axis="y", length=0)
            if i == len(budgets) - 1:
                ax.set_xlabel(unit)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        if len(intervals) > 1:
            legend_below(figure, handles=handles, labels=labels, ncols=len(labels))
        headline(figure, title, note)
    return figure


def effects_and_edits(
    table: pd.DataFrame,
    *,
    metric: str = "accuracy",
    title: str = "Does tracing tell where to edit?",
    note: str = "",
) -> Figure:
    """Draw the score of editing a place against what tracing said of it, one panel per method.

    Places with the same effect, above all those without any, are spread sideways so that none
    covers another. Each panel gives Spearman's rho with its interval (Hase et al. 2023, arXiv
    2301.04213, found little relation).

    Args:
        table: columns `aie` and `metric` (0 to 1), one row per place; optional `method`,
            `<metric>_low`, `<metric>_high`, and `size` (how many layers the place has), shown by
            the marker.
        metric: the column drawn.
        title, note: above the figure.
    """
    require_columns(table, "aie", metric)
    groups = groups_of(table, "method")
    sizes = sorted(table["size"].unique()) if "size" in table else []
    span = float(table["aie"].max() - table["aie"].min()) or 1.0
    with style():
        figure, axes = new_figure(
            PAGE if len(groups) > 1 else COLUMN + 0.5, 2.1, ncols=len(groups), sharey=True, sharex=True, squeeze=False
        )  # fmt: skip
        for i, (ax, (name, rows)) in enumerate(zip(axes[0], groups, strict=True)):
            x = spread_ties(rows["aie"].to_numpy(float), 0.012 * span)
            _score_points(ax, x, rows, metric, CYCLE[i % len(CYCLE)], sizes)
            label = name
            if len(rows) > 2:
                rho = spearman_interval(rows["aie"], rows[metric])
                label = f"{name}\nρ = {rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]".strip()
            ax.set_title(label, fontsize=7.5, linespacing=1.3)
            ax.set_xlabel("AIE of the place")
        axes[0, 0].set_ylabel(f"{_percent_label(metric)}\nof editing it")
        if len(sizes) > 1:
            for j, n in enumerate(sizes):
                word = "1 layer" if n == 1 else f"{n} layers"
                axes[0, 0].plot(
                    [], [], color=SOFT, marker=MARKERS[j % len(MARKERS)], ls="", label=word
                )
            handles, labels = axes[0, 0].get_legend_handles_labels()
            legend_below(figure, handles=handles, labels=labels, ncols=len(labels))
        headline(figure, title, note)
    return figure


def spread_ties(x: np.ndarray, step: float) -> np.ndarray:
    """Move equal values apart by a step each, about their common value."""
    moved = x.copy()
    for value in np.unique(x):
        at = np.flatnonzero(x == value)
        moved[at] = value + (np.arange(len(at)) - (len(at) - 1) / 2) * step
    return moved


def _score_points(
    ax: Axes, x: np.ndarray, rows: pd.DataFrame, metric: str, colour: str, sizes: Sequence[Any]
) -> None:
    """Draw scores with their intervals; the marker tells how many layers a place has."""
    y, ends = 100 * rows[metric].to_numpy(float), interval_lengths(rows, metric)
    if ends is not None:
        ax.errorbar(x, y, yerr=100 * ends, fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.6)
    size = rows["size"].to_numpy() if sizes else np.zeros(len(rows))
    for j, n in enumerate(sizes or [0]):
        at = size == n
        ax.scatter(x[at], y[at], s=16, color=colour, marker=MARKERS[j % len(MARKERS)], linewidths=0, alpha=0.9)  # fmt: skip


# ---- methods ------------------------------------------------------------------------------------


def parameters(
    table: pd.DataFrame,
    *,
    metric: str = "accuracy",
    title: str = "Accuracy and trainable parameters",
    note: str = "",
) -> Figure:
    """Draw one row per method, smallest first: its trainable parameters (log axis) and its score,
    side by side.

    Args:
        table: columns `method`, `parameters` and `metric` (0 to 1), one row per seed.
        metric: the column drawn: seeds as faint points, their mean as a marker with one standard
            deviation.
        title, note: above the figure.
    """
    require_columns(table, "method", "parameters", metric)
    sizes = table.groupby("method", sort=False)["parameters"].mean().sort_values(kind="stable")
    with style():
        figure, (left, right) = new_figure(
            PAGE * 0.8, 0.5 + 0.17 * len(sizes), ncols=2, sharey=True, width_ratios=(1, 1.6)
        )
        for row, (name, size) in enumerate(sizes.items()):
            y = 100 * table[table["method"] == name][metric].to_numpy(float)
            spread = [float(np.std(y, ddof=1))] if len(y) > 1 else None
            left.scatter([size], [row], s=16, color=SOFT, linewidths=0)
            right.scatter(y, np.full(len(y), row), s=6, color=CYCLE[0], alpha=0.35, linewidths=0)
            right.errorbar(
                [y.mean()], [row], xerr=spread, fmt="o", color=CYCLE[0], markersize=4, elinewidth=1.0, capsize=2
            )  # fmt: skip
            for ax in (left, right):
                ax.axhline(row, color=GRID, linewidth=0.5, zorder=0)
        left.set_xscale("log")
        left.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k, 1M
        left.set_yticks(range(len(sizes)), [str(name) for name in sizes.index])
        left.set_ylim(len(sizes) - 0.5, -0.5)
        left.set_xlabel("trainable parameters")
        right.set_xlabel(_percent_label(metric))
        for ax in (left, right):
            ax.tick_params(axis="y", length=0)
        several = table.groupby("method")[metric].size().max() > 1
        below = [note, "bars: one sd over seeds; faint points: single seeds" if several else ""]
        headline(figure, title, "\n".join(x for x in below if x))
    return figure


def differences(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    unit: str = "points of accuracy",
    title: str = "Difference to the reference",
    note: str = "",
) -> Figure:
    """Draw paired differences with their intervals, one row each, about a line at 0.

    Args:
        table: columns `name`, `difference`, `low`, `high` (0 to 1, drawn in points); optional `p`.
            Rows with p < 0.05 are filled, the others hollow.
        ax: to draw on; default a figure of its own.
        unit: for the axis.
        title, note: above the figure.
    """
    require_columns(table, "name", "difference", "low", "high")
    x, low, high = (100 * table[c].to_numpy(float) for c in ("difference", "low", "high"))
    with style():
        figure, on = axes_or_new(ax, COLUMN + 1.4, 0.6 + 0.17 * max(len(table), 4))
        on.axvline(0, color=SOFT, linewidth=0.7)
        y = np.arange(len(table))
        ends = np.clip(np.stack([x - low, high - x]), 0, None)
        on.errorbar(x, y, xerr=ends, fmt="none", ecolor=CYCLE[0], elinewidth=1.0, capsize=2)
        clear = (table["p"] < 0.05).to_numpy() if "p" in table else np.ones(len(table), bool)
        for mask, fill, label in ((clear, CYCLE[0], "p < 0.05"), (~clear, "white", "p ≥ 0.05")):
            on.scatter(
                x[mask], y[mask], s=16, facecolor=fill, edgecolor=CYCLE[0], linewidth=0.9, zorder=3,
                label=label if "p" in table else None,
            )  # fmt: skip
        on.set_yticks(y, [str(n) for n in table["name"]])
        on.set_ylim(len(table) - 0.5, -0.5)
        on.set_xlabel(unit)
        return finish(figure, on, ax is None, title, note)


def ranks(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    metric: str = "accuracy",
    title: str = "Rank of the edit",
    note: str = "",
) -> Figure:
    """Draw the score over the rank of an edit (axis in powers of two), one line per method, class
    or group.

    Args:
        table: columns `rank` and `metric` (0 to 1); optional `<metric>_low`, `<metric>_high`, and
            `method`.
        ax: to draw on; default a figure of its own.
        metric: the column drawn.
        title, note: above the figure.
    """
    require_columns(table, "rank", metric)
    with style():
        figure, on = axes_or_new(ax, COLUMN + 0.5, 2.2)
        for i, (name, rows) in enumerate(groups_of(table, "method")):
            rows = rows.sort_values("rank")
            curve(on, rows["rank"].to_numpy(float), rows, metric, i, name, factor=100.0)
        on.set_xscale("log", base=2)
        values = sorted(table["rank"].unique())
        on.set_xticks(values, [str(r) for r in values])
        on.set_xlabel("rank")
        on.set_ylabel(_percent_label(metric))
        return finish(figure, on, ax is None, title, note)


# ---- checks of the method -----------------------------------------------------------------------


def faithfulness(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    title: str = "Faithfulness of the ranking",
    note: str = "",
) -> Figure:
    """Draw the share of behaviour that a circuit of the best components keeps, over its size; one
    line per ranking.

    Args:
        table: columns `share` (of components kept, 0 to 1) and `faithfulness`; optional
            `faithfulness_low`, `faithfulness_high`, `method`.
        ax: to draw on; default a figure of its own.
        title, note: above the figure.
    """
    require_columns(table, "share", "faithfulness")
    smallest = 100 * float(table["share"][table["share"] > 0].min())
    with style():
        figure, on = axes_or_new(ax, COLUMN + 0.5, 2.2)
        on.axhline(1, color=SOFT, linewidth=0.6, linestyle=":")
        on.axhline(0, color=SOFT, linewidth=0.6)
        for i, (name, rows) in enumerate(groups_of(table, "method")):
            rows = rows.sort_values("share")
            x = 100 * rows["share"].to_numpy(float)
            curve(on, x, rows, "faithfulness", i, name, band=True)
        if smallest < 2:
            on.set_xscale("symlog", linthresh=smallest)
            on.xaxis.set_major_formatter("{x:g}")
        on.set_xlabel("components kept (%)")
        on.set_ylabel("faithfulness\n(1: the whole model)")
        return finish(figure, on, ax is None, title, note)


def pruning(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    metric: str = "accuracy",
    title: str = "Least important removed first",
    note: str = "",
) -> Figure:
    """Draw the score over the share of components removed, one line per ranking.

    Args:
        table: columns `removed` (0 to 1) and `metric` (0 to 1); optional `<metric>_low`,
            `<metric>_high`, `method`, and `majority`.
        ax: to draw on; default a figure of its own.
        metric: the column drawn.
        title, note: above the figure.
    """
    require_columns(table, "removed", metric)
    with style():
        figure, on = axes_or_new(ax, COLUMN + 0.5, 2.2)
        for i, (name, rows) in enumerate(groups_of(table, "method")):
            rows = rows.sort_values("removed")
            x = 100 * rows["removed"].to_numpy(float)
            curve(on, x, rows, metric, i, name, factor=100.0, band=True)
        if "majority" in table:
            level = 100 * float(table["majority"].iloc[0])
            on.axhline(level, color=SOFT, linewidth=0.8, linestyle=":", label="most frequent class")
        on.set_xlabel("components removed (%)")
        on.set_ylabel(_percent_label(metric))
        return finish(figure, on, ax is None, title, note)


SMALL = 1e-4
"""Effects below this share of the largest stand on the linear part of the axes of `agreement`."""


def agreement(
    exact: ImportanceMap,
    estimate: ImportanceMap,
    ax: Axes | None = None,
    *,
    rho: Any = None,
    title: str = "An estimate against the exact effects",
    note: str | None = None,
) -> Figure:
    """Draw the AIE of one map against another's over the cells they share, with Spearman's rho.

    Both axes are logarithmic away from 0, so that an estimate a hundred times too small is seen to
    be that, and cells near 0, which rho counts as much as the large ones, are seen as well.

    Args:
        exact, estimate: maps of the same model.
        ax: to draw on; default a figure of its own.
        rho: an `Estimate` (value, low, high) to print; computed by default.
        title: of the figure.
        note: default the facts of the exact map.

    Raises:
        ConfigError: the maps share fewer than 3 cells.
    """
    keys = ["kind", "layer", "head", place_column(exact.table)]
    both = exact.table.merge(estimate.table, on=keys, suffixes=("_exact", "_estimate"))
    both = both.dropna(subset=["aie_exact", "aie_estimate"])
    if len(both) < 3:
        raise ConfigError(
            f"the two maps share {len(both)} cells; at least 3 are needed to compare them"
        )
    x, y = both["aie_exact"].to_numpy(float), both["aie_estimate"].to_numpy(float)
    rho = spearman_interval(x, y) if rho is None else rho
    with style():
        figure, on = axes_or_new(ax, COLUMN + 0.5, 2.8)
        ends = np.array([min(x.min(), y.min()), max(x.max(), y.max())])
        line = (
            np.concatenate([-np.logspace(0, -8, 50), np.logspace(-8, 0, 50)]) * np.abs(ends).max()
        )
        line = line[(line >= ends[0]) & (line <= ends[1])]
        on.plot(line, line, color=SOFT, linewidth=0.7, linestyle=":", label="equal")
        for i, (kind, rows) in enumerate(both.groupby("kind", sort=False)):
            on.scatter(
                rows["aie_exact"], rows["aie_estimate"], s=7, alpha=0.6, color=CYCLE[i % len(CYCLE)],
                marker=MARKERS[i % len(MARKERS)], linewidths=0, label=str(kind),
            )  # fmt: skip
        _symmetric_log(on, np.abs(ends).max())
        ratio = f"\nsum of estimates / exact: {y.sum() / x.sum():.2g}" if x.sum() else ""
        words = f"ρ = {rho.value:.3f} [{rho.low:.3f}, {rho.high:.3f}]\n{len(both)} cells{ratio}"
        on.text(0.02, 0.98, words, transform=on.transAxes, va="top", fontsize=6, linespacing=1.3)
        unit = exact.about.get("unit") or "metric"
        on.set_xlabel("\n".join(textwrap.wrap(f"AIE, {method_words(exact.about)} ({unit})", 34)))
        on.set_ylabel(f"AIE, {method_words(estimate.about)}")
        return finish(
            figure, on, ax is None, title, facts(exact.about) if note is None else note, 4
        )


def _symmetric_log(ax: Axes, largest: float) -> None:
    """Make both axes logarithmic away from 0, with few ticks, lines at 0, and room for words on top."""
    limits = ax.get_xlim(), ax.get_ylim()
    threshold = 10.0 ** np.ceil(np.log10(SMALL * largest))
    decades = 10.0 ** np.arange(np.log10(threshold), np.floor(np.log10(largest)) + 1)
    ticks = np.concatenate([-decades[::-2], [0.0], decades[::-1][::2]])
    for axis, scale in ((ax.xaxis, ax.set_xscale), (ax.yaxis, ax.set_yscale)):
        scale("symlog", linthresh=threshold, linscale=0.5)
        axis.set_ticks(sorted(ticks), [f"{t:g}".replace("-", "−") for t in sorted(ticks)])
        axis.set_ticks([], minor=True)
    ax.axhline(0, color=FAINT, linewidth=0.5, zorder=0)
    ax.axvline(0, color=FAINT, linewidth=0.5, zorder=0)
    ax.set_xlim(min(limits[0][0], -threshold), limits[0][1] * 1.5)
    ax.set_ylim(min(limits[1][0], -threshold), largest * 100)
