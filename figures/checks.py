"""Checks of the method: faithfulness, pruning, agreement of estimates."""

from __future__ import annotations

import json

import numpy as np

from mech_absa import plots
from mech_absa.plots.layout import headline, legend_below, new_figure
from mech_absa.stats import spearman_interval, top_k_overlap

from . import charts
from .study import Shown, Study, interval, percent, shows

# ---- how true -----------------------------------------------------------------------------------------------------------------


@shows("faithfulness", "Faithfulness of the traced ranking", "circuit")
def faithful(study: Study) -> Shown:
    table, summary = study.table("faithfulness.csv"), study.run["faithfulness"]
    own = table[table["method"] == "ranking"].sort_values("k")
    enough = own[own["faithfulness"] >= 0.9]
    chance = float(np.mean(summary["random_cpr"]))
    reached = (
        f"the best {int(enough.iloc[0]['k'])} of {study.run['components']['by_role']} components give 90 % of the model's answer"
        if len(enough)
        else "no part of the ranking gives 90 % of the model's answer"
    )
    cpr = summary["cpr"]
    says = (
        f"Run alone on other reviews ({study.run['data']['source']}), {reached}. Area under the curve (CPR) {cpr['value']:.3f} "
        f"[{cpr['low']:.3f}, {cpr['high']:.3f}], random orders {chance:.3f}."
    )
    note = f"{study.note}{plots.SEPARATOR}{summary['metric']}, 95 % intervals by sentence"
    return Shown(charts.faithfulness(table, note=note), says)


@shows("pruning", "Pruning the least important heads and MLPs", "circuit")
def pruned(study: Study) -> Shown:
    table = study.table("pruning.csv")
    own = table[table["method"] != "random order"].sort_values("removed")
    chance = table[table["method"] == "random order"].set_index("count")["accuracy"]
    whole = own.iloc[0]
    kept = own[own["accuracy"] >= whole["accuracy"] - 0.05].iloc[-1]
    says = (
        f"Of {study.run['components']['removable']} heads and MLPs the {int(kept['count'])} that matter least can be replaced by their means at a cost of no "
        f"more than 5 points ({percent(whole['accuracy'])} to {percent(kept['accuracy'])}); as many in random order leave {percent(chance[kept['count']])}."
    )
    note = f"{study.note}{plots.SEPARATOR}{study.run['pruning']['examples']} examples, 95 % intervals by sentence"
    return Shown(charts.pruning(table, note=note), says)


ESTIMATES = ("atp", "atpstar", "relp", "ig")


def _agreement(study: Study, metric: str) -> Shown:
    table = study.table("agreement.csv")
    table = table[(table["metric"] == metric) & (table["exact"] != 0)]
    about = json.loads(study.path(f"about_{metric}.json").read_text(encoding="utf-8"))
    keys = ["kind", "layer", "head", "role"]
    exact = study.map_of(table[keys].assign(aie=table["exact"]), about)
    estimates = [m for m in ESTIMATES if m in table]
    largest, parts = max(1, len(table) // 20), []
    with plots.style():
        figure, axes = new_figure(plots.PAGE, 2.6, ncols=len(estimates), sharey=True, squeeze=False)
        for ax, method in zip(axes[0], estimates, strict=True):
            steps = study.record["runs"][f"{metric}_{method}"]["config"]["steps"]
            estimate = study.map_of(
                table[keys].assign(aie=table[method]), {**about, "method": method, "steps": steps}
            )
            rho = spearman_interval(table["exact"], table[method])
            name = plots.method_words(estimate.about).removeprefix("estimate: ")
            charts.agreement(exact, estimate, ax, rho=rho, title=name)
            ax.set_xlabel("AIE, exact")
            ax.set_ylabel("AIE, estimate" if ax is axes[0, 0] else "")
            overlap = top_k_overlap(table["exact"], table[method], largest)
            top = table.nlargest(largest, "exact")
            share = top[method].sum() / top["exact"].sum()
            parts.append(
                f"{method} {interval(rho, digits=3)}, {percent(overlap)}, {percent(share)}"
            )
            handles, labels = ax.get_legend_handles_labels()
            ax.get_legend().remove()
        legend_below(figure, handles=handles, labels=labels, ncols=len(labels))
        unit = exact.about.get("unit", metric)
        note = f"{exact.about['kept']} pairs, {unit}{plots.SEPARATOR}{study.note.splitlines()[0]}"
        headline(figure, "Estimates against exact effects, averaged maps", note)
    says = (
        f"Averaged maps of the {unit}, cells that are not 0, against the exact effects: Spearman's ρ, in which the many "
        "cells near 0 weigh as much as the few large ones; how many of the "
        f"{largest} largest cells are the same; and the sum of their estimates against their exact sum: "
        f"{'; '.join(parts)}."
    )
    return Shown(figure, says)


@shows("agreement_logit_diff", "Estimates against exact effects: logit difference", "estimates")
def agreement_logit_diff(study: Study) -> Shown:
    return _agreement(study, "logit_diff")


@shows(
    "agreement_prob",
    "Estimates against exact effects: probability, where first order is weak",
    "estimates",
)
def agreement_prob(study: Study) -> Shown:
    return _agreement(study, "prob")
