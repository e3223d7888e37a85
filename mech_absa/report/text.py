"""Numbers and records as text for the page, and data as JSON that a script element can hold."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd
from markupsafe import Markup

from ..records import plain


def digits(value: Any, n: int = 4) -> float | None:
    """Round a number to `n` significant digits; return None for what is no finite number."""
    try:
        x = float(value)
    except (TypeError, ValueError):
        return None
    return float(f"{x:.{n}g}") if math.isfinite(x) else None


def number(value: Any, n: int = 4) -> str:
    """Write a number for reading: thousands apart, `n` significant digits, a dash where there is
    none.
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return "–" if not math.isfinite(value) else f"{value:.{n}g}".replace("-", "−")
    return str(value)


def percent(value: Any) -> str:
    """Write a share as percent with one decimal."""
    x = digits(value, 12)
    return "–" if x is None else f"{100 * x:.1f}"


def signed(share: Any) -> str:
    """Write a difference of shares in points, with its sign."""
    x = digits(share, 12)
    return "–" if x is None else f"{100 * x:+.1f}".replace("-", "−")


def bracket(low: Any, high: Any, write: Any = number) -> str:
    """Write an interval as ` [low, high]`; return nothing where an end is missing."""
    if digits(low) is None or digits(high) is None:
        return ""
    return f" [{write(low)}, {write(high)}]"


def pretty(value: Any) -> str:
    """Write a record as indented JSON."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False)


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table with Python's own numbers, None for what is missing."""
    return [
        {str(k): None if pd.isna(v) else v for k, v in row.items()}
        for row in table.astype(object).to_dict("records")
    ]


def listed(value: Any) -> list[Any]:
    """Return a value as a list: lists as they are, nothing as an empty list."""
    if isinstance(value, list):
        return value
    return [] if value in (None, {}) else [value]


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Return every number of a nested record as a row of its path and its text."""
    words = path.replace("_", " ")
    if isinstance(value, dict):
        if {"value", "low", "high"} <= set(value):
            return [(path, number(value["value"]) + bracket(value["low"], value["high"]))]
        return [
            row for k, v in value.items() for row in flat(v, f"{path} · {k}" if path else str(k))
        ]
    if not isinstance(value, list):
        return [(words, number(value))]
    if all(not isinstance(v, (dict, list)) for v in value):
        more = " …" if len(value) > 12 else ""
        return [(words, ", ".join(number(v) for v in value[:12]) + more)] if value else []
    rows = []
    for i, v in enumerate(value):
        name = (v.get("name") or v.get("data")) if isinstance(v, dict) else None
        rows += flat(v, f"{words} · {name or i + 1}")
    return rows


ESCAPES = (
    ("<", "\\u003c"),
    (">", "\\u003e"),
    ("&", "\\u0026"),
    ("\u2028", "\\u2028"),
    ("\u2029", "\\u2029"),
)


def embedded(data: object) -> Markup:
    """Return JSON for a script element: no character in it can end the element, open a comment or
    begin an entity.
    """
    how: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    try:
        text = json.dumps(data, **how)
    except ValueError:  # a NaN somewhere; looking for one beforehand is slow
        text = json.dumps(_without_nan(data), **how)
    for character, escape in ESCAPES:
        text = text.replace(character, escape)
    return Markup(text)


def _without_nan(value: object) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verdict(clear: bool) -> str:
    """Return what is known of chosen sites; intervals alone do not decide (`patch.selection`)."""
    if clear:
        return "The choice is clear: it stands out from 0 and from the control."
    return "The choice is not clear: nothing stands out from 0 and from the control."
