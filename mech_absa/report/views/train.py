"""The view of a training: the edit, its parts, its history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ..charts import Line, legend, line_chart, y_range
from ..runs import Run
from ..text import digits, number, percent
from .common import basics, duration, fact_rows, model_text, sources

STEPS = ("step", "examples", "epoch")
NOT_DRAWN = ("step", "epoch", "batch", "examples", "seconds")
ELSEWHERE = ("stopped", "share", "parameters", "seed", "data_sha256")


def train_view(run: Run, budget: int) -> dict[str, Any]:
    """Return what the template says of an edit and its training."""
    record, edit = run.record, run.notes["edit.json"]
    trained = {**(edit.get("record") or {}), **(record.get("edit") or {})}
    history = run.tables.get("history.csv")
    known = {
        k: v
        for k, v in trained.items()
        if isinstance(v, (int, float, str, bool)) and str(v).strip() and k not in ELSEWHERE
    }
    return basics(run) | {
        "conclusion": conclusion(run), "facts": facts(run, trained), "formulas": edit.get("formulas") or {},
        "parts": parts(edit.get("parts") or []),
        "charts": history_charts([(run.name, history)]) if history is not None else [], "known": known,
        "validation": sources(record, "validation_data"), "data": {"kind": "train"},
    }  # fmt: skip


def last_value(run: Run, column: str) -> float | None:
    """Return the last value of a column of the history, or None."""
    history = run.tables.get("history.csv")
    if history is None or column not in history:
        return None
    values = history[column].dropna().tolist()
    return digits(values[-1]) if values else None


def conclusion(run: Run) -> list[dict[str, str]]:
    """Return the sentences on top of the page."""
    edit = run.notes["edit.json"]
    share = edit.get("share")
    words = f"The edit trains {edit.get('n_parameters', 0):,} parameters"
    words += f" ({100 * share:.3g} % of the model)" if share else ""
    sites = " ".join(map(str, edit.get("sites") or []))
    lines = [{"text": f"{words}{f' at {sites}' if sites else ''}."}]
    if (loss := last_value(run, "loss")) is not None:
        validation = last_value(run, "validation_loss")
        also = "" if validation is None else f", the last validation loss {number(validation)}"
        accuracy = last_value(run, "validation_accuracy")
        also += "" if accuracy is None else f" (accuracy {percent(accuracy)} %)"
        lines.append({"text": f"The last training loss is {number(loss)}{also}."})
        if validation is None:
            lines.append(
                {"text": "There is no validation data, so the history cannot show overfitting.", "look": "warn"}
            )  # fmt: skip
    lines.append(
        {
            "text": "Accuracy on test data and side effects are not measured here: python -m mech_absa.evaluate --side-effects does both."
        }
    )
    return lines


def facts(run: Run, trained: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the table of what was trained."""
    record, edit = run.record, run.notes["edit.json"]
    preset, share = record.get("preset") or {}, edit.get("share")
    size = f"{edit.get('n_parameters', 0):,}"
    memory = record.get("peak_memory_bytes")
    return fact_rows(
        [
            ("Model", model_text(record, (edit.get("base") or {}).get("name"))),
            ("Preset", preset.get("name")),
            ("Sites", " ".join(map(str, edit.get("sites") or []))),
            ("Trainable parameters", f"{size} ({100 * share:.3g} % of the model)" if share else size),
            ("Epochs", preset.get("epochs")), ("Batch size", preset.get("batch_size")),
            ("Schedule", preset.get("schedule")), ("Loss", preset.get("loss")),
            ("Seed", run.config.get("seed")), ("Stopped", trained.get("stopped")),
            ("Memory", f"{memory / 2**20:,.0f} MiB at most" if memory else None),
            ("Time", duration(record)),
        ]
    )  # fmt: skip


def parts(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the parts of an edit; those that differ only in their place share a row."""
    grouped: dict[str, dict[str, Any]] = {}
    for p in entries:
        options = ", ".join(f"{k} {number(v)}" for k, v in (p.get("options") or {}).items())
        row = grouped.setdefault(
            f"{p.get('family')}|{options}|{p.get('lr')}",
            {"family": p.get("family"), "options": options, "lr": p.get("lr"), "places": []},
        )
        row["places"].append(str(p.get("place", p.get("at", ""))))
    return list(grouped.values())


def history_charts(histories: Sequence[tuple[str, pd.DataFrame]]) -> list[dict[str, Any]]:
    """Return a chart per measured column, one line per run; loss and validation loss share one."""
    drawn: dict[str, list[Line]] = {}
    for i, (name, table) in enumerate(histories):
        x_name = next((c for c in STEPS if c in table), None)
        for column in table.columns:
            if column in NOT_DRAWN or not pd.api.types.is_numeric_dtype(table[column]):
                continue
            rows = table[table[column].notna()]
            if rows.empty:
                continue
            is_loss = column in ("loss", "validation_loss")
            dash = int(column == "validation_loss")
            label = column if len(histories) == 1 else f"{name}: {column}"
            x = rows[x_name].tolist() if x_name else list(range(len(rows)))
            look = (i % 8 if len(histories) > 1 else dash, dash)
            line = Line(label, x, [digits(v) for v in rows[column]], look=look)
            drawn.setdefault("loss" if is_loss else str(column), []).append(line)
    step = next((c for c in STEPS if histories and c in histories[0][1]), "row")
    charts = []
    for group, lines in drawn.items():
        words = group.replace("_", " ")
        most = 1.0 if "accuracy" in group or "f1" in group else None
        ys = y_range(lines, zero=group == "loss", most=most)
        chart = line_chart(lines, step, words, ys=ys)
        charts.append({"name": words, "chart": chart, "legend": legend(lines)})
    return charts
