"""Draw where states carry the answer: Figure 3, more maps, one prompt, counts of cells."""

from __future__ import annotations

from mech_absa import plots
from mech_absa.patch.effects import Effects

from . import tables
from .study import Shown, Study, best, cell, clear_of_zero, shows

# ---- Figure 3: noise on all tokens ---------------------------------------------------------------


def _noise(study: Study) -> Shown:
    """Draw a map of a trace with noise, with the largest effects in words."""
    table = study.importance.table
    resid = table[table["kind"] == "resid_post"]
    inner = resid[~resid["role"].isin(["answer"])]
    in_sentence = best(inner[inner["role"].str.startswith("aspect")])
    top, total = best(inner), study.run["average_total_effect"]
    answer = best(resid[resid["role"] == "answer"])
    says = (
        f"The mean total effect is {total:.3f}. The last token has the largest effect ({cell(answer)}). "
        f"The largest elsewhere is {cell(top)}"
        f"{'' if clear_of_zero(top) else ' (not different from 0 after correction)'}; the largest "
        f"at the aspect in the sentence is {cell(in_sentence)}. "
        f"Chosen sites: {_chosen(study)}. "
        "The paper prints no numbers for its map; it names the aspect tokens in middle layers."
    )
    return Shown(plots.heatmap(study.importance, study.sites, compress=True), says)


def _chosen(study: Study) -> str:
    return ", ".join(map(str, study.sites))


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
        f"The largest effect of the residual stream in each of the three leading roles: {peaks}.",
    )


@shows("figure3_real", "Figure 3: noise on all tokens, the paper's laptop reviews", "trace_real")
def figure3_real(study: Study) -> Shown:
    return _noise(study)


# ---- maps that the paper lacks -------------------------------------------------------------------


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
    names = ("residual stream", "attention", "MLP")
    largest = "; ".join(f"{name} {cell(top)}" for name, top in zip(names, tops, strict=True))
    says = (
        "Here the corrupted text differs from the clean one by minimal edits, without noise. "
        f"The largest effects outside the last token: {largest}. Restoring the {changed} token in "
        "early layers only undoes the edit of the text, so the choice of sites leaves it out. "
        f"Chosen sites: {_chosen(study)}."
    )
    return Shown(plots.heatmap(study.importance, study.sites), says)


@shows(
    "maps_counterfactual_lines",
    "Counterfactual reviews as curves with intervals",
    "trace_counterfactual",
)
def maps_lines(study: Study) -> Shown:
    table = study.importance.table
    attention = table[table["kind"] == "attn_out"].sort_values("aie", ascending=False)
    mlp = table[
        (table["kind"] == "mlp_out")
        & ~table["role"].isin(study.importance.about.get("changed_roles", ()))
    ]
    return Shown(
        plots.lines(study.importance),
        f"The two largest effects of attention are {cell(attention.iloc[0])} and "
        f"{cell(attention.iloc[1])}. The largest effect of an MLP outside the edited words is "
        f"{cell(best(mlp))}.",
    )


@shows("maps_heads", "Attention heads", "trace_counterfactual")
def maps_heads(study: Study) -> Shown:
    table = study.importance.table
    heads = table[table["kind"] == "head"].sort_values("aie", ascending=False)
    clear = int((heads["p_adjusted"] < 0.05).sum())
    return Shown(
        plots.heads(study.importance),
        f"Of {len(heads)} cells (a head at a role), {clear} differ from 0 after correction. The "
        f"largest are {cell(heads.iloc[0])} and {cell(heads.iloc[1])}.",
    )


@shows(
    "example_counterfactual",
    "One pair, token by token",
    "trace_counterfactual",
)
def example(study: Study) -> Shown:
    effects = Effects.load(study.path("example"))
    pair = effects.pairs.iloc[0]
    rows = effects.frame[effects.frame["kind"] == "resid_post"]
    top = rows.loc[rows["effect"].idxmax()]
    word = plots.shown(pair["tokens"][int(top["position"])])
    says = (
        "This is the pair whose total effect is the median. The review is "
        f"“{pair['sentence']}”, and the question is about “{pair['aspect']}”. "
        f"The largest effect, {top['effect']:.3f}, is in layer {top['layer']} at “{word}” "
        f"(role {top['role']})."
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
        "Cells of the maps that differ from 0. p-values come from sign flips of whole sentences, "
        f"with {about['adjustment'].capitalize()} correction over all cells of a map; cells that "
        "are exactly 0 by construction are not tested. "
        f"{' '.join(s.source for s in present)}"
    )
    counts = [
        f"{(table['p_adjusted'] < 0.05).sum()} of {table['p'].notna().sum()} in {title}"
        for title, table in maps
    ]
    return Shown(
        tables.significance(maps, caption),
        f"Tested cells that differ from 0 after correction: {', '.join(counts)}.",
    )
