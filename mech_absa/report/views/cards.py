"""Two parts of an evaluation's view: the scorecard of all edits, and how they treat classes and groups."""

from __future__ import annotations

from typing import Any

import pandas as pd
from markupsafe import Markup

from ..charts import Line, legend, line_chart
from ..text import bracket, digits, flat, number, percent, rows_of


def scorecard(note: dict[str, Any] | None) -> dict[str, Any]:
    """Return the table of `scorecard.json`: names of the edits, and a row per measure; empty without it."""
    note = note or {}
    rows = [
        {
            "measure": str(r.get("measure") or ""),
            "how": str(r.get("how") or ""),
            "cells": [str(r.get("base") or "–"), *map(str, r.get("edited") or [])],
        }
        for r in note.get("rows") or []
    ]
    return {"systems": ["base", *map(str, note.get("systems") or [])], "rows": rows} if rows else {}


def fairness(table: pd.DataFrame | None, notes: dict[str, Any]) -> dict[str, Any]:
    """Return gaps, divergences and drift: a row per edit, a chart over layers, and a table for each edit.

    Args:
        table: `fairness.csv`.
        notes: `fairness.json`, edit -> its record.
    """
    rows = [] if table is None else rows_of(table)
    if not rows:
        return {}
    drifts = [
        Line(str(name), *_drift(record), look=(i % 8, i // 8 % 3))
        for i, (name, record) in enumerate(notes.items())
    ]
    return {
        "rows": [fairness_row(rows[0], base=True), *map(fairness_row, rows)],
        "chart": line_chart(drifts, "layer", "drift (nats)", title="drift of the logit lens"),
        "legend": legend(drifts) if len(drifts) > 1 else Markup(""),
        "edits": [edit_entry(str(name), record) for name, record in notes.items()],
    }


def fairness_row(r: dict[str, Any], base: bool = False) -> dict[str, str]:
    """Return one edit's row of `fairness.csv`, spelled out: column -> text.

    Args:
        r: the row.
        base: take what it says of the unedited model.
    """

    def share(name: str) -> str:
        if base:
            return percent(r.get(f"{name}_base"))
        return percent(r.get(name)) + bracket(r.get(f"{name}_low"), r.get(f"{name}_high"), percent)

    def nats(name: str) -> str:
        ends = bracket(r.get(f"{name}_low"), r.get(f"{name}_high"), lambda x: number(digits(x, 3)))
        return "–" if base else f"{number(digits(r.get(name), 3))}{ends}"

    def gap(kind: str) -> str:
        p = "" if base else f", p {number(digits(r.get(f'{kind}_gap_p'), 2))}"
        return f"{share(f'{kind}_gap')}{p}"

    kinds = [str(c).removesuffix("_gap_p") for c in r if str(c).endswith("_gap_p")]
    return {
        "edit": "none" if base else str(r.get("system")),
        "rank": "–" if base else number(r.get("rank")),
        "parameters": "–" if base else number(r.get("parameters")),
        "accuracy, %": share("accuracy"),
        "gap of classes": share("class_gap"),
        **{f"gap of groups: {kind}": gap(kind) for kind in kinds},
        "KL, labels": nats("kl_labels"),
        "KL, vocabulary": nats("kl_vocabulary"),
    }


def edit_entry(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Return one edit's record for the page: its table for reading, and every number as a flat row."""
    table = [
        {k: str(r.get(k) or "") for k in ("measure", "base", "edited", "note")}
        for r in record.get("summary") or []
    ]
    rest = {k: v for k, v in record.items() if k != "summary"}
    return {"name": name, "table": table, "rows": flat(rest)}


def _drift(record: dict[str, Any]) -> tuple[list[int], list[Any], list[Any], list[Any]]:
    """Return layers, drifts and the ends of their intervals."""
    found = [e if isinstance(e, dict) else {} for e in record.get("layers") or []]
    value, low, high = ([digits(e.get(k)) for e in found] for k in ("value", "low", "high"))
    return list(range(len(found))), value, low, high
