"""The report's interactive maps as a notebook shows them: the same scripts and styles, in a frame
of their own.

    importance_html(map)      the averaged maps: hover, arrow keys, CSV and PNG
    effects_html(effects)     the same, with the browser of single examples under them
    selection_html(choice)    the chosen sites, their effect and the verdict, over the map they are framed in

A frame without an address cannot reach the notebook around it, and its styles cannot change the
notebook's. Where frames are not shown (a web view of a kept notebook), a plain table below says the
same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..plots.words import corruption_words, facts
from ..records import About
from ..sites import HEAD_KINDS
from . import maps
from .runs import EffectRows, Run, with_whole_numbers
from .text import bracket, embedded, number, verdict
from .views.trace import mark_words, top_sites

if TYPE_CHECKING:
    from ..patch.effects import Effects
    from ..patch.importance import ImportanceMap, Selection

ROW, OVERHEAD, AROUND = 27, 300, 130
"""Pixels: of a row of a map, of what stands around all maps, and around each."""
MOST_EXAMPLES = 50
"""Pairs that a notebook's browser of examples holds, so that a kept notebook stays small."""
BUDGET = 1 << 20


def importance_html(importance: ImportanceMap, sites: Iterable[Any] = ()) -> str:
    """Return an importance map as interactive HTML.

    Args:
        importance: to show.
        sites: chosen sites, which get a frame.
    """
    table = with_whole_numbers(importance.table)
    data = _data(table, importance.about, [str(s) for s in sites])
    return _frame(data, table, importance.about, repr(importance), _height(table))


def effects_html(effects: Effects, importance: ImportanceMap) -> str:
    """Return effects as interactive HTML: their map, and single examples under it.

    Args:
        effects: from a trace.
        importance: their average.
    """
    table = with_whole_numbers(importance.table)
    data = _data(table, importance.about, [])
    pairs = effects.pairs.head(MOST_EXAMPLES)
    frame = effects.frame[effects.frame["example_id"].isin(set(pairs["example_id"]))]
    tables = {"pairs.parquet": pairs}
    about = {"template": effects.about.get("template")}
    rows = EffectRows.of(frame)
    run = Run(Path(), "trace", "", {}, tables, {"about.json": about}, rows)
    data["examples"] = maps.examples(run, BUDGET)
    height = max([650, *(ROW * len(tokens) + OVERHEAD for tokens in pairs["tokens"])])
    return _frame(data, table, importance.about, repr(effects), _height(table) + height)


def selection_html(selection: Selection) -> str:
    """Return chosen sites as HTML: their names, mean effect with its interval, the rule and the
    verdict, and the map that they were chosen from, with a frame around their cells.
    """
    sites = " ".join(f"<code>{escape(str(s))}</code>" for s in selection.sites)
    interval = bracket(selection.ci_low, selection.ci_high)
    colour = "#1b6e3c" if selection.clear else "#b3261e"
    trust = ""
    if selection.honest is not None and math.isfinite(selection.honest.value):
        h = selection.honest
        trust += f"On sentences they were not chosen on: {number(float(h.value))}{bracket(h.low, h.high)}. "
    if math.isfinite(selection.stability):
        trust += f"Jaccard index with the choice of bootstrap samples: {selection.stability:.2f}. "
    trust += "; ".join(selection.warnings)
    known = selection.importance
    chosen_from = "" if known is None else importance_html(known, selection.sites)
    return (
        f"<div><p>{sites}</p><p>Mean effect <b>{number(float(selection.aie))}</b>{escape(interval)} over {selection.n} pairs; "
        f"the control's interval ends at {number(float(selection.control_high))}. "
        f'<b style="color:{colour}">{verdict(selection.clear)}</b></p>{f"<p>{escape(trust)}</p>" if trust else ""}'
        f"<p><small>Rule: {escape(selection.rule)}.</small></p></div>{chosen_from}"
    )


def _data(table: pd.DataFrame, about: About, sites: list[str]) -> dict[str, Any]:
    """Return what the scripts draw."""
    return {
        "kind": "trace", "name": "", "unit": about.get("unit") or "", "metric": about.get("metric") or "",
        "direction": about.get("direction") or "", "corruption": corruption_words(about),
        "average": maps.average(table, sites),
    }  # fmt: skip


def _height(table: pd.DataFrame) -> int:
    """Return the height of the frame in pixels: three maps stand side by side, a row of maps under
    another.
    """
    by = "role" if "role" in table else "position"
    heights: list[int] = [
        int(rows["head" if kind in HEAD_KINDS else by].nunique()) * ROW + AROUND
        for kind, rows in table.groupby("kind", sort=False)
    ]
    return OVERHEAD + sum(max(heights[i : i + 2]) for i in range(0, len(heights), 2))


def _frame(data: dict[str, Any], table: pd.DataFrame, about: About, name: str, height: int) -> str:
    """Return the frame with the page in it, and a plain table for where frames are not shown."""
    from .page import css, environment, scripts

    page = environment().get_template("embed.html").render(
        name=name, facts=facts(about).splitlines(), mark=mark_words(table, about), data=embedded({"runs": [data]}),
        css=css(), js=scripts(), examples="examples" in data,
    )  # fmt: skip
    rows = "".join(
        f"<tr><td><code>{escape(r['site'])}</code></td><td>{number(r['aie'])}{escape(bracket(r['ci_low'], r['ci_high']))}</td>"
        f"<td>{number(r['p_adjusted'], 2)}</td><td>{r['n']}</td></tr>"
        for r in top_sites(table, 8)
    )
    head = "<tr><th>site</th><th>AIE</th><th>p, adjusted</th><th>pairs</th></tr>"
    return (
        f'<iframe title="{escape(name)}" sandbox="allow-scripts allow-downloads" srcdoc="{escape(page)}" '
        f'style="width:100%;height:{height}px;border:0;resize:vertical;overflow:auto"></iframe>'
        f"<details><summary>{escape(name)}: the largest effects as a table</summary><table>{head}{rows}</table></details>"
    )
