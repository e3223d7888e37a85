"""The view of a domain matrix: methods side by side, and every training domain against every test
domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ...plots.domains import LEAST_RANGE
from ..charts import interval_chart
from ..runs import Run
from ..text import percent, rows_of
from .common import basics, duration, fact_rows, model_text, sources


def matrix_view(run: Run, budget: int) -> dict[str, Any]:
    """Return what the template says of every domain against every domain."""
    record, config, table = run.record, run.config, run.tables["matrix.csv"]
    rows = summary_rows(run.tables["summary.csv"])
    accounts = [d for d in (record.get("domains") or {}).values() if isinstance(d, dict)]
    both = {
        word: sources({"data": [d[word] for d in accounts if isinstance(d.get(word), dict)]})
        for word in ("train", "test")
    }
    model = record.get("model")
    facts = [
        ("Model", model_text(record, config.get("model"))), ("Domains", ", ".join(map(str, table["test"].drop_duplicates()))),
        ("Trainings", record.get("trainings")), ("Seeds", ", ".join(map(str, config.get("seeds") or []))),
        ("Sites", " ".join(map(str, record.get("sites") or []))), ("Rank", config.get("rank")), ("Epochs", config.get("epochs")),
        ("Validation share", config.get("validation")), ("Device", model.get("device") if isinstance(model, dict) else None),
        ("Time", duration(record)),
    ]  # fmt: skip
    return basics(run) | {
        "conclusion": conclusion(rows), "facts": fact_rows(facts), "domains": both, "summary": rows,
        "baselines": baseline_rows(run.tables.get("matrix_baselines.csv")),
        "chart": interval_chart(spread(rows), "accuracy (%)"), "maps": domain_maps(table), "data": {"kind": "matrix"},
    }  # fmt: skip


def conclusion(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the sentences on top: the best trained method in domain and across, and who stands
    within its spread.
    """
    lines = []
    for where, words in (("in", "In domain"), ("out", "Across domains")):
        ranked = [r for r in rows if r["trainable"] and r[f"accuracy_{where}"] is not None]
        ranked.sort(key=lambda r: -r[f"accuracy_{where}"])
        if not ranked:
            continue
        best = ranked[0]
        mean, sd = best[f"accuracy_{where}"], best[f"accuracy_{where}_sd"]
        near = [
            r["method"]
            for r in ranked[1:]
            if mean - r[f"accuracy_{where}"] <= (sd or 0.0) + (r[f"accuracy_{where}_sd"] or 0.0)
        ]
        text = f"{words}, {best['method']} scores best with {percent(mean)} %"
        text += "" if sd is None else f" ± {percent(sd)} over {best['seeds']} seeds"
        text += f"; within the spread of the seeds: {', '.join(near)}" if near else ""
        lines.append({"text": text + "."})
    untrained = [r for r in rows if not r["trainable"] and r["accuracy_out"] is not None]
    if untrained:
        lines.append({"text": f"Without training the model scores {percent(untrained[0]['accuracy_out'])} %."})  # fmt: skip
    lines.append(
        {
            "text": "Side effects are not measured by a domain matrix: python -m mech_absa.evaluate --side-effects measures them for a saved edit.",
            "look": "side",
        }
    )
    return lines


def baseline_rows(table: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Return mean accuracy and macro-F1 of every baseline in domain and across; none of an older run."""
    if table is None:
        return []
    rows = []
    for name, of in table.groupby("baseline", sort=False):
        row: dict[str, Any] = {"name": str(name)}
        for where, part in (("in", of[of["in_domain"]]), ("out", of[~of["in_domain"]])):
            for metric in ("accuracy", "macro_f1"):
                row[f"{metric}_{where}"] = float(part[metric].mean()) if len(part) else None
        rows.append(row)
    return rows


def summary_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a row per method; columns that an older run lacks are None."""
    columns = ("method", "trainable", "share", "seeds", "seconds", "peak_memory_mib")
    measured = [
        f"{m}_{where}{sd}"
        for m in ("accuracy", "macro_f1")
        for where in ("in", "out")
        for sd in ("", "_sd")
    ]
    return [{c: r.get(c) for c in (*columns, *measured)} for r in rows_of(table)]


def spread(
    rows: Sequence[dict[str, Any]],
) -> list[tuple[str, float, float | None, float | None]]:
    """Return (method and where, accuracy, one standard deviation over seeds below, and above), in
    percent.
    """
    drawn: list[tuple[str, float, float | None, float | None]] = []
    for r in rows:
        for where, words in (("in", " in domain" if r["trainable"] else ""), ("out", " across")):
            mean, sd = r[f"accuracy_{where}"], r[f"accuracy_{where}_sd"]
            if mean is None:
                continue
            ends = (None, None) if sd is None else (100 * (mean - sd), 100 * (mean + sd))
            drawn.append((f"{r['method']}{words}", 100 * mean, *ends))
    return drawn


def domain_maps(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one heat map per method: training domain x test domain, means over seeds, all on one
    scale.

    The scale spans at least 20 points, so that the seeds' noise does not fill it.
    """
    table = table.assign(train=table["train"].fillna(""))
    tests = [str(t) for t in table["test"].drop_duplicates()]
    means = table.groupby(["method", "train", "test"])["accuracy"].mean()
    high = float(means.max())
    low = max(0.0, min(float(means.min()), high - LEAST_RANGE / 100))
    majority = table.groupby("test")["majority"].mean() if "majority" in table else {}
    return [
        {
            "method": str(method),
            "tests": tests,
            "lines": [
                (str(train), [_cell(str(method), str(train), t, rows, (low, high)) for t in tests])
                for train, rows in of.groupby("train", sort=False)
            ],
            "majority": [majority.get(t) for t in tests],
        }
        for method, of in table.groupby("method", sort=False)
    ]


def _cell(
    method: str, train: str, test: str, rows: pd.DataFrame, scale: tuple[float, float]
) -> dict[str, Any] | None:
    """Return one cell of a domain map, or None where nothing was measured."""
    seeds = rows[rows["test"] == test]["accuracy"].dropna()
    if seeds.empty:
        return None
    mean, (low, high) = float(seeds.mean()), scale
    values = ", ".join(percent(x) for x in seeds)
    trained = f"trained on {train}" if train else "untrained"
    return {
        "mean": mean,
        "spread": f" ± {100 * seeds.std(ddof=1):.1f}" if len(seeds) > 1 else "",
        "words": f"{method}, {trained}, tested on {test}: {values}",
        "v": (mean - low) / ((high - low) or 1),
        "own": train == test,
    }
