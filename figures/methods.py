"""Compare methods: Tables 2 and 3, sizes, differences, ablations, domain matrices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import t as student

from mech_absa import plots
from mech_absa.errors import DataError
from mech_absa.stats import adjust, paired_bootstrap_difference, spearman_interval

from . import charts, tables
from .study import (
    EDIT,
    SD,
    Shown,
    Study,
    inside_and_out,
    interval,
    percent,
    sentence,
    shows,
    with_spread,
)
from .tables import name_of, over_seeds, spelled

# ---- Tables 2 and 3 ------------------------------------------------------------------------------

DIFFERS = (
    "Compare rows within a block only: models and data differ between blocks. The published rows are "
    "of Llama-2-7b, or of the model named, on the paper's four domains. Ours are of the bundled "
    "model of 4 million parameters: mean and standard deviation over seeds."
)


def _sources(matrix: Study, real: Study | None) -> tuple[list[tuple[str, pd.DataFrame]], str]:
    made = [("Ours: bundled model, built-in reviews", matrix.matrix)]
    if real is not None:
        made.append(("Ours: bundled model, the paper's data", real.matrix))
    return made, " ".join([DIFFERS, *(s.source for s in (matrix, real) if s is not None)])


def _ranked(matrix: pd.DataFrame, inside: bool) -> list[tuple[str, float, float]]:
    """Return (method, mean, sd over seeds) of the trained methods, best first."""
    rows = matrix[(matrix["train"] != "") & (matrix["in_domain"] == inside)]
    made = [(str(m), *over_seeds(of)) for m, of in rows.groupby("method", sort=False)]
    return sorted(made, key=lambda x: -x[1])


def _standing(matrix: pd.DataFrame, inside: bool) -> str:
    """Return the best and the last method in words, and the rank of the paper's edit."""
    order = _ranked(matrix, inside)
    if not order:
        return "no rows"
    place = next((i for i, x in enumerate(order) if x[0] == EDIT), None)
    text = (
        f"the best of {len(order)} methods is {name_of(order[0][0])} ({spelled(*order[0][1:])} %)"
    )
    if place:
        text += f"; the paper's edit is number {place + 1} ({spelled(*order[place][1:])} %)"
    return f"{text}; the last is {name_of(order[-1][0])} ({spelled(*order[-1][1:])} %)"


@shows("table2", "Table 2: in domain", "matrix", may=("matrix_real",))
def table2(matrix: Study, real: Study | None) -> Shown:
    sources, caption = _sources(matrix, real)
    base = over_seeds(matrix.matrix[matrix.matrix["method"] == "zero_shot"])[0]
    says = (
        f"Built-in reviews: {_standing(matrix.matrix, True)}; the model without training has "
        f"{percent(base)}."
    )
    if real is not None:
        base = over_seeds(real.matrix[real.matrix["method"] == "zero_shot"])[0]
        majority = real.matrix.drop_duplicates("test")["majority"].mean()
        says += (
            f" The paper's data: {_standing(real.matrix, True)}; the model without training has "
            f"{percent(base)}, and the most frequent class {percent(majority)}."
        )
    return Shown(tables.table_2(sources, f"In-domain accuracy (%). {caption}"), says)


@shows("table3", "Table 3: out of domain", "matrix", may=("matrix_real",))
def table3(matrix: Study, real: Study | None) -> Shown:
    sources, caption = _sources(matrix, real)
    says = f"Built-in reviews: {_standing(matrix.matrix, False)}."
    if real is not None:
        says += f" The paper's data: {_standing(real.matrix, False)}."
    caption = (
        "Out-of-domain accuracy (%). A column names the training and the test domain by first letter. "
        f"The paper printed ten of the twelve pairs. {caption}"
    )
    return Shown(tables.table_3(sources, caption), says)


# ---- methods against methods ---------------------------------------------------------------------


@shows("parameters_accuracy", "Accuracy against trainable parameters", "matrix")
def parameters(study: Study) -> Shown:
    rows = study.matrix[study.matrix["in_domain"] & study.matrix["where"].isin(["sites", "all"])]
    table = (
        rows.groupby(["method", "seed"], sort=False)
        .agg(parameters=("trainable", "mean"), accuracy=("accuracy", "mean"))
        .reset_index()
    )
    mean = table.groupby("method")[["parameters", "accuracy"]].mean()
    rho = spearman_interval(mean["parameters"], mean["accuracy"])
    small, large = mean["parameters"].idxmin(), mean["parameters"].idxmax()
    says = (
        f"The smallest method is {name_of(small)} ({mean['parameters'][small]:,.0f} parameters, "
        f"{percent(mean['accuracy'][small])}), the largest {name_of(large)} "
        f"({mean['parameters'][large]:,.0f}, {percent(mean['accuracy'][large])}). Over {len(mean)} "
        f"methods, Spearman's ρ between size and accuracy is {interval(rho)}"
        f"{'' if rho.low > 0 or rho.high < 0 else ': no correlation is shown'}."
    )
    named = table.assign(
        method=table["method"].map(
            lambda m: name_of(m).replace(" layers", "").replace(" (LoRA on W_O)", "")
        )
    )
    return Shown(
        charts.parameters(
            named, title="In-domain accuracy against trainable parameters", note=study.note
        ),
        says,
    )


def compared(matrix: pd.DataFrame, reference: str = EDIT) -> pd.DataFrame:
    """Compare each trained method with the reference, paired by domains and seed.

    The bootstrap resamples trained models (training domain and seed), because all tests of one model
    share its luck. If a method edits other layers with every seed (random layers), all models with
    the same layers share the luck of that draw, so the sets of layers are resampled. Few units get a
    t interval, because a bootstrap of three units is far too narrow.

    Args:
        matrix: rows of a matrix.csv.
        reference: the method that is subtracted.

    Returns:
        columns method, difference, low, high, units, p (sign flips over units, Holm over methods),
        largest difference first.
    """
    trained = matrix[matrix["train"] != ""]
    keys = ["train", "seed", "test"]
    wide = trained.pivot_table(index=keys, columns="method", values="accuracy", sort=False)
    models = [f"{train} {seed}" for train, seed, _ in wide.index]
    rows = []
    for method in (m for m in dict.fromkeys(trained["method"]) if m != reference):
        units = _drawn_layers(trained[trained["method"] == method], wide.index) or models
        estimate = paired_bootstrap_difference(wide[method], wide[reference], units)
        low, high = estimate.low, estimate.high
        if len(set(units)) < FEW_UNITS:
            low, high = _t_interval(wide[method] - wide[reference], units)
        rows.append((method, estimate.value, low, high, len(set(units)), estimate.p))
    table = pd.DataFrame(rows, columns=["method", "difference", "low", "high", "units", "p"])
    table["p"] = adjust(table["p"].to_numpy(float), "holm")
    return table.sort_values("difference", ascending=False, kind="stable")


FEW_UNITS = 6
"""With fewer units than this, an interval is a t interval over the units' means."""


def _drawn_layers(rows: pd.DataFrame, index: pd.MultiIndex) -> list[str]:
    """Return the edited layers of each row of the index; an empty list if all seeds share them."""
    if "layers" not in rows or rows["layers"].nunique() < 2:
        return []
    by_seed = rows.drop_duplicates(["train", "seed"]).set_index(["train", "seed"])["layers"]
    return [str(by_seed.get((train, seed), "")) for train, seed, _ in index]


def _t_interval(
    difference: pd.Series, units: list[str], level: float = 0.95
) -> tuple[float, float]:
    """Return the t interval of the mean over units of their mean differences."""
    means = difference.groupby(np.asarray(units)).mean()
    if len(means) < 2:
        return float("nan"), float("nan")
    reach = student.ppf(0.5 + level / 2, len(means) - 1) * means.std(ddof=1) / len(means) ** 0.5
    return float(means.mean() - reach), float(means.mean() + reach)


def _compared(study: Study) -> Shown:
    table = compared(study.matrix)
    models = study.matrix[study.matrix["train"] != ""].drop_duplicates(["train", "seed"])
    clear = table["p"] < 0.05
    better, worse = (
        table[clear & (table["difference"] > 0)],
        table[clear & (table["difference"] < 0)],
    )
    few = table[table["units"] < len(models)]

    def listed(rows: pd.DataFrame) -> str:
        names = [
            f"{name_of(m)} ({100 * d:+.1f})"
            for m, d in zip(rows["method"], rows["difference"], strict=True)
        ]
        return "; ".join(names) or "none"

    says = (
        "Differences from the paper's edit at the traced layers, in points over all pairs of domains, "
        f"paired over {len(models)} trained models, with p corrected over methods. Better: "
        f"{listed(better)}. Worse: {listed(worse)}. No difference is shown for: {listed(table[~clear])}."
    )
    if len(models) < 6:
        says += f" With {len(models)} models, p cannot be below {2 / 2 ** len(models):g}."
    for row in few.itertuples():
        drawn = study.matrix.loc[study.matrix["method"] == row.method, "layers"].unique()
        says += (
            f" The layers of “{name_of(row.method)}” were drawn only {row.units} times "
            f"({', '.join('-'.join(str(d).split()) for d in drawn)}), so the draws are the units: the "
            f"interval is [{100 * row.low:.1f}, {100 * row.high:.1f}], and p cannot be below "
            f"{2 / 2**row.units:g}."
        )
    note = (
        f"{study.note}\nintervals resample trained models (random layers: t over their sets); "
        "p by sign flips, Holm"
    )
    names = table["method"].map(name_of)
    title = f"Methods minus {name_of(EDIT)}"
    return Shown(charts.differences(table.assign(name=names), title=title, note=note), says)


@shows("significance_methods", "Differences between methods, built-in reviews", "matrix")
def significance_methods(study: Study) -> Shown:
    return _compared(study)


@shows("significance_methods_real", "Differences between methods, the paper's data", "matrix_real")
def significance_methods_real(study: Study) -> Shown:
    return _compared(study)


def _dots(study: Study, methods: Mapping[str, str], title: str) -> tuple[Figure, pd.DataFrame]:
    """Draw some methods under short names, in and out of domain; return the figure and its table."""
    rows = inside_and_out(study.matrix[study.matrix["method"].isin(methods)])
    if rows.empty:
        raise DataError(
            f"the study {study.folder.name} has none of the methods {', '.join(methods)}"
        )
    order = {m: i for i, m in enumerate(methods)}
    rows = rows.sort_values("method", key=lambda m: m.map(order), kind="stable")
    table = with_spread(rows, "data", "method").sort_values("data", kind="stable")
    drawn = table.assign(position=table["method"].map(methods))
    note = f"{study.note}{plots.SEPARATOR}{SD}; faint: single seeds"
    return charts.dots(drawn, title=title, note=note), table


def _by_name(table: pd.DataFrame, names: Mapping[str, str]) -> str:
    return "; ".join(
        f"{data}: "
        + ", ".join(
            f"{names[r['method']]} {spelled(r['accuracy'], r['sd'])} %" for _, r in rows.iterrows()
        )
        for data, rows in table.groupby("data", sort=False)
    )


@shows("ablations", "The parts of the edit, trained alone", "matrix")
def ablations(study: Study) -> Shown:
    names = {
        EDIT: "both parts",
        "lora_o@sites": "weight part alone",
        "loreft@sites": "representation part alone",
    }
    figure, table = _dots(study, names, "The parts of the edit, at the traced layers")
    return Shown(
        figure,
        "The edit has a weight part and a representation part. The paper does not train them apart. "
        f"{sentence(_by_name(table, names))}",
    )


@shows("places", "The edit in other layers, one learning rate for all", "matrix")
def places(study: Study) -> Shown:
    names = {
        EDIT: "traced",
        "both@first": "first",
        "both@last": "last",
        "both@random": "random",
        "both@all": "all layers",
    }
    figure, table = _dots(study, names, "The edit at the traced layers and elsewhere")
    against = compared(study.matrix[study.matrix["method"].isin(names)])
    differences = [
        f"{names[r['method']]} {100 * r['difference']:+.1f} "
        f"[{100 * r['low']:.1f}, {100 * r['high']:.1f}]"
        + ("" if r["p"] < 0.05 else " (no difference shown)")
        for _, r in against.iterrows()
    ]
    return Shown(
        figure,
        f"{sentence(_by_name(table, names))} Differences from the traced layers, in points over all "
        f"pairs of domains: {'; '.join(differences)}. All places share one learning rate, which was "
        "tuned in layers 2-4, and the sites were chosen on test reviews; both favour the traced "
        f"layers. {_overlap(study.matrix)} The study of places with tuned rates, below, avoids both.",
    )


def _overlap(matrix: pd.DataFrame) -> str:
    """Return a sentence that counts the random draws sharing a layer with the traced or the last ones."""

    def layers(method: str) -> list[set[str]]:
        rows = matrix.loc[matrix["method"] == method, "layers"].dropna()
        return [set(str(row).split()) for row in rows.unique()]

    taken = set().union(*layers(EDIT), *layers("both@last"))
    drawn = layers("both@random")
    shared = sum(bool(d & taken) for d in drawn)
    return f"Of {len(drawn)} random draws, {shared} share a layer with the traced or the last ones."


def _domains(study: Study) -> Shown:
    rows = study.matrix[study.matrix["method"] == EDIT]
    inside, outside = rows[rows["in_domain"]], rows[~rows["in_domain"]]
    low = outside.groupby(["train", "test"])["accuracy"].mean()
    says = (
        f"The paper's edit has {percent(inside['accuracy'].mean())} on the domain it was trained on "
        f"and {percent(outside['accuracy'].mean())} on the others. The lowest pair is "
        f"{low.idxmin()[0]} to {low.idxmin()[1]} with {percent(low.min())}."
    )
    return Shown(
        plots.domains(
            rows, title=f"{name_of(EDIT).capitalize()}: training and test domain", note=study.note
        ),
        says,
    )


@shows("domain_matrix", "Domain matrix, built-in reviews", "matrix")
def domain_matrix(study: Study) -> Shown:
    return _domains(study)


@shows("domain_matrix_real", "Domain matrix, the paper's data", "matrix_real")
def domain_matrix_real(study: Study) -> Shown:
    return _domains(study)
