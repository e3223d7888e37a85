"""Results -> figures that need no explanation.

Every figure says what was measured, in which unit, on which model, from how many examples, how runs were corrupted and in which direction
states were moved. Nothing here loads a model or imports torch: figures are made from tables, in a notebook, a command or years later.

    heatmap(map)  lines(map)  heads(map)          where: role x layer with intervals, curves over layers, head x layer
    example_map(effects, id)                      one prompt, word by word
    layer_ranges  position_bars                   accuracy against the edited layers and positions (Li et al. 2025, Figures 4 and 5)
    parameters  domains  differences  faithfulness  pruning  ranks  agreement
    effects_and_edits                             does tracing tell where to edit?

Functions that take a map of several panels make a figure; those of one panel draw on the `ax` they are given, or make a figure of their
own. Either way they return the figure, which shows itself in a notebook. `save` writes PNG and PDF, the same bytes for the same figure.

Colours: blue - white - red with the white at exactly 0 for signed effects, and the eight colours of Okabe and Ito for categories; both can
be told apart under the common colour blindnesses, and lines differ in dashes as well. A figure brings its own white ground, so that it
reads the same in a dark notebook. Styles hold inside this module only: importing it changes no rcParams.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator

from ..errors import ConfigError, DataError, choices
from ..records import atomic
from ..sites import HEAD_KINDS, ROLES, Site, parse_layers

if TYPE_CHECKING:
    from ..patch.effects import Effects
    from ..patch.importance import ImportanceMap

SEPARATOR = "  ·  "
COLUMN, PAGE = 3.3, 7.0
"""Widths in inches: one column of a paper, and two."""

INK, SOFT, FAINT, GRID, MISSING = "#1a1a1a", "#5f6368", "#d0d4da", "#e4e7eb", "#c9ccd1"
OKABE_ITO = {
    "blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "vermilion": "#D55E00", "purple": "#CC79A7", "sky": "#56B4E9",
    "yellow": "#F0E442", "black": "#000000",
}  # fmt: skip
CYCLE = tuple(
    OKABE_ITO[c] for c in ("blue", "vermilion", "green", "purple", "orange", "sky", "black")
)
MARKERS = "osD^vPX"

DIVERGING = LinearSegmentedColormap.from_list(
    "effect",
    [
        "#0a3b70",
        "#2f79b5",
        "#8ec1de",
        "#dfecf3",
        "#ffffff",
        "#fbe3d4",
        "#f0a582",
        "#c94741",
        "#6d0220",
    ],
).with_extremes(bad=MISSING)
"""Blue - white - red, white at the centre."""
SEQUENTIAL = LinearSegmentedColormap.from_list(
    "score", ["#f3f7fb", "#b9d3e8", "#6ba3cd", "#2166ac", "#0a3b70"]
).with_extremes(bad=MISSING)
"""Light to dark blue, for scores."""

STYLE: dict[str, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 7.5, "axes.titlesize": 8, "axes.labelsize": 7.5,
    "xtick.labelsize": 6.5, "ytick.labelsize": 6.5, "legend.fontsize": 6.5, "figure.titlesize": 9, "figure.facecolor": "white",
    "axes.facecolor": "white", "savefig.facecolor": "white", "savefig.edgecolor": "white", "savefig.transparent": False, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5,
    "ytick.major.size": 2.5, "xtick.minor.size": 1.5, "ytick.minor.size": 1.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "lines.linewidth": 1.3, "lines.markersize": 3.5, "legend.frameon": False, "hatch.linewidth": 0.5,
    "pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "mech_absa", "path.simplify": True, "text.usetex": False,
    "text.parse_math": False, "axes.prop_cycle": cycler(color=CYCLE), "axes.unicode_minus": True, "figure.dpi": 120,
    "axes.formatter.use_mathtext": False,
}  # fmt: skip

KIND_WORDS = {
    "resid_pre": "residual stream before the layer", "resid_mid": "residual stream between attention and MLP",
    "resid_post": "residual stream after the layer", "attn_out": "attention output", "mlp_out": "MLP output", "head": "attention head (z)",
    "q": "query", "k": "key", "v": "value",
}  # fmt: skip
SPAN_WORDS = {
    "all": "all tokens",
    "sentence": "the sentence",
    "aspect": "the aspect in the sentence",
    "query": "the aspect in the question",
}

ROLE_STYLES: dict[str, tuple[str, Any]] = {
    "template": (SOFT, ":"), "before": (OKABE_ITO["purple"], "-"), "aspect.first": (OKABE_ITO["orange"], ":"),
    "aspect.middle": (OKABE_ITO["orange"], "--"), "aspect.last": (OKABE_ITO["orange"], "-"), "opinion": (OKABE_ITO["vermilion"], "-"),
    "after": (OKABE_ITO["green"], "-"), "query.first": (OKABE_ITO["blue"], ":"), "query.middle": (OKABE_ITO["blue"], "--"),
    "query.last": (OKABE_ITO["blue"], "-"), "answer": (OKABE_ITO["black"], "-"),
}  # fmt: skip
"""Colour by what the tokens belong to, dashes by the place inside it; one look for a role in every figure."""


class Picture(Figure):
    """A figure that belongs to nobody but its holder: no window, no global state, shown by notebooks without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with style():
            self.savefig(buffer, format="png", dpi=160)
        return buffer.getvalue()


def style(**changes: Any) -> AbstractContextManager[None]:
    """The look of this module's figures, for the length of a `with` block."""
    look: Any = STYLE | changes
    return mpl.rc_context(look)


def save(figure: Figure, path: str | Path, *, dpi: int = 200) -> list[Path]:
    """`path` with the endings .png and .pdf; the PDF keeps text as text.

    The same figure gives the same bytes: no date, no random ids.
    """
    stem = Path(path)
    stem = stem.with_suffix("") if stem.suffix in (".png", ".pdf") else stem
    written = []
    with style():
        for ending, metadata in (
            (".png", {"Software": None}),
            (".pdf", {"CreationDate": None, "ModDate": None}),
        ):
            target = stem.parent / (stem.name + ending)
            with atomic(target) as temporary:
                figure.savefig(temporary, dpi=dpi, metadata=metadata)
            written.append(target)
    return written


# ---- words --------------------------------------------------------------------------------------------------------------------


def corruption_words(about: Mapping[str, Any]) -> str:
    """How corrupted runs were made: `Gaussian noise on all tokens, 3 sd, mean of 10 draws`."""
    name, settings = str(about.get("corruption", "")), about.get("corruption_settings") or {}
    if name == "GaussianNoise":
        span = SPAN_WORDS.get(str(settings.get("span", "all")), str(settings.get("span")))
        draws = int(settings.get("draws", 1))
        return f"Gaussian noise on {span}, {settings.get('scale', 0):g} sd, {'1 draw' if draws == 1 else f'mean of {draws} draws'}"
    if name == "MeanAblation":
        return f"states replaced by their mean over {'tokens of the same role' if settings.get('by', 'role') == 'role' else 'all tokens'}"
    return {
        "Counterfactual": "minimal edit of the text with another polarity",
        "ZeroAblation": "states replaced by zero",
        "Resample": "states replaced by those of another example",
    }.get(name, name or "unknown corruption")


def direction_words(about: Mapping[str, Any]) -> str:
    """What was put where, said aloud."""
    if str(about.get("corruption", "")) in ("MeanAblation", "ZeroAblation", "Resample"):
        return "noise: states of the clean run are replaced"
    return {
        "denoise": "denoise: clean states restored in the corrupted run",
        "noise": "noise: corrupted states put into the clean run",
    }.get(str(about.get("direction")), str(about.get("direction", "")))


def method_words(about: Mapping[str, Any]) -> str:
    """How effects were computed."""
    steps = about.get("steps")
    return {
        "exact": "exact",
        "atp": "estimate: attribution patching",
        "atpstar": "estimate: AtP*",
        "ig": f"estimate: integrated gradients{f', {steps} steps' if steps else ''}",
    }.get(str(about.get("method", "exact")), str(about.get("method")))


def facts(about: Mapping[str, Any], n: int | None = None) -> str:
    """One or two lines for under a title: model, n, corruption, direction, method."""
    n = about.get("n_pairs", about.get("kept")) if n is None else n
    window = int(about.get("window") or 1)
    parts = [
        f"model {about['model']}" if about.get("model") else "",
        f"n = {n} pairs" if n is not None else "",
        f"windows of {window} layers" if window > 1 else "",
        method_words(about),
    ]
    return (
        SEPARATOR.join(p for p in parts if p)
        + f"\n{corruption_words(about)}{SEPARATOR}{direction_words(about)}"
    )


def effect_label(about: Mapping[str, Any], average: bool = True) -> str:
    """The axis of an effect with its unit, in lines short enough for a panel."""
    unit = str(about.get("unit") or about.get("metric") or "metric")
    return "\n".join(textwrap.wrap(f"{'AIE' if average else 'indirect effect'} ({unit})", 26))


def shown(token: str) -> str:
    """A token as it can stand on an axis: line ends and tabs visible, a leading blank dropped."""
    text = token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "")
    return text.strip(" ▁Ġ") or "␣"


def short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


# ---- frames -------------------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float, **grid: Any) -> tuple[Picture, Any]:
    figure = Picture(figsize=(width, height), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.04, h_pad=0.04, wspace=0.03, hspace=0.03)
    return figure, figure.subplots(**grid)


def _single(ax: Axes | None, width: float = COLUMN, height: float = 2.5) -> tuple[Figure, Axes]:
    """The axes to draw on, and their figure."""
    if ax is not None:
        return ax.get_figure(root=True), ax  # type: ignore[return-value]
    return _figure(width, height)


def _packed(text: str, width: int) -> str:
    """Lines of at most `width` characters, broken between facts where that will do."""
    lines = []
    for line in text.split("\n"):
        packed = ""
        for piece in line.split(SEPARATOR):
            if packed and len(packed) + len(SEPARATOR) + len(piece) > width:
                lines.append(packed)
                packed = ""
            packed += SEPARATOR * bool(packed) + piece
        lines += textwrap.wrap(packed, width) if len(packed) > width else [packed]
    return "\n".join(lines)


def _headline(figure: Figure, title: str, below: str = "") -> None:
    """A bold title and plain facts under it, both left-aligned, in room added on top of the figure."""
    width, height = map(float, figure.get_size_inches())
    title = "\n".join(textwrap.wrap(title, int(width / 0.083)))
    below = _packed(below, int(width / 0.0505)) if below else ""
    above, under = title.count("\n") + 1, below.count("\n") + 1 if below else 0
    total = height + 0.05 + 0.165 * above + 0.135 * under
    figure.set_size_inches(width, total)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0, 0, 1, height / total))  # type: ignore[call-arg]
    look: dict[str, Any] = {"ha": "left", "va": "top"}
    figure.text(
        0.09 / width,
        1 - 0.06 / total,
        title,
        fontsize=9,
        fontweight="bold",
        color=INK,
        linespacing=1.25,
        **look,
    )
    if below:
        figure.text(
            0.09 / width,
            1 - (0.06 + 0.165 * above) / total,
            below,
            fontsize=6.5,
            color=SOFT,
            linespacing=1.35,
            **look,
        )


def _scale(values: Iterable[np.ndarray]) -> float:
    """The end of a scale that is symmetric about 0."""
    ends = [float(np.nanmax(np.abs(v))) for v in values if np.size(v) and not np.isnan(v).all()]
    return max(ends, default=0.0) or 1.0


def _mesh(
    ax: Axes, values: np.ndarray, columns: Sequence[Any], rows: Sequence[Any], limit: float
) -> Any:
    """A matrix, row 0 on top, with a thin grid between cells, so that a cell of 0 is seen to be there."""
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(values),
        cmap=DIVERGING,
        norm=Normalize(-limit, limit),
        edgecolors=GRID,
        linewidth=0.4 if len(columns) <= 16 else 0.2 if len(columns) <= 48 else 0,
    )
    ax.set_xlim(0, len(columns))
    ax.set_ylim(len(rows), 0)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, pad=2)
    step = max(1, math.ceil(len(columns) / 12))
    ax.set_xticks(np.arange(0, len(columns), step) + 0.5, [str(c) for c in columns[::step]])
    ax.set_yticks(np.arange(len(rows)) + 0.5, [str(r) for r in rows])
    return mesh


def _dots(ax: Axes, where: np.ndarray, size: float = 2.2) -> None:
    """A small dot in every cell of a mask."""
    y, x = np.nonzero(where)
    if len(x):
        ax.scatter(
            x + 0.5, y + 0.5, s=size, c=SOFT, alpha=0.75, linewidths=0, zorder=3, gid="uncertain"
        )


def _outline(ax: Axes, where: np.ndarray) -> None:
    """A frame around every run of neighbouring cells in a row of a mask."""
    for y, row in enumerate(where):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
        for a, b in zip(edges[::2], edges[1::2], strict=True):
            ax.add_patch(
                Rectangle(
                    (a, y),
                    b - a,
                    1,
                    fill=False,
                    edgecolor=INK,
                    linewidth=1.3,
                    zorder=4,
                    clip_on=False,
                    gid="selected",
                )
            )


def _bar(figure: Figure, mesh: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02, aspect=22)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, width=0.5)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    bar.set_label(label, fontsize=6.5)


# ---- where: averaged maps -----------------------------------------------------------------------------------------------------


def _by(table: pd.DataFrame) -> str:
    return "role" if "role" in table else "position"


def _grid(
    table: pd.DataFrame, rows: Sequence[Any], layers: Sequence[int], column: str
) -> np.ndarray:
    wide = table.pivot_table(index=_by(table), columns="layer", values=column, aggfunc="mean")
    return wide.reindex(index=rows, columns=layers).to_numpy(dtype=float)


def _rows_of(table: pd.DataFrame) -> list[Any]:
    by = _by(table)
    present = set(table[by])
    return [r for r in ROLES if r in present] if by == "role" else sorted(present)


def uncertain(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Cells whose interval covers 0."""
    with np.errstate(invalid="ignore"):
        return (low <= 0) & (high >= 0)


def heatmap(
    importance: ImportanceMap,
    selection: Iterable[Site] | None = None,
    *,
    kinds: Sequence[str] | None = None,
) -> Figure:
    """Role (or token position) x layer, one panel a kind, all on one scale about 0.

    Args:
        importance: kinds that have one state a layer are drawn; heads have their own figure.
        selection: chosen sites, framed.
        kinds: which, in this order; default all.

    Returns:
        a figure in which a dot marks cells whose interval covers 0, and a frame the chosen sites.
    """
    table = importance.table
    present = [k for k in table["kind"].unique() if k not in HEAD_KINDS]
    kinds = present if kinds is None else list(kinds)
    if not kinds or (unknown := [k for k in kinds if k not in present]):
        asked = unknown[0] if kinds else "none"
        raise ConfigError(
            f"a heat map of kind {asked!r} was asked for; the map has {choices(present) if present else 'only heads'}"
        )
    table = table[table["kind"].isin(kinds)]
    rows, layers = _rows_of(table), sorted(int(layer) for layer in table["layer"].unique())
    grids = {k: _grid(table[table["kind"] == k], rows, layers, "aie") for k in kinds}
    limit = _scale(grids.values())
    chosen = list(selection) if selection is not None else []
    n = len(kinds)
    width = PAGE if n > 1 or len(layers) > 12 else COLUMN + 0.7
    with style():
        figure, axes = _figure(
            width, 0.9 + 0.165 * max(len(rows), 5), ncols=n, sharey=True, squeeze=False
        )
        for ax, kind in zip(axes[0], kinds, strict=True):
            cells = table[table["kind"] == kind]
            mesh = _mesh(ax, grids[kind], layers, rows, limit)
            _dots(
                ax,
                uncertain(
                    _grid(cells, rows, layers, "ci_low"), _grid(cells, rows, layers, "ci_high")
                ),
                2.2 if len(layers) <= 24 else 1.2,
            )
            _outline(
                ax,
                np.array(
                    [
                        [
                            any(s.kind == kind and s.layer == j and s.at == r for s in chosen)
                            for j in layers
                        ]
                        for r in rows
                    ]
                ),
            )
            ax.set_title(f"{kind}\n{KIND_WORDS.get(kind, '')}", fontsize=7.5, linespacing=1.3)
            ax.set_xlabel("layer")
        axes[0, 0].set_ylabel("role of the token" if _by(table) == "role" else "token position")
        _bar(figure, mesh, list(axes[0]), effect_label(importance.about))
        level = importance.about.get("level", 0.95)
        keys: list[Any] = [
            Line2D(
                [],
                [],
                marker="o",
                color="none",
                markerfacecolor=SOFT,
                markeredgewidth=0,
                markersize=2.2,
                label=f"{level:.0%} interval covers 0",
            )
        ]
        if chosen:
            keys.append(Patch(fill=False, edgecolor=INK, linewidth=1.1, label="selected sites"))
        if any(np.isnan(g).any() for g in grids.values()):
            keys.append(Patch(facecolor=MISSING, edgecolor="none", label="not measured"))
        figure.legend(
            handles=keys,
            loc="outside lower left",
            ncols=len(keys),
            handlelength=1.4,
            columnspacing=1.6,
            borderaxespad=0.3,
        )
        _headline(
            figure,
            "Where a state carries the answer: average indirect effect (AIE)",
            facts(importance.about),
        )
    return figure


def lines(
    importance: ImportanceMap,
    *,
    kinds: Sequence[str] | None = None,
    highlight: int | Sequence[str] = 5,
) -> Figure:
    """AIE over layers, one line a role with its interval, one panel a kind.

    Args:
        importance: by role; heads are left out.
        kinds: which, in this order; default all.
        highlight: the roles drawn in colour, or at most how many (those with the largest effects, and no less than a twentieth of the
            largest); the others are thin and grey.
    """
    table = importance.table
    if "role" not in table:
        raise ConfigError("lines are drawn by role; make the map with by='role'")
    kinds = list(kinds or [k for k in table["kind"].unique() if k not in HEAD_KINDS])
    table = table[table["kind"].isin(kinds)]
    if table.empty:
        raise ConfigError("the map has no kind with one state a layer; heads(map) draws heads")
    roles, layers = _rows_of(table), sorted(int(layer) for layer in table["layer"].unique())
    if isinstance(highlight, int):
        peak = (
            table.assign(size=table["aie"].abs())
            .groupby("role", observed=True)["size"]
            .max()
            .reindex(roles)
        )
        peak = peak[peak > 0.05 * peak.max()].sort_values(ascending=False, kind="stable")
        bright = [r for r in roles if r in set(peak.index[:highlight])]
    else:
        bright = [r for r in roles if r in set(highlight)]
    with style():
        figure, axes = _figure(
            PAGE if len(kinds) > 1 else COLUMN + 0.7,
            1.95,
            ncols=len(kinds),
            sharey=True,
            squeeze=False,
        )
        for ax, kind in zip(axes[0], kinds, strict=True):
            ax.axhline(0, color=SOFT, linewidth=0.6, zorder=1)
            for role in [*(r for r in roles if r not in bright), *bright]:
                rows = table[(table["kind"] == kind) & (table["role"] == role)].sort_values("layer")
                x, y = rows["layer"].to_numpy(float), rows["aie"].to_numpy(float)
                if role not in bright:
                    ax.plot(x, y, color=FAINT, linewidth=0.9, zorder=2)
                    continue
                colour, dash = ROLE_STYLES.get(role, (INK, "-"))
                ax.fill_between(
                    x,
                    rows["ci_low"].to_numpy(float),
                    rows["ci_high"].to_numpy(float),
                    color=colour,
                    alpha=0.16,
                    linewidth=0,
                    zorder=3,
                )
                ax.plot(
                    x,
                    y,
                    color=colour,
                    linestyle=dash,
                    marker="o",
                    markersize=2.2 if len(layers) <= 24 else 0,
                    zorder=4,
                    label=role,
                )
            ax.set_title(f"{kind}\n{KIND_WORDS.get(kind, '')}", fontsize=7.5, linespacing=1.3)
            ax.set_xlabel("layer")
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            ax.margins(x=0.02)
        axes[0, 0].set_ylabel(effect_label(importance.about))
        keys: list[Any] = [
            Line2D(
                [],
                [],
                color=ROLE_STYLES.get(r, (INK, "-"))[0],
                linestyle=ROLE_STYLES.get(r, (INK, "-"))[1],
                label=r,
            )
            for r in bright
        ]
        if len(bright) < len(roles):
            keys.append(Line2D([], [], color=FAINT, linewidth=0.9, label="other roles"))
        keys.append(
            Patch(
                facecolor=SOFT,
                alpha=0.25,
                linewidth=0,
                label=f"{importance.about.get('level', 0.95):.0%} interval (bootstrap by sentence)",
            )
        )
        columns = len(keys) if len(kinds) > 1 else 3
        figure.legend(
            handles=keys,
            loc="outside lower left",
            ncols=columns,
            handlelength=1.9,
            columnspacing=1.3,
            borderaxespad=0.3,
        )
        _headline(figure, "Average indirect effect (AIE) over the layers", facts(importance.about))
    return figure


def heads(
    importance: ImportanceMap, *, kind: str | None = None, roles: Sequence[str] | int = 3
) -> Figure:
    """Head x layer, one panel a role, all on one scale about 0.

    Args:
        importance: with a kind that has heads.
        kind: which; default the first such.
        roles: which, or how many: those at which a head has the largest effect.
    """
    table = importance.table
    present = [k for k in table["kind"].unique() if k in HEAD_KINDS]
    if not present or kind not in (None, *present):
        raise ConfigError(
            f"heads of kind {kind or 'head'!r} were asked for; the map has {choices(table['kind'].unique())}"
        )
    kind = kind or present[0]
    table = table[table["kind"] == kind]
    by, everywhere = _by(table), _rows_of(table)
    if isinstance(roles, int):
        peak = (
            table.assign(size=table["aie"].abs())
            .groupby(by, observed=True)["size"]
            .max()
            .reindex(everywhere)
        )
        best = set(peak.sort_values(ascending=False, kind="stable").index[:roles])
        places: list[Any] = [r for r in everywhere if r in best]
    else:
        places = [r for r in everywhere if r in set(roles)]
    if not places:
        raise ConfigError(
            f"heads at {choices(roles) if not isinstance(roles, int) else roles} were asked for; the map has {choices(everywhere)}"
        )
    table = table[table[by].isin(places)]
    layers, numbers = (
        sorted(int(layer) for layer in table["layer"].unique()),
        sorted(table["head"].unique()),
    )

    def grid(place: Any, column: str) -> np.ndarray:
        wide = table[table[by] == place].pivot_table(
            index="head", columns="layer", values=column, aggfunc="mean"
        )
        return wide.reindex(index=numbers, columns=layers).to_numpy(dtype=float)

    limit = _scale(grid(p, "aie") for p in places)
    with style():
        figure, axes = _figure(
            PAGE if len(places) > 1 else COLUMN + 0.7,
            0.85 + 0.15 * max(len(numbers), 6),
            ncols=len(places),
            sharey=True,
            squeeze=False,
        )
        for ax, place in zip(axes[0], places, strict=True):
            mesh = _mesh(ax, grid(place, "aie"), layers, numbers, limit)
            _dots(
                ax,
                uncertain(grid(place, "ci_low"), grid(place, "ci_high")),
                2.2 if len(layers) <= 24 else 1.2,
            )
            ax.set_title(f"at {place}", fontsize=7.5)
            ax.set_xlabel("layer")
        axes[0, 0].set_ylabel("head")
        _bar(figure, mesh, list(axes[0]), effect_label(importance.about))
        dot = Line2D(
            [],
            [],
            marker="o",
            color="none",
            markerfacecolor=SOFT,
            markeredgewidth=0,
            markersize=2.2,
        )
        dot.set_label(f"{importance.about.get('level', 0.95):.0%} interval covers 0")
        figure.legend(handles=[dot], loc="outside lower left", handlelength=1.4, borderaxespad=0.3)
        _headline(
            figure,
            f"Which heads carry the answer: AIE of {KIND_WORDS[kind]}",
            facts(importance.about),
        )
    return figure


def save_trace_figures(
    importance: ImportanceMap,
    folder: str | Path,
    selection: Iterable[Site] | None = None,
    effects: Effects | None = None,
) -> list[Path]:
    """The figures of a trace as PNG and PDF: `heatmap`, `lines`, `heads` where the map has heads, `example` where effects are given.

    Args:
        importance: by role.
        folder: made where it is missing.
        selection: chosen sites, framed on the heat map.
        effects: for one prompt, word by word: the pair whose corruption took the most away.

    Returns:
        what was written.
    """
    folder, written = Path(folder), []
    found = list(importance.table["kind"].unique())
    if any(k not in HEAD_KINDS for k in found):
        written += save(heatmap(importance, selection), folder / "heatmap")
        if "role" in importance.table:
            written += save(lines(importance), folder / "lines")
    for kind in (k for k in found if k in HEAD_KINDS):
        written += save(
            heads(importance, kind=kind), folder / ("heads" if kind == "head" else f"heads-{kind}")
        )
    if effects is not None and any(k not in HEAD_KINDS for k in found):
        written += save(example_map(effects), folder / "example")
    return written


# ---- where: one example -------------------------------------------------------------------------------------------------------


def example_map(effects: Effects, example_id: str | None = None, kind: str | None = None) -> Figure:
    """Token x layer of one prompt, its words on the axis.

    Args:
        effects: from a trace; by role, every token shows the effect of its role.
        example_id: default the pair with the largest total effect.
        kind: default the first that has one state a layer.
    """
    pairs = effects.pairs.set_index("example_id")
    if example_id is None:
        gap = (pairs["clean"] - pairs["corrupted"]).fillna(-np.inf)
        example_id = str(gap.index[int(np.argmax(gap.to_numpy()))])
    rows = effects.example(example_id)
    present = [k for k in rows["kind"].unique() if k not in HEAD_KINDS]
    kind = kind or (present[0] if present else None)
    rows = rows[rows["kind"] == kind]
    if rows.empty or kind in HEAD_KINDS:
        raise DataError(
            f"example {example_id!r} has no map of kind {kind!r}; it was traced at {choices(effects.frame['kind'].unique())}"
        )
    meta = pairs.loc[example_id]
    tokens, roles = list(meta["tokens"]), list(meta["roles"])
    layers = sorted(rows["layer"].unique())
    single = bool((rows["position"] >= 0).any())
    wide = rows.pivot_table(
        index="position" if single else "role",
        columns="layer",
        values="effect",
        aggfunc="mean",
        observed=True,
    )
    values = wide.reindex(index=range(len(tokens)) if single else roles, columns=layers).to_numpy(
        dtype=float
    )
    with style():
        width = COLUMN + 0.7 if len(layers) <= 16 else PAGE * 0.75
        figure, ax = _figure(width, 0.6 + 0.135 * len(tokens))
        mesh = _mesh(ax, values, layers, [short(shown(t), 18) for t in tokens], _scale([values]))
        for label, role in zip(ax.get_yticklabels(), roles, strict=True):
            colour = ROLE_STYLES.get(role, (INK, "-"))[0]
            label.set_color(SOFT if role == "template" else colour)
            label.set_fontweight(
                "bold" if role.startswith(("aspect", "query", "opinion")) else "normal"
            )
        ax.set_xlabel("layer")
        ax.set_ylabel("token (colour: role)")
        _bar(figure, mesh, [ax], effect_label(effects.about, average=False))
        seen = [
            r
            for r in ("before", "aspect.last", "opinion", "after", "query.last", "answer")
            if r in roles
        ]
        keys = [
            Line2D(
                [],
                [],
                marker="s",
                color="none",
                markeredgewidth=0,
                markersize=4,
                markerfacecolor=ROLE_STYLES[r][0],
                label=r.partition(".")[0],
            )
            for r in seen
        ]
        figure.legend(
            handles=keys,
            loc="outside lower left",
            ncols=len(keys),
            handlelength=0.6,
            columnspacing=1.0,
            handletextpad=0.3,
            borderaxespad=0.3,
        )
        ask = f"{short(str(meta['aspect']), 30)}: {meta['polarity']}"
        gone = "" if pd.isna(meta["corrupted"]) else f", corrupted {meta['corrupted']:.3g}"
        below = f"{example_id}, {kind} ({KIND_WORDS.get(str(kind), '')})\n{effects.about.get('metric', 'metric')}: clean {meta['clean']:.3g}{gone}\n"
        _headline(
            figure,
            f"One prompt, word by word ({ask})",
            below
            + f"model {effects.about.get('model')}, {method_words(effects.about)}\n{corruption_words(effects.about)}\n{direction_words(effects.about)}",
        )
    return figure


# ---- how good: curves over a choice -------------------------------------------------------------------------------------------


def _need(table: pd.DataFrame, *columns: str) -> None:
    if missing := [c for c in columns if c not in table]:
        raise ConfigError(
            f"the table for this figure has no column {missing[0]!r}; it needs {', '.join(columns)} and has {', '.join(map(str, table.columns))}"
        )
    if table.empty:
        raise ConfigError("the table for this figure has no rows")


def _groups(table: pd.DataFrame, column: str) -> list[tuple[str, pd.DataFrame]]:
    """The rows of every value of a column, in the order they first appear; one unnamed group where there is no such column."""
    return (
        [(str(k), g) for k, g in table.groupby(column, sort=False)]
        if column in table
        else [("", table)]
    )


def _ends(rows: pd.DataFrame, value: str) -> np.ndarray | None:
    """Distances from a value down and up to its interval `[2 row]`; None where the table has no interval."""
    low, high = f"{value}_low", f"{value}_high"
    if low not in rows or high not in rows:
        return None
    y = rows[value].to_numpy(float)
    return np.nan_to_num(
        np.clip(np.stack([y - rows[low].to_numpy(float), rows[high].to_numpy(float) - y]), 0, None)
    )


def _curve(
    ax: Axes,
    x: np.ndarray,
    rows: pd.DataFrame,
    value: str,
    i: int,
    label: str,
    factor: float = 1.0,
    band: bool = False,
    breaks: Sequence[int] = (),
) -> None:
    """A line with its interval, interrupted before the points `breaks`."""
    y, ends = rows[value].to_numpy(float) * factor, _ends(rows, value)
    look: dict[str, Any] = {
        "color": CYCLE[i % len(CYCLE)],
        "label": label or None,
        "marker": MARKERS[i % len(MARKERS)],
    }
    if ends is not None and band:
        ax.fill_between(
            x,
            y - ends[0] * factor,
            y + ends[1] * factor,
            color=look["color"],
            alpha=0.16,
            linewidth=0,
        )
    elif ends is not None:
        ax.errorbar(
            x,
            y,
            yerr=ends * factor,
            fmt="none",
            ecolor=look["color"],
            elinewidth=0.8,
            capsize=1.5,
            alpha=0.8,
        )
    ax.plot(
        np.insert(x, breaks, np.nan),
        np.insert(y, breaks, np.nan),
        linestyle=("-", "--", "-.", ":")[i // len(CYCLE) % 4],
        **look,
    )


def _finish(figure: Figure, ax: Axes, own: bool, title: str, note: str, ncols: int = 3) -> Figure:
    """A legend where lines have names; a headline on a figure of its own, a plain title on borrowed axes."""
    names = ax.get_legend_handles_labels()[1]
    if own:
        if names:
            figure.legend(
                loc="outside lower left",
                ncols=min(ncols, len(names)),
                borderaxespad=0.3,
                columnspacing=1.2,
                handlelength=1.8,
            )
        _headline(figure, title, note)
    else:
        ax.set_title(title)
        if names:
            ax.legend(ncols=1)
    return figure


def layer_ranges(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    metric: str = "accuracy",
    title: str = "Which layers to edit",
    note: str = "",
) -> Figure:
    """Score against the edited range of layers, a line a data set or method (Li et al. 2025, Figure 4).

    The line is interrupted where the number of layers changes: what lies on its two sides is not a neighbour.

    Args:
        table: columns `layers` (such as `10-15`, in the order of the axis) and `accuracy` (0 to 1); optional `accuracy_low`,
            `accuracy_high`, and `data` or `method` to tell lines apart.
        metric: the column drawn.
        note: for under the title: model, n, what the interval is.
    """
    _need(table, "layers", metric)
    with style():
        figure, on = _single(ax, COLUMN + 0.5, 2.2)
        names = [str(x) for x in dict.fromkeys(table["layers"])]
        for i, (name, rows) in enumerate(_groups(table, "data" if "data" in table else "method")):
            widths = [
                len(parse_layers(str(x), 10**6)) if re.fullmatch(r"[\d,-]+", str(x)) else str(x)
                for x in rows["layers"]
            ]
            breaks = [j for j in range(1, len(widths)) if widths[j] != widths[j - 1]]
            _curve(
                on,
                np.array([names.index(str(x)) for x in rows["layers"]], float),
                rows,
                metric,
                i,
                name,
                100.0,
                breaks=breaks,
            )
        on.set_xticks(range(len(names)), names, rotation=30 if len(names) > 6 else 0)
        on.set_xlabel("edited layers")
        on.set_ylabel(f"{metric.replace('_', ' ')} (%)")
        return _finish(figure, on, ax is None, title, note)


def position_bars(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    metric: str = "accuracy",
    title: str = "Which token to edit",
    note: str = "",
) -> Figure:
    """Score by the position that is edited, a group of bars a data set (Li et al. 2025, Figure 5).

    Args:
        table: columns `position` and `accuracy` (0 to 1); optional `accuracy_low`, `accuracy_high`, `data`.
        metric: the column drawn. The axis is cut off below the lowest bar and says so.
    """
    _need(table, "position", metric)
    with style():
        figure, on = _single(ax, COLUMN + 0.5, 2.2)
        groups = _groups(table, "data")
        names = [str(x) for x in dict.fromkeys(table["position"])]
        width = 0.8 / len(names)
        lowest = 100 * float(
            np.nanmin(table[f"{metric}_low"] if f"{metric}_low" in table else table[metric])
        )
        floor = max(0.0, 10 * math.floor((lowest - 5) / 10))
        for j, name in enumerate(names):
            rows = pd.concat(
                [
                    g[g["position"].astype(str) == name].head(1).assign(_x=i)
                    for i, (_, g) in enumerate(groups)
                ]
            )
            y, ends = 100 * rows[metric].to_numpy(float), _ends(rows, metric)
            x = rows["_x"].to_numpy(float) + (j - (len(names) - 1) / 2) * width
            on.bar(
                x, y - floor, width * 0.94, bottom=floor, color=CYCLE[j % len(CYCLE)], label=name, edgecolor="white", linewidth=0.3,
                yerr=None if ends is None else 100 * ends, error_kw={"elinewidth": 0.8, "capsize": 1.5, "ecolor": INK},
            )  # fmt: skip
        on.set_xticks(range(len(groups)), [name for name, _ in groups])
        on.set_ylabel(f"{metric.replace('_', ' ')} (%)" + (f", from {floor:.0f}" if floor else ""))
        return _finish(figure, on, ax is None, title, note)


def parameters(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    metric: str = "accuracy",
    title: str = "Accuracy against trainable parameters",
    note: str = "",
) -> Figure:
    """Score against trainable parameters on a logarithmic axis: every seed a faint point, the mean of a method a marker with its spread.

    Names stand beside the markers; of more than six methods they stand below, where they cannot cover one another.

    Args:
        table: columns `method`, `parameters` and `accuracy` (0 to 1), one row a seed.
        metric: the column drawn.
    """
    _need(table, "method", "parameters", metric)
    with style():
        figure, on = _single(ax, COLUMN + 0.5, 2.4)
        points, groups = [], _groups(table, "method")
        for i, (name, rows) in enumerate(groups):
            x, y = float(rows["parameters"].mean()), 100 * rows[metric].to_numpy(float)
            colour, marker = CYCLE[i % len(CYCLE)], MARKERS[i // len(CYCLE) % len(MARKERS)]
            on.scatter(rows["parameters"], y, s=6, color=colour, alpha=0.35, linewidths=0)
            spread = float(np.std(y, ddof=1)) if len(y) > 1 else None
            on.errorbar(
                [x],
                [y.mean()],
                yerr=None if spread is None else [spread],
                fmt=marker,
                color=colour,
                markersize=5,
                elinewidth=0.9,
                capsize=2,
                label=name if len(groups) > 6 else None,
            )
            points.append((x, float(y.mean()), name, colour))
        on.set_xscale("log")
        on.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k, 1M
        on.margins(x=0.12, y=0.12)
        if len(groups) <= 6:
            _label_points(on, points)
        on.set_xlabel("trainable parameters")
        on.set_ylabel(f"{metric.replace('_', ' ')} (%)")
        seeds = table.groupby("method")[metric].size().max()
        return _finish(
            figure,
            on,
            ax is None,
            title,
            "\n".join(
                x
                for x in (
                    note,
                    "bars: sd over seeds; faint points: single seeds" if seeds > 1 else "",
                )
                if x
            ),
        )


def _label_points(ax: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside points, pushed up where they would stand on one another."""
    low, high = ax.get_ylim()
    gap = 0.06 * (high - low)
    taken: list[tuple[float, float]] = []
    for x, y, name, colour in sorted(points, key=lambda p: p[1]):
        at = y
        for other_x, other in taken:
            if abs(math.log10(x / other_x)) < 1.2 and at < other + gap:
                at = other + gap
        taken.append((x, at))
        ax.text(x * 1.12, at, name, fontsize=6, color=colour, va="center", clip_on=False)


def domains(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    metric: str = "accuracy",
    title: str = "Trained here, tested there",
    note: str = "",
) -> Figure:
    """Score for every pair of training and test domain, the number in its cell; in-domain cells are framed.

    Args:
        table: columns `train`, `test` and `accuracy` (0 to 1).
        metric: the column drawn; several rows of one pair are averaged.
    """
    _need(table, "train", "test", metric)
    with style():
        rows, tested = list(dict.fromkeys(table["train"])), list(dict.fromkeys(table["test"]))
        columns = [r for r in rows if r in tested] + [c for c in tested if c not in rows]
        figure, on = _single(ax, COLUMN + 0.2, 0.7 + 0.42 * len(rows))
        values = 100 * table.pivot_table(
            index="train", columns="test", values=metric, aggfunc="mean"
        ).reindex(index=rows, columns=columns).to_numpy(float)
        mesh = on.pcolormesh(
            np.ma.masked_invalid(values), cmap=SEQUENTIAL, edgecolors="white", linewidth=1
        )
        on.set_ylim(len(rows), 0)
        on.spines[:].set_visible(False)
        on.tick_params(length=0)
        on.set_xticks(np.arange(len(columns)) + 0.5, [str(c) for c in columns])
        on.set_yticks(np.arange(len(rows)) + 0.5, [str(r) for r in rows])
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for i, j in np.ndindex(values.shape):
            text = "–" if np.isnan(values[i, j]) else f"{values[i, j]:.1f}"
            on.text(
                j + 0.5,
                i + 0.5,
                text,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if values[i, j] > middle else INK,
            )
        _outline(on, np.array([[r == c for c in columns] for r in rows]))
        on.set_xlabel("tested on")
        on.set_ylabel("trained on")
        _bar(figure, mesh, [on], f"{metric.replace('_', ' ')} (%)")
        return _finish(figure, on, ax is None, title, note)


def differences(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    unit: str = "points of accuracy",
    title: str = "Difference to the reference",
    note: str = "",
) -> Figure:
    """Paired differences with their intervals, a row each, about a line at 0.

    Args:
        table: columns `name`, `difference`, `low`, `high` (0 to 1, drawn in points); optional `p`. Rows with a p of 0.05 or more are hollow.
        unit: for the axis.
    """
    _need(table, "name", "difference", "low", "high")
    with style():
        figure, on = _single(ax, COLUMN + 0.9, 0.6 + 0.17 * max(len(table), 4))
        on.axvline(0, color=SOFT, linewidth=0.7)
        y = np.arange(len(table))
        x = 100 * table["difference"].to_numpy(float)
        ends = np.clip(
            np.stack(
                [x - 100 * table["low"].to_numpy(float), 100 * table["high"].to_numpy(float) - x]
            ),
            0,
            None,
        )
        on.errorbar(x, y, xerr=ends, fmt="none", ecolor=CYCLE[0], elinewidth=1.0, capsize=2)
        clear = (table["p"] < 0.05).to_numpy() if "p" in table else np.ones(len(table), bool)
        for mask, fill, label in ((clear, CYCLE[0], "p < 0.05"), (~clear, "white", "p ≥ 0.05")):
            on.scatter(
                x[mask],
                y[mask],
                s=16,
                facecolor=fill,
                edgecolor=CYCLE[0],
                linewidth=0.9,
                zorder=3,
                label=label if "p" in table else None,
            )
        on.set_yticks(y, [str(n) for n in table["name"]])
        on.set_ylim(len(table) - 0.5, -0.5)
        on.set_xlabel(unit)
        return _finish(figure, on, ax is None, title, note)


def effects_and_edits(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    metric: str = "accuracy",
    title: str = "Does tracing tell where to edit?",
    note: str = "",
) -> Figure:
    """Score of an edit against what tracing said of the place it edits, a colour a method, with Spearman's rho and its interval.

    The claim of Hase et al. 2023 (arXiv 2301.04213) is that the two have little to do with one another.

    Args:
        table: columns `aie` and `accuracy` (0 to 1), one row a place; optional `method`, `accuracy_low`, `accuracy_high`, and `size` (how
            many layers the place has), which is told by the marker. A method of fewer than 3 places gets no rho.
        metric: the column drawn.
    """
    from ..stats import spearman_interval

    _need(table, "aie", metric)
    with style():
        figure, on = _single(ax, COLUMN + 0.5, 2.9)
        sizes = sorted(table["size"].unique()) if "size" in table else []
        for i, (name, rows) in enumerate(_groups(table, "method")):
            colour, x, y, ends = (
                CYCLE[i % len(CYCLE)],
                rows["aie"].to_numpy(float),
                100 * rows[metric].to_numpy(float),
                _ends(rows, metric),
            )
            label = name
            if len(rows) > 2:
                rho = spearman_interval(x, y)
                label = f"{name}  ρ = {rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]".strip()
            if ends is not None:
                on.errorbar(
                    x, y, yerr=100 * ends, fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.6
                )
            markers = (
                rows["size"].map({n: MARKERS[j % len(MARKERS)] for j, n in enumerate(sizes)})
                if sizes
                else pd.Series("o", rows.index)
            )
            for marker in markers.unique():
                on.scatter(
                    x[markers == marker],
                    y[markers == marker],
                    s=14,
                    color=colour,
                    marker=marker,
                    linewidths=0,
                    alpha=0.9,
                )
            on.plot([], [], color=colour, marker="o", linestyle="", label=label)
        if len(sizes) > 1:
            for j, n in enumerate(sizes):
                on.plot(
                    [],
                    [],
                    color=SOFT,
                    marker=MARKERS[j % len(MARKERS)],
                    linestyle="",
                    label="1 layer" if n == 1 else f"{n} layers",
                )
        on.set_xlabel("AIE of the place")
        on.set_ylabel(f"{metric.replace('_', ' ')} (%)\nof editing it")
        return _finish(figure, on, ax is None, title, note, 1)


# ---- how true: checks of the method -------------------------------------------------------------------------------------------


def faithfulness(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    title: str = "Faithfulness of the ranking",
    note: str = "",
) -> Figure:
    """Share of the model's behaviour that a circuit of the best-ranked components keeps, against its size; a line a ranking.

    Args:
        table: columns `share` (of components kept, 0 to 1) and `faithfulness`; optional `faithfulness_low`, `faithfulness_high`, `method`.
    """
    _need(table, "share", "faithfulness")
    with style():
        figure, on = _single(ax, COLUMN + 0.3, 2.2)
        on.axhline(1, color=SOFT, linewidth=0.6, linestyle=":")
        on.axhline(0, color=SOFT, linewidth=0.6)
        for i, (name, rows) in enumerate(_groups(table, "method")):
            rows = rows.sort_values("share")
            _curve(
                on, 100 * rows["share"].to_numpy(float), rows, "faithfulness", i, name, band=True
            )
        if float(table["share"][table["share"] > 0].min()) < 0.02:
            on.set_xscale("symlog", linthresh=100 * float(table["share"][table["share"] > 0].min()))
            on.xaxis.set_major_formatter("{x:g}")
        on.set_xlabel("components kept (%)")
        on.set_ylabel("faithfulness\n(1: the whole model)")
        return _finish(figure, on, ax is None, title, note)


def pruning(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    metric: str = "accuracy",
    title: str = "Least important removed first",
    note: str = "",
) -> Figure:
    """Score against the share of components removed, a line a ranking.

    Args:
        table: columns `removed` (0 to 1) and `accuracy` (0 to 1); optional `accuracy_low`, `accuracy_high`, `method`, and `majority`.
    """
    _need(table, "removed", metric)
    with style():
        figure, on = _single(ax, COLUMN + 0.3, 2.2)
        for i, (name, rows) in enumerate(_groups(table, "method")):
            rows = rows.sort_values("removed")
            _curve(
                on, 100 * rows["removed"].to_numpy(float), rows, metric, i, name, 100.0, band=True
            )
        if "majority" in table:
            on.axhline(
                100 * float(table["majority"].iloc[0]),
                color=SOFT,
                linewidth=0.8,
                linestyle=":",
                label="most frequent class",
            )
        on.set_xlabel("components removed (%)")
        on.set_ylabel(f"{metric.replace('_', ' ')} (%)")
        return _finish(figure, on, ax is None, title, note)


def ranks(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    metric: str = "accuracy",
    title: str = "Rank of the edit",
    note: str = "",
) -> Figure:
    """Score against the rank of an edit (axis in powers of two), a line a method, class or group.

    Args:
        table: columns `rank` and `accuracy` (0 to 1); optional `accuracy_low`, `accuracy_high`, and `method`.
    """
    _need(table, "rank", metric)
    with style():
        figure, on = _single(ax, COLUMN + 0.3, 2.2)
        for i, (name, rows) in enumerate(_groups(table, "method")):
            rows = rows.sort_values("rank")
            _curve(on, rows["rank"].to_numpy(float), rows, metric, i, name, 100.0)
        on.set_xscale("log", base=2)
        on.set_xticks(
            sorted(table["rank"].unique()), [str(r) for r in sorted(table["rank"].unique())]
        )
        on.set_xlabel("rank")
        on.set_ylabel(f"{metric.replace('_', ' ')} (%)")
        return _finish(figure, on, ax is None, title, note)


def agreement(
    exact: ImportanceMap,
    estimate: ImportanceMap,
    ax: Axes | None = None,
    *,
    rho: Any = None,
    title: str = "An estimate against the exact effects",
    note: str | None = None,
) -> Figure:
    """AIE of one map against another's over the cells they share, with Spearman's rho.

    Args:
        exact, estimate: maps of the same model.
        rho: an `Estimate` (value, low, high) to print; computed where it is not given.
        note: default the facts of the exact map.
    """
    from ..stats import spearman_interval

    both = exact.table.merge(
        estimate.table,
        on=["kind", "layer", "head", _by(exact.table)],
        suffixes=("_exact", "_estimate"),
    )
    both = both.dropna(subset=["aie_exact", "aie_estimate"])
    if len(both) < 3:
        raise ConfigError(
            f"the two maps share {len(both)} cells; at least 3 are needed to compare them"
        )
    rho = (
        spearman_interval(both["aie_exact"].to_numpy(), both["aie_estimate"].to_numpy())
        if rho is None
        else rho
    )
    with style():
        figure, on = _single(ax, COLUMN + 0.3, 2.7)
        ends = np.array(
            [
                both[["aie_exact", "aie_estimate"]].min().min(),
                both[["aie_exact", "aie_estimate"]].max().max(),
            ]
        )
        on.plot(ends, ends, color=SOFT, linewidth=0.7, linestyle=":", label="equal")
        for i, (kind, rows) in enumerate(both.groupby("kind", sort=False)):
            on.scatter(
                rows["aie_exact"], rows["aie_estimate"], s=9, alpha=0.7, color=CYCLE[i % len(CYCLE)], marker=MARKERS[i % len(MARKERS)], linewidths=0,
                label=str(kind),
            )  # fmt: skip
        on.text(
            0.03,
            0.97,
            f"ρ = {rho.value:.3f}\n[{rho.low:.3f}, {rho.high:.3f}]\n{len(both)} cells",
            transform=on.transAxes,
            va="top",
            fontsize=6.5,
        )
        unit = exact.about.get("unit") or "metric"
        on.set_xlabel("\n".join(textwrap.wrap(f"AIE, {method_words(exact.about)} ({unit})", 44)))
        on.set_ylabel(f"AIE, {method_words(estimate.about)}")
        return _finish(
            figure,
            on,
            ax is None,
            title,
            facts(exact.about) if note is None else note,
            4,
        )
