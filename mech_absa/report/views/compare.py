"""The view of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...plots.words import corruption_words, direction_words, method_words
from ...stats import spearman_interval
from ..runs import WORDS, Run
from ..text import bracket, digits, number
from .evaluate import accuracy_chart, score_rows, side_effects
from .matrix import summary_rows
from .trace import top_sites
from .train import history_charts, last_value


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the template says of runs of one kind side by side."""
    traces, trainings, evaluations, matrices = (
        [r for r in runs if r.kind == k] for k in ("trace", "train", "evaluate", "matrix")
    )
    histories = [(r.name, r.tables["history.csv"]) for r in trainings if "history.csv" in r.tables]
    scores = [
        {**row, "run": r.name} for r in evaluations for row in score_rows(r.tables["scores.csv"])
    ]
    whole = [r for r in scores if r["subset"] == "all"] or scores
    damage = [
        e | {"name": f"{r.name}: {e['name']}"}
        for r in evaluations
        for e in side_effects(r.notes.get("side_effects.json") or {})
    ]
    unmeasured = [r.name for r in evaluations if not r.notes.get("side_effects.json")]
    return {
        "runs": [{"name": r.name, "word": WORDS[r.kind]} for r in runs], "traces": trace_table(traces),
        "agreement": agreement(traces), "trainings": [training_row(r) for r in trainings],
        "charts": history_charts(histories) if len(histories) > 1 else [], "scores": scores,
        "chart": accuracy_chart(whole, ("run", "system", "data")), "effects": damage, "unmeasured": unmeasured,
        "matrices": [{**row, "run": r.name} for r in matrices for row in summary_rows(r.tables["summary.csv"])],
    }  # fmt: skip


def trace_table(traces: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the facts of traces as rows of (fact, one text per run), so that long sites have room."""
    columns: list[dict[str, str]] = []
    for r in traces:
        about, pairs = r.notes["about.json"], r.tables["pairs.parquet"]
        best = top_sites(r.tables["importance.csv"], 1)
        total = digits((pairs["clean"] - pairs["corrupted"]).mean())
        sites = r.notes.get("sites.json") or {}
        top = best[0] if best else None
        columns.append(
            {
                "run": r.name, "model": str(about.get("model")), "corruption": corruption_words(about),
                "direction": direction_words(about), "method": method_words(about), "metric": str(about.get("metric")),
                "pairs": number(len(pairs)), "average total effect": number(total),
                "largest AIE at": top["site"] if top else "–",
                "its AIE": number(top["aie"]) + bracket(top["ci_low"], top["ci_high"]) if top else "–",
                "selected sites": " ".join(map(str, sites.get("sites", []))) or "–",
            }
        )  # fmt: skip
    return [(name, [c[name] for c in columns]) for name in (columns[0] if columns else ())]


def agreement(traces: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the rank correlation of the averages of every two traces over the cells they share."""
    rows: list[dict[str, Any]] = []
    for i, a in enumerate(traces):
        for b in traces[i + 1 :]:
            x, y = a.tables["importance.csv"], b.tables["importance.csv"]
            keys = [k for k in ("kind", "layer", "head", "role", "position") if k in x and k in y]
            both = x.merge(y, on=keys, suffixes=("_x", "_y"))[["aie_x", "aie_y"]].dropna()
            row: dict[str, Any] = {"a": a.name, "b": b.name, "n": len(both), "rho": None}
            if len(both) >= 3:
                rho = spearman_interval(
                    both["aie_x"].to_numpy(), both["aie_y"].to_numpy(), draws=500
                )
                row |= {k: digits(v, 3) for k, v in (("rho", rho.value), ("low", rho.low), ("high", rho.high))}  # fmt: skip
            rows.append(row)
    return rows


def training_row(run: Run) -> dict[str, Any]:
    """Return one training of the table of trainings."""
    edit = run.notes["edit.json"]
    return {
        "name": run.name, "preset": (run.record.get("preset") or {}).get("name"),
        "sites": " ".join(map(str, edit.get("sites") or [])), "parameters": edit.get("n_parameters"), "share": edit.get("share"),
        "loss": last_value(run, "loss"), "validation_loss": last_value(run, "validation_loss"),
        "validation_accuracy": last_value(run, "validation_accuracy"), "seconds": digits(run.record.get("seconds"), 3),
    }  # fmt: skip
