"""The view of an evaluation: scores, what the edit fixed and broke, side effects, answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from ..charts import interval_chart
from ..runs import Run
from ..text import bracket, digits, listed, number, percent, rows_of, signed
from .cards import edit_entry, fairness, scorecard
from .common import basics, duration, fact_rows, model_text, sources

ANSWERS = 3000
"""Examples whose answers one page holds; those that a system got wrong are kept first."""
DECODING = {
    "label": "the label string with the largest log-probability",
    "generate": "greedy free text, exact match",
}
SCORE_COLUMNS = (
    "system", "data", "subset", "n", "accuracy", "accuracy_low", "accuracy_high", "macro_f1", "macro_f1_low", "macro_f1_high",
    "majority", "gold_probability", "unanswered", "leaked",
)  # fmt: skip


def evaluate_view(run: Run, budget: int) -> dict[str, Any]:
    """Return what the template says of scores and side effects, and the answers for the browser."""
    record, scores = run.record, run.tables["scores.csv"]
    rows = score_rows(scores)
    whole = [r for r in rows if r["subset"] == "all"] or rows
    answer_data, total = answers(run.tables.get("predictions.parquet"))
    effects = side_effects(run.notes.get("side_effects.json") or {})
    compared = run.tables.get("comparisons.csv")
    facts = [
        ("Model", model_text(record, run.config.get("model"))),
        ("Systems", ", ".join(map(str, scores["system"].drop_duplicates()))),
        ("Decoding", DECODING.get(str(run.config.get("decode")))),
        ("Device", record.get("device")),
        ("Time", duration(record)),
    ]
    return basics(run) | {
        "conclusion": conclusion(whole, compared, effects), "facts": fact_rows(facts), "scores": rows,
        "chart": accuracy_chart(whole, ("system", "data")), "confusions": confusions(record),
        "comparisons": comparison_rows(compared), "aggregate": aggregate_rows(run.tables.get("aggregate.csv")),
        "effects": effects, "scorecard": scorecard(run.notes.get("scorecard.json")),
        "fairness": fairness(run.tables.get("fairness.csv"), run.notes.get("fairness.json") or {}),
        "train": sources(record, "train"), "shown": len(answer_data["rows"]), "total": total,
        "data": {"kind": "evaluate", "name": run.name, "predictions": answer_data},
    }  # fmt: skip


def conclusion(
    rows: Sequence[dict[str, Any]],
    compared: pd.DataFrame | None,
    effects: Sequence[dict[str, Any]],
) -> list[dict[str, str]]:
    """Return the sentences on top: scores, differences with their intervals, and always the side
    effects.
    """
    lines = []
    for r in rows[:6]:
        interval = bracket(r["accuracy_low"], r["accuracy_high"], percent)
        majority = "" if r["majority"] is None else f"; always answering the most frequent class gives {percent(r['majority'])} %"  # fmt: skip
        lines.append(
            {"text": f"{r['system']} answers {percent(r['accuracy'])} %{interval} of {r['n']:,} rows of {r['data']}{majority}."}
        )  # fmt: skip
    if len(rows) > 6:
        lines.append({"text": f"{len(rows) - 6} more rows are in the table of scores."})
    for r in [] if compared is None else rows_of(compared)[:6]:
        low, high = digits(r.get("difference_low")), digits(r.get("difference_high"))
        shown = low is not None and high is not None and (low > 0 or high < 0)
        verdict = "" if shown else "; no difference is shown"
        only = (r.get("only_first_right"), r.get("only_second_right"))
        alone = "" if None in only else f"; {only[0]:,} rows fixed, {only[1]:,} broken"
        lines.append(
            {
                "text": f"{r.get('first')} minus {r.get('second')} on {r.get('data') or 'the same rows'}: {signed(r.get('difference'))} points"
                f"{bracket(low, high, signed)}{alone}{verdict}.",
                "look": "" if shown else "warn",
            }
        )
    for e in effects:
        words = "; ".join(effect_words(e["table"]))
        lines.append(
            {"text": f"Side effects of {e['name']}: {words or 'see the table below'}.", "look": "side"}
        )  # fmt: skip
    if not effects:
        lines.append(
            {
                "text": "Side effects were not measured; an edit can score well and still damage the model. Add --side-effects.",
                "look": "warn",
            }
        )
    return lines


def effect_words(table: Sequence[Mapping[str, str]]) -> list[str]:
    """Return side effects in words, those of other wordings together and without their questions.

    >>> row = {"measure": "generality: accuracy", "base": "70 %", "edited": "65 %", "note": "a, b?"}
    >>> effect_words([row, row | {"base": "40 %", "edited": "50 %"}])
    ['accuracy under other wordings 65 %, 50 % (base 70 %, 40 %)']
    """
    worded = [row for row in table if row["measure"].startswith("generality")]
    said = [_effect_words(row) for row in table if row not in worded]
    if worded:
        edited, base = (", ".join(row[name] for row in worded) for name in ("edited", "base"))
        said.insert(min(1, len(said)), f"accuracy under other wordings {edited} (base {base})")
    return said


def _effect_words(row: Mapping[str, str]) -> str:
    """Return one side effect: `unrelated text: KL 0.012 nats, top-1 the same at 98 %`."""
    base = f" (base {row['base']})" if row["base"] not in ("-", "–", "") else ""
    note = f", {row['note']}" if row["note"] else ""
    return f"{row['measure']} {row['edited']}{base}{note}"


# ---- scores -------------------------------------------------------------------------------------


def score_rows(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the table of scores with the F1 of every class that occurs."""
    classes = [c.removeprefix("f1_") for c in scores.columns if c.startswith("f1_")]
    return [
        {c: r.get(c) for c in SCORE_COLUMNS}
        | {
            "classes": [
                (c, r.get(f"f1_{c}"), r.get(f"support_{c}"))
                for c in classes
                if r.get(f"support_{c}")
            ]
        }
        for r in rows_of(scores)
    ]


def accuracy_chart(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Markup:
    """Draw accuracies with their intervals, and what the most frequent class would score."""

    def hundred(row: dict[str, Any], column: str) -> float | None:
        return None if row[column] is None else 100.0 * row[column]

    drawn = [
        (
            " · ".join(str(r[n]) for n in names),
            hundred(r, "accuracy") or 0.0,
            hundred(r, "accuracy_low"),
            hundred(r, "accuracy_high"),
        )
        for r in rows
    ]
    return interval_chart(drawn, "accuracy (%)", [hundred(r, "majority") for r in rows])


def comparison_rows(table: pd.DataFrame | None) -> list[dict[str, str]]:
    """Return two systems on the same rows, spelled out: column -> text."""

    def points(r: dict[str, Any], what: str, low: str, high: str) -> str:
        return f"{signed(r.get(what))} [{signed(r.get(low))}, {signed(r.get(high))}]"

    return [
        {
            "first": f"{r.get('first')}", "second": f"{r.get('second')}", "data": str(r.get("data") or ""), "n": number(r.get("n")),
            "accuracy, points": points(r, "difference", "difference_low", "difference_high"),
            "p (sentences)": number(r.get("p_sign_flip"), 2),
            "macro-F1, points": points(r, "macro_f1_difference", "macro_f1_low", "macro_f1_high"),
            "right alone": f"{number(r.get('only_first_right'))} : {number(r.get('only_second_right'))}",
            "p (McNemar)": number(r.get("p_mcnemar"), 2),
        }
        for r in ([] if table is None else rows_of(table))
    ]  # fmt: skip


def aggregate_rows(table: pd.DataFrame | None) -> list[dict[str, str]]:
    """Return several seeds of one method, spelled out; intervals of shares end at 0 and 100."""

    def spread(r: dict[str, Any], what: str) -> str:
        low, high = (
            None if r.get(f"{what}_{end}") is None else min(1.0, max(0.0, r[f"{what}_{end}"]))
            for end in ("low", "high")
        )
        return f"{percent(r.get(what))} ± {percent(r.get(f'{what}_sd'))} [{percent(low)}, {percent(high)}]"

    return [
        {
            "system": str(r.get("system")), "data": str(r.get("data") or ""), "seeds": number(r.get("seeds")),
            "accuracy, % ± sd": spread(r, "accuracy"), "macro-F1, % ± sd": spread(r, "macro_f1"),
        }
        for r in ([] if table is None else rows_of(table))
    ]  # fmt: skip


def confusions(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the confusion matrix of every system and data set, over all rows."""
    matrices = []
    for entry in listed(record.get("scores")):
        whole = entry.get("all") if isinstance(entry, dict) else None
        if not isinstance(whole, dict) or not whole.get("confusion"):
            continue
        names = [k.removeprefix("f1_") for k in whole if k.startswith("f1_")]
        columns = [*names, "none"][: len(whole["confusion"][0])]
        rows = [
            (name, [(c, c / (sum(row) or 1), name == columns[j]) for j, c in enumerate(row)])
            for name, row in zip(names, whole["confusion"], strict=False)
        ]
        matrices.append(
            {
                "system": entry.get("system"),
                "data": entry.get("data"),
                "answers": columns,
                "rows": rows,
            }
        )
    return matrices


def side_effects(notes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every edit's side effects: its table for reading, and every number as a flat row."""
    return [edit_entry(name, record) for name, record in notes.items()]


# ---- answers ------------------------------------------------------------------------------------


def answers(table: pd.DataFrame | None, most: int = ANSWERS) -> tuple[dict[str, Any], int]:
    """Return the answers of all systems to each example on one row, and how many examples there
    were.

    Rows that some system got wrong come first; if there are more than `most` rows, they are the
    ones that are kept.
    """
    if table is None:
        return {"systems": [], "labels": [], "sets": [], "rows": []}, 0
    keys = ["data", "id"]
    wrong = (~table["correct"].astype(bool)).groupby([table[k] for k in keys], sort=False).any()
    total = len(wrong)
    order = wrong.sort_values(ascending=False, kind="stable").index[:most]
    place = {key: i for i, key in enumerate(order)}
    labels = [c.removeprefix("logprob_") for c in table.columns if c.startswith("logprob_")]
    systems = [str(s) for s in table["system"].drop_duplicates()]
    sets = [str(d) for d in table["data"].drop_duplicates()]
    rows: list[list[Any]] = [[] for _ in order]
    for r in rows_of(table):
        i = place.get((r["data"], r["id"]))
        if i is None:
            continue
        if not rows[i]:
            where = sets.index(str(r["data"]))
            given = [str(r[k]) for k in ("id", "sentence", "aspect", "gold")]
            rows[i] = [where, *given, [None] * len(systems)]
        rows[i][5][systems.index(str(r["system"]))] = _answer(r, labels)
    return {"systems": systems, "labels": labels, "sets": sets, "rows": rows}, total


def _answer(row: dict[str, Any], labels: Sequence[str]) -> list[Any]:
    """Return what one system answered: label or None, right or wrong, shares of the labels, free
    text.
    """
    scores = [row.get(f"logprob_{c}") for c in labels]
    shares = [None if x is None else digits(math.exp(x), 3) for x in scores]
    predicted = None if row["predicted"] is None else str(row["predicted"])
    return [predicted, int(bool(row["correct"])), shares, row.get("text")]
