"""Compare the two directions of patching: the interaction INT = TIE - PIE of every cell.

    PIE = m(corrupted run with the clean state restored) - m(corrupted run)          `denoise`
    TIE = m(clean run) - m(clean run with the corrupted state)                       `noise`
    INT = TIE - PIE                          0 if the cell does not interact (arXiv 2606.27510)

With INT > 0, removing the cell costs more than restoring it brings back, so other cells are needed
too. With INT < 0, restoring it brings back more than removing it costs, so others can replace it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mech_absa import plots
from mech_absa.errors import DataError
from mech_absa.patch.effects import Effects
from mech_absa.patch.importance import ImportanceMap
from mech_absa.records import write_json
from mech_absa.sites import HEAD_KINDS
from mech_absa.stats import top_k_overlap

from .study import Shown, Study, cell, percent, sentence, shows
from .tables import Table

KEYS = ["kind", "layer", "head", "role"]
METRICS = ("prob", "logit_diff")
TOP = 20
"""Leading cells that are compared between the directions."""


def interaction_table(denoise: Effects, noise: Effects) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return PIE, TIE and INT of every cell with their intervals (bootstrap by sentence).

    The difference is taken within each pair, so the interval of INT is that of a paired difference.

    Args:
        denoise, noise: effects of the same pairs and cells in the two directions.

    Returns:
        columns KEYS, pie, tie and int with `_low` and `_high` each, p and p_adjusted (of INT), n;
        and the `about` of the map of INT, with its correction and its number of sentences.

    Raises:
        DataError: the two hold different pairs or cells.
    """
    keys = ["example_id", *KEYS]
    one, two = denoise.frame, noise.frame
    one, two = (
        f.assign(head=f["head"].fillna(-1).astype(int)).set_index(keys)["effect"].sort_index()
        for f in (one, two)
    )
    if not one.index.equals(two.index):
        raise DataError(
            "the two directions were traced on different pairs or cells; INT needs the same"
        )
    difference = replace(
        denoise, frame=denoise.frame.assign(effect=_aligned(denoise.frame, two - one, keys))
    )
    maps = {"pie": denoise, "tie": noise, "int": difference}
    parts, about = [], {}
    for name, effects in maps.items():
        importance = effects.importance(by="role")
        table, about = importance.table, dict(importance.about)
        table = table.assign(head=table["head"].fillna(-1).astype(int)).set_index(KEYS)
        columns = {"aie": name, "ci_low": f"{name}_low", "ci_high": f"{name}_high"}
        extra = ["p", "p_adjusted", "n"] if name == "int" else []
        parts.append(table[[*columns, *extra]].rename(columns=columns))
    return pd.concat(parts, axis=1).reset_index(), about


def _aligned(frame: pd.DataFrame, values: pd.Series, keys: list[str]) -> list[float]:
    """Return values by key in the order of a frame's rows."""
    wanted = frame.assign(head=frame["head"].fillna(-1).astype(int))[keys]
    return values.reindex(pd.MultiIndex.from_frame(wanted)).tolist()


def keep_interaction(work: Path, results: Path, metrics: tuple[str, ...] = METRICS) -> None:
    """Write `<metric>.csv` and `about_<metric>.json` from the traces `<metric>_<direction>`."""
    for metric in metrics:
        keep_both(*(work / f"{metric}_{d}" for d in ("denoise", "noise")), results, metric)


def keep_both(denoise: Path, noise: Path, results: Path, metric: str) -> None:
    """Write `<metric>.csv` and `about_<metric>.json` from the traces of both directions."""
    results.mkdir(parents=True, exist_ok=True)
    table, about = interaction_table(Effects.load(denoise), Effects.load(noise))
    table.to_csv(results / f"{metric}.csv", index=False, float_format="%.5g", lineterminator="\n")
    kept = json.loads((denoise / "about.json").read_text(encoding="utf-8"))
    known = {k: about[k] for k in ("level", "adjustment", "n_pairs", "n_sentences", "resolution")}
    write_json(results / f"about_{metric}.json", kept | known | {"direction": "both"})


# ---- figures ------------------------------------------------------------------------------------


def _map(study: Study, metric: str) -> ImportanceMap:
    """Return INT as a map that the plots of AIE can draw."""
    table = study.table(f"{metric}.csv")
    about = json.loads(study.path(f"about_{metric}.json").read_text(encoding="utf-8"))
    names = {"int": "aie", "int_low": "ci_low", "int_high": "ci_high"}
    columns = [*KEYS, *names, "p", "p_adjusted", "n"]
    table = table[columns].rename(columns=names)
    return ImportanceMap(table, np.empty((0, len(table))), np.empty(0), about)


def _words(study: Study, metric: str, heads: bool) -> str:
    table = study.table(f"{metric}.csv")
    table = table[table["kind"].isin(HEAD_KINDS) == heads]
    share = table["int"].abs().mean() / table["pie"].abs().mean()
    clear = int((table["p_adjusted"] < 0.05).sum())
    same = round(TOP * top_k_overlap(table["pie"], table["tie"], TOP))
    row = table.loc[table["int"].abs().idxmax()].rename(
        {"int": "aie", "int_low": "ci_low", "int_high": "ci_high"}
    )
    about = json.loads(study.path(f"about_{metric}.json").read_text(encoding="utf-8"))
    kinds = "cells of heads" if heads else "cells of the residual stream, attention and MLPs"
    return (
        f"Over {len(table)} {kinds}, mean |INT| is {percent(share)} of mean |PIE|. {clear} "
        f"{'cell differs' if clear == 1 else 'cells differ'} from 0 after correction. {same} of the "
        f"{TOP} largest cells are the same in both directions. The largest interaction is {cell(row)} "
        f"(PIE {row['pie']:.3f}, TIE {row['tie']:.3f}). Resolution of the test: {about['resolution']}."
    )


def states(study: Study, metric: str) -> Shown:
    title = "Interaction INT = TIE − PIE: where the direction of patching matters"
    figure = plots.heatmap(_map(study, metric), title=title, value="INT", compress=True)
    return Shown(figure, _words(study, metric, heads=False))


def _heads(study: Study, metric: str) -> Shown:
    title = "Interaction INT = TIE − PIE of heads"
    figure = plots.heads(_map(study, metric), title=title, value="INT")
    return Shown(figure, _words(study, metric, heads=True))


@shows("interaction_prob", "Interaction of the two directions: probability", "interaction")
def interaction_prob(study: Study) -> Shown:
    return states(study, "prob")


@shows("interaction_prob_heads", "Interaction in heads: probability", "interaction")
def interaction_prob_heads(study: Study) -> Shown:
    return _heads(study, "prob")


@shows(
    "interaction_logit_diff", "Interaction of the two directions: logit difference", "interaction"
)
def interaction_logit_diff(study: Study) -> Shown:
    return states(study, "logit_diff")


@shows("interaction_logit_diff_heads", "Interaction in heads: logit difference", "interaction")
def interaction_logit_diff_heads(study: Study) -> Shown:
    return _heads(study, "logit_diff")


@shows("table_interaction", "Interaction by kind of state", "interaction")
def table_interaction(study: Study) -> Shown:
    header = (
        "kind", "cells", "mean |INT| / mean |PIE|, %", "differ from 0", f"top {TOP} shared", "largest INT", "INT", "PIE", "TIE",
    )  # fmt: skip
    blocks, words = [], []
    for metric in METRICS:
        table = study.table(f"{metric}.csv")
        rows = []
        for kind, of in table.groupby("kind", sort=False):
            top = of.loc[of["int"].abs().idxmax()]
            head = int(top["head"]) if kind in HEAD_KINDS else ""
            share = of["int"].abs().mean() / of["pie"].abs().mean()
            same = round(TOP * top_k_overlap(of["pie"], of["tie"], TOP))
            rows.append(
                (
                    str(kind), str(len(of)), f"{100 * share:.1f}", str(int((of["p_adjusted"] < 0.05).sum())), f"{same} of {TOP}",
                    f"L{int(top['layer'])}.{kind}{head}@{top['role']}",
                    f"{top['int']:.3f} [{top['int_low']:.3f}, {top['int_high']:.3f}]", f"{top['pie']:.3f}", f"{top['tie']:.3f}",
                )
            )  # fmt: skip
        blocks.append((metric, tuple(rows)))
        share = table["int"].abs().mean() / table["pie"].abs().mean()
        words.append(
            f"{metric}: mean |INT| is {percent(share)} of mean |PIE| over all {len(table)} cells"
        )
    caption = (
        "Interaction of the two directions of patching: INT = TIE - PIE within each pair, with intervals "
        "by sentence. A cell differs from 0 if p is below 0.05 after correction over all cells. "
        f"{study.source}"
    )
    return Shown(Table(caption, "tab:interaction", header, tuple(blocks)), sentence(words))
