"""Maps as coloured cells: the mesh, marks of significant cells, frames around chosen cells, the
colour bar.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ..sites import in_reading_order
from .style import DIVERGING, GRID, INK
from .words import CORRECTIONS

SIGNIFICANT = 0.05
"""Adjusted p below which a cell is marked."""


def symmetric_limit(values: Iterable[np.ndarray]) -> float:
    """Return the end of a scale that is symmetric about 0: the largest absolute value, or 1."""
    ends = [float(np.nanmax(np.abs(v))) for v in values if np.size(v) and not np.isnan(v).all()]
    return max(ends, default=0.0) or 1.0


def draw_cells(
    ax: Axes,
    values: Float[np.ndarray, "row column"],
    columns: Sequence[Any],
    rows: Sequence[Any],
    limit: float,
    compress: bool = False,
) -> Any:
    """Draw a matrix, row 0 on top, with a thin grid so that a cell of 0 is seen to exist.

    Args:
        ax: to draw on.
        values: NaN where there is no cell.
        columns, rows: names on the axes.
        limit: of the colours, to either side of 0.
        compress: colours follow the square root of the size, so that small cells are seen beside
            large ones.
    """
    line = 0.4 if len(columns) <= 16 else 0.2 if len(columns) <= 48 else 0
    norm = FuncNorm((_root, _square), -limit, limit) if compress else Normalize(-limit, limit)
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(values), cmap=DIVERGING, norm=norm, edgecolors=GRID, linewidth=line
    )  # fmt: skip
    ax.set_xlim(0, len(columns))
    ax.set_ylim(len(rows), 0)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, pad=2)
    step = max(1, math.ceil(len(columns) / 12))
    ax.set_xticks(np.arange(0, len(columns), step) + 0.5, [str(c) for c in columns[::step]])
    ax.set_yticks(np.arange(len(rows)) + 0.5, [str(r) for r in rows])
    return mesh


def _root(x: Any) -> Any:
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x: Any) -> Any:
    return np.sign(x) * np.square(x)


def mark_significant(
    ax: Axes,
    where: Bool[np.ndarray, "row column"],
    values: Float[np.ndarray, "row column"],
    limit: float,
) -> None:
    """Put a dot into every cell of a mask: dark on light cells, white on dark ones."""
    y, x = np.nonzero(where)
    if not len(x):
        return
    colours = np.where(np.abs(values[y, x]) > 0.6 * limit, "#ffffff", INK)
    size = 3.2 if where.shape[1] <= 24 else 1.6
    ax.scatter(x + 0.5, y + 0.5, s=size, c=colours, linewidths=0, zorder=3, gid="significant")


def outline_cells(ax: Axes, where: Bool[np.ndarray, "row column"]) -> None:
    """Draw a frame around every run of neighbouring cells in a row of a mask."""
    for y, row in enumerate(where):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
        for a, b in zip(edges[::2], edges[1::2], strict=True):
            frame = Rectangle(
                (a, y), b - a, 1, fill=False, edgecolor=INK, linewidth=1.3, zorder=4, clip_on=False, gid="selected"
            )  # fmt: skip
            ax.add_patch(frame)


def colour_bar(figure: Figure, mesh: Any, axes: Any, label: str) -> None:
    """Add the colour scale of a mesh beside its axes."""
    bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02, aspect=22)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, width=0.5)
    if isinstance(mesh.norm, FuncNorm):
        ticks = [0.0, *_root_ticks(float(mesh.norm.vmax or 1.0))]
        bar.set_ticks(ticks, labels=[f"{t:g}".replace("-", "−") for t in ticks])
        label = f"{label}\n(square-root colours)"
    else:
        bar.locator = MaxNLocator(5)
        bar.update_ticks()
    bar.set_label(label, fontsize=6.5)


def _root_ticks(limit: float) -> list[float]:
    """Return round values at about a 16th, a quarter and all of a limit, to either side of 0."""
    sizes = {float(f"{limit * share:.1g}") for share in (1 / 16, 1 / 4, 0.8)}
    return sorted({sign * size for size in sizes for sign in (-1, 1)})


# ---- tables of cells ----------------------------------------------------------------------------


def place_column(table: pd.DataFrame) -> str:
    """Return the column that says where a cell is: `role`, or `position` where there is no role."""
    return "role" if "role" in table else "position"


def places_of(table: pd.DataFrame) -> list[Any]:
    """Return the roles in reading order, or the positions in order."""
    by = place_column(table)
    present = table[by].unique()
    return in_reading_order(present) if by == "role" else sorted(present)


def layers_of(table: pd.DataFrame) -> list[int]:
    """Return the layers of a table in order."""
    return sorted(int(layer) for layer in table["layer"].unique())


def matrix_of(
    table: pd.DataFrame, index: str, rows: Sequence[Any], layers: Sequence[int], column: str
) -> Float[np.ndarray, "row layer"]:
    """Return a column of a table as a matrix, NaN where a cell is absent."""
    wide = table.pivot_table(index=index, columns="layer", values=column, aggfunc="mean")
    values: np.ndarray = wide.reindex(index=rows, columns=layers).to_numpy(dtype=float)
    return values


def significant(table: pd.DataFrame) -> pd.Series:
    """Return which cells differ from 0: adjusted p below 0.05, or intervals that leave 0 out
    without p-values.
    """
    if "p_adjusted" in table and table["p_adjusted"].notna().any():
        return table["p_adjusted"] < SIGNIFICANT
    return (table["ci_low"] > 0) | (table["ci_high"] < 0)


def significance_label(table: pd.DataFrame, adjustment: str | None, level: float) -> str:
    """Say what a dot means on the map of a table."""
    if "p_adjusted" in table and table["p_adjusted"].notna().any():
        name = CORRECTIONS.get(str(adjustment))
        corrected = f", {name}" if name else ""
        label = f"p < {SIGNIFICANT:g}{corrected}"
    else:
        label = f"{level:.0%} interval excludes 0"
    return label if significant(table).any() else f"{label}: no cell"
