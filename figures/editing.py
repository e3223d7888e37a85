"""Draw where to edit and how large an edit should be: ranges of layers, positions, windows, ranks."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mech_absa import plots
from mech_absa.sites import Site
from mech_absa.stats import spearman_interval

from . import charts, tables
from .rank_fairness import trends
from .study import SD, Shown, Study, inside_and_out, interval, percent, sentence, shows, with_spread
from .tables import spelled

# ---- where to edit -------------------------------------------------------------------------------


@shows(
    "figure4_layer_ranges", "Figure 4: the edited range of layers", "ranges", "trace_counterfactual"
)
def figure4(study: Study, traced: Study) -> Shown:
    rows = inside_and_out(study.matrix)
    table = with_spread(rows.assign(layers=rows["where"].astype(str)), "data", "layers")
    everywhere = with_spread(rows.assign(layers=rows["where"].astype(str)), "layers").set_index(
        "layers"
    )
    order = everywhere["accuracy"].sort_values(ascending=False)
    widest = max(order.index, key=lambda r: int(r.split("-")[-1]) - int(r.split("-")[0]))
    here = traced.layers
    says = (
        f"Mean accuracy over all {rows.drop_duplicates(['train', 'test']).shape[0]} pairs of domains: "
        f"all layers {percent(order[widest])}, the best range ({order.index[0]}) "
        f"{percent(order.iloc[0])}, the worst ({order.index[-1]}) {percent(order.iloc[-1])}"
    )
    if here in order:
        same = [
            r
            for r in order.index
            if int(r.split("-")[-1]) - int(r.split("-")[0])
            == int(here.split("-")[-1]) - int(here.split("-")[0])
        ]
        says += (
            f". The traced range ({here}) has {percent(order[here])} and is number "
            f"{same.index(here) + 1} of {len(same)} ranges of its width"
        )
    note = f"{study.note}{plots.SEPARATOR}{SD}\ntraced layers: {here}"
    return Shown(
        charts.layer_ranges(table, title="Figure 4: which layers to edit (both parts)", note=note),
        says + ".",
    )


SPOTS = {
    "query.last": "aspect (question)", "aspect.last": "aspect (sentence)", "answer": "last token", "after": "after the aspect",
    "before": "before the aspect", "8": "some word", "2": "third token",
}  # fmt: skip
"""Names of positions in a legend."""


@shows("figure5_positions", "Figure 5: the edited position", "positions")
def figure5(study: Study) -> Shown:
    rows = study.matrix[study.matrix["in_domain"]]
    rows = rows.assign(
        data=rows["preset"].map({"both": "both parts", "loreft": "representation part alone"}),
        position=rows["position"].astype(str).map(lambda at: SPOTS.get(at, at)),
    )
    table = with_spread(rows, "data", "position")
    parts = []
    for data, of in table.groupby("data", sort=False):
        ranked = of.sort_values("accuracy", ascending=False)
        parts.append(
            f"{data}: "
            + ", ".join(
                f"{r['position']} {spelled(r['accuracy'], r['sd'])} %" for _, r in ranked.iterrows()
            )
        )
    says = (
        f"Accuracy in domain, best position first. {sentence(parts)} The weight part acts on every "
        "token, whatever the position of the representation part. In the paper the aspect is best, then "
        "the last word, then a random one."
    )
    title = "Figure 5: which token to edit"
    return Shown(
        charts.dots(
            table, title=title, note=f"{study.note}{plots.SEPARATOR}{SD}; faint: single seeds"
        ),
        says,
    )


@shows(
    "windows",
    "Does tracing tell where to edit? (Hase et al. 2023)",
    "windows",
    "trace_counterfactual",
)
def effects_and_edits(study: Study, traced: Study) -> Shown:
    table = window_effects(study.matrix, traced.importance.table, traced.sites[0])
    parts = []
    for method, of in table.groupby("method", sort=False):
        rho = spearman_interval(of["aie"], of["accuracy"])
        verdict = (
            "not defined"
            if np.isnan(rho.low)
            else "the correlation is positive"
            if rho.low > 0
            else "the correlation is negative"
            if rho.high < 0
            else "no rank correlation is shown"
        )
        one, best_one = of[of["size"] == 1], of.loc[of["accuracy"].idxmax()]
        alone = (
            f"; over single layers alone {interval(spearman_interval(one['aie'], one['accuracy']))}"
            if len(one) > 2
            else ""
        )
        wide = of[of["size"] == of["size"].max()]
        traced_one = wide.loc[wide["aie"].idxmax()]
        place = int((wide["accuracy"] > traced_one["accuracy"]).sum()) + 1
        parts.append(
            f"{method}: Spearman's ρ = {interval(rho)} over {len(of)} places ({verdict}){alone}. "
            f"The best place is {best_one['window']} ({percent(best_one['accuracy'])}); the window "
            f"with the largest effect ({traced_one['window']}, {percent(traced_one['accuracy'])}) is "
            f"number {place} of {len(wide)} of its size"
        )
    role = traced.sites[0].at
    says = (
        f"The effect of a place (resid_post at {role}, mean over its layers) against the accuracy of an "
        f"edit there. {' '.join(map(sentence, parts))} "
        "Windows overlap, so these intervals are too narrow."
    )
    note = (
        f"{study.note}\neffects: run {traced.record['study']}, resid_post at {role}"
        f"{plots.SEPARATOR}{SD}"
    )
    return Shown(charts.effects_and_edits(table, note=note), says)


ROUNDED = 3
"""Decimals of an effect when places are ranked.

Fixed before the results were seen. Layers without any effect then tie, instead of being ranked by
their rounding errors.
"""


def window_effects(matrix: pd.DataFrame, importance: pd.DataFrame, site: Site) -> pd.DataFrame:
    """Return each edited window with the effect that tracing gave it.

    Args:
        matrix: rows of trainings at single layers and windows.
        importance: an importance.csv.
        site: whose kind and role give the effect.

    Returns:
        columns method, window, size, aie (mean over the window's layers, rounded to `ROUNDED`
        decimals), accuracy with its ends.
    """
    cells = importance[(importance["kind"] == site.kind) & (importance["role"] == site.at)]
    effect = cells.set_index("layer")["aie"]
    rows = matrix[(matrix["train"] != "") & matrix["in_domain"]]
    table = with_spread(rows, "preset", "layers")
    names = table["layers"].astype(str).str.split()
    layers = names.map(lambda words: [int(float(x)) for x in words])
    return table.assign(
        method=table["preset"].map(lambda p: tables.PRESETS.get(p, p)),
        window=layers.map(lambda x: f"layer {x[0]}" if len(x) == 1 else f"layers {x[0]}-{x[-1]}"),
        size=layers.map(len),
        aie=layers.map(lambda x: round(float(effect.reindex(x).mean()), ROUNDED)),
    )


PLACE_WORDS = {
    "traced": "traced layers", "first": "first layers", "middle": "middle layers", "last": "last layers",
    "random": "random windows", "all": "all layers", "all, same size": "all layers, same size",
    "traced, before": "traced layers, words before", "traced, answer": "traced layers, last token",
}  # fmt: skip
"""Names of places in sentences and figures."""


def _places(study: Study) -> pd.DataFrame:
    """Return places.csv with counted budgets and names in words; the budget "all" is every row."""
    table = study.table("places.csv").dropna(subset=["accuracy"])
    everything = study.run["rows"]["train"]
    budget = table["budget"].replace({"all": everything}).astype(int)
    names = table["place"].map(lambda name: PLACE_WORDS.get(name, name))
    return table.assign(budget=budget, place=names)


@shows("places_tuned", "Places with tuned rates", "places")
def places_tuned(study: Study) -> Shown:
    table, parts = _places(study), []
    for (budget, epochs), of in table.groupby(["budget", "epochs"], sort=False):
        ranked = of.sort_values("accuracy", ascending=False, kind="stable")
        order = "; ".join(f"{r['place']} {percent(r['accuracy'])}" for _, r in ranked.iterrows())
        parts.append(f"{_budget(budget, epochs)}: {order}")
    figure = charts.place_grid(
        table, [("interval over samples", "low", "high")], title="Accuracy of an edit by place, rates tuned per place",
        note=study.note,
    )  # fmt: skip
    says = (
        "The same edit in different places. For each place and budget, the learning rate with the "
        "lowest loss on validation reviews is taken; the sites were chosen on training reviews. "
        f"Accuracy, best first. {' '.join(map(sentence, parts))} All edits train "
        f"{_count(table, 'all layers', among=False)} parameters, those of all layers "
        f"{_count(table, 'all layers', among=True)}. {_at_the_end(study, table)}"
    )
    if missing := _missing(study, table):
        says += f" Planned and not run: {'; '.join(missing)}."
    return Shown(figure, says)


def _at_the_end(study: Study, table: pd.DataFrame) -> str:
    """Return a sentence that counts the chosen rates at the upper end of the grid."""
    chosen = [float(r) for rates in table["rates"] for r in str(rates).split(";")]
    largest = max(study.run["config"]["rates"])
    return (
        f"Of {len(chosen)} tuned rates, {sum(r == largest for r in chosen)} are the largest of the "
        "grid, so a larger one might do better there."
    )


def _missing(study: Study, table: pd.DataFrame) -> list[str]:
    """Return the planned budgets that lack a place, in words."""
    config, everything = study.run["config"], study.run["rows"]["train"]
    of = table.groupby(["budget", "epochs"])["place"].nunique()
    whole = {budget for budget, n in of.items() if n == of.max()}
    planned = [
        (n or everything, e)
        for n in config["examples"]
        for e in config["epochs"]
        if f"{n}x{e}" not in config["skip"]
    ]
    return [_budget(*b) for b in sorted(planned, key=lambda b: b[0] * b[1]) if b not in whole]


def _budget(budget: int, epochs: int) -> str:
    return f"{budget} examples and {epochs} epoch{'s' * (epochs != 1)}"


def _count(table: pd.DataFrame, place: str, *, among: bool) -> str:
    """Return the numbers of parameters of one place, or of all others, in words."""
    rows = table[(table["place"] == place) == among]
    return " or ".join(f"{n:,}" for n in sorted(rows["parameters"].unique()))


@shows("places_difference", "Places with tuned rates, minus the traced layers", "places")
def places_difference(study: Study) -> Shown:
    table = _places(study).dropna(subset=["difference"])
    intervals = [
        ("interval over samples", "low_sample", "high_sample"),
        ("interval over random windows", "low_window", "high_window"),
    ]
    ends = np.stack([table[low].fillna(np.inf) for _, low, _ in intervals]).min(axis=0)
    tops = np.stack([table[high].fillna(-np.inf) for _, _, high in intervals]).max(axis=0)
    above, below = table[ends > 0], table[tops < 0]

    def listed(rows: pd.DataFrame) -> str:
        words = [
            f"{r['place']} with {_budget(r['budget'], r['epochs'])} ({100 * r['difference']:+.1f})"
            for _, r in rows.iterrows()
        ]
        return "; ".join(words) or "none"

    figure = charts.place_grid(
        table, intervals, value="difference", unit="points minus the traced layers",
        title="Other places minus the traced layers, rates tuned per place", note=study.note,
    )  # fmt: skip
    says = (
        f"{len(table)} comparisons with the traced layers, in points. Intervals are over training "
        "samples and, for random windows, also over windows; they are not corrected for the number of "
        f"comparisons. Above the traced layers in every interval: {listed(above)}. Below in every "
        f"interval: {listed(below)}. The other {len(table) - len(above) - len(below)} show no difference."
    )
    return Shown(figure, says)


# ---- size ----------------------------------------------------------------------------------------


@shows("ranks", "Rank of the edit", "ranks")
def ranks(study: Study) -> Shown:
    table = with_spread(inside_and_out(study.matrix), "data", "rank").rename(
        columns={"data": "method"}
    )
    inside = table[table["method"] == "in domain"].sort_values("rank")
    first, last = inside.iloc[0], inside.iloc[-1]
    says = (
        f"In domain, rank {int(first['rank'])} has {spelled(first['accuracy'], first['sd'])} % and "
        f"rank {int(last['rank'])} {spelled(last['accuracy'], last['sd'])} %. The best mean is that of "
        f"rank {int(inside.loc[inside['accuracy'].idxmax(), 'rank'])}."
    )
    return Shown(charts.ranks(table, note=f"{study.note}{plots.SEPARATOR}{SD}"), says)


@shows("ranks_recall", "Rank and the recall of each class", "ranks")
def ranks_recall(study: Study) -> Shown:
    rows = study.matrix[study.matrix["in_domain"]]
    classes = [c for c in ("positive", "negative", "neutral") if f"recall_{c}" in rows]
    parts = [
        with_spread(rows, "rank", metric=f"recall_{c}")
        .rename(columns=lambda n, c=c: n.replace(f"_{c}", ""))
        .assign(method=c)
        for c in classes
    ]
    table = pd.concat(parts, ignore_index=True)
    ends = [of.sort_values("rank").iloc[[0, -1]]["recall"].tolist() for of in parts]
    span = sorted(int(r) for r in rows["rank"].unique())
    changes = ", ".join(
        f"{c} {percent(a)} to {percent(b)}" for c, (a, b) in zip(classes, ends, strict=True)
    )
    figure = charts.ranks(
        table,
        metric="recall",
        title="Rank of the edit and recall of each class",
        note=f"{study.note}{plots.SEPARATOR}{SD}",
    )
    return Shown(figure, f"Recall in domain from rank {span[0]} to rank {span[-1]}: {changes}.")


@shows("ranks_gap", "Rank and the gap of classes", "ranks")
def ranks_gap(study: Study) -> Shown:
    table = with_gap(study.matrix)
    shown = with_spread(table, "data", "rank", metric="gap_of_classes")
    changes = trends(
        table.groupby(["data", "rank", "seed"], sort=False)["gap_of_classes"]
        .mean()
        .reset_index()
        .rename(columns={"data": "world", "seed": "sample"})
    ).set_index("world")
    parts = []
    for data, rows in shown.groupby("data", sort=False):
        rows, r = rows.sort_values("rank"), changes.loc[data]
        first, last = rows.iloc[0], rows.iloc[-1]
        parts.append(
            f"{data}, rank {first['rank']} has a gap of {percent(first['gap_of_classes'])} and rank {last['rank']} "
            f"{percent(last['gap_of_classes'])}, a change of {100 * r['slope']:+.1f} [{100 * r['low']:.1f}, "
            f"{100 * r['high']:.1f}] points per doubling (t interval over {r['samples']} seeds)"
        )
    says = (
        f"The largest recall of a class minus the smallest. {sentence(parts)} Das et al. (arXiv 2405.18572) report that "
        "low ranks keep more of the base model's bias. All ranks train with the same rates, so a low rank also learns less "
        "in the same time: this shows the gap, and not its cause."
    )
    figure = charts.ranks(
        shown.rename(columns={"data": "method"}),
        metric="gap_of_classes",
        title="Rank of the edit and the gap between classes",
        note=f"{study.note}{plots.SEPARATOR}{SD}",
    )
    return Shown(figure, says)


def with_gap(matrix: pd.DataFrame) -> pd.DataFrame:
    """Return the trained rows of a matrix with a column `gap_of_classes`: largest minus smallest recall.

    A class without rows has no recall and does not count.
    """
    rows = inside_and_out(matrix)
    recalls = rows[[c for c in rows if c.startswith("recall_")]]
    return rows.assign(gap_of_classes=recalls.max(axis=1) - recalls.min(axis=1))
