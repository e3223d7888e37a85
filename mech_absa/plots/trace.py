"""Figures of a trace: where states carry the answer, averaged over pairs or in one prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..errors import ConfigError, DataError, choices
from ..records import About
from ..sites import HEAD_KINDS, Site
from .cells import (
    colour_bar,
    draw_cells,
    layers_of,
    mark_significant,
    matrix_of,
    outline_cells,
    place_column,
    places_of,
    significance_label,
    significant,
    symmetric_limit,
)
from .layout import headline, legend_below, new_figure
from .style import COLUMN, FAINT, INK, MISSING, PAGE, ROLE_STYLES, SOFT, save, style
from .words import (
    KIND_WORDS,
    corruption_words,
    direction_words,
    effect_label,
    facts,
    method_words,
    short,
    shown,
)

if TYPE_CHECKING:
    from ..patch.effects import Effects
    from ..patch.importance import ImportanceMap
    from ..patch.stored import StoredEffects

TITLE = "Where a state carries the answer: average indirect effect (AIE)"


def heatmap(
    importance: ImportanceMap,
    selection: Iterable[Site] | None = None,
    *,
    kinds: Sequence[str] | None = None,
    title: str = TITLE,
    value: str = "AIE",
    compress: bool = False,
) -> Figure:
    """Draw role (or token position) x layer, one panel per kind, all on one scale about 0.

    A dot marks cells that differ from 0 after correction, a frame the selected sites.

    Args:
        importance: kinds that have one state per layer are drawn; `heads` draws the others.
        selection: sites to frame.
        kinds: which, in this order; default all.
        title: of the figure.
        value: what a cell holds, for the colour scale.
        compress: colours follow the square root of the effect, for maps in which few cells outshine
            the others.

    Raises:
        ConfigError: the map lacks a kind that was asked for.
    """
    table = importance.table
    present = [k for k in table["kind"].unique() if k not in HEAD_KINDS]
    kinds = present if kinds is None else list(kinds)
    if not kinds or (unknown := [k for k in kinds if k not in present]):
        asked = unknown[0] if kinds else "none"
        raise ConfigError(
            f"a heat map of kind {asked!r} was asked for; "
            f"the map has {choices(present) if present else 'only heads'}"
        )
    table = table[table["kind"].isin(kinds)].assign(significant=lambda t: significant(t))
    by, rows, layers = place_column(table), places_of(table), layers_of(table)
    grids = {k: matrix_of(table[table["kind"] == k], by, rows, layers, "aie") for k in kinds}
    limit = symmetric_limit(grids.values())
    chosen = {(s.kind, s.at, s.layer) for s in selection or ()}
    width = PAGE if len(kinds) > 1 or len(layers) > 12 else COLUMN + 0.7
    height = 0.9 + 0.165 * max(len(rows), 5)
    with style():
        figure, axes = new_figure(width, height, ncols=len(kinds), sharey=True, squeeze=False)
        for ax, kind in zip(axes[0], kinds, strict=True):
            mesh = draw_cells(ax, grids[kind], layers, rows, limit, compress)
            marked = matrix_of(table[table["kind"] == kind], by, rows, layers, "significant") > 0
            mark_significant(ax, marked, grids[kind], limit)
            outline_cells(ax, np.array([[(kind, r, n) in chosen for n in layers] for r in rows]))
            _name_panel(ax, kind)
        axes[0, 0].set_ylabel("role of the token" if by == "role" else "token position")
        colour_bar(figure, mesh, list(axes[0]), effect_label(importance.about, value))
        keys = [_dot_key(table, importance.about)]
        if chosen:
            keys.append(Patch(fill=False, edgecolor=INK, linewidth=1.1, label="selected sites"))
        if any(np.isnan(g).any() for g in grids.values()):
            keys.append(Patch(facecolor=MISSING, edgecolor="none", label="not measured"))
        legend_below(figure, handles=keys, ncols=len(keys), handlelength=1.4, columnspacing=1.6)
        headline(figure, title, facts(importance.about))
    return figure


def _name_panel(ax: Axes, kind: str) -> None:
    ax.set_title(f"{kind}\n{KIND_WORDS.get(kind, '')}", fontsize=7.5, linespacing=1.3)
    ax.set_xlabel("layer")


def _dot_key(table: pd.DataFrame, about: About) -> Any:
    """Return the legend's entry of the dots."""
    label = significance_label(table, about.get("adjustment"), about.get("level") or 0.95)
    return Line2D(
        [], [], marker="o", color="none", markerfacecolor=INK, markeredgewidth=0, markersize=2.4, label=label
    )  # fmt: skip


# ---- curves -------------------------------------------------------------------------------------


def lines(
    importance: ImportanceMap,
    *,
    kinds: Sequence[str] | None = None,
    highlight: int | Sequence[str] = 5,
) -> Figure:
    """Draw the AIE over layers, one line per role with its interval, one panel per kind.

    Args:
        importance: by role; heads are left out.
        kinds: which, in this order; default all.
        highlight: the roles drawn in colour, or at most how many: those with the largest effects,
            and at least a twentieth of the largest. The others are thin and grey.

    Raises:
        ConfigError: the map is not by role, or has only heads.
    """
    table = importance.table
    if "role" not in table:
        raise ConfigError("lines are drawn by role; make the map with by='role'")
    kinds = list(kinds or [k for k in table["kind"].unique() if k not in HEAD_KINDS])
    table = table[table["kind"].isin(kinds)]
    if table.empty:
        raise ConfigError("the map has no kind with one state per layer; heads(map) draws heads")
    bright = _highlighted(table, highlight)
    width = PAGE if len(kinds) > 1 else COLUMN + 0.7
    with style():
        figure, axes = new_figure(width, 1.95, ncols=len(kinds), sharey=True, squeeze=False)
        for ax, kind in zip(axes[0], kinds, strict=True):
            _draw_lines(ax, table[table["kind"] == kind], bright)
            _name_panel(ax, kind)
        axes[0, 0].set_ylabel(effect_label(importance.about))
        keys = _line_keys(bright, len(bright) < table["role"].nunique(), importance.about)
        columns = len(keys) if len(kinds) > 1 else 3
        legend_below(figure, handles=keys, ncols=columns, handlelength=1.9, columnspacing=1.3)
        headline(figure, "Average indirect effect (AIE) over the layers", facts(importance.about))
    return figure


def _highlighted(table: pd.DataFrame, highlight: int | Sequence[str]) -> list[str]:
    """Return the roles drawn in colour, in reading order."""
    roles = places_of(table)
    if not isinstance(highlight, int):
        return [r for r in roles if r in set(highlight)]
    peak = _peaks(table, "role")
    peak = peak[peak > 0.05 * peak.max()].sort_values(ascending=False, kind="stable")
    return [r for r in roles if r in set(peak.index[:highlight])]


def _peaks(table: pd.DataFrame, by: str) -> pd.Series:
    """Return the largest absolute effect at every place, in reading order."""
    size = table.assign(size=table["aie"].abs())
    peaks: pd.Series = size.groupby(by, observed=True)["size"].max().reindex(places_of(table))
    return peaks


def _draw_lines(ax: Axes, table: pd.DataFrame, bright: Sequence[str]) -> None:
    """Draw the curves of one kind, the highlighted ones on top."""
    ax.axhline(0, color=SOFT, linewidth=0.6, zorder=1)
    marker = 2.2 if table["layer"].nunique() <= 24 else 0
    for role in [*(r for r in places_of(table) if r not in bright), *bright]:
        rows = table[table["role"] == role].sort_values("layer")
        x, y = rows["layer"].to_numpy(float), rows["aie"].to_numpy(float)
        if role not in bright:
            ax.plot(x, y, color=FAINT, linewidth=0.9, zorder=2)
            continue
        colour, dash = ROLE_STYLES.get(role, (INK, "-"))
        low, high = rows["ci_low"].to_numpy(float), rows["ci_high"].to_numpy(float)
        ax.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0, zorder=3)
        ax.plot(
            x, y, color=colour, linestyle=dash, marker="o", markersize=marker, zorder=4, label=role
        )
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.margins(x=0.02)


def _line_keys(bright: Sequence[str], others: bool, about: About) -> list[Any]:
    """Return the legend of the curves."""
    keys: list[Any] = []
    for role in bright:
        colour, dash = ROLE_STYLES.get(role, (INK, "-"))
        keys.append(Line2D([], [], color=colour, linestyle=dash, label=role))
    if others:
        keys.append(Line2D([], [], color=FAINT, linewidth=0.9, label="other roles"))
    label = f"{about.get('level') or 0.95:.0%} interval (bootstrap by sentence)"
    keys.append(Patch(facecolor=SOFT, alpha=0.25, linewidth=0, label=label))
    return keys


# ---- heads --------------------------------------------------------------------------------------


def heads(
    importance: ImportanceMap,
    *,
    kind: str | None = None,
    roles: Sequence[str] | int = 3,
    title: str | None = None,
    value: str = "AIE",
) -> Figure:
    """Draw head x layer, one panel per role, all on one scale about 0; a dot marks significant cells.

    Args:
        importance: with a kind that has heads.
        kind: which; default the first such.
        roles: which, or how many: those at which a head has the largest effect.
        title: of the figure.
        value: what a cell holds, for the colour scale.

    Raises:
        ConfigError: the map lacks the kind or the roles.
    """
    table = importance.table
    present = [k for k in table["kind"].unique() if k in HEAD_KINDS]
    if not present or kind not in (None, *present):
        raise ConfigError(
            f"heads of kind {kind or 'head'!r} were asked for; the map has {choices(table['kind'].unique())}"
        )
    kind = kind or present[0]
    table = table[table["kind"] == kind].assign(significant=lambda t: significant(t))
    by, places = place_column(table), _head_places(table, roles)
    table = table[table[by].isin(places)]
    layers, numbers = layers_of(table), sorted(table["head"].unique())

    def grid(place: Any, column: str) -> np.ndarray:
        return matrix_of(table[table[by] == place], "head", numbers, layers, column)

    limit = symmetric_limit(grid(p, "aie") for p in places)
    width = PAGE if len(places) > 1 else COLUMN + 0.7
    height = 0.85 + 0.15 * max(len(numbers), 6)
    with style():
        figure, axes = new_figure(width, height, ncols=len(places), sharey=True, squeeze=False)
        for ax, place in zip(axes[0], places, strict=True):
            values = grid(place, "aie")
            mesh = draw_cells(ax, values, layers, numbers, limit)
            mark_significant(ax, grid(place, "significant") > 0, values, limit)
            ax.set_title(f"at {place}", fontsize=7.5)
            ax.set_xlabel("layer")
        axes[0, 0].set_ylabel("head")
        colour_bar(figure, mesh, list(axes[0]), effect_label(importance.about, value))
        key = _dot_key(table, importance.about)
        legend_below(figure, handles=[key], handlelength=1.4)
        title = title or f"Which heads carry the answer: AIE of {KIND_WORDS[kind]}"
        headline(figure, title, facts(importance.about))
    return figure


def _head_places(table: pd.DataFrame, roles: Sequence[str] | int) -> list[Any]:
    """Return the places that get a panel, in reading order."""
    everywhere = places_of(table)
    if isinstance(roles, int):
        peaks = _peaks(table, place_column(table)).sort_values(ascending=False, kind="stable")
        wanted, asked = set(peaks.index[:roles]), str(roles)
    else:
        wanted, asked = set(roles), choices(roles)
    places = [r for r in everywhere if r in wanted]
    if not places:
        raise ConfigError(f"heads at {asked} were asked for; the map has {choices(everywhere)}")
    return places


# ---- one prompt ---------------------------------------------------------------------------------


def example_map(
    effects: Effects | StoredEffects, example_id: str | None = None, kind: str | None = None
) -> Figure:
    """Draw token x layer of one prompt, with its words on the axis.

    Args:
        effects: from a trace; by role, every token shows the effect of its role.
        example_id: default the pair with the largest total effect.
        kind: default the first that has one state per layer.

    Raises:
        DataError: the example or the kind was not traced.
    """
    pairs = effects.pairs.set_index("example_id")
    if example_id is None:
        total = (pairs["clean"] - pairs["corrupted"]).fillna(-np.inf)
        example_id = str(total.index[int(np.argmax(total.to_numpy()))])
    rows = effects.example(example_id)
    present = [k for k in rows["kind"].unique() if k not in HEAD_KINDS]
    kind = kind or (present[0] if present else None)
    rows = rows[rows["kind"] == kind]
    if rows.empty or kind in HEAD_KINDS:
        raise DataError(
            f"example {example_id!r} has no map of kind {kind!r}; "
            f"it was traced at {choices(effects.kinds)}"
        )
    meta = pairs.loc[example_id]
    tokens, roles, layers = list(meta["tokens"]), list(meta["roles"]), layers_of(rows)
    single = bool((rows["position"].fillna(-1) >= 0).any())
    index, names = ("position", range(len(tokens))) if single else ("role", roles)
    values = matrix_of(rows.rename(columns={"effect": "aie"}), index, list(names), layers, "aie")
    width = COLUMN + 0.7 if len(layers) <= 16 else PAGE * 0.75
    with style():
        figure, ax = new_figure(width, 0.6 + 0.135 * len(tokens))
        words = [short(shown(t), 18) for t in tokens]
        mesh = draw_cells(ax, values, layers, words, symmetric_limit([values]))
        _colour_words(ax, roles)
        ax.set_xlabel("layer")
        ax.set_ylabel("token (colour: role)")
        colour_bar(figure, mesh, [ax], effect_label(effects.about, "indirect effect"))
        keys = _role_keys(roles)
        legend_below(
            figure, handles=keys, ncols=len(keys), handlelength=0.6, columnspacing=1.0, handletextpad=0.3
        )  # fmt: skip
        title = f"One prompt, word by word ({short(str(meta['aspect']), 30)}: {meta['polarity']})"
        headline(figure, title, _example_facts(effects.about, example_id, str(kind), meta))
    return figure


def _colour_words(ax: Axes, roles: Sequence[str]) -> None:
    """Colour the words on the axis by their roles; those of aspect, question and opinion are bold."""
    for label, role in zip(ax.get_yticklabels(), roles, strict=True):
        label.set_color(SOFT if role == "template" else ROLE_STYLES.get(role, (INK, "-"))[0])
        bold = role.startswith(("aspect", "query", "opinion"))
        label.set_fontweight("bold" if bold else "normal")


def _role_keys(roles: Sequence[str]) -> list[Any]:
    """Return the legend of the words' colours."""
    named = ("before", "aspect.last", "opinion", "after", "query.last", "answer")
    look: dict[str, Any] = {"marker": "s", "color": "none", "markeredgewidth": 0, "markersize": 4}
    return [
        Line2D([], [], markerfacecolor=ROLE_STYLES[r][0], label=r.partition(".")[0], **look)
        for r in named
        if r in roles
    ]


def _example_facts(about: About, example_id: str, kind: str, meta: pd.Series) -> str:
    """Return the lines under the title of one prompt's map."""
    corrupted = "" if pd.isna(meta["corrupted"]) else f", corrupted {meta['corrupted']:.3g}"
    return "\n".join(
        (
            f"{example_id}, {kind} ({KIND_WORDS.get(kind, '')})",
            f"{about.get('metric') or 'metric'}: clean {meta['clean']:.3g}{corrupted}",
            f"model {about.get('model')}, {method_words(about)}",
            corruption_words(about),
            direction_words(about),
        )
    )


# ---- all of them --------------------------------------------------------------------------------


def save_trace_figures(
    importance: ImportanceMap,
    folder: str | Path,
    selection: Iterable[Site] | None = None,
    effects: Effects | StoredEffects | None = None,
) -> list[Path]:
    """Write the figures of a trace as PNG and PDF, and return their paths.

    `heatmap`, `lines`, `heads` if the map has heads, and `example` if effects are given.

    Args:
        importance: by role.
        folder: created if it is missing.
        selection: sites to frame on the heat map.
        effects: for the map of one prompt: the pair with the largest total effect.
    """
    folder, written = Path(folder), []
    kinds = list(importance.table["kind"].unique())
    whole = any(k not in HEAD_KINDS for k in kinds)
    if whole:
        written += save(heatmap(importance, selection), folder / "heatmap")
        if "role" in importance.table:
            written += save(lines(importance), folder / "lines")
    for kind in (k for k in kinds if k in HEAD_KINDS):
        name = "heads" if kind == "head" else f"heads-{kind}"
        written += save(heads(importance, kind=kind), folder / name)
    if effects is not None and whole:
        written += save(example_map(effects), folder / "example")
    return written
