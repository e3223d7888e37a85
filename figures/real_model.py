"""Draw what SmolLM2-135M shows on real reviews, beside what the paper says of Llama-2-7b."""

from __future__ import annotations

import pandas as pd

from mech_absa import plots

from . import charts
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
