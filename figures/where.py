"""Where states carry the answer: Figure 3, maps that the paper lacks, one prompt, counts of cells."""

from __future__ import annotations

from mech_absa import plots
from mech_absa.patch.effects import Effects

from . import tables
from .study import Shown, Study, best, cell, clear_of_zero, sentence, shows

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
    return Shown(plots.heatmap(study.importance, study.sites, compress=True), says)


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
    effects = Effects.load(study.path("example"))
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
