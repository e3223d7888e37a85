"""Small charts as inline SVG: they take their colours from the page, so they follow its theme, and every mark says its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

Number = int | float


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: for the legend and the marks.
        x, y: its points; None in `y` where there is none.
        low, high: ends of its interval; empty where there is none.
        look: number of the colour (0 to 7) and of the dashes.
    """

    name: str
    x: Sequence[Number]
    y: Sequence[Number | None]
    low: Sequence[Number | None] = ()
    high: Sequence[Number | None] = ()
    look: tuple[int, int] = (0, 0)
    quiet: bool = field(default=False)


def nice(value: Number) -> str:
    """A number as a tick or a label."""
    return f"{value:.4g}".replace("-", "−")


def ticks(low: Number, high: Number, n: int = 5, whole: bool = False) -> list[Number]:
    """About `n` round numbers inside [low, high]; `whole` ones only, where that is asked for."""
    if not high > low:
        return [low]
    raw = (high - low) / n
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if raw <= m * step * (1 + 1e-9))
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    width: int = 400,
    height: int = 215,
    zero: bool = True,
    title: str = "",
) -> Markup:
    """Curves with intervals over one x axis."""
    points = [
        (x, y)
        for line in lines
        for x, y in zip(line.x, line.y, strict=True)
        if y is not None and math.isfinite(y)
    ]
    if not points:
        return Markup("")
    ends = [
        v for line in lines for v in (*line.low, *line.high) if v is not None and math.isfinite(v)
    ]
    ys = [y for _, y in points] + ends + ([0.0] if zero else [])
    xs = [x for x, _ in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    if y0 == y1 and not zero:  # one value throughout: in the middle, with room to either side
        y0, y1 = y0 - 0.05 * (abs(y0) or 1), y1 + 0.05 * (abs(y1) or 1)
    y1 = y1 if y1 > y0 else y0 + 1
    y0, y1 = (y0 - 0.04 * (y1 - y0) if y0 < 0 or not zero else y0), y1 + 0.04 * (y1 - y0)
    left, right, top, bottom = 56, 10, 8, 34

    def px(x: Number) -> float:
        return (
            left + (x - x0) / ((x1 - x0) or 1) * (width - left - right)
            if x1 > x0
            else (left + width - right) / 2
        )

    def py(y: Number) -> float:
        return top + (y1 - y) / (y1 - y0) * (height - top - bottom)

    out = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title or y_label)} over {escape(x_label)}">'
    ]
    for y in ticks(y0, y1):
        out.append(
            f'<line class="{"zero" if y == 0 else "rule"}" x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
        )
        out.append(
            f'<text class="tick" x="{left - 6}" y="{py(y) + 3.5:.1f}" text-anchor="end">{nice(y)}</text>'
        )
    for x in ticks(x0, x1, 7, whole=all(float(x).is_integer() for x in xs)):
        out.append(
            f'<text class="tick" x="{px(x):.1f}" y="{height - bottom + 15}" text-anchor="middle">{nice(x)}</text>'
        )
    out.append(
        f'<text class="axis" x="{(left + width - right) / 2:.0f}" y="{height - 3}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = top + (height - top - bottom) / 2
    out.append(
        f'<text class="axis" transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    for line in sorted(lines, key=lambda line: not line.quiet):
        look = "quiet" if line.quiet else f"c{line.look[0]} d{line.look[1]}"
        known = [
            (i, px(x), y)
            for i, (x, y) in enumerate(zip(line.x, line.y, strict=True))
            if y is not None and math.isfinite(y)
        ]
        if line.low and not line.quiet:
            band = [(x, line.low[i], line.high[i]) for i, x, _ in known]
            band = [
                (x, lo, hi)
                for x, lo, hi in band
                if lo is not None and hi is not None and math.isfinite(lo) and math.isfinite(hi)
            ]
            edge = [f"{x:.1f},{py(hi):.1f}" for x, _, hi in band] + [
                f"{x:.1f},{py(lo):.1f}" for x, lo, _ in reversed(band)
            ]  # type: ignore[arg-type]
            out.append(f'<polygon class="band {look}" points="{" ".join(edge)}"/>')
        path = " ".join(f"{x:.1f},{py(y):.1f}" for _, x, y in known)
        out.append(f'<polyline class="line {look}" points="{path}"/>')
        if len(known) <= 80:
            for i, x, y in known:
                between = (
                    f" [{nice(line.low[i])}, {nice(line.high[i])}]"
                    if line.low and line.low[i] is not None
                    else ""
                )  # type: ignore[arg-type]
                words = (
                    f"{escape(line.name)}, {escape(x_label)} {nice(line.x[i])}: {nice(y)}{between}"
                )
                out.append(
                    f'<circle class="dot {look}" cx="{x:.1f}" cy="{py(y):.1f}" r="3"><title>{words}</title></circle>'
                )
    out.append("</svg>")
    return Markup("".join(out))


def legend(lines: Sequence[Line]) -> Markup:
    """The names of the curves, each with a stroke of its own look."""
    shown = [line for line in lines if not line.quiet]
    keys = [
        f'<span class="key"><svg width="26" height="10" aria-hidden="true"><line class="line c{line.look[0]} d{line.look[1]}" x1="1" x2="25" y1="5" y2="5"/>'
        f"</svg>{escape(line.name)}</span>"
        for line in shown
    ]
    if len(shown) < len(lines):
        keys.append(
            '<span class="key"><svg width="26" height="10" aria-hidden="true"><line class="line quiet" x1="1" x2="25" y1="5" y2="5"/></svg>others</span>'
        )
    return Markup(f'<div class="legend">{"".join(keys)}</div>')


def interval_chart(
    rows: Sequence[tuple[str, Number, Number | None, Number | None]],
    label: str,
    marks: Sequence[Number | None] = (),
) -> Markup:
    """One line a row: a dot with its interval; `marks` are reference values, drawn as a small tick.

    Args:
        rows: (name, value, low, high), in percent.
        label: of the axis.
        marks: one a row, such as what always answering the most frequent class scores.
    """
    ends = [v for _, y, lo, hi in rows for v in (y, lo, hi) if v is not None and math.isfinite(v)]
    ends += [m for m in marks if m is not None and math.isfinite(m)]
    if not ends:
        return Markup("")
    low, high = max(0.0, min(ends) - 3), min(100.0, max(ends) + 3)
    name_width, width, step = (
        min(290, max(120, 7 * max(len(name) for name, *_ in rows) + 12)),
        640,
        22,
    )
    height = step * len(rows) + 40

    def px(v: Number) -> float:
        return name_width + (v - low) / ((high - low) or 1) * (width - name_width - 16)

    out = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    ]
    for t in ticks(low, high, 6):
        out.append(
            f'<line class="rule" x1="{px(t):.1f}" x2="{px(t):.1f}" y1="4" y2="{height - 34}"/>'
        )
        out.append(
            f'<text class="tick" x="{px(t):.1f}" y="{height - 20}" text-anchor="middle">{nice(t)}</text>'
        )
    out.append(
        f'<text class="axis" x="{(name_width + width) / 2:.0f}" y="{height - 4}" text-anchor="middle">{escape(label)}</text>'
    )
    for i, (name, y, lo, hi) in enumerate(rows):
        at = 4 + step * (i + 0.5)
        cut = name if len(name) <= 40 else name[:18] + "…" + name[-21:]
        out.append(
            f'<text class="tick name" x="{name_width - 8}" y="{at + 3.5:.1f}" text-anchor="end">{escape(cut)}<title>{escape(name)}</title></text>'
        )
        mark = marks[i] if i < len(marks) else None
        if mark is not None and math.isfinite(mark):
            out.append(
                f'<line class="mark" x1="{px(mark):.1f}" x2="{px(mark):.1f}" y1="{at - 6:.1f}" y2="{at + 6:.1f}">'
                f"<title>most frequent class: {nice(mark)} %</title></line>"
            )
        if not math.isfinite(y):
            continue
        between = ""
        if lo is not None and hi is not None and math.isfinite(lo) and math.isfinite(hi):
            out.append(
                f'<line class="line c0" x1="{px(lo):.1f}" x2="{px(hi):.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'
            )
            between = f" [{nice(lo)}, {nice(hi)}]"
        out.append(
            f'<circle class="dot c0" cx="{px(y):.1f}" cy="{at:.1f}" r="4"><title>{escape(name)}: {nice(y)}{between}</title></circle>'
        )
    out.append("</svg>")
    return Markup("".join(out))
