"""Where to edit and how large: ranges of layers, positions, windows, ranks."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mech_absa import plots
from mech_absa.sites import Site
from mech_absa.stats import spearman_interval

from . import charts, tables
from .study import SD, Shown, Study, inside_and_out, interval, percent, sentence, shows, with_spread
from .tables import spelled

# ---- where to edit ------------------------------------------------------------------------------------------------------------


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
        f"Over all {rows.drop_duplicates(['train', 'test']).shape[0]} pairs of domains, all layers give {percent(order[widest])}, the best range "
        f"({order.index[0]}) {percent(order.iloc[0])}, the worst ({order.index[-1]}) {percent(order.iloc[-1])}"
    )
    if here in order:
        same = [
            r
            for r in order.index
            if int(r.split("-")[-1]) - int(r.split("-")[0])
            == int(here.split("-")[-1]) - int(here.split("-")[0])
        ]
        says += f"; the traced range ({here}) {percent(order[here])}, number {same.index(here) + 1} of {len(same)} of its width"
    note = f"{study.note}{plots.SEPARATOR}{SD}\ntraced layers: {here}"
    return Shown(
        charts.layer_ranges(table, title="Figure 4: which layers to edit (both parts)", note=note),
        says + ".",
    )


SPOTS = {
    "query.last": "aspect (question)", "aspect.last": "aspect (sentence)", "answer": "last token", "after": "after the aspect",
    "before": "before the aspect", "8": "some word", "2": "third token",
}  # fmt: skip
"""Positions as they can stand in a legend."""


@shows("figure5_positions", "Figure 5: the edited position", "positions")
def figure5(study: Study) -> Shown:
    rows = study.matrix[study.matrix["in_domain"]]
    rows = rows.assign(
        data=rows["preset"].map({"both": "both parts", "loreft": "representation part alone"}),
        position=rows["position"].astype(str).map(lambda at: SPOTS.get(at, at)),
    )
    table = with_spread(rows, "data", "position")
    said = []
    for data, of in table.groupby("data", sort=False):
        ranked = of.sort_values("accuracy", ascending=False)
        said.append(
            f"{data}: "
            + ", ".join(
                f"{r['position']} {spelled(r['accuracy'], r['sd'])} %" for _, r in ranked.iterrows()
            )
        )
    says = (
        f"In domain, best first. {sentence(said)} (The weight part acts on every token, wherever the other part stands. In the paper the aspect is best, "
        "then the last word, then a random one.)"
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
    said = []
    for method, of in table.groupby("method", sort=False):
        rho = spearman_interval(of["aie"], of["accuracy"])
        verdict = (
            "not defined"
            if np.isnan(rho.low)
            else "tracing ranks the places"
            if rho.low > 0
            else "tracing ranks them the wrong way"
            if rho.high < 0
            else "no rank correlation is shown"
        )
        one, best_one = of[of["size"] == 1], of.loc[of["accuracy"].idxmax()]
        alone = (
            f", single layers {interval(spearman_interval(one['aie'], one['accuracy']))}"
            if len(one) > 2
            else ""
        )
        wide = of[of["size"] == of["size"].max()]
        traced_one = wide.loc[wide["aie"].idxmax()]
        place = int((wide["accuracy"] > traced_one["accuracy"]).sum()) + 1
        said.append(
            f"{method}: ρ = {interval(rho)} over {len(of)} places{alone}; {verdict}; best is {best_one['window']} with {percent(best_one['accuracy'])}, and "
            f"the window with the largest effect ({traced_one['window']}, {percent(traced_one['accuracy'])}) is number {place} of {len(wide)} of its size"
        )
    role = traced.sites[0].at
    says = (
        f"Effect of a place (resid_post at {role}, mean over its layers) against the accuracy of editing it alone. {' '.join(map(sentence, said))} "
        "Windows overlap, so the intervals are too narrow rather than too wide."
    )
    note = f"{study.note}\neffects: run {traced.record['study']}, resid_post at {role}{plots.SEPARATOR}{SD}"
    return Shown(charts.effects_and_edits(table, note=note), says)


ROUNDED = 3
"""Decimals of an effect when places are ranked: written down before the results were looked at, so that the many layers
without any effect tie and are not ranked by their rounding errors."""


def window_effects(matrix: pd.DataFrame, importance: pd.DataFrame, site: Site) -> pd.DataFrame:
    """Return each edited window with the effect that tracing gave it.

    Args:
        matrix: rows of trainings at single layers and windows.
        importance: an importance.csv.
        site: whose kind and role give the effect.

    Returns:
        columns method, window, size, aie (mean over the window's layers, rounded to `ROUNDED` decimals), accuracy with
        its ends.
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
    "random": "random windows", "all": "all layers",
}  # fmt: skip


def _places(study: Study) -> pd.DataFrame:
    table = study.table("places.csv").dropna(subset=["accuracy"])
    everything = study.run["rows"]["train"]
    budget = table["budget"].astype(int).replace(0, everything)
    names = table["place"].map(lambda name: PLACE_WORDS.get(name, name))
    return table.assign(budget=budget, place=names)


@shows("places_tuned", "Places with learning rates tuned for each", "places")
def places_tuned(study: Study) -> Shown:
    table, parts = _places(study), []
    for (budget, epochs), of in table.groupby(["budget", "epochs"], sort=False):
        ranked = of.sort_values("accuracy", ascending=False, kind="stable")
        order = ", ".join(f"{r['place']} {percent(r['accuracy'])}" for _, r in ranked.iterrows())
        parts.append(f"{budget} examples, {epochs} epoch{'s' * (epochs != 1)}: {order}")
    figure = charts.place_grid(
        table, [("interval over samples", "low", "high")], title="Accuracy of an edit by place, rates tuned per place",
        note=study.note,
    )  # fmt: skip
    return Shown(figure, sentence(parts))


@shows("places_difference", "The same, minus the traced layers", "places")
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
            f"{r['place']} with {r['budget']} examples and {r['epochs']} epochs ({100 * r['difference']:+.1f})"
            for _, r in rows.iterrows()
        ]
        return ", ".join(words) or "none"

    figure = charts.place_grid(
        table, intervals, value="difference", unit="points minus the traced layers",
        title="Other places minus the traced layers, rates tuned per place", note=study.note,
    )  # fmt: skip
    says = (
        f"Of {len(table)} comparisons, places with more than the traced layers in every interval: {listed(above)}; with less: "
        f"{listed(below)}; for the other {len(table) - len(above) - len(below)} no difference is shown."
    )
    return Shown(figure, says)


# ---- size ---------------------------------------------------------------------------------------------------------------------


@shows("ranks", "Rank of the edit", "ranks")
def ranks(study: Study) -> Shown:
    table = with_spread(inside_and_out(study.matrix), "data", "rank").rename(
        columns={"data": "method"}
    )
    inside = table[table["method"] == "in domain"].sort_values("rank")
    first, last = inside.iloc[0], inside.iloc[-1]
    says = (
        f"In domain, rank {int(first['rank'])} gives {spelled(first['accuracy'], first['sd'])} % and rank {int(last['rank'])} "
        f"{spelled(last['accuracy'], last['sd'])} %; "
        f"the best is rank {int(inside.loc[inside['accuracy'].idxmax(), 'rank'])}."
    )
    return Shown(charts.ranks(table, note=f"{study.note}{plots.SEPARATOR}{SD}"), says)


@shows("ranks_recall", "Rank and the single classes", "ranks")
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
    said = ", ".join(
        f"{c} {percent(a)} to {percent(b)}" for c, (a, b) in zip(classes, ends, strict=True)
    )
    figure = charts.ranks(
        table,
        metric="recall",
        title="Rank of the edit and recall of each class",
        note=f"{study.note}{plots.SEPARATOR}{SD}",
    )
    return Shown(figure, f"Recall in domain from rank {span[0]} to rank {span[-1]}: {said}.")
