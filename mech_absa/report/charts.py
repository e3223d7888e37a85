"""Small charts as inline SVG and HTML: they take their colours from the page, and every mark says
its value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

Number = int | float
WIDTH, HEIGHT = 400, 215
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 8, 34
"""Margins of a line chart."""
MOST_DOTS = 80
"""Points of a line above which only the line is drawn."""


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: for the legend and the marks.
        x, y: its points; None in `y` where there is none.
        low, high: ends of its interval; empty where there is none.
        look: number of the colour (0 to 7) and of the dashes.
        quiet: thin and grey, without a name.
    """

    name: str
    x: Sequence[Number]
    y: Sequence[Number | None]
    low: Sequence[Number | None] = ()
    high: Sequence[Number | None] = ()
    look: tuple[int, int] = (0, 0)
    quiet: bool = field(default=False)

    def points(self) -> list[tuple[int, Number, Number]]:
        """Return (index, x, y) of every point that has a value."""
        pairs = enumerate(zip(self.x, self.y, strict=True))
        return [(i, x, y) for i, (x, y) in pairs if y is not None and math.isfinite(y)]

    def ends(self, i: int) -> tuple[Number, Number] | None:
        """Return the interval of a point, or None."""
        low = self.low[i] if self.low else None
        high = self.high[i] if self.high else None
        if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
            return None
        return low, high


def nice(value: Number) -> str:
    """Write a number as a tick or a label."""
    return f"{value:.4g}".replace("-", "−")


def ticks(low: Number, high: Number, n: int = 5, whole: bool = False) -> list[Number]:
    """Return about `n` round numbers inside [low, high]; with `whole`, whole numbers only."""
    if not high > low:
        return [low]
    raw = (high - low) / n
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if raw <= m * step * (1 + 1e-9))
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def y_range(
    lines: Sequence[Line], zero: bool = True, most: Number | None = None
) -> tuple[Number, Number] | None:
    """Return the ends of a y axis that holds all curves and their intervals, or None without
    points.

    Args:
        lines: of one chart, or of several that share one scale.
        zero: whether the axis must hold 0.
        most: the largest value that can occur, such as 1 for an accuracy; the axis does not go
            beyond it.
    """
    values = [y for line in lines for _, _, y in line.points()]
    if not values:
        return None
    ends = [v for line in lines for v in (*line.low, *line.high) if v is not None]
    values += [v for v in ends if math.isfinite(v)] + ([0.0] if zero else [])
    low, high = min(values), max(values)
    if low == high and not zero:  # one value throughout: in the middle, with room to either side
        low, high = low - 0.05 * (abs(low) or 1), high + 0.05 * (abs(high) or 1)
    high = high if high > low else low + 1
    room = 0.04 * (high - low)
    low, high = (low - room if low < 0 or not zero else low), high + room
    return low, high if most is None else min(high, most)


class _Frame:
    """The frame of a line chart: where a value stands, and the elements drawn so far."""

    def __init__(self, xs: Sequence[Number], ys: tuple[Number, Number], label: str):
        self.x0, self.x1, (self.y0, self.y1) = min(xs), max(xs), ys
        self.parts = [
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        ]

    def px(self, x: Number) -> float:
        if self.x1 == self.x0:
            return (LEFT + WIDTH - RIGHT) / 2
        return LEFT + (x - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def py(self, y: Number) -> float:
        return TOP + (self.y1 - y) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_label: str, y_label: str, whole: bool) -> None:
        """Add grid, ticks and labels."""
        for y in ticks(self.y0, self.y1):
            look, at = "zero" if y == 0 else "rule", self.py(y)
            self.parts += [
                f'<line class="{look}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>',
                f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{nice(y)}</text>',
            ]
        for x in ticks(self.x0, self.x1, 7, whole=whole):
            self.parts.append(
                f'<text class="tick" x="{self.px(x):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{nice(x)}</text>'
            )
        middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
        self.parts += [
            f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>',
            f'<text class="axis" transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
        ]

    def curve(self, line: Line, x_label: str) -> None:
        """Add one curve with its interval and its marks."""
        look = "quiet" if line.quiet else f"c{line.look[0]} d{line.look[1]}"
        points = line.points()
        if line.low and not line.quiet:
            band = [(x, ends) for i, x, _ in points if (ends := line.ends(i)) is not None]
            edge = [f"{self.px(x):.1f},{self.py(high):.1f}" for x, (_, high) in band]
            edge += [f"{self.px(x):.1f},{self.py(low):.1f}" for x, (low, _) in reversed(band)]
            self.parts.append(f'<polygon class="band {look}" points="{" ".join(edge)}"/>')
        path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for _, x, y in points)
        self.parts.append(f'<polyline class="line {look}" points="{path}"/>')
        for i, x, y in points if len(points) <= MOST_DOTS else ():
            ends = line.ends(i)
            between = f" [{nice(ends[0])}, {nice(ends[1])}]" if ends else ""
            words = f"{escape(line.name)}, {escape(x_label)} {nice(x)}: {nice(y)}{between}"
            self.parts.append(
                f'<circle class="dot {look}" cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="3"><title>{words}</title></circle>'
            )


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    ys: tuple[Number, Number] | None = None,
    title: str = "",
) -> Markup:
    """Draw curves with intervals over one x axis.

    Args:
        lines: the curves; quiet ones are drawn below the others.
        x_label, y_label: of the axes.
        ys: ends of the y axis, to give several charts one scale; default those of these curves and 0.
        title: for screen readers.
    """
    xs = [x for line in lines for _, x, _ in line.points()]
    ys = ys or y_range(lines)
    if not xs or ys is None:
        return Markup("")
    frame = _Frame(xs, ys, f"{title or y_label} over {x_label}")
    frame.axes(x_label, y_label, all(float(x).is_integer() for x in xs))
    for line in sorted(lines, key=lambda line: not line.quiet):
        frame.curve(line, x_label)
    return Markup("".join([*frame.parts, "</svg>"]))


def legend(lines: Sequence[Line]) -> Markup:
    """Return the names of the curves, each with a stroke of its own look."""

    def key(look: str, name: str) -> str:
        stroke = f'<line class="line {look}" x1="1" x2="25" y1="5" y2="5"/>'
        return f'<span class="key"><svg width="26" height="10" aria-hidden="true">{stroke}</svg>{escape(name)}</span>'

    shown = [line for line in lines if not line.quiet]
    keys = [key(f"c{line.look[0]} d{line.look[1]}", line.name) for line in shown]
    if len(shown) < len(lines):
        keys.append(key("quiet", "others"))
    return Markup(f'<div class="legend">{"".join(keys)}</div>')


def interval_chart(
    rows: Sequence[tuple[str, Number, Number | None, Number | None]],
    label: str,
    marks: Sequence[Number | None] = (),
) -> Markup:
    """Draw one line per row: a dot with its interval, and its value in words.

    It is made of boxes, so that it fits any width: on a narrow screen names stand above their lines.

    Args:
        rows: (name, value, low, high), in percent.
        label: of the axis.
        marks: one per row, such as what always answering the most frequent class scores; a small tick.
    """
    values = [v for _, y, lo, hi in rows for v in (y, lo, hi) if v is not None]
    values = [v for v in (*values, *(m for m in marks if m is not None)) if math.isfinite(v)]
    if not values:
        return Markup("")
    low, high = max(0.0, min(values) - 3), min(100.0, max(values) + 3)

    def at(value: Number) -> str:
        return f"{100 * (value - low) / ((high - low) or 1):.2f}%"

    lines = []
    for i, (name, y, lo, hi) in enumerate(rows):
        mark = marks[i] if i < len(marks) else None
        lines.append(_interval_row(name, y, (lo, hi), mark, at))
    scale = "".join(f'<b style="left:{at(t)}">{nice(t)}</b>' for t in ticks(low, high, 5))
    axis = f'<div class="row axis"><span></span><span class="track">{scale}</span><span class="n">{escape(label)}</span></div>'
    return Markup(
        f'<div class="intervals" role="img" aria-label="{escape(label)}">{"".join(lines)}{axis}</div>'
    )


def _interval_row(
    name: str,
    y: Number,
    ends: tuple[Number | None, Number | None],
    mark: Number | None,
    at: object,
) -> str:
    """Return one row of an interval chart; `at` gives the place of a value."""
    place = at if callable(at) else str
    track, words = "", "–"
    if mark is not None and math.isfinite(mark):
        track += f'<u style="left:{place(mark)}" title="most frequent class: {nice(mark)} %"></u>'
    if math.isfinite(y):
        words = f"{y:.1f}"
        lo, hi = ends
        if lo is not None and hi is not None and math.isfinite(lo) and math.isfinite(hi):
            track += f'<i style="left:{place(lo)};right:calc(100% - {place(hi)})"></i>'
            words += f" [{lo:.1f}, {hi:.1f}]"
        track += f'<b style="left:{place(y)}" title="{escape(name)}: {words}"></b>'
    return (
        f'<div class="row"><span class="name">{escape(name)}</span>'
        f'<span class="track">{track}</span><span class="n">{words}</span></div>'
    )
