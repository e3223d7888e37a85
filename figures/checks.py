"""Draw checks of the method: faithfulness, pruning, agreement of estimates with exact effects."""

from __future__ import annotations

import json

import numpy as np

from mech_absa import plots
from mech_absa.plots.layout import headline, legend_below, new_figure
from mech_absa.stats import spearman_interval, top_k_overlap

from . import charts
from .study import Shown, Study, interval, percent, sentence, shows

# ---- checks --------------------------------------------------------------------------------------


@shows("faithfulness", "Faithfulness of the traced ranking", "circuit")
def faithful(study: Study) -> Shown:
    table, summary = study.table("faithfulness.csv"), study.run["faithfulness"]
    own = table[table["method"] == "ranking"].sort_values("k")
    enough = own[own["faithfulness"] >= 0.9]
    chance = float(np.mean(summary["random_cpr"]))
    reached = (
        f"{int(enough.iloc[0]['k'])} of {study.run['components']['by_role']} components are enough "
        "for 90 % of the model's logit difference"
        if len(enough)
        else "no number of components reaches 90 % of the model's logit difference"
    )
    cpr = summary["cpr"]
    says = (
        "Only the leading components of the ranking keep their states, on reviews of another domain "
        f"({study.run['data']['source']}): {reached}. The area under the curve (CPR) is "
        f"{cpr['value']:.3f} [{cpr['low']:.3f}, {cpr['high']:.3f}]; random orders have {chance:.3f}."
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
        f"The lowest {int(kept['count'])} of {study.run['components']['removable']} heads and MLPs in the "
        "ranking can be replaced by their means with a loss of at most 5 points of accuracy "
        f"({percent(whole['accuracy'])} before, {percent(kept['accuracy'])} after). Replacing as many "
        f"in random order leaves {percent(chance[kept['count']])}."
    )
    note = (
        f"{study.note}{plots.SEPARATOR}{study.run['pruning']['examples']} examples, "
        "95 % intervals by sentence"
    )
    return Shown(charts.pruning(table, note=note), says)


NAMES = {"atp": "AtP", "atpstar": "AtP*", "relp": "RelP", "ig": "integrated gradients"}
ESTIMATES = tuple(NAMES)


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
            name = (
                plots.method_words(estimate.about).removeprefix("estimate: ").replace(", ", ",\n")
            )
            charts.agreement(exact, estimate, ax, rho=rho, title=name)
            ax.set_xlabel("AIE, exact")
            ax.set_ylabel("AIE, estimate" if ax is axes[0, 0] else "")
            pearson = np.corrcoef(table["exact"], table[method])[0, 1]
            overlap = top_k_overlap(table["exact"], table[method], largest)
            top = table.nlargest(largest, "exact")
            share = top[method].sum() / top["exact"].sum()
            parts.append(
                f"{NAMES[method]}: ρ {interval(rho, digits=3)}, r {pearson:.2f}, "
                f"{percent(overlap)} of the largest, {percent(share)} of the sum"
            )
            handles, labels = ax.get_legend_handles_labels()
            ax.get_legend().remove()
        legend_below(figure, handles=handles, labels=labels, ncols=len(labels))
        unit = exact.about.get("unit", metric)
        note = f"{exact.about['kept']} pairs, {unit}{plots.SEPARATOR}{study.note.splitlines()[0]}"
        headline(figure, "Estimates against exact effects, averaged maps", note)
    says = (
        f"Maps of the {unit}, averaged over pairs, against the exact effects of all {len(table)} cells that "
        "are not 0: Spearman's ρ, in which the many cells near 0 weigh as much as the few large ones; "
        f"Pearson's r; the share of the {largest} largest cells that are also the largest in the "
        "estimate; and the sum of the estimates of these cells as a share of their exact sum. "
        f"{sentence(parts)}"
    )
    return Shown(figure, says)


@shows("agreement_logit_diff", "Estimates against exact effects: logit difference", "estimates")
def agreement_logit_diff(study: Study) -> Shown:
    return _agreement(study, "logit_diff")


@shows(
    "agreement_prob",
    "Estimates against exact effects: probability",
    "estimates",
)
def agreement_prob(study: Study) -> Shown:
    return _agreement(study, "prob")
