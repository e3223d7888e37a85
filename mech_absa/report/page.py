"""One page from the folders of runs, whole in one file: it opens from disk, with no network, and years later.

Tables, charts and words are HTML, there without any script. Maps and the browsers of examples are drawn by a script of the page from data
of the page, which stand in it as JSON. Whatever comes from the data is text and stays text: the templates escape it, the JSON has its
`<`, `>` and `&` spelled as escapes, and the script only ever sets text. A content security policy forbids the page to load anything.

The same folders give the same bytes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from ..errors import ConfigError
from ..plots import ROLE_STYLES, corruption_words, direction_words, method_words
from ..records import plain, write_text
from ..sites import HEAD_KINDS, ROLES
from . import maps
from .charts import Line, interval_chart, legend, line_chart, nice
from .runs import WORDS, Run, read_runs

TEMPLATES = Path(__file__).parent / "templates"
PREDICTIONS = 3000
"""Rows of predictions in one page; wrong answers are kept before right ones."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#5f6368")
"""The order of the page's colours c0 to c7; see page.css."""


def write_report(folder: str | Path | Iterable[str | Path], out: str | Path | None = None) -> Path:
    """`report.html` of a run, or of several side by side.

    Args:
        folder: of a trace, a training, an evaluation or a domain matrix; or several.
        out: the file; default `report.html` in the (first) folder, `comparison.html` for several.

    Returns:
        the file written.

    Raises:
        DataError: a folder holds no finished run.
    """
    folders = [Path(folder)] if isinstance(folder, (str, Path)) else [Path(f) for f in folder]
    if not folders:
        raise ConfigError(
            "no folder was given; at least one --out folder of a finished run is needed"
        )
    runs = read_runs(folders)
    path = (
        Path(out)
        if out is not None
        else folders[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    )
    write_text(path, render(runs))
    return path


def leave_report(folder: str | Path) -> Path | None:
    """`report.html` of a run that has just ended; where it cannot be made, the reason is said and the run stands all the same."""
    try:
        return write_report(folder)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(
            f"warning: {Path(folder) / 'report.html'} could not be written ({reason}); all other files are there",
            file=sys.stderr,
        )
        return None


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape(default=True, default_for_string=True), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "percent": percent, "pretty": pretty}
    environment.tests["number"] = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
    budget = maps.BUDGET // max(1, sum(r.kind == "trace" for r in runs))
    views = [VIEWS[r.kind](r, budget) for r in runs]
    for i, view in enumerate(views):
        view["id"] = f"run{i}"
    data = {"runs": [v.pop("data") for v in views]}
    title = (
        f"{WORDS[runs[0].kind]}: {runs[0].name}"
        if len(runs) == 1
        else f"Comparison of {len(runs)} runs"
    )
    return environment.get_template("report.html").render(
        title=title, views=views, comparison=comparison(runs) if len(runs) > 1 else None, data=embedded(data),
        css=Markup(_read("page.css")), js=Markup(_read("page.js")),
    )  # fmt: skip


def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def embedded(data: Any) -> Markup:
    """JSON for a script element: no character in it can end the element, open a comment, or begin an entity."""
    how: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    try:
        text = json.dumps(data, **how)
    except ValueError:  # a number that is none; walking everything to look for one is slow
        text = json.dumps(_finite(data), **how)
    for character, escape in (
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("&", "\\u0026"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        text = text.replace(character, escape)
    return Markup(text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- words and numbers ----------------------------------------------------------------------------------------------------------


def number(value: Any, n: int = 4) -> str:
    """A number as it is read: thousands apart, `n` significant digits, a dash where there is none."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no"}.get(value, "–")  # type: ignore[arg-type]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return "–" if not math.isfinite(value) else f"{value:.{n}g}".replace("-", "−")
    return str(value)


def percent(value: Any) -> str:
    x = maps.digits(value, 12)
    return "–" if x is None else f"{100 * x:.1f}"


def pretty(value: Any) -> str:
    return json.dumps(plain(value), indent=2, ensure_ascii=False)


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows with Python's own numbers, None for what is missing."""
    return [
        {str(k): None if pd.isna(v) else v for k, v in row.items()}
        for row in table.astype(object).to_dict("records")
    ]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value in (None, {}) else [value]


def _model(record: dict[str, Any], config: dict[str, Any]) -> str:
    model = record.get("model") or config.get("model") or ""
    if not isinstance(model, dict):
        return str(model)
    size = f", {model['parameters']:,} parameters" if model.get("parameters") else ""
    digest = f", weights {str(model['sha256'])[:12]}" if model.get("sha256") else ""
    return f"{model.get('name', '')}{size}{digest}"


def _sources(record: dict[str, Any], key: str = "data") -> list[dict[str, Any]]:
    """The data of a run: source, examples, classes, and what was left out of the file."""
    found = []
    for d in _listed(record.get(key)):
        if not isinstance(d, dict):
            d = {"source": str(d)}
        classes = ", ".join(f"{n} {c}" for c, n in (d.get("classes") or {}).items())
        out = [f"{n} ({reason})" for reason, n in (d.get("left_out") or {}).items()]
        if d.get("ambiguous"):
            out.append(f"{d['ambiguous']} rows are ambiguous: their aspect occurs more than once")
        found.append(
            {
                "source": str(d.get("source", "")),
                "examples": d.get("examples"),
                "classes": classes,
                "left_out": out,
                "sha256": str(d.get("sha256", ""))[:12],
            }
        )
    return found


def _basics(run: Run) -> dict[str, Any]:
    record = run.record
    seconds = record.get("seconds")
    return {
        "kind": run.kind, "word": WORDS[run.kind], "name": run.name, "folder": str(run.path), "config": run.config,
        "versions": record.get("versions") or {}, "key": record.get("key"), "sources": _sources(record), "seconds": seconds,
        "warnings": [str(w) for w in _listed(record.get("warnings"))],
    }  # fmt: skip


# ---- a trace --------------------------------------------------------------------------------------------------------------------


CONTROLS = {
    "estimate_against_exact": "The estimate against exact effects of cells drawn at random",
    "half_precision_control": "Half precision against float32",
}


def trace_view(run: Run, budget: int) -> dict[str, Any]:
    """What the template says of a trace, and under `data` what the script draws."""
    about, record = run.notes["about.json"], run.record
    single = maps.examples(run, budget)
    account = {**about, **(record.get("pairs") or {})}
    considered, kept = (
        account.get("considered"),
        account.get("kept", len(run.tables["pairs.parquet"])),
    )
    model = _model(record, {"model": about.get("model")})
    adapter = (
        about.get("adapter") or (record.get("model") or {}).get("adapter")
        if isinstance(record.get("model"), dict)
        else about.get("adapter")
    )
    window = int(about.get("window") or 1)
    noise = f"sd {number(float(account.get('sigma') or 0))}; P(gold) varies by {number(float(account.get('draw_sd') or 0))} (sd) over draws"
    total = run.tables["pairs.parquet"]
    effect = (total["clean"] - total["corrupted"]).mean()
    facts = [
        ("Model", model), ("Adapter", adapter if isinstance(adapter, str) else None),
        ("Corruption", corruption_words(about)), ("Direction", direction_words(about)),
        ("Metric", f"{about.get('unit', '')} ({about.get('metric', '')})"), ("Method", method_words(about)),
        ("Restored together", f"windows of {window} layers" if window > 1 else "one state"),
        ("States", "all tokens of a role together" if about.get("by") == "role" else "one token at a time"),
        ("Cells", f"{len(run.tables['effects.parquet']):,} effects of {kept:,} pairs"),
        ("Average total effect", number(float(effect)) if pd.notna(effect) else None),
        ("Noise", noise if account.get("sigma") else None),
        ("Device", record.get("device")), ("Time", f"{number(record.get('seconds'), 3)} s" if record.get("seconds") is not None else None),
    ]  # fmt: skip
    dropped = account.get("dropped") or {}
    checks, said = self_checks(record.get("self_checks") or about.get("self_checks") or {})
    return _basics(run) | {
        "facts": [(k, v) for k, v in facts if v], "template": about.get("template"), "labels": about.get("labels") or [],
        "kept": kept, "considered": considered, "dropped": dropped, "classes": account.get("classes_kept") or {}, "mixed": account.get("mixed_polarity"),
        "controls": [(words, _flat(record[k])) for k, words in CONTROLS.items() if isinstance(record.get(k), dict)],
        "checks": checks, "compared": said, "sites": run.notes.get("sites.json"), "top": top_sites(run.tables["importance.csv"]),
        "curves": curves(run.tables["importance.csv"], str(about.get("unit", ""))), "shown": len(single["list"]), "total": single["total"],
        "heads": any(k in HEAD_KINDS for k in single["kinds"]), "level": about.get("level", 0.95), "denoise": about.get("direction") == "denoise",
        "unit": about.get("unit", ""),
        "data": {
            "kind": "trace", "unit": about.get("unit", ""), "metric": about.get("metric", ""), "direction": about.get("direction", ""),
            "average": maps.average(run), "examples": single,
        },
    }  # fmt: skip


def self_checks(found: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Every identity with its largest difference and whether that is allowed; and the cells that were compared."""
    words = {
        "engine_against_loop": "the engine agrees with one forward pass a cell",
        "same_onto_same": "putting a run's own states back changes nothing",
        "all_of_resid_pre_0": "restoring all of the stream before layer 0 gives the other run",
        "left_of_first_difference": "nothing changes left of the first token that differs",
    }
    allowed = maps.digits(found.get("tolerance"))
    rows = []
    for name, value in found.items():
        x = maps.digits(value)
        if name == "tolerance" or x is None or isinstance(value, bool):
            continue
        rows.append(
            {
                "name": words.get(name, name.replace("_", " ")),
                "value": x,
                "allowed": allowed,
                "ok": allowed is None or x <= allowed,
            }
        )
    return rows, [str(c) for c in _listed(found.get("cells_compared"))]


def top_sites(table: pd.DataFrame, n: int = 12) -> list[dict[str, Any]]:
    best = table.sort_values("aie", ascending=False, kind="stable").head(n)
    by = "role" if "role" in best else "position"
    rows = rows_of(best)
    for row in rows:
        row["site"] = (
            f"L{row['layer']}.{row['kind']}{row['head'] if row['kind'] in HEAD_KINDS else ''}@{row[by]}"
        )
    return rows


def curves(table: pd.DataFrame, unit: str, highlight: int = 6) -> list[dict[str, Any]]:
    """A chart a kind: AIE over layers, one line a role."""
    if "role" not in table:
        return []
    found = []
    for kind, rows in table[~table["kind"].isin(HEAD_KINDS)].groupby("kind", sort=False):
        peak = rows.groupby("role")["aie"].apply(lambda x: x.abs().max())
        bright = set(
            peak[peak > 0.05 * peak.max()]
            .sort_values(ascending=False, kind="stable")
            .index[:highlight]
        )
        drawn = []
        for role in (r for r in ROLES if r in set(rows["role"])):
            one = rows[rows["role"] == role].sort_values("layer")
            colour, dash = ROLE_STYLES[role]
            look = (
                COLOURS.index(colour) if colour in COLOURS else 7,
                {"-": 0, "--": 1, ":": 2}[dash],
            )
            ends = [[maps.digits(v) for v in one[c]] for c in ("aie", "ci_low", "ci_high")]
            drawn.append(
                Line(
                    role,
                    one["layer"].tolist(),
                    ends[0],
                    ends[1],
                    ends[2],
                    look=look,
                    quiet=role not in bright,
                )
            )
        found.append(
            {
                "kind": kind,
                "chart": line_chart(drawn, "layer", "AIE", title=f"AIE of {kind}, {unit}"),
                "legend": legend(drawn),
            }
        )
    return found


# ---- a training -----------------------------------------------------------------------------------------------------------------


def train_view(run: Run, budget: int) -> dict[str, Any]:
    """What the template says of an edit and its training."""
    record, edit = run.record, run.notes["edit.json"]
    trained = {**(edit.get("record") or {}), **(record.get("edit") or {})}
    preset = record.get("preset") or {}
    model = _model(record, {"model": (edit.get("base") or {}).get("name")})
    share = edit.get("share")
    facts = [
        ("Model", model), ("Preset", preset.get("name")), ("Sites", " ".join(map(str, edit.get("sites") or []))),
        ("Trainable parameters", f"{edit.get('n_parameters', 0):,}" + (f" ({100 * share:.3g} % of the model)" if share else "")),
        ("Epochs", preset.get("epochs")), ("Batch size", preset.get("batch_size")), ("Schedule", preset.get("schedule")), ("Loss", preset.get("loss")),
        ("Seed", run.config.get("seed")), ("Stopped", trained.get("stopped")),
        ("Memory", f"{record['peak_memory_bytes'] / 2**20:,.0f} MiB at most" if record.get("peak_memory_bytes") else None),
        ("Time", f"{number(record.get('seconds'), 3)} s" if record.get("seconds") is not None else None),
    ]  # fmt: skip
    history = run.tables.get("history.csv")
    known = {
        k: v
        for k, v in trained.items()
        if isinstance(v, (int, float, str, bool))
        and str(v).strip()
        and k not in ("stopped", "share", "parameters", "seed", "data_sha256")
    }
    return _basics(run) | {
        "facts": [(k, number(v)) for k, v in facts if v not in (None, "")], "formulas": edit.get("formulas") or {}, "parts": _parts(edit.get("parts") or []),
        "charts": history_charts([(run.name, history)]) if history is not None else [], "known": known,
        "validation": _sources(record, "validation_data"), "data": {"kind": "train"},
    }  # fmt: skip


def _parts(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts that differ in their place only, in one row."""
    grouped: dict[str, dict[str, Any]] = {}
    for p in parts:
        options = ", ".join(f"{k} {number(v)}" for k, v in (p.get("options") or {}).items())
        row = grouped.setdefault(
            f"{p.get('family')}|{options}|{p.get('lr')}",
            {"family": p.get("family"), "options": options, "lr": p.get("lr"), "places": []},
        )
        row["places"].append(str(p.get("place", p.get("at", ""))))
    return list(grouped.values())


def history_charts(histories: Sequence[tuple[str, pd.DataFrame]]) -> list[dict[str, Any]]:
    """A chart a measured column, one line a run; loss and validation loss share one."""
    drawn: dict[str, list[Line]] = {}
    for i, (name, table) in enumerate(histories):
        x_name = next((c for c in ("step", "examples", "epoch") if c in table), None)
        for column in table.columns:
            if column in (
                "step",
                "epoch",
                "batch",
                "examples",
                "seconds",
            ) or not pd.api.types.is_numeric_dtype(table[column]):
                continue
            rows = table[table[column].notna()]
            if rows.empty:
                continue
            group, dash, label = (
                ("loss", int(column != "loss"), column)
                if column in ("loss", "validation_loss")
                else (column, 0, column)
            )
            name_of = label if len(histories) == 1 else f"{name}: {label}"
            x = rows[x_name].tolist() if x_name else list(range(len(rows)))
            drawn.setdefault(group, []).append(
                Line(
                    name_of,
                    x,
                    [maps.digits(v) for v in rows[column]],
                    look=(i % 8 if len(histories) > 1 else dash, dash),
                )
            )
    step = next(
        (c for c in ("step", "examples", "epoch") if histories and c in histories[0][1]), "row"
    )
    return [
        {
            "name": group.replace("_", " "),
            "chart": line_chart(lines, step, group.replace("_", " "), zero=group == "loss"),
            "legend": legend(lines),
        }
        for group, lines in drawn.items()
    ]


# ---- an evaluation --------------------------------------------------------------------------------------------------------------


DECODING = {
    "label": "the label string with the largest log-probability",
    "generate": "greedy free text, exact match",
}


def evaluate_view(run: Run, budget: int) -> dict[str, Any]:
    """What the template says of scores and side effects."""
    record, scores = run.record, run.tables["scores.csv"]
    facts = [
        ("Model", _model(record, run.config)), ("Systems", ", ".join(map(str, scores["system"].drop_duplicates()))),
        ("Decoding", DECODING.get(str(run.config.get("decode")))),
        ("Device", record.get("device")), ("Time", f"{number(record.get('seconds'), 3)} s" if record.get("seconds") is not None else None),
    ]  # fmt: skip
    table = score_rows(scores)
    everything = [r for r in table if r["subset"] == "all"] or table
    answers, total = predictions(run)
    return _basics(run) | {
        "facts": [(k, v) for k, v in facts if v], "scores": table,
        "chart": accuracy_chart(everything, ("system", "data")),
        "confusions": confusions(record), "comparisons": comparison_rows(run.tables.get("comparisons.csv")),
        "aggregate": aggregate_rows(run.tables.get("aggregate.csv")),
        "effects": side_effects(run.notes.get("side_effects.json") or {}), "train": _sources(record, "train"),
        "shown": len(answers["rows"]), "total": total, "data": {"kind": "evaluate", "predictions": answers},
    }  # fmt: skip


SCORE_COLUMNS = (
    "system", "data", "subset", "n", "accuracy", "accuracy_low", "accuracy_high", "macro_f1", "macro_f1_low", "macro_f1_high", "majority",
    "gold_probability", "unanswered", "leaked",
)  # fmt: skip


def score_rows(scores: pd.DataFrame) -> list[dict[str, Any]]:
    rows = rows_of(scores)
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
        for r in rows
    ]


def accuracy_chart(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Markup:
    """Accuracies with their intervals, and what the most frequent class would score."""

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
    """Two systems on the same rows, spelled out: columns -> text."""

    def points(r: dict[str, Any], what: str, low: str, high: str) -> str:
        return f"{_signed(r.get(what))} [{_signed(r.get(low))}, {_signed(r.get(high))}]"

    return [
        {
            "first": f"{r.get('first')}", "second": f"{r.get('second')}", "data": str(r.get("data") or ""), "n": number(r.get("n")),
            "accuracy, points": points(r, "difference", "difference_low", "difference_high"), "p (sentences)": number(r.get("p_sign_flip"), 2),
            "macro-F1, points": points(r, "macro_f1_difference", "macro_f1_low", "macro_f1_high"),
            "right alone": f"{number(r.get('only_first_right'))} : {number(r.get('only_second_right'))}", "p (McNemar)": number(r.get("p_mcnemar"), 2),
        }
        for r in ([] if table is None else rows_of(table))
    ]  # fmt: skip


def aggregate_rows(table: pd.DataFrame | None) -> list[dict[str, str]]:
    """Several seeds of one method, spelled out; intervals of shares end at 0 and 100."""

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


def _signed(share: Any) -> str:
    x = maps.digits(share, 12)
    return "–" if x is None else f"{100 * x:+.1f}".replace("-", "−")


def confusions(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The confusion matrix of every system and data set, over all rows."""
    found = []
    for entry in _listed(record.get("scores")):
        whole = entry.get("all") if isinstance(entry, dict) else None
        if not isinstance(whole, dict) or not whole.get("confusion"):
            continue
        names = [k.removeprefix("f1_") for k in whole if k.startswith("f1_")]
        answers = [*names, "none"][: len(whole["confusion"][0])]
        rows = [
            (name, [(c, c / (sum(row) or 1), name == answers[j]) for j, c in enumerate(row)])
            for name, row in zip(names, whole["confusion"], strict=False)
        ]
        found.append(
            {
                "system": entry.get("system"),
                "data": entry.get("data"),
                "answers": answers,
                "rows": rows,
            }
        )
    return found


def side_effects(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every edit's side effects: the table for reading where the run has one, and every number as a flat row."""
    return [
        {
            "name": name,
            "table": record.get("summary") or [],
            "rows": _flat({k: v for k, v in record.items() if k != "summary"}),
        }
        for name, record in found.items()
    ]


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        if {"value", "low", "high"} <= set(value):
            between = (
                ""
                if value["low"] is None
                else f" [{number(value['low'])}, {number(value['high'])}]"
            )
            return [(path, number(value["value"]) + between)]
        return [
            row for k, v in value.items() for row in _flat(v, f"{path} · {k}" if path else str(k))
        ]
    if isinstance(value, list):
        path = path.replace("_", " ")
        if all(not isinstance(v, (dict, list)) for v in value):
            return (
                [
                    (
                        path,
                        ", ".join(number(v) for v in value[:12])
                        + (" …" if len(value) > 12 else ""),
                    )
                ]
                if value
                else []
            )
        return [
            row
            for i, v in enumerate(value)
            for row in _flat(
                v,
                f"{path} · {v.get('name') or v.get('data') or i + 1}"
                if isinstance(v, dict)
                else f"{path} · {i + 1}",
            )
        ]
    return [(path.replace("_", " "), number(value))]


def predictions(run: Run, most: int = PREDICTIONS) -> tuple[dict[str, Any], int]:
    """Answers for the browser, and how many there were."""
    table = run.tables.get("predictions.parquet")
    if table is None:
        return {"systems": [], "labels": [], "rows": []}, 0
    total = len(table)
    if total > most:
        wrong_first = table["correct"].astype(bool).sort_values(kind="stable").index[:most]
        table = table.loc[sorted(wrong_first)]
    labels = [c.removeprefix("logprob_") for c in table.columns if c.startswith("logprob_")]
    systems = list(
        dict.fromkeys(f"{s} · {d}" for s, d in zip(table["system"], table["data"], strict=True))
    )
    rows = []
    for r in rows_of(table):
        scores = [r.get(f"logprob_{c}") for c in labels]
        share = [maps.digits(math.exp(x), 3) if x is not None else None for x in scores]
        rows.append(
            [systems.index(f"{r['system']} · {r['data']}"), str(r["id"]), str(r["sentence"]), str(r["aspect"]), str(r["gold"]),
             None if r["predicted"] is None else str(r["predicted"]), int(bool(r["correct"])), share, r.get("text")]
        )  # fmt: skip
    return {"systems": systems, "labels": labels, "rows": rows}, total


# ---- a domain matrix --------------------------------------------------------------------------------------------------------------


def matrix_view(run: Run, budget: int) -> dict[str, Any]:
    """What the template says of every domain against every domain."""
    record, config, table = run.record, run.config, run.tables["matrix.csv"]
    rows = summary_rows(run.tables["summary.csv"])
    accounts = [d for d in (record.get("domains") or {}).values() if isinstance(d, dict)]
    both = {
        word: _sources({"data": [d[word] for d in accounts if isinstance(d.get(word), dict)]})
        for word in ("train", "test")
    }
    facts = [
        ("Model", _model(record, config)), ("Domains", ", ".join(map(str, table["test"].drop_duplicates()))),
        ("Trainings", record.get("trainings")), ("Seeds", ", ".join(map(str, config.get("seeds") or []))),
        ("Sites", " ".join(map(str, record.get("sites") or []))), ("Rank", config.get("rank")), ("Epochs", config.get("epochs")),
        ("Validation share", config.get("validation")), ("Device", (record.get("model") or {}).get("device")),
        ("Time", f"{number(record.get('seconds'), 3)} s" if record.get("seconds") is not None else None),
    ]  # fmt: skip
    return _basics(run) | {
        "facts": [(k, number(v)) for k, v in facts if v not in (None, "")], "domains": both, "summary": rows,
        "chart": interval_chart(_spread(rows), "accuracy (%)"),
        "maps": domain_maps(table), "data": {"kind": "matrix"},
    }  # fmt: skip


def summary_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A row a method; columns that an older run lacks are None."""
    columns = ("method", "trainable", "share", "seeds", "seconds", "peak_memory_mib")
    measured = [
        f"{m}_{where}{sd}"
        for m in ("accuracy", "macro_f1")
        for where in ("in", "out")
        for sd in ("", "_sd")
    ]
    return [{c: r.get(c) for c in (*columns, *measured)} for r in rows_of(table)]


def _spread(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float, float | None, float | None]]:
    """(method and where, accuracy, one standard deviation over the seeds below, and above), in percent."""
    drawn: list[tuple[str, float, float | None, float | None]] = []
    for r in rows:
        for where, words in (("in", " in domain" if r["trainable"] else ""), ("out", " across")):
            mean, sd = r[f"accuracy_{where}"], r[f"accuracy_{where}_sd"]
            if mean is not None:
                drawn.append(
                    (
                        f"{r['method']}{words}",
                        100 * mean,
                        *((None, None) if sd is None else (100 * (mean - sd), 100 * (mean + sd))),
                    )
                )
    return drawn


def domain_maps(table: pd.DataFrame) -> list[dict[str, Any]]:
    """One heat map a method: training domain x test domain, means over seeds, all on one scale."""
    table = table.assign(train=table["train"].fillna(""))
    tests = [str(t) for t in table["test"].drop_duplicates()]
    means = table.groupby(["method", "train", "test"])["accuracy"].mean()
    low, high = float(means.min()), float(means.max())
    majority = table.groupby("test")["majority"].mean() if "majority" in table else {}
    found = []
    for method, of in table.groupby("method", sort=False):
        lines = []
        for train, rows in of.groupby("train", sort=False):
            cells: list[dict[str, Any] | None] = []
            for test in tests:
                seeds = rows[rows["test"] == test]["accuracy"].dropna()
                if seeds.empty:
                    cells.append(None)
                    continue
                mean = float(seeds.mean())
                spread = f" ± {100 * seeds.std(ddof=1):.1f}" if len(seeds) > 1 else ""
                said = f"{method}, {f'trained on {train}' if train else 'untrained'}, tested on {test}: {', '.join(percent(x) for x in seeds)}"
                cells.append(
                    {
                        "mean": mean,
                        "spread": spread,
                        "said": said,
                        "v": (mean - low) / ((high - low) or 1),
                        "own": train == test,
                    }
                )
            lines.append((str(train), cells))
        found.append(
            {
                "method": str(method),
                "tests": tests,
                "lines": lines,
                "majority": [majority.get(t) for t in tests],
            }
        )
    return found


# ---- several runs ---------------------------------------------------------------------------------------------------------------


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """Runs of one kind side by side."""
    traces, trainings, evaluations, matrices = (
        [r for r in runs if r.kind == k] for k in ("trace", "train", "evaluate", "matrix")
    )
    histories = [(r.name, r.tables["history.csv"]) for r in trainings if "history.csv" in r.tables]
    scores = [
        {**row, "run": r.name} for r in evaluations for row in score_rows(r.tables["scores.csv"])
    ]
    everything = [r for r in scores if r["subset"] == "all"] or scores
    return {
        "runs": [{"name": r.name, "word": WORDS[r.kind]} for r in runs], "traces": _trace_table(traces), "agreement": _agreement(traces),
        "trainings": [_training_row(r) for r in trainings], "charts": history_charts(histories) if len(histories) > 1 else [],
        "scores": scores, "chart": accuracy_chart(everything, ("run", "system", "data")),
        "matrices": [{**row, "run": r.name} for r in matrices for row in summary_rows(r.tables["summary.csv"])],
    }  # fmt: skip


def _trace_table(traces: Sequence[Run]) -> list[dict[str, Any]]:
    found = []
    for r in traces:
        about, pairs = r.notes["about.json"], r.tables["pairs.parquet"]
        best = top_sites(r.tables["importance.csv"], 1)
        sites = r.notes.get("sites.json") or {}
        found.append(
            {
                "name": r.name, "model": about.get("model"), "corruption": corruption_words(about), "direction": direction_words(about),
                "method": method_words(about), "metric": about.get("metric"), "n": len(pairs),
                "total": maps.digits((pairs["clean"] - pairs["corrupted"]).mean()),
                "best": best[0] if best else None, "sites": ", ".join(map(str, sites.get("sites", []))),
            }
        )  # fmt: skip
    return found


def _agreement(traces: Sequence[Run]) -> list[dict[str, Any]]:
    """Rank correlation of the averages of every two traces over the cells they share."""
    from ..stats import spearman_interval

    found = []
    for i, a in enumerate(traces):
        for b in traces[i + 1 :]:
            x, y = a.tables["importance.csv"], b.tables["importance.csv"]
            keys = [k for k in ("kind", "layer", "head", "role", "position") if k in x and k in y]
            both = x.merge(y, on=keys, suffixes=("_x", "_y"))[["aie_x", "aie_y"]].dropna()
            if len(both) < 3:
                found.append({"a": a.name, "b": b.name, "n": len(both), "rho": None})
                continue
            rho = spearman_interval(both["aie_x"].to_numpy(), both["aie_y"].to_numpy(), draws=500)
            found.append(
                {
                    "a": a.name,
                    "b": b.name,
                    "n": len(both),
                    "rho": maps.digits(rho.value, 3),
                    "low": maps.digits(rho.low, 3),
                    "high": maps.digits(rho.high, 3),
                }
            )
    return found


def _training_row(run: Run) -> dict[str, Any]:
    edit, history = run.notes["edit.json"], run.tables.get("history.csv")

    def last(column: str) -> float | None:
        known = (
            history[column].dropna().tolist() if history is not None and column in history else []
        )
        return maps.digits(known[-1]) if known else None

    return {
        "name": run.name, "preset": (run.record.get("preset") or {}).get("name"), "sites": ", ".join(map(str, edit.get("sites") or [])),
        "parameters": edit.get("n_parameters"), "share": edit.get("share"), "loss": last("loss"), "validation_loss": last("validation_loss"),
        "validation_accuracy": last("validation_accuracy"), "seconds": maps.digits(run.record.get("seconds"), 3),
    }  # fmt: skip


VIEWS = {"trace": trace_view, "train": train_view, "evaluate": evaluate_view, "matrix": matrix_view}
__all__ = ["embedded", "leave_report", "nice", "render", "write_report"]
