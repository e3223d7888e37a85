"""The look of the figures: sizes, colours, fonts, and how a figure is saved.

Colours can be told apart under the common colour blindnesses: blue - white - red for signed
effects, with white at exactly 0, and the eight colours of Okabe and Ito for categories. Lines
differ in dashes as well. A figure has a white ground of its own, so that it looks the same in a
dark notebook. The style applies only inside `style()`: importing this module changes no rcParams.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ..records import atomic

COLUMN, PAGE = 3.3, 7.0
"""Widths in inches: one column of a paper, and two."""

INK, SOFT, FAINT, GRID, MISSING = "#1a1a1a", "#5f6368", "#d0d4da", "#e4e7eb", "#c9ccd1"
OKABE_ITO = {
    "blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "vermilion": "#D55E00", "purple": "#CC79A7",
    "sky": "#56B4E9", "yellow": "#F0E442", "black": "#000000",
}  # fmt: skip
CYCLE = tuple(
    OKABE_ITO[c] for c in ("blue", "vermilion", "green", "purple", "orange", "sky", "black")
)
MARKERS = "osD^vPX"

DIVERGING = LinearSegmentedColormap.from_list(
    "effect",
    [
        "#0a3b70", "#2f79b5", "#8ec1de", "#dfecf3", "#ffffff", "#fbe3d4", "#f0a582", "#c94741", "#6d0220",
    ],
).with_extremes(bad=MISSING)  # fmt: skip
"""Blue - white - red, white at the centre."""
SEQUENTIAL = LinearSegmentedColormap.from_list(
    "score", ["#f3f7fb", "#b9d3e8", "#6ba3cd", "#2166ac", "#0a3b70"]
).with_extremes(bad=MISSING)
"""Light to dark blue, for scores."""

STYLE: dict[str, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 7.5, "axes.titlesize": 8,
    "axes.labelsize": 7.5, "xtick.labelsize": 6.5, "ytick.labelsize": 6.5, "legend.fontsize": 6.5, "figure.titlesize": 9,
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "savefig.edgecolor": "white",
    "savefig.transparent": False, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT, "xtick.color": SOFT,
    "ytick.color": SOFT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5, "ytick.minor.size": 1.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "lines.linewidth": 1.3, "lines.markersize": 3.5, "legend.frameon": False,
    "hatch.linewidth": 0.5, "pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "mech_absa",
    "path.simplify": True, "text.usetex": False, "text.parse_math": False, "axes.prop_cycle": cycler(color=CYCLE),
    "axes.unicode_minus": True, "figure.dpi": 120, "axes.formatter.use_mathtext": False,
}  # fmt: skip

ROLE_STYLES: dict[str, tuple[str, Any]] = {
    "template": (SOFT, ":"), "before": (OKABE_ITO["purple"], "-"), "aspect.first": (OKABE_ITO["orange"], ":"),
    "aspect.middle": (OKABE_ITO["orange"], "--"), "aspect.last": (OKABE_ITO["orange"], "-"),
    "opinion": (OKABE_ITO["vermilion"], "-"), "after": (OKABE_ITO["green"], "-"),
    "query.first": (OKABE_ITO["blue"], ":"), "query.middle": (OKABE_ITO["blue"], "--"),
    "query.last": (OKABE_ITO["blue"], "-"), "answer": (OKABE_ITO["black"], "-"),
}  # fmt: skip
"""Colour and dashes of a role: the colour is shared by all tokens of one span, the dashes tell its
first, middle and last.
"""


class Picture(Figure):
    """A matplotlib figure that a notebook shows by itself, without pyplot and its global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with style():
            self.savefig(buffer, format="png", dpi=160)
        return buffer.getvalue()


def style(**changes: Any) -> AbstractContextManager[None]:
    """Apply the look of these figures inside a `with` block; `changes` override single rcParams."""
    look: Any = STYLE | changes
    return mpl.rc_context(look)


def save(figure: Figure, path: str | Path, *, dpi: int = 200) -> list[Path]:
    """Write a figure as PNG and PDF, and return both paths.

    The PDF keeps text as text. The same figure gives the same bytes: there is no date and no random id.

    Args:
        figure: any figure of this package.
        path: with or without an ending; `.png` and `.pdf` are written beside each other.
        dpi: dots per inch of the PNG.
    """
    stem = Path(path)
    stem = stem.with_suffix("") if stem.suffix in (".png", ".pdf") else stem
    metadata: dict[str, dict[str, Any]] = {
        ".png": {"Software": None},
        ".pdf": {"CreationDate": None, "ModDate": None},
    }
    written = []
    with style():
        for ending, entries in metadata.items():
            target = stem.parent / (stem.name + ending)
            with atomic(target) as temporary:
                figure.savefig(temporary, dpi=dpi, metadata=entries)
            written.append(target)
    return written
