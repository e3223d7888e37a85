"""Every figure and table, from the results kept in `figures/results`: `make figures`. No model is loaded.

    python -m figures.make                                    figures/*.pdf, *.png, *.md, *.tex and figures/README.md
    python -m figures.make --runs runs/mine --out /some/folder

`reproduce.py` makes the results. Each function below draws one thing from one or two studies and says in one sentence what is seen, with numbers
that are computed here and nowhere written by hand; so a result against the story stands as plainly as one for it. The same results
give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mech_absa.commands.cli import command
from mech_absa.errors import ConfigError, DataError
from mech_absa.patch.effects import Effects
from mech_absa.patch.importance import ImportanceMap
from mech_absa.plots import plots
from mech_absa.records import write_text
from mech_absa.sites import HEAD_KINDS, Site
from mech_absa.stats import (
    Estimate,
    adjust,
    paired_bootstrap_difference,
    spearman_interval,
    top_k_overlap,
)

from . import tables
from .tables import Table, name_of, over_seeds, spelled

HERE = Path(__file__).resolve().parent
EDIT = "both@sites"
"""The paper's edit, in a matrix."""


# ---- what is read -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """The kept results of a study."""

    folder: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        return json.loads(self.path("run.json").read_text(encoding="utf-8"))

    def path(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            raise DataError(
                f"{self.folder.name}/{name} is missing among the results; `make reproduce`, or python -m figures.reproduce --only {self.folder.name}, makes it"
            )
        return path

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.path(name))

    @cached_property
    def matrix(self) -> pd.DataFrame:
        table = self.table("matrix.csv")
        return table.assign(
            train=table["train"].fillna(""), in_domain=table["in_domain"].astype(bool)
        )

    @property
    def run(self) -> dict[str, Any]:
        """The record of its first command; what is asked of it is the same in all."""
        return next(iter(self.record["runs"].values()))

    @cached_property
    def importance(self) -> ImportanceMap:
        about = json.loads(self.path("about.json").read_text(encoding="utf-8"))
        return self.map_of(self.table("importance.csv"), about)

    def map_of(self, table: pd.DataFrame, about: Mapping[str, Any]) -> ImportanceMap:
        config = self.run["config"]
        known = {
            "level": config["level"],
            "adjustment": config["adjustment"],
            "n_pairs": about["kept"],
        }
        return ImportanceMap(table, np.empty((0, len(table))), np.empty(0), {**about, **known})

    @cached_property
    def sites(self) -> list[Site]:
        return [
            Site.parse(s)
            for s in json.loads(self.path("sites.json").read_text(encoding="utf-8"))["sites"]
        ]

    @property
    def layers(self) -> str:
        """The traced layers, as a range."""
        found = sorted({s.layer for s in self.sites})
        return f"{found[0]}-{found[-1]}" if len(found) > 1 else str(found[0])

    @property
    def n(self) -> str:
        """How much it rests on."""
        if "pairs" in self.run:
            return f"n = {self.run['pairs']['kept']} pairs"
        seeds = sorted({s for r in self.record["runs"].values() for s in r["config"]["seeds"]})
        sizes = {
            part: sorted({d[part]["examples"] for d in self.run["domains"].values()})
            for part in ("train", "test")
        }
        train, test = ("–".join(map(str, dict.fromkeys((v[0], v[-1])))) for v in sizes.values())
        of = (
            f"{len(self.run['domains'])} domains"
            if len(self.run["domains"]) > 1
            else next(iter(self.run["domains"]))
        )
        return f"{of}, {train} training and {test} test examples each, {len(seeds)} seed{'s' * (len(seeds) > 1)}"

    @property
    def source(self) -> str:
        """The run that a figure came from."""
        model, versions = self.run["model"], self.run["versions"]
        named = ", ".join(
            f"{n} {versions[n]}"
            for n in ("mech-absa", "torch", "transformer-lens")
            if n in versions
        )
        return f"Run {self.record['study']} of {self.record['date']}: model {model['name']} ({model['sha256'][:8]}), {self.n}; {named}."

    @property
    def note(self) -> str:
        """The same in short, for inside a figure."""
        return f"run {self.record['study']}, {self.record['date']}{plots.SEPARATOR}model {self.run['model']['name']}\n{self.n}"


# ---- what is made -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """One thing of the index.

    Attributes:
        what: a figure, or a table.
        says: what is seen, in a sentence or two.
    """

    what: Figure | Table
    says: str


@dataclass(frozen=True)
class Item:
    """One thing that can be made.

    Attributes:
        name: of its files.
        title: of its section.
        needs: studies, by name; those of `may` are used where they are there.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    draw: Callable[..., Shown]


ITEMS: list[Item] = []


def shows(
    name: str, title: str, *needs: str, may: Sequence[str] = ()
) -> Callable[[Callable[..., Shown]], Callable[..., Shown]]:
    """Puts a function of some studies on the list; those it may do without are None where they are missing."""

    def note(draw: Callable[..., Shown]) -> Callable[..., Shown]:
        ITEMS.append(Item(name, title, needs, tuple(may), draw))
        return draw

    return note


# ---- numbers in sentences -----------------------------------------------------------------------------------------------------


def sentence(parts: Sequence[str] | str, between: str = "; ") -> str:
    """Parts as one sentence, with a capital and a full stop."""
    text = parts if isinstance(parts, str) else between.join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def cell(row: Any) -> str:
    """`L3.resid_post@query.last 0.42 [0.35, 0.49]`."""
    head = f"{row['kind']}{int(row['head'])}" if row["kind"] in HEAD_KINDS else row["kind"]
    ends = "" if pd.isna(row["ci_low"]) else f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    return f"L{int(row['layer'])}.{head}@{row['role']} {row['aie']:.3f}{ends}"


def interval(e: Estimate, factor: float = 1.0, digits: int = 2) -> str:
    return (
        f"{e.value * factor:.{digits}f} [{e.low * factor:.{digits}f}, {e.high * factor:.{digits}f}]"
    )


def best(table: pd.DataFrame) -> Any:
    """The row with the largest effect."""
    return table.loc[table["aie"].idxmax()]


def clear_of_zero(row: Any) -> bool:
    return bool(row["p_adjusted"] < 0.05)


def with_spread(rows: pd.DataFrame, *by: str, metric: str = "accuracy") -> pd.DataFrame:
    """Mean over seeds of every group, with the ends one standard deviation over seeds away; in the order groups first come."""
    made = []
    for key, of in rows.groupby(list(by), sort=False):
        mean, sd = over_seeds(of, metric)
        end = 0.0 if np.isnan(sd) else sd
        made.append(
            dict(zip(by, key, strict=True))
            | {metric: mean, f"{metric}_low": mean - end, f"{metric}_high": mean + end, "sd": sd}
        )
    return pd.DataFrame(made)


def inside_and_out(matrix: pd.DataFrame) -> pd.DataFrame:
    """The trained rows with a column `data` that says whether they are tested where they were trained; inside comes first."""
    trained = matrix[matrix["train"] != ""]
    data = np.where(trained["in_domain"], "in domain", "out of domain")
    return trained.assign(data=data).sort_values("data", kind="stable")


SD = "bars: one sd over seeds"


# ---- Figure 3: where a state brings the answer back ---------------------------------------------------------------------------


def _noise(study: Study) -> Shown:
    table = study.importance.table
    resid = table[table["kind"] == "resid_post"]
    inner = resid[~resid["role"].isin(["answer"])]
    in_sentence = best(inner[inner["role"].str.startswith("aspect")])
    top, total = best(inner), study.run["average_total_effect"]
    answer = best(resid[resid["role"] == "answer"])
    says = (
        f"Of an average total effect of {total:.3f}, the state that brings back most, apart from the last token's ({cell(answer)}), is {cell(top)}"
        f"{'' if clear_of_zero(top) else ' (not clear of 0 after correction)'}; at the aspect in the sentence it is {cell(in_sentence)}. "
        f"The sites chosen are {', '.join(map(str, study.sites))}. The paper prints no numbers for its map; it names aspect tokens in middle layers."
    )
    return Shown(plots.heatmap(study.importance, study.sites), says)


@shows("figure3_noise", "Figure 3: noise on all tokens, built-in reviews", "trace_noise")
def figure3_noise(study: Study) -> Shown:
    return _noise(study)


@shows("figure3_noise_lines", "Figure 3 as curves with intervals", "trace_noise")
def figure3_lines(study: Study) -> Shown:
    table = study.importance.table
    roles = (
        table[table["kind"] == "resid_post"]
        .groupby("role")["aie"]
        .max()
        .sort_values(ascending=False)
    )
    peaks = ", ".join(f"{role} {value:.3f}" for role, value in roles.head(3).items())
    return Shown(
        plots.lines(study.importance),
        f"The largest effects of the residual stream by role: {peaks}.",
    )


@shows("figure3_real", "Figure 3: noise on all tokens, the paper's laptop reviews", "trace_real")
def figure3_real(study: Study) -> Shown:
    return _noise(study)


# ---- maps that the paper lacks ------------------------------------------------------------------------------------------------


@shows(
    "maps_counterfactual",
    "Attention, MLP and residual stream: counterfactual reviews",
    "trace_counterfactual",
)
def maps(study: Study) -> Shown:
    table = study.importance.table
    tops = [
        best(table[(table["kind"] == kind) & (table["role"] != "answer")])
        for kind in ("resid_post", "attn_out", "mlp_out")
    ]
    changed = ", ".join(study.importance.about.get("changed_roles", ()))
    says = (
        f"With minimal edits of the text in place of noise, the largest effects of each kind, the last token apart, are {'; '.join(map(cell, tops))}. "
        f"(Restoring the {changed} in early layers only undoes the edit; the choice of sites leaves it out: {', '.join(map(str, study.sites))}.)"
    )
    return Shown(plots.heatmap(study.importance, study.sites), says)


@shows("maps_counterfactual_lines", "The same as curves with intervals", "trace_counterfactual")
def maps_lines(study: Study) -> Shown:
    table = study.importance.table
    attention = table[table["kind"] == "attn_out"].sort_values("aie", ascending=False)
    mlp = table[
        (table["kind"] == "mlp_out")
        & ~table["role"].isin(study.importance.about.get("changed_roles", ()))
    ]
    return Shown(
        plots.lines(study.importance),
        f"Attention writes the answer in few places: {cell(attention.iloc[0])}, then {cell(attention.iloc[1])}. "
        f"No MLP outside the edited words has more than {cell(best(mlp))}.",
    )


@shows("maps_heads", "Heads", "trace_counterfactual")
def maps_heads(study: Study) -> Shown:
    table = study.importance.table
    heads = table[table["kind"] == "head"].sort_values("aie", ascending=False)
    clear = int((heads["p_adjusted"] < 0.05).sum())
    return Shown(
        plots.heads(study.importance),
        f"Of {len(heads)} heads and roles, {clear} have an effect clear of 0 after correction; the largest are {cell(heads.iloc[0])} and "
        f"{cell(heads.iloc[1])}.",
    )


@shows(
    "example_counterfactual",
    "One pair, word by word: the one whose total effect is the median",
    "trace_counterfactual",
)
def example(study: Study) -> Shown:
    effects = Effects.load(study.folder)
    pair = effects.pairs.iloc[0]
    rows = effects.frame[effects.frame["kind"] == "resid_post"]
    top = rows.loc[rows["effect"].idxmax()]
    word = plots.shown(pair["tokens"][int(top["position"])])
    says = (
        f"“{pair['sentence']}”, asked about “{pair['aspect']}”: the largest effect, {top['effect']:.3f}, is that of layer {top['layer']} at “{word}” "
        f"({top['role']})."
    )
    return Shown(plots.example_map(effects), says)


@shows(
    "significance_cells",
    "How many cells differ from 0",
    "trace_counterfactual",
    may=("trace_noise", "trace_real"),
)
def significance_cells(*found: Study | None) -> Shown:
    present = [s for s in found if s is not None]
    maps = [(s.record["study"].replace("_", " "), s.importance.table) for s in present]
    about = present[0].importance.about
    caption = (
        f"Cells of the maps that differ from 0: sign flips by sentence, {about['adjustment'].capitalize()} correction over all cells of a map; "
        f"cells that are 0 for certain are not tested. {' '.join(s.source for s in present)}"
    )
    said = []
    for title, table in maps:
        tested = table["p"].notna()
        said.append(
            f"{title}: {int((table['p_adjusted'] < 0.05).sum())} of {int(tested.sum())} tested cells are clear of 0"
        )
    return Shown(tables.significance(maps, caption), sentence(said))


# ---- Tables 2 and 3 -----------------------------------------------------------------------------------------------------------

DIFFERS = (
    "Models and data differ: the published rows are of Llama-2-7b (or the model named) on the paper's four domains; ours are of the bundled model of "
    "4 million parameters, a mean and a standard deviation over seeds. Read down a block, not across blocks."
)


def _sources(matrix: Study, real: Study | None) -> tuple[list[tuple[str, pd.DataFrame]], str]:
    made = [("Ours: bundled model, built-in reviews", matrix.matrix)]
    if real is not None:
        made.append(("Ours: bundled model, the paper's data", real.matrix))
    return made, " ".join([DIFFERS, *(s.source for s in (matrix, real) if s is not None)])


def _ranked(matrix: pd.DataFrame, inside: bool) -> list[tuple[str, float, float]]:
    """(method, mean, sd over seeds) of the trained methods, best first."""
    rows = matrix[(matrix["train"] != "") & (matrix["in_domain"] == inside)]
    made = [(str(m), *over_seeds(of)) for m, of in rows.groupby("method", sort=False)]
    return sorted(made, key=lambda x: -x[1])


def _standing(matrix: pd.DataFrame, inside: bool) -> str:
    """Where the paper's edit stands among the methods."""
    order = _ranked(matrix, inside)
    if not order:
        return "no rows"
    place = next((i for i, x in enumerate(order) if x[0] == EDIT), None)
    said = f"best of {len(order)} is {name_of(order[0][0])} with {spelled(*order[0][1:])} %"
    if place:
        said += f"; the paper's edit is number {place + 1} with {spelled(*order[place][1:])} %"
    return f"{said}; last is {name_of(order[-1][0])} with {spelled(*order[-1][1:])} %"


@shows("table2", "Table 2: in domain", "matrix", may=("matrix_real",))
def table2(matrix: Study, real: Study | None) -> Shown:
    sources, caption = _sources(matrix, real)
    base = over_seeds(matrix.matrix[matrix.matrix["method"] == "zero_shot"])[0]
    says = f"Built-in reviews: {_standing(matrix.matrix, True)}; without training {percent(base)}."
    if real is not None:
        base = over_seeds(real.matrix[real.matrix["method"] == "zero_shot"])[0]
        majority = real.matrix.drop_duplicates("test")["majority"].mean()
        says += f" The paper's data: {_standing(real.matrix, True)}; without training {percent(base)}, the most frequent class {percent(majority)}."
    return Shown(tables.table_2(sources, f"In-domain accuracy (%). {caption}"), says)


@shows("table3", "Table 3: out of domain", "matrix", may=("matrix_real",))
def table3(matrix: Study, real: Study | None) -> Shown:
    sources, caption = _sources(matrix, real)
    says = f"Built-in reviews: {_standing(matrix.matrix, False)}."
    if real is not None:
        says += f" The paper's data: {_standing(real.matrix, False)}."
    caption = f"Out-of-domain accuracy (%), train,test by first letter. The paper printed ten of the twelve pairs. {caption}"
    return Shown(tables.table_3(sources, caption), says)


# ---- methods against methods --------------------------------------------------------------------------------------------------


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
        f"From {name_of(small)} ({mean['parameters'][small]:,.0f} parameters, {percent(mean['accuracy'][small])}) to {name_of(large)} "
        f"({mean['parameters'][large]:,.0f}, {percent(mean['accuracy'][large])}); over {len(mean)} methods Spearman's ρ of size and accuracy is "
        f"{interval(rho)}."
    )
    named = table.assign(
        method=table["method"].map(
            lambda m: name_of(m).replace(" layers", "").replace(" (LoRA on W_O)", "")
        )
    )
    return Shown(
        plots.parameters(
            named, title="In-domain accuracy against trainable parameters", note=study.note
        ),
        says,
    )


def compared(matrix: pd.DataFrame, reference: str = EDIT) -> pd.DataFrame:
    """Each trained method minus the reference, over all pairs of domains, paired by training domain, test domain and seed.

    What is drawn anew is the trained model (training domain and seed), since its tests share its luck; p by sign flips, Holm over methods.

    Returns:
        columns method, difference, low, high, p (adjusted), best first.
    """
    trained = matrix[matrix["train"] != ""]
    wide = trained.pivot_table(
        index=["train", "seed", "test"], columns="method", values="accuracy", sort=False
    )
    clusters = [f"{train} {seed}" for train, seed, _ in wide.index]
    others = [m for m in dict.fromkeys(trained["method"]) if m != reference]
    found = [paired_bootstrap_difference(wide[m], wide[reference], clusters) for m in others]
    table = pd.DataFrame(
        {
            "method": others,
            "difference": [e.value for e in found],
            "low": [e.low for e in found],
            "high": [e.high for e in found],
        }
    )
    return table.assign(p=adjust([e.p for e in found], "holm")).sort_values(
        "difference", ascending=False, kind="stable"
    )


def _compared(study: Study) -> Shown:
    table = compared(study.matrix)
    n = study.matrix[study.matrix["train"] != ""].drop_duplicates(["train", "seed"])
    better, worse = (
        table[(table["p"] < 0.05) & (table["difference"] > 0)],
        table[(table["p"] < 0.05) & (table["difference"] < 0)],
    )
    equal = table[table["p"] >= 0.05]

    def listed(rows: pd.DataFrame) -> str:
        return (
            "; ".join(
                f"{name_of(m)} ({100 * d:+.1f})"
                for m, d in zip(rows["method"], rows["difference"], strict=True)
            )
            or "none"
        )

    says = (
        f"Against the paper's edit at the traced layers, in points over all pairs of domains, paired over {len(n)} trained models and corrected: better "
        f"are {listed(better)}; worse are {listed(worse)}; no difference is shown for {listed(equal)}."
    )
    if len(n) < 6:
        says += f" {len(n)} models cannot give a p below {2 / 2 ** len(n):g}."
    note = f"{study.note}\nintervals resample trained models; p by sign flips, Holm"
    title = f"Methods minus {name_of(EDIT)}"
    return Shown(
        plots.differences(table.assign(name=table["method"].map(name_of)), title=title, note=note),
        says,
    )


@shows("significance_methods", "Which differences between methods are more than luck", "matrix")
def significance_methods(study: Study) -> Shown:
    return _compared(study)


@shows("significance_methods_real", "The same on the paper's data", "matrix_real")
def significance_methods_real(study: Study) -> Shown:
    return _compared(study)


def _bars(study: Study, methods: Mapping[str, str], title: str) -> tuple[Figure, pd.DataFrame]:
    """Bars of some methods under short names, in and out of domain."""
    rows = inside_and_out(study.matrix[study.matrix["method"].isin(methods)])
    if rows.empty:
        raise DataError(
            f"the study {study.folder.name} has none of the methods {', '.join(methods)}"
        )
    order = {m: i for i, m in enumerate(methods)}
    rows = rows.sort_values("method", key=lambda m: m.map(order), kind="stable")
    table = with_spread(rows, "data", "method").sort_values("data", kind="stable")
    drawn = table.assign(position=table["method"].map(methods))
    return plots.position_bars(drawn, title=title, note=f"{study.note}{plots.SEPARATOR}{SD}"), table


def _by_name(table: pd.DataFrame, names: Mapping[str, str]) -> str:
    return "; ".join(
        f"{data}: "
        + ", ".join(
            f"{names[r['method']]} {spelled(r['accuracy'], r['sd'])} %" for _, r in rows.iterrows()
        )
        for data, rows in table.groupby("data", sort=False)
    )


@shows("ablations", "The halves of the edit", "matrix")
def ablations(study: Study) -> Shown:
    names = {
        EDIT: "both parts",
        "lora_o@sites": "weight part alone",
        "loreft@sites": "representation part alone",
    }
    figure, table = _bars(study, names, "The halves of the edit, at the traced layers")
    return Shown(
        figure, f"The paper has no ablation of its edit. {sentence(_by_name(table, names))}"
    )


@shows("places", "The edit at the traced layers and elsewhere", "matrix")
def places(study: Study) -> Shown:
    names = {
        EDIT: "traced",
        "both@first": "first",
        "both@last": "last",
        "both@random": "random",
        "both@all": "all layers",
    }
    figure, table = _bars(study, names, "The edit at the traced layers and elsewhere")
    against = compared(study.matrix[study.matrix["method"].isin(names)])
    said = [
        f"{names[r['method']]} {100 * r['difference']:+.1f} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"
        + ("" if r["p"] < 0.05 else " (no difference shown)")
        for _, r in against.iterrows()
    ]
    return Shown(
        figure,
        f"{sentence(_by_name(table, names))} Minus the traced layers, in points over all pairs: {'; '.join(said)}.",
    )


def _domains(study: Study) -> Shown:
    rows = study.matrix[study.matrix["method"] == EDIT]
    inside, outside = rows[rows["in_domain"]], rows[~rows["in_domain"]]
    low = outside.groupby(["train", "test"])["accuracy"].mean()
    says = (
        f"The paper's edit answers {percent(inside['accuracy'].mean())} where it was trained and {percent(outside['accuracy'].mean())} elsewhere; "
        f"the weakest pair is {low.idxmin()[0]} to {low.idxmin()[1]} with {percent(low.min())}."
    )
    return Shown(
        plots.domains(
            rows, title=f"{name_of(EDIT).capitalize()}: trained here, tested there", note=study.note
        ),
        says,
    )


@shows("domain_matrix", "Domain matrix, built-in reviews", "matrix")
def domain_matrix(study: Study) -> Shown:
    return _domains(study)


@shows("domain_matrix_real", "Domain matrix, the paper's data", "matrix_real")
def domain_matrix_real(study: Study) -> Shown:
    return _domains(study)


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
        plots.layer_ranges(table, title="Figure 4: which layers to edit (both parts)", note=note),
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
        plots.position_bars(table, title=title, note=f"{study.note}{plots.SEPARATOR}{SD}"), says
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
    return Shown(plots.effects_and_edits(table, note=note), says)


def window_effects(matrix: pd.DataFrame, importance: pd.DataFrame, site: Site) -> pd.DataFrame:
    """Each edited window with the effect that tracing gave it.

    Args:
        matrix: rows of trainings at single layers and windows.
        importance: an importance.csv.
        site: whose kind and role give the effect.

    Returns:
        columns method, window, size, aie (mean over the window's layers), accuracy with its ends.
    """
    effect = importance[
        (importance["kind"] == site.kind) & (importance["role"] == site.at)
    ].set_index("layer")["aie"]
    rows = matrix[(matrix["train"] != "") & matrix["in_domain"]]
    table = with_spread(rows, "preset", "layers")
    layers = (
        table["layers"].astype(str).str.split().map(lambda names: [int(float(x)) for x in names])
    )
    return table.assign(
        method=table["preset"].map(lambda p: tables.PRESETS.get(p, p)),
        window=layers.map(lambda x: f"layer {x[0]}" if len(x) == 1 else f"layers {x[0]}-{x[-1]}"),
        size=layers.map(len),
        aie=layers.map(lambda x: float(effect.reindex(x).mean())),
    )


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
    return Shown(plots.ranks(table, note=f"{study.note}{plots.SEPARATOR}{SD}"), says)


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
    figure = plots.ranks(
        table,
        metric="recall",
        title="Rank of the edit and recall of each class",
        note=f"{study.note}{plots.SEPARATOR}{SD}",
    )
    return Shown(figure, f"Recall in domain from rank {span[0]} to rank {span[-1]}: {said}.")


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
    return Shown(plots.faithfulness(table, note=note), says)


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
    return Shown(plots.pruning(table, note=note), says)


def _agreement(study: Study, metric: str) -> Shown:
    table = study.table("agreement.csv")
    table = table[(table["metric"] == metric) & (table["exact"] != 0)]
    about = json.loads(study.path(f"about_{metric}.json").read_text(encoding="utf-8"))
    keys = ["kind", "layer", "head", "role"]
    exact = study.map_of(table[keys].assign(aie=table["exact"]), about)
    estimates = [m for m in ("atp", "atpstar", "ig") if m in table]
    said, largest = [], max(1, len(table) // 20)
    with plots.style():
        figure = plots.Picture(figsize=(plots.PAGE, 2.9), layout="constrained")
        for ax, method in zip(
            figure.subplots(ncols=len(estimates), squeeze=False)[0], estimates, strict=True
        ):
            steps = study.record["runs"][f"{metric}_{method}"]["config"]["steps"]
            estimate = study.map_of(
                table[keys].assign(aie=table[method]), {**about, "method": method, "steps": steps}
            )
            rho = spearman_interval(table["exact"], table[method])
            plots.agreement(
                exact,
                estimate,
                ax,
                rho=rho,
                title=plots.method_words(estimate.about).removeprefix("estimate: "),
            )
            ax.set_ylabel("AIE, estimate")
            overlap, top = (
                top_k_overlap(table["exact"], table[method], largest),
                table.nlargest(largest, "exact"),
            )
            said.append(
                f"{method} {interval(rho, digits=3)}, {percent(overlap)}, {percent(top[method].sum() / top['exact'].sum())}"
            )
            handles, labels = ax.get_legend_handles_labels()
            ax.get_legend().remove()
        figure.legend(handles, labels, loc="outside lower left", ncols=len(labels))
        figure.suptitle(
            f"Estimates against exact effects: {exact.about['kept']} pairs, {study.note.splitlines()[0]}",
            x=0.01,
            ha="left",
            fontsize=8,
        )
    unit = exact.about.get("unit", metric)
    says = (
        f"Averaged maps of the {unit}, cells that are not 0, against the exact effects: Spearman's ρ, in which the many cells near 0 weigh as much as "
        f"the few large ones; how many of the {largest} largest cells are the same; and the sum of their estimates against their exact sum: "
        f"{'; '.join(said)}."
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


# ---- the command --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Draw every figure and write every table, with an index of them all."""

    runs: Path = field(default_factory=lambda: HERE / "results")
    """The kept results, a folder a study."""
    out: Path = field(default_factory=lambda: HERE)
    """Where figures, tables and the index go."""
    only: tuple[str, ...] = ()
    """These alone, by the names of their files; the index is left as it is."""


HEAD = """# Figures and tables

Made by `make figures` from the results in [results](results), which `make reproduce` makes anew; no model is needed to draw them. Numbers in the
sentences are computed from the results. Accuracies are of greedy answers among three labels. Where the paper is named, it is Li et al.,
AAAI 2025 ([arXiv 2503.15117](https://arxiv.org/abs/2503.15117)); its own numbers are in [published.csv](published.csv).
"""


def make(item: Item, config: Config) -> str:
    """Its files, and its section of the index.

    Raises:
        DataError: a study is missing.
    """
    for name in item.needs:
        Study(config.runs / name).path("run.json")
    studies = [Study(config.runs / name) for name in item.needs]
    extra = [
        s if (s.folder / "run.json").exists() else None
        for s in (Study(config.runs / name) for name in item.may)
    ]
    shown = item.draw(*studies, *extra)
    sources = " ".join(s.source for s in (*studies, *extra) if s is not None)
    if isinstance(shown.what, Table):
        write_text(
            config.out / f"{item.name}.md", f"{shown.what.markdown()}\n{shown.what.caption}\n"
        )
        write_text(config.out / f"{item.name}.tex", shown.what.latex())
        body = f"{shown.says}\n\n{shown.what.markdown()}\n{shown.what.caption} [LaTeX]({item.name}.tex), [Markdown]({item.name}.md)."
    else:
        plots.save(shown.what, config.out / item.name)
        body = (
            f"{shown.says}\n\n![{item.title}]({item.name}.png)\n\n{sources} [PDF]({item.name}.pdf)."
        )
    return f"## {item.title}\n\n{body}\n"


def run(config: Config) -> list[str]:
    """Make everything that there are results for.

    Returns:
        names of what was made.

    Raises:
        ConfigError: `--only` names nothing that is made here.
        DataError: no study at all is there.
    """
    names = [item.name for item in ITEMS]
    if unknown := [n for n in config.only if n not in names]:
        raise ConfigError(
            f"--only {unknown[0]!r} is no figure or table; accepted: {', '.join(names)}"
        )
    made, sections, missing = [], [], []
    for item in ITEMS:
        if config.only and item.name not in config.only:
            continue
        try:
            sections.append(make(item, config))
            made.append(item.name)
            print(item.name, flush=True)
        except DataError as error:
            missing.append(f"`{item.name}`: {error}")
            print(f"{item.name} is left out: {error}", flush=True)
    if not made:
        raise DataError(f"{config.runs} holds no results; `make reproduce` makes them")
    if not config.only:
        write_text(
            config.out / "README.md",
            "\n".join(
                [HEAD, *sections, *_times(config.runs), *_left_out(item for item in missing)]
            ),
        )
    return made


def _times(runs: Path) -> list[str]:
    """What the studies cost."""
    if not (runs / "times.csv").exists():
        return []
    seconds = pd.read_csv(runs / "times.csv").groupby("study", sort=False)["seconds"].sum()
    lines = [f"| {study} | {value / 60:.1f} |" for study, value in seconds.items()]
    head = f"## What the results cost\n\nMinutes that the commands ran, one thread each and several side by side: {seconds.sum() / 60:.0f} in all.\n"
    return ["\n".join([head, "| study | minutes |", "| --- | ---: |", *lines]) + "\n"]


def _left_out(missing: Any) -> list[str]:
    lines = [f"- {line}" for line in missing]
    return ["\n".join(["## Not there yet", "", *lines]) + "\n"] if lines else []


def main(config: Config) -> None:
    run(config)


if __name__ == "__main__":
    raise SystemExit(command(Config, main, "python -m figures.make"))
