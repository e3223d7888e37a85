"""The view of a trace: where the answer is carried, the chosen sites, single examples, self-checks."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ...plots.style import ROLE_STYLES
from ...plots.words import CORRECTIONS, corruption_words, direction_words, method_words
from ...records import About
from ...sites import HEAD_KINDS, in_reading_order
from ...stats import ADJUSTMENTS, resolution
from .. import maps
from ..charts import Line, legend, line_chart, y_range
from ..runs import Run
from ..text import bracket, digits, flat, listed, number, rows_of, verdict
from .common import COLOURS, basics, duration, fact_rows, model_text

CONTROLS = {
    "estimate_against_exact": "The estimate against exact effects of cells drawn at random",
    "half_precision_control": "Half precision against float32",
}
CHECKS = {
    "engine_against_loop": "the engine agrees with one forward pass per cell",
    "same_onto_same": "putting a run's own states back changes nothing",
    "all_of_resid_pre_0": "restoring all of the stream before layer 0 gives the other run",
    "left_of_first_difference": "nothing changes left of the first token that differs",
}


def trace_view(run: Run, budget: int) -> dict[str, Any]:
    """Return what the template says of a trace, and under `data` what the scripts draw."""
    about: About = run.notes["about.json"]
    record = run.record
    single = maps.examples(run, budget)
    table, pairs = run.tables["importance.csv"], run.tables["pairs.parquet"]
    account = {**about, **(record.get("pairs") or {})}
    checks, compared = self_checks(record.get("self_checks") or about.get("self_checks") or {})
    controls = [(words, flat(record[k])) for k, words in CONTROLS.items() if isinstance(record.get(k), dict)]  # fmt: skip
    total = digits((pairs["clean"] - pairs["corrupted"]).mean())
    return basics(run) | {
        "conclusion": conclusion(run, total, checks),
        "facts": facts(run, account, total),
        "template": about.get("template"), "labels": about.get("labels") or [],
        "kept": account.get("kept", len(pairs)), "considered": account.get("considered"),
        "dropped": account.get("dropped") or {}, "classes": account.get("classes_kept") or {},
        "mixed": account.get("mixed_polarity"), "sentences": sentence_count(pairs),
        "controls": controls, "checks": checks, "compared": compared,
        "sites": run.notes.get("sites.json"), "top": top_sites(table), "curves": curves(table, str(about.get("unit", ""))),
        "shown": len(single["list"]), "total": single["total"], "heads": any(k in HEAD_KINDS for k in single["kinds"]),
        "level": about.get("level") or 0.95, "denoise": about.get("direction") == "denoise", "unit": about.get("unit", ""),
        "mark": mark_words(table, about),
        "data": {
            "kind": "trace", "name": run.name, "unit": about.get("unit", ""), "metric": about.get("metric", ""),
            "direction": about.get("direction", ""), "corruption": corruption_words(about),
            "average": maps.average(table, (run.notes.get("sites.json") or {}).get("sites", [])), "examples": single,
        },
    }  # fmt: skip


def sentence_count(pairs: pd.DataFrame) -> int | None:
    """Return how many sentences the pairs come from: the units that intervals resample."""
    column = next((c for c in ("cluster", "sentence") if c in pairs), None)
    return None if column is None else int(pairs[column].nunique())


def mark_words(table: pd.DataFrame, about: About) -> str:
    """Say what a dot means: significant after correction, or an interval that leaves 0 out."""
    if "p_adjusted" in table and table["p_adjusted"].notna().any():
        return f"p below 0.05 after {CORRECTIONS.get(str(about.get('adjustment')), 'correction')}"
    return f"an interval ({100 * (about.get('level') or 0.95):.0f} %) that leaves 0 out"


def conclusion(run: Run, total: float | None, checks: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the sentences on top of the page: what the trace shows, and how far it can be trusted."""
    best, lines = top_sites(run.tables["importance.csv"], 1), []
    if best and best[0]["aie"] is not None:
        top = best[0]
        interval = bracket(top["ci_low"], top["ci_high"])
        of = f", of an average total effect of {number(total)}" if total else ""
        text = f"The largest average effect is {number(top['aie'])}{interval} at {top['site']}{of}."
        lines.append({"text": text})
    lines += choice_words(run.notes.get("sites.json") or {})
    pairs = run.tables["pairs.parquet"]
    if (sentences := sentence_count(pairs)) is not None:
        few = sentences < FEW
        words = f"It rests on {len(pairs):,} pairs from {sentences:,} sentences"
        words += "; with so few, p-values cannot get small and intervals are rough." if few else "."
        lines.append({"text": words, "look": "warn" if few else ""})
        lines += resolution_words(run, sentences)
    broken = [c["name"] for c in checks if not c["ok"]]
    if broken:
        lines.append({"text": f"A self-check is broken: {'; '.join(broken)}.", "look": "bad"})
    elif checks:
        lines.append({"text": f"All {len(checks)} self-checks hold.", "look": "ok"})
    return lines


FEW = 20
"""Sentences below which the page warns."""


def resolution_words(run: Run, sentences: int) -> list[dict[str, str]]:
    """Return the sentence on what so many sentences can show of so many cells, if the correction is
    known.
    """
    table, adjustment = run.tables["importance.csv"], str(run.config.get("adjustment"))
    tested = int(table["p"].notna().sum()) if "p" in table else 0
    if adjustment not in ADJUSTMENTS or not tested or not sentences:
        return []
    limit = resolution(sentences, tested, adjustment)
    lines = [{"text": f"Resolution: {limit}.", "look": "" if limit.possible else "warn"}]
    if adjustment != "bootstrap" and (skewed := digits(run.record.get("skewed_cells"))):
        text = (
            f"{int(skewed)} of {tested} tested cells have skewed effects. Their p-values are too small too often: sign flips "
            "assume effects symmetric about 0 where nothing is there. Read their intervals and single examples, or take "
            "--adjustment bootstrap."
        )
        lines.append({"text": text, "look": "warn"})
    return lines


def choice_words(sites: dict[str, Any]) -> list[dict[str, str]]:
    """Return the sentences on the chosen sites: where, how large, how stable, and whether they
    stand out.
    """
    if not sites.get("sites"):
        return []
    mean = ""
    if sites.get("aie") is not None:
        interval = bracket(sites.get("ci_low"), sites.get("ci_high"))
        mean = f", mean effect {number(sites['aie'])}{interval}"
    lines = [{"text": f"Selected sites: {', '.join(map(str, sites['sites']))}{mean}."}]
    trust = []
    honest = sites.get("honest")
    if isinstance(honest, dict) and digits(honest.get("value")) is not None:
        interval = bracket(honest.get("low"), honest.get("high"))
        trust.append(
            f"on sentences they were not chosen on the effect is {number(honest['value'])}{interval}"
        )
    if digits(sites.get("stability")) is not None:
        trust.append(
            f"bootstrap samples choose them with a Jaccard index of {sites['stability']:.2f}"
        )
    if trust:
        text = "; ".join(trust)
        lines.append({"text": f"{text[0].upper()}{text[1:]}."})
    if sites.get("clear") is not None:
        text = verdict(sites["clear"])
        if not sites["clear"]:
            text += " Do not edit there on this evidence."
        lines.append({"text": text, "look": "ok" if sites["clear"] else "bad"})
    return lines + [{"text": str(w), "look": "warn"} for w in listed(sites.get("warnings"))]


def facts(run: Run, account: dict[str, Any], total: float | None) -> list[tuple[str, str]]:
    """Return the table of what was run."""
    about, record = run.notes["about.json"], run.record
    window = int(about.get("window") or 1)
    model = record.get("model")
    adapter = about.get("adapter") or (model.get("adapter") if isinstance(model, dict) else None)
    sigma, draw_sd = (digits(account.get(k)) for k in ("sigma", "draw_sd"))
    noise = f"sd {number(sigma)}; P(gold) varies by {number(draw_sd)} (sd) over draws"
    kept = account.get("kept", len(run.tables["pairs.parquet"]))
    return fact_rows(
        [
            ("Model", model_text(record, about.get("model"))),
            ("Adapter", adapter if isinstance(adapter, str) else None),
            ("Corruption", corruption_words(about)),
            ("Direction", direction_words(about)),
            ("Metric", f"{about.get('unit', '')} ({about.get('metric', '')})"),
            ("Method", method_words(about)),
            ("Restored together", f"windows of {window} layers" if window > 1 else "one state"),
            ("States", "all tokens of a role together" if about.get("by") == "role" else "one token at a time"),
            ("Cells", f"{len(run.effects or ()):,} effects of {kept:,} pairs"),
            ("Average total effect", total),
            ("Noise", noise if account.get("sigma") else None),
            ("Device", record.get("device")),
            ("Time", duration(record)),
        ]
    )  # fmt: skip


def self_checks(record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return every identity with its largest difference and whether it holds, and the cells
    compared.
    """
    allowed = digits(record.get("tolerance"))
    rows = []
    for name, value in record.items():
        x = digits(value)
        if name == "tolerance" or x is None or isinstance(value, bool):
            continue
        ok = allowed is None or x <= allowed
        words = CHECKS.get(name, name.replace("_", " "))
        rows.append({"name": words, "value": x, "allowed": allowed, "ok": ok})
    return rows, [str(c) for c in listed(record.get("cells_compared"))]


def top_sites(table: pd.DataFrame, n: int = 12) -> list[dict[str, Any]]:
    """Return the cells with the largest effects, with their sites spelled out."""
    best = table.sort_values("aie", ascending=False, kind="stable").head(n)
    by = "role" if "role" in best else "position"
    rows = rows_of(best)
    for row in rows:
        head = row["head"] if row["kind"] in HEAD_KINDS else ""
        row["site"] = f"L{row['layer']}.{row['kind']}{head}@{row[by]}"
    return rows


def curves(table: pd.DataFrame, unit: str, highlight: int = 6) -> list[dict[str, Any]]:
    """Return a chart per kind: AIE over layers, one line per role, all charts on one scale."""
    if "role" not in table:
        return []
    drawn = {
        str(kind): _role_lines(rows, highlight)
        for kind, rows in table[~table["kind"].isin(HEAD_KINDS)].groupby("kind", sort=False)
    }
    ys = y_range([line for lines in drawn.values() for line in lines])
    return [
        {
            "kind": kind,
            "chart": line_chart(lines, "layer", "AIE", ys=ys, title=f"AIE of {kind}, {unit}"),
            "legend": legend(lines),
        }
        for kind, lines in drawn.items()
    ]


def _role_lines(rows: pd.DataFrame, highlight: int) -> list[Line]:
    """Return the curves of one kind; roles without a sizeable effect are quiet."""
    peak = rows.groupby("role")["aie"].apply(lambda x: x.abs().max())
    peak = peak[peak > 0.05 * peak.max()].sort_values(ascending=False, kind="stable")
    bright = set(peak.index[:highlight])
    lines = []
    for role in in_reading_order(rows["role"]):
        one = rows[rows["role"] == role].sort_values("layer")
        colour, dash = ROLE_STYLES.get(role, ("", "-"))
        look = (COLOURS.index(colour) if colour in COLOURS else 7, ["-", "--", ":"].index(dash))
        aie, low, high = ([digits(v) for v in one[c]] for c in ("aie", "ci_low", "ci_high"))
        layers = [int(x) for x in one["layer"]]
        lines.append(Line(role, layers, aie, low, high, look=look, quiet=role not in bright))
    return lines
