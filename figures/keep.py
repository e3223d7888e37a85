"""Keep the small part of what a study leaves: tables, the chosen sites, one example, a record."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from mech_absa.patch.effects import Effects
from mech_absa.patch.gradients import agreement
from mech_absa.records import atomic, write_json
from mech_absa.train.matrix import summary

from .interaction import keep_interaction
from .plan import Plan

ESTIMATES = ("atp", "atpstar", "relp", "ig")
METRICS = ("logit_diff", "prob")


def keep_map(plan: Plan, work: Path, results: Path) -> None:
    """Keep the averaged map and the sites that were chosen from it, if any were."""
    folder = work / plan.steps[0].name
    write_table(pd.read_csv(folder / "importance.csv"), results / "importance.csv")
    for name in ("sites.json", "about.json"):
        if (folder / name).exists():
            write_json(results / name, json.loads((folder / name).read_text(encoding="utf-8")))


def keep_trace(plan: Plan, work: Path, results: Path) -> None:
    """Keep the same, and one pair word by word: the one with the median total effect."""
    keep_map(plan, work, results)
    effects = Effects.load(work / plan.steps[0].name)
    typical = effects.total.sort_values(kind="stable").index[(len(effects.total) - 1) // 2]
    frame = effects.frame[
        (effects.frame["example_id"] == typical) & (effects.frame["kind"] != "head")
    ]
    one = effects.pairs[effects.pairs["example_id"] == typical]
    about = dict(effects.about) | {"kept": 1}
    replace(effects, frame=frame, pairs=one, about=about).save(results / "example")


def keep_matrix(plan: Plan, work: Path, results: Path) -> None:
    """Keep the rows of all steps, each with its step's marks; the unedited model stands once."""
    table = pd.concat(
        [pd.read_csv(work / step.name / "matrix.csv").assign(**step.mark) for step in plan.steps],
        ignore_index=True,
    )
    again = (table["method"] == "zero_shot") & table.duplicated(["method", "test"])
    table = table[~again]
    write_table(table, results / "matrix.csv")
    if not any(step.mark for step in plan.steps):
        rows = table.astype(object).where(table.notna(), "").to_dict("records")
        write_table(summary(rows), results / "summary.csv")


def keep_estimates(plan: Plan, work: Path, results: Path) -> None:
    """Keep exact and estimated maps side by side, one row per cell, and how well they agree."""
    parts = []
    for metric in METRICS:
        keys = ["kind", "layer", "head", "role"]
        maps = {
            m: pd.read_csv(work / f"{metric}_{m}" / "importance.csv").set_index(keys)["aie"]
            for m in ("exact", *ESTIMATES)
        }
        parts.append(pd.DataFrame(maps).reset_index().assign(metric=metric))
        about = json.loads((work / f"{metric}_exact" / "about.json").read_text(encoding="utf-8"))
        write_json(results / f"about_{metric}.json", about)
    table = pd.concat(parts, ignore_index=True)
    write_table(table, results / "agreement.csv")
    write_table(agreements(table), results / "summary.csv")


def agreements(table: pd.DataFrame) -> pd.DataFrame:
    """Return how well each estimate stands for the exact map, one row per metric and method.

    Cells whose exact effect is 0 are left out, since most of them are 0 for certain. The overlap is
    that of the largest twentieth of the cells.
    """
    rows = []
    for metric, cells in table[table["exact"] != 0].groupby("metric", sort=False):
        largest = max(1, len(cells) // 20)
        for method in ESTIMATES:
            row = agreement(cells["exact"], cells[method], largest)
            rows.append({"metric": metric, "method": method, **row})
    return pd.DataFrame(rows)


def keep_directions(plan: Plan, work: Path, results: Path) -> None:
    """Keep the effects of both directions and their difference, one row per cell."""
    keep_interaction(work, results)


def keep_curves(plan: Plan, work: Path, results: Path) -> None:
    for name in ("faithfulness", "pruning"):
        write_table(pd.read_csv(work / plan.steps[0].name / f"{name}.csv"), results / f"{name}.csv")


def write_table(table: pd.DataFrame, path: Path) -> None:
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.5g")


def record(
    plan: Plan, work: Path, commands: Mapping[str, str], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Return a study's run.json: how each of its steps was made, and when."""
    runs = {
        s.name: json.loads((work / s.name / "run.json").read_text(encoding="utf-8"))
        for s in plan.steps
    }
    last = max((work / s.name / "run.json").stat().st_mtime for s in plan.steps)
    return {
        "study": plan.name, "question": plan.question, "date": time.strftime("%Y-%m-%d", time.gmtime(last)), "commands": dict(commands),
        "seconds": {name: round(value, 1) for name, value in seconds.items()}, "runs": runs,
    }  # fmt: skip


def scrubbed(value: Any, names: Mapping[str, str]) -> Any:
    """Return `value` with the folders of this machine replaced by their names."""
    if isinstance(value, dict):
        return {k: scrubbed(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [scrubbed(v, names) for v in value]
    if isinstance(value, str):
        for folder, name in names.items():
            value = value.replace(folder, name)
    return value
