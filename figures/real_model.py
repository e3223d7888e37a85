"""Draw what SmolLM2-135M shows on real reviews, beside what the paper says of Llama-2-7b."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from mech_absa import plots

from . import charts
from .interaction import states
from .study import Shown, Study, best, cell, sentence, shows
from .tables import NONE, Table

PAPER = "9-14"
"""Layers of 30 that correspond to the paper's 10-15 of 32."""
WORDS = {
    "aspect": "aspect in the sentence", "query": "aspect in the question", "opinion": "opinion words",
    "rest": "rest of the sentence", "template": "template", "answer": "last token",
}  # fmt: skip
"""Groups of roles, in words."""
ASPECTS = ("aspect", "query")


def _map(study: Study, what: str) -> Shown:
    """Draw a map, and say where its largest effects are and what the paper's layers hold."""
    table = study.importance.table
    resid = table[(table["kind"] == "resid_post") & (table["role"] != "answer")]
    changed = study.importance.about.get("changed_roles") or ()
    kept = resid[~resid["role"].isin(changed)]
    bands = study.table("bands.csv")
    rows = bands[(bands["kind"] == "resid_post") & (bands["layers"] == PAPER)].set_index("roles")
    means = [
        f"{WORDS[roles]} {rows.loc[roles, 'aie']:.3f} [{rows.loc[roles, 'ci_low']:.3f}, "
        f"{rows.loc[roles, 'ci_high']:.3f}]"
        for roles in ASPECTS
        if roles in rows.index
    ]
    says = [
        f"{what} The mean total effect is {study.run['average_total_effect']:.3f}.",
        f"The largest effect outside the last token is {cell(best(resid))}"
        + (f", and outside the changed tokens {cell(best(kept))}." if changed else "."),
        f"Mean over layers {PAPER} (the paper's 10-15 of 32): {'; '.join(means)}.",
        f"Chosen sites: {', '.join(map(str, study.sites)) or 'none; no role is left to choose from'}.",
    ]
    return Shown(plots.heatmap(study.importance, study.sites), " ".join(says))


@shows("smollm2_noise", "SmolLM2, Figure 3: noise on all tokens, real reviews", "smollm2/noise")
def noise(study: Study) -> Shown:
    """Draw the paper's Figure 3."""
    return _map(
        study,
        "All tokens are noised, as in the paper, which names the aspect tokens in middle layers.",
    )


@shows(
    "smollm2_aspect_swap",
    "SmolLM2: the question asks about another aspect",
    "smollm2/aspect_swap",
)
def aspect_swap(study: Study) -> Shown:
    """Draw the map of AspectSwap."""
    return _map(study, "The sentence stays, and the question asks about another aspect (MAMS).")


@shows(
    "smollm2_interaction",
    "SmolLM2: both directions of patching",
    "smollm2/aspect_swap_noise",
)
def both_directions(study: Study) -> Shown:
    """Draw where the direction of patching matters, with AspectSwap."""
    return states(study, "prob")


@shows(
    "smollm2_interaction_opinion",
    "SmolLM2: both directions of patching, opinion words",
    "smollm2/opinion_swap_noise",
)
def both_directions_opinion(study: Study) -> Shown:
    """Draw where the direction of patching matters, with OpinionSwap."""
    return states(study, "prob")


@shows("smollm2_heads", "SmolLM2: attention heads", "smollm2/aspect_swap_heads")
def heads(study: Study) -> Shown:
    """Draw the heads, with AspectSwap."""
    table = study.importance.table.sort_values("aie", ascending=False)
    clear = int((table["p_adjusted"] < 0.05).sum())
    first = "; ".join(cell(row) for _, row in table.head(4).iterrows())
    return Shown(
        plots.heads(study.importance),
        f"Of {len(table)} cells (a head at a role), {clear} differ from 0 after correction; the mean "
        f"total effect is {study.run['average_total_effect']:.3f}. The largest are {first}.",
    )


@shows("smollm2_opinion_swap", "SmolLM2: another opinion expression", "smollm2/opinion_swap")
def opinion_swap(study: Study) -> Shown:
    """Draw the map of OpinionSwap."""
    return _map(study, "The opinion expression is replaced by one of another polarity (DMASTE).")


@shows(
    "table_smollm2_bands",
    "SmolLM2: the paper's layers beside others",
    "smollm2/noise",
    may=("smollm2/aspect_swap", "smollm2/opinion_swap"),
)
def bands(*found: Study | None) -> Shown:
    """Tabulate mean effects of the residual stream over bands of layers."""
    present = [s for s in found if s is not None]
    blocks, layers = [], list[str]()
    for study in present:
        table = study.table("bands.csv")
        table = table[table["kind"] == "resid_post"]
        layers = list(dict.fromkeys(table["layers"]))
        rows = []
        for roles, group in table.groupby("roles", sort=False):
            by = group.set_index("layers")
            rows.append((WORDS[str(roles)], *(_interval(by.loc[b]) for b in layers)))
        blocks.append((_name(study), tuple(rows)))
    says = [_claim(study) for study in present]
    caption = (
        "Mean AIE of the residual stream over six layers, with 95 % intervals by sentence. "
        f"Layers {PAPER} of 30 correspond to the paper's 10-15 of 32. "
        f"{' '.join(s.source for s in present)}"
    )
    head = ("tokens", *(f"layers {b}" for b in layers))
    return Shown(Table(caption, "tab:smollm2-bands", head, tuple(blocks)), " ".join(says))


def _name(study: Study) -> str:
    return study.folder.name.replace("_", " ")


def _interval(row: pd.Series) -> str:
    return f"{row['aie']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"


def _claim(study: Study) -> str:
    """Return a sentence on the paper's claim: aspect tokens in its layers against other layers."""
    table = study.table("bands.csv")
    rows = table[(table["kind"] == "resid_post") & (table["layers"] == PAPER)].set_index("roles")
    parts = [
        f"{WORDS[roles]} {row['minus_others']:+.3f} [{row['minus_low']:+.3f}, {row['minus_high']:+.3f}]"
        for roles in ASPECTS
        if roles in rows.index
        for row in [rows.loc[roles]]
    ]
    return sentence(
        f"with {_name(study)}, layers {PAPER} minus all other layers: {'; '.join(parts)}"
    )


@shows("table_smollm2_accuracy", "SmolLM2: accuracy on the test files", "smollm2/accuracy")
def accuracy(study: Study) -> Shown:
    """Tabulate the accuracy of the adapter beside the model as it is and the majority class."""
    table = study.table("scores.csv")
    table = table[table["subset"] == "all"]
    rows, means = [], dict[str, float]()
    for data, group in table.groupby("data", sort=False):
        by = group.set_index("system")
        one = by.iloc[0]
        rows.append(
            (
                _file(str(data)), str(int(one["n"])), f"{100 * one['majority']:.1f}",
                *(_accuracy(by.loc[s]) for s in ("none", "bundled")),
                f"{100 * by.loc['bundled', 'macro_f1']:.1f}", f"{by.loc['bundled', 'label_mass']:.3f}",
            )
        )  # fmt: skip
    domains = table[~table["data"].str.contains("mams")]
    for system, group in domains.groupby("system"):
        means[str(system)] = 100 * float(group["accuracy"].mean())
    means["majority"] = 100 * float(domains["majority"].mean())
    says = (
        f"Mean accuracy over the four domains: adapter {means['bundled']:.1f} %, model as it is "
        f"{means['none']:.1f} %, majority class {means['majority']:.1f} % (the paper: LoRA on "
        "Llama-2-7b 86.5 %, BERT-base 82.3 %). Rows are a sample drawn by seed; 95 % intervals "
        "resample sentences."
    )
    caption = f"Accuracy in percent. {study.source}"
    head = ("test file", "n", "majority", "as it is", "adapter", "macro-F1", "label mass")
    return Shown(Table(caption, "tab:smollm2-accuracy", head, (("", tuple(rows)),)), says)


def _file(data: str) -> str:
    """Return `rest_test` for a path or name of a file."""
    return data.rsplit("/", 1)[-1].split(".")[0].replace("_test", "").replace("test", "MAMS")


def _accuracy(row: pd.Series) -> str:
    if pd.isna(row["accuracy"]):
        return NONE
    return (
        f"{100 * row['accuracy']:.1f} [{100 * row['accuracy_low']:.1f}, "
        f"{100 * row['accuracy_high']:.1f}]"
    )


# ---- the edit at places --------------------------------------------------------------------------

PLACES = {
    "zero_shot": "unedited, the paper's wording", "best_wording": "unedited, best wording", "traced": "traced layers {}",
    "paper": "the paper's layers {}", "random": "random layers {}", "last": "last layers {}", "first": "first layers {}",
    "all": "all layers {}", "lora all": "LoRA, all layers {}", "traced, last token": "traced layers {}, LoReFT at the last token",
    "traced, a word": "traced layers {}, LoReFT at a word of the sentence",
    "loreft traced": "LoReFT alone, traced layers {}", "W_O traced": "W_O alone, traced layers {}",
    "lora traced": "LoRA, traced layers {}", "loreft all": "LoReFT alone, all layers {}",
}  # fmt: skip
"""Places of the edit in words; other places are ranges of layers and keep their names."""
FILES = ("device", "laptop", "restaurant", "service")
SMALLER = (
    "Smaller than the paper's protocol: one training set from all four domains, a sample of each "
    "test file, one epoch, two learning rates."
)


def _placed(study: Study) -> pd.DataFrame:
    """Return places.csv with names in words that hold the layers."""
    table = study.table("places.csv")
    words = [PLACES.get(r["place"], r["place"]).format(r["layers"]) for _, r in table.iterrows()]
    return table.assign(words=words)


@shows("table_smollm2_places", "SmolLM2: the paper's edit at places", "smollm2/places")
def places(study: Study) -> Shown:
    """Tabulate accuracy by place and file, and the difference from the traced layers."""
    table = _placed(study)
    rows = [
        (
            row["words"], NONE if pd.isna(row["rate"]) else f"{row['rate']:g}", f"{int(row['parameters']):,}",
            str(int(row["seeds"])), *(f"{100 * row[f]:.1f}" for f in FILES), _accuracy(row),
            NONE if pd.isna(row["minus_traced"]) else _points(row),
        )
        for _, row in table.iterrows()
    ]  # fmt: skip
    head = ("place", "rate", "parameters", "seeds", *FILES, "mean", "minus traced")
    caption = f"Accuracy in percent and differences in points. {SMALLER} {study.source}"
    return Shown(Table(caption, "tab:smollm2-places", head, (("", tuple(rows)),)), _outcome(study))


def _points(row: pd.Series) -> str:
    """Return a difference from the traced layers in points, with its interval."""
    value, low, high = (100 * row[c] for c in ("minus_traced", "minus_low", "minus_high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _outcome(study: Study) -> str:
    """Say which places differ from the traced layers, by the measure that was fixed before."""
    table = _placed(study)
    trained = table[(table["parameters"] > 0) & table["minus_traced"].notna()]
    parts = []
    for what, chosen in (
        ("better than the traced layers", trained["minus_low"] > 0),
        ("worse", trained["minus_high"] < 0),
        ("no difference shown", (trained["minus_low"] <= 0) & (trained["minus_high"] >= 0)),
    ):
        rows = [f"{r['words']} {_points(r)}" for _, r in trained[chosen].iterrows()]
        parts.append(f"{what}: {', '.join(rows) or 'none'}")
    traced = table[table["place"] == "traced"].iloc[0]
    done = study.run["trainings"]
    return (
        f"The traced layers ({traced['layers']}) reach {_accuracy(traced)} %. Differences from them in "
        f"points, with intervals over test sentences: {sentence(parts)} {done['done']} of "
        f"{done['planned']} trainings are done. {SMALLER}"
    )


@shows("smollm2_places", "SmolLM2, Figures 4 and 5: which layers and which token", "smollm2/places")
def places_drawn(study: Study) -> Shown:
    """Draw accuracy by place, with single seeds."""
    table, answers = _placed(study), study.table("answers.csv")
    single = {
        name: [
            float((answers[c] == answers["gold"]).mean())
            for c in answers.columns[3:]
            if c.partition("/")[0] == name
        ]
        for name in table["place"]
    }
    figure = charts.dots(
        table.assign(single=table["place"].map(single)), place="words", title="The paper's edit at places of SmolLM2-135M",
        note=f"{study.note}{plots.SEPARATOR}bars: 95 % intervals by sentence; faint: single seeds",
    )  # fmt: skip
    order = table.sort_values("accuracy", ascending=False, kind="stable")
    ranked = "; ".join(f"{r['words']} {100 * r['accuracy']:.1f}" for _, r in order.iterrows())
    return Shown(figure, f"Accuracy in percent over the four test files, best first: {ranked}.")


# ---- does the trace predict where editing helps? -------------------------------------------------

DRAWS = 1000
"""Resamples of test sentences."""


@shows(
    "table_smollm2_windows",
    "SmolLM2: effects of a range of layers, and the accuracy of editing it",
    "smollm2/places",
    "smollm2/noise",
    "smollm2/aspect_swap",
)
def windows(places: Study, *traces: Study) -> Shown:
    """Tabulate mean AIE at the edited token beside accuracy, and their rank correlation."""
    ranges = edited_ranges(places.table("places.csv"))
    effects = {_name(s): [mean_effect(s.table("importance.csv"), r) for r in ranges.values()] for s in traces}  # fmt: skip
    accuracy = accuracies(places.table("answers.csv"), list(ranges))
    rows = [
        (
            f"{r[0]}-{r[-1]}",
            *(f"{e[i]:.3f}" for e in effects.values()),
            f"{100 * accuracy[0, i]:.1f}",
        )
        for i, r in enumerate(ranges.values())
    ]
    says = [
        f"{name}: rho {value:.2f} [{low:.2f}, {high:.2f}], p {p:.2f}"
        for name, effect in effects.items()
        for value, low, high, p in [rank_correlation(effect, accuracy)]
    ]
    caption = (
        "Mean AIE of the residual stream at the last token of the aspect in the question, over the "
        f"layers of a range, and accuracy in percent of the paper's edit there. {places.source}"
    )
    head = ("layers", *(f"AIE, {name}" for name in effects), "accuracy")
    return Shown(
        Table(caption, "tab:smollm2-windows", head, (("", tuple(rows)),)),
        f"Spearman's correlation over {len(ranges)} ranges, with an interval that resamples test sentences "
        f"and a two-sided p-value over permutations of the ranges: {'; '.join(says)}. Ranges overlap.",
    )


def edited_ranges(table: pd.DataFrame) -> dict[str, list[int]]:
    """Return the places where the whole edit acts on neighbouring layers, with their layers."""
    found = {}
    for _, row in table.iterrows():
        low, dash, high = str(row["layers"]).partition("-")
        whole = row["place"] in ("traced", "paper", "first", "last", "all")
        if dash and high.isdigit() and (whole or str(row["place"]).startswith("layers ")):
            found[str(row["place"])] = list(range(int(low), int(high) + 1))
    return dict(sorted(found.items(), key=lambda item: (item[1][0], item[1][-1])))


def mean_effect(table: pd.DataFrame, layers: list[int], role: str = "query.last") -> float:
    """Return the mean AIE of the residual stream over some layers, at one role."""
    here = (table["kind"] == "resid_post") & (table["role"] == role) & table["layer"].isin(layers)
    return float(table.loc[here, "aie"].mean())


def accuracies(answers: pd.DataFrame, names: list[str]) -> np.ndarray:
    """Return `[1 + draw place]`: accuracies over seeds, then the same for resampled sentences."""
    right = np.stack(
        [
            answers[[c for c in answers.columns[3:] if c.partition("/")[0] == name]]
            .eq(answers["gold"], axis=0).mean(axis=1).to_numpy()
            for name in names
        ]
    )  # fmt: skip
    numbers, rng = answers["sentence"].to_numpy(), np.random.default_rng(0)
    member = numbers[:, None] == np.unique(numbers)
    weights = rng.multinomial(member.shape[1], np.full(member.shape[1], 1 / member.shape[1]), DRAWS)
    of_rows = np.concatenate([np.ones((1, len(numbers))), weights @ member.T])
    return np.asarray(of_rows @ right.T / of_rows.sum(1, keepdims=True))


def rank_correlation(
    effect: list[float], accuracy: np.ndarray
) -> tuple[float, float, float, float]:
    """Return Spearman's rho with the first row, its interval over the others, and a p-value."""
    several = [row for row in accuracy if np.ptp(row) > 0]  # equal accuracies have no order
    drawn = [float(stats.spearmanr(effect, row).statistic) for row in several]
    low, high = np.quantile(drawn[1:], [0.025, 0.975])

    def rho(x: np.ndarray) -> float:
        return float(stats.spearmanr(x, accuracy[0]).statistic)

    tested = stats.permutation_test(
        (np.asarray(effect),), rho, permutation_type="pairings", n_resamples=2000, rng=0
    )
    return drawn[0], float(low), float(high), float(tested.pvalue)


# ---- one domain for training ---------------------------------------------------------------------

TRAINED = {"traced": "the edit, layers 18-23", "lora all": "LoRA, all layers"}


@shows("table_smollm2_domains", "SmolLM2, Table 3: other domains", "smollm2/domains")
def domains(study: Study) -> Shown:
    """Tabulate accuracy by training domain and test file, inside and outside the domain."""
    table = study.table("domains.csv")
    blocks, says = [], []
    for system, group in table.groupby("system", sort=False):
        name = TRAINED[str(system)]
        each = group[group["domain"] != "all"]
        rows = tuple(
            (r["domain"], *(f"{100 * r[f]:.1f}" for f in FILES), *(_side(r, side) for side in SIDES))
            for _, r in each.iterrows()
        )  # fmt: skip
        whole = group[group["domain"] == "all"].iloc[0]
        seeds = sorted({int(n) for n in each["seeds"]})
        blocks.append((f"{name}, {' or '.join(map(str, seeds))} seed{'s' * (seeds[-1] > 1)}", rows))
        says.append(f"{name}: inside {_side(whole, 'inside')}, outside {_side(whole, 'outside')}")
    caption = f"Accuracy in percent by test file. {study.source}"
    head = ("trained on", *FILES, "inside the domain", "outside")
    return Shown(
        Table(caption, "tab:smollm2-domains", head, tuple(blocks)),
        f"Means over training domains, with 95 % intervals by sentence. {sentence(says)} The rates are "
        "those that the study of places chose; none was tuned for a domain.",
    )


SIDES = ("inside", "outside")


def _side(row: pd.Series, side: str) -> str:
    return (
        f"{100 * row[side]:.1f} [{100 * row[f'{side}_low']:.1f}, {100 * row[f'{side}_high']:.1f}]"
    )
