"""Do selectors name better layers than chance? Results of `mech-absa compare` (docs/which_selector.md)."""

from __future__ import annotations

import pandas as pd

from mech_absa.plots.layout import headline, new_figure
from mech_absa.plots.style import PAGE, style

from . import charts
from .study import Shown, Study, shows

POINTS = 0.02
"""A smaller difference does not count, by the plan of the study."""


@shows("which_selector", "Layers that selectors name, minus random layers", "compare")
def which_selector(study: Study) -> Shown:
    return _minus_random(study)


@shows(
    "which_selector_harder",
    "Layers that selectors name, minus random layers, harder reviews",
    "compare_harder",
)
def which_selector_harder(study: Study) -> Shown:
    return _minus_random(study)


def _minus_random(study: Study) -> Shown:
    """Draw every selector's difference from the mean of all places, by budget."""
    table = study.table("selectors.csv")
    budgets = list(dict.fromkeys(table["budget"]))
    with style():
        figure, axes = new_figure(
            PAGE, 0.9 + 0.17 * table["selector"].nunique(), ncols=len(budgets), squeeze=False
        )
        for ax, budget in zip(axes[0], budgets, strict=True):
            charts.differences(rows_of(table, budget), ax, title=words(budget))
        headline(figure, "Layers that selectors name, minus the mean of all places", study.note)
    return Shown(figure, says(table))


def rows_of(table: pd.DataFrame, budget: str) -> pd.DataFrame:
    """Return the rows of a budget as `charts.differences` takes them, the largest difference first."""
    rows = table[table["budget"] == budget].sort_values(
        "difference", ascending=False, kind="stable"
    )
    names = [f"{r['selector']} ({r['layers'].replace(' ', ', ')})" for _, r in rows.iterrows()]
    return rows.assign(name=names, p=rows["p_adjusted"])


def words(budget: str) -> str:
    """Return a budget in words.

    >>> words("64x2"), words("320x1")
    ('64 examples, 2 epochs', '320 examples, 1 epoch')
    """
    examples, _, epochs = budget.partition("x")
    return f"{examples} examples, {epochs} epoch{'s' * (epochs != '1')}"


def passing(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return the selectors that meet the plan's threshold, by budget: corrected p < 0.05 and two points."""
    good = table[(table["p_adjusted"] < 0.05) & (table["difference"] >= POINTS)]
    return {b: list(good["selector"][good["budget"] == b]) for b in dict.fromkeys(table["budget"])}


def says(table: pd.DataFrame) -> str:
    """Return the text: which selectors pass at each budget."""
    found = [
        f"with {words(budget)}: {', '.join(names) or 'none'}"
        for budget, names in passing(table).items()
    ]
    return (
        "Accuracy of the same edit at the two layers that a selector names, minus its mean over all 28 "
        "places, in points; intervals are over five training samples. A filled dot has a p-value below "
        f"0.05 after Holm's correction. Selectors that are also two points ahead: {'; '.join(found)}."
    )


@shows(
    "smollm2_selectors",
    "SmolLM2: the place that each selector takes, minus the mean of twelve",
    "smollm2/selectors",
)
def smollm2_selectors(study: Study) -> Shown:
    """Draw how much better the paper's edit is at the place that a selector takes."""
    table = study.table("selectors.csv").sort_values("difference", ascending=False, kind="stable")
    named = table.assign(name=[f"{r['selector']} ({r['place']})" for _, r in table.iterrows()])
    figure = charts.differences(
        named,
        title="Accuracy at the place that a selector takes, minus the mean of twelve places",
        note=f"{study.note}; 95 % intervals by sentence, for all places together",
    )
    passed = table[(table["low"] > 0) & (table["difference"] >= POINTS)]["selector"]
    failed = "; ".join(f"{name}: {why}" for name, why in study.run["failed"].items())
    return Shown(
        figure,
        "The paper's edit was trained at twelve sets of layers of SmolLM2-135M, and a selector takes the one "
        "whose layers it scores highest on average. Two points ahead, with an interval above 0: "
        f"{', '.join(passed) or 'none'}." + (f" Without a ranking: {failed}." if failed else ""),
    )
