"""Hold what every view says: model, data, configuration."""

from __future__ import annotations

from typing import Any

from ..runs import WORDS, Run
from ..text import listed, number

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#5f6368")
"""The order of the page's colours c0 to c7; see page.css."""


def model_text(record: dict[str, Any], fallback: Any = "") -> str:
    """Describe the model of a record: name, size, hash of its weights."""
    model = record.get("model") or fallback or ""
    if not isinstance(model, dict):
        return str(model)
    size = f", {model['parameters']:,} parameters" if model.get("parameters") else ""
    digest = f", weights {str(model['sha256'])[:12]}" if model.get("sha256") else ""
    return f"{model.get('name', '')}{size}{digest}"


def sources(record: dict[str, Any], key: str = "data") -> list[dict[str, Any]]:
    """Return the data of a run: source, examples, classes, and what was left out of the file."""
    entries = []
    for d in listed(record.get(key)):
        if not isinstance(d, dict):
            d = {"source": str(d)}
        classes = ", ".join(f"{n} {c}" for c, n in (d.get("classes") or {}).items())
        left_out = [f"{n} ({reason})" for reason, n in (d.get("left_out") or {}).items()]
        if d.get("ambiguous"):
            left_out.append(
                f"{d['ambiguous']} rows are ambiguous: their aspect occurs more than once"
            )
        entries.append(
            {
                "source": str(d.get("source", "")),
                "examples": d.get("examples"),
                "classes": classes,
                "left_out": left_out,
                "sha256": str(d.get("sha256", ""))[:12],
            }
        )
    return entries


def basics(run: Run) -> dict[str, Any]:
    """Return what the template says of every run."""
    record = run.record
    return {
        "kind": run.kind, "word": WORDS[run.kind], "name": run.name, "folder": str(run.path), "config": run.config,
        "versions": record.get("versions") or {}, "key": record.get("key"), "sources": sources(record),
        "warnings": [str(w) for w in listed(record.get("warnings"))],
    }  # fmt: skip


def fact_rows(pairs: list[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Return the facts that a run has, as text."""
    return [(name, number(value)) for name, value in pairs if value not in (None, "")]


def duration(record: dict[str, Any]) -> str | None:
    """Return the seconds of a run as text, or None."""
    seconds = record.get("seconds")
    return None if seconds is None else f"{number(seconds, 3)} s"
