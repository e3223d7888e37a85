"""How much exact work does it take to find the largest cells? `python -m figures.search`.

The adapted bundled model is traced whole, once exactly and once by each estimate. Searches then draw
on the exact effects as if they computed them, at several budgets and with several orders of the
pairs, so that their recall of the ten largest cells is known. Two baselines stand beside them: the
estimate alone, and all cells on as few pairs as the budget allows. Results go to
`figures/results/search`: `recall.csv` (a row per estimate, way and budget) and `run.json`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mech_absa.commands.cli import command
from mech_absa.edits import load_edit
from mech_absa.model import load_model
from mech_absa.patch.pairs import make_pairs
from mech_absa.patch.plan import changed_roles
from mech_absa.patch.trace import trace
from mech_absa.readers import load_examples
from mech_absa.records import atomic, versions, write_json
from mech_absa.select.search import Search, Strategy, search

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Config:
    """Measure the recall of searches under a budget on the bundled model."""

    data: str = "builtin:laptop/train"
    """Reviews that are traced."""
    pairs: int = 60
    """Pairs, at most."""
    kinds: tuple[str, ...] = ("resid_post", "attn_out", "mlp_out", "head")
    """Kinds of state."""
    estimates: tuple[str, ...] = ("relp", "atp")
    """Estimates that searches begin with."""
    budgets: tuple[float, ...] = (0.02, 0.05, 0.1, 0.25)
    """Shares of the exact work."""
    k: int = 10
    """Cells to find."""
    seeds: int = 20
    """Orders of the pairs."""
    out: Path = ROOT / "figures" / "results" / "search"
    """Where the results go."""


class Kept:
    """Exact effects that are known, handed out as if they were computed."""

    def __init__(self, effects: np.ndarray):
        self.effects = effects

    @property
    def exists(self) -> np.ndarray:
        return ~np.isnan(self.effects)

    def __call__(self, pairs: np.ndarray, cells: np.ndarray) -> np.ndarray:
        return np.asarray(self.effects[np.ix_(pairs, cells)])


def top(means: np.ndarray, k: int) -> set[int]:
    """Return the numbers of the k largest means."""
    return {int(c) for c in np.argsort(-means, kind="stable")[:k]}


def runs(exact: np.ndarray, estimate: np.ndarray, config: Config) -> Iterator[dict[str, Any]]:
    """Yield a row per way, budget and order of the pairs."""
    means = np.nanmean(exact, axis=0)
    truth = top(means, config.k)

    def row(way: str, budget: float, found: set[int], **more: Any) -> dict[str, Any]:
        recall = len(truth & found) / config.k
        return {"way": way, "budget": budget, "recall": recall, **more}

    yield row("estimate alone", 0.0, top(np.nanmean(estimate, axis=0), config.k), spent=0.0)
    for budget in config.budgets:
        for seed in range(config.seeds):
            order = np.random.default_rng(seed).permutation(len(exact))
            few = exact[order[: max(1, int(budget * len(exact)))]]
            known = np.where(np.isnan(few).all(axis=0), -np.inf, np.nansum(few, axis=0))
            mean = known / np.maximum((~np.isnan(few)).sum(axis=0), 1)
            yield row("all cells, fewer pairs", budget, top(mean, config.k), spent=budget)
            for strategy in Strategy:
                how = Search(config.k, budget, strategy, seed=seed)
                found = search(Kept(exact), estimate, how)
                t = found.table
                inside = means[t["cell"]]
                sure = np.isfinite(t["high"].to_numpy())
                missed = (inside < t["low"] - 1e-9) | (inside > t["high"] + 1e-9)
                yield row(
                    str(strategy.value),
                    budget,
                    set(found.top),
                    spent=found.share,
                    certain=found.certain,
                    intervals=int(sure.sum()),
                    any_missed=bool(missed[sure].any()),
                )


def main(config: Config) -> None:
    """Trace, search, and write the results."""
    clock = time.process_time()
    base = load_model("bundled", device="cpu")
    model = load_edit("bundled", base).merged(base)
    examples = load_examples(config.data)
    pairs = make_pairs(model, examples, "counterfactual", limit=config.pairs)
    options: dict[str, Any] = {"by": "role", "metric": "logit_diff", "check": False}
    left_out = {"template", "answer", *changed_roles(pairs)}
    frames, cpu = [], {}
    exact, kept = np.empty(0), np.empty(0, dtype=bool)
    for method in ("exact", *config.estimates):
        started = time.process_time()
        effects = trace(model, pairs, config.kinds, method=method, **options)
        cpu[method] = round(time.process_time() - started, 1)
        values, cells = effects.matrix("role")
        if method == "exact":
            kept = ~cells["role"].isin(left_out).to_numpy()
            exact = values[:, kept]
            continue
        table = pd.DataFrame(runs(exact, values[:, kept], config))
        frames.append(table.assign(estimate=method))
    table = pd.concat(frames, ignore_index=True)
    short = table.groupby(["estimate", "way", "budget"], sort=False).agg(
        recall=("recall", "mean"),
        recall_sd=("recall", "std"),
        spent=("spent", "mean"),
        certain=("certain", "mean"),
        intervals=("intervals", "mean"),
        any_missed=("any_missed", "mean"),
        orders=("recall", "size"),
    )
    with atomic(config.out / "recall.csv") as temporary:
        short.reset_index().to_csv(temporary, index=False, float_format="%.4g")
    write_json(
        config.out / "run.json",
        {
            "study": "search",
            "command": "python -m figures.search",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "config": {k: v for k, v in asdict(config).items() if k != "out"},
            "model": {"name": model.name, "sha256": model.sha256},
            "pairs": len(pairs),
            "cells": int(kept.sum()),
            "roles_left_out": sorted(left_out),
            "cpu_seconds": {**cpu, "all": round(time.process_time() - clock, 1)},
            "versions": versions(),
        },
    )
    print(short.to_string())


if __name__ == "__main__":
    raise SystemExit(command(Config, main, "python -m figures.search"))
