"""The search on matrices of known effects, and on a model against the full sweep."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from support.jobs import EXAMPLES, pairs_of, tiny

from mech_absa.errors import ConfigError
from mech_absa.patch.corruption import Counterfactual
from mech_absa.patch.trace import trace
from mech_absa.select.search import (
    LEAST_SURE,
    Search,
    Strategy,
    Tally,
    anytime_radius,
    search,
    search_cells,
)

BOTH = list(Strategy)


class Known:
    """Effects that are known beforehand; notes what was asked."""

    def __init__(self, effects):
        self.effects = effects
        self.asked = np.zeros(effects.shape, dtype=int)

    @property
    def exists(self):
        return ~np.isnan(self.effects)

    def __call__(self, pairs, cells):
        at = np.ix_(pairs, cells)
        self.asked[at] += self.exists[at]
        return self.effects[at]


def world(n_pairs: int = 120, n_cells: int = 60, seed: int = 0, error: float = 0.3):
    """Effects with means 3, 2.9, ... around the tenth cell, and an estimate with errors of its own."""
    rng = np.random.default_rng(seed)
    means = np.linspace(3, 0, n_cells)
    effects = means + rng.normal(size=(n_pairs, n_cells))
    bias = rng.normal(scale=error, size=n_cells)
    return effects, effects + bias + error * rng.normal(size=effects.shape)


def truth(effects, k: int) -> set[int]:
    return set(np.argsort(-np.nanmean(effects, axis=0))[:k].tolist())


@pytest.mark.parametrize("strategy", BOTH)
def test_a_whole_budget_finds_the_truth_whatever_the_estimate(strategy):
    effects, _ = world(40, 30)
    wrong = np.random.default_rng(9).normal(size=effects.shape)
    found = search(Known(effects), wrong, Search(5, 1.0, strategy, pool=30))
    assert set(found.top) == truth(effects, 5)
    assert found.spent <= found.total == effects.size


@pytest.mark.parametrize("strategy", BOTH)
@pytest.mark.parametrize("budget", [0.01, 0.07, 0.25, 0.6])
def test_the_budget_holds_and_no_cell_is_computed_twice(strategy, budget):
    effects, estimate = world()
    effects[::3, ::4] = np.nan  # cells that some pairs lack
    estimate[::3, ::4] = np.nan
    known = Known(effects)
    found = search(known, estimate, Search(10, budget, strategy))
    assert known.asked.max() <= 1
    assert known.asked.sum() == found.spent <= budget * found.total
    assert found.total == np.isfinite(effects).sum()


@pytest.mark.parametrize("strategy", BOTH)
def test_a_quarter_of_the_work_finds_nearly_all(strategy):
    shares = []
    for seed in range(10):
        effects, estimate = world(seed=seed)
        found = search(Known(effects), estimate, Search(10, 0.25, strategy, seed=seed))
        shares.append(len(truth(effects, 10) & set(found.top)) / 10)
    alone = [
        len(truth(e, 10) & set(np.argsort(-h.mean(0))[:10].tolist())) / 10
        for e, h in (world(seed=s) for s in range(10))
    ]
    assert np.mean(shares) >= 0.95 and np.mean(shares) > np.mean(alone) + 0.1


@pytest.mark.parametrize("strategy", BOTH)
def test_a_perfect_estimate_is_believed_once_it_was_checked(strategy):
    effects, _ = world()
    found = search(Known(effects), effects, Search(10, 0.25, strategy))
    assert set(found.top) == truth(effects, 10)
    sure = found.table[found.table["n"] >= LEAST_SURE]
    assert len(sure) and np.allclose(sure["high"] - sure["low"], 0)
    np.testing.assert_allclose(found.table["mean"], effects.mean(0)[found.table["cell"]])


def test_halving_measures_the_best_on_the_most_pairs():
    effects, estimate = world()
    table = search(Known(effects), estimate, Search(5, 0.15, pool=40)).table
    counts = sorted(set(table["n"]))
    assert len(counts) >= 3
    assert table["n"][:5].min() == counts[-1] and (table["n"] == counts[0]).sum() == 20


@pytest.mark.parametrize("strategy", [Strategy.UCB, Strategy.THOMPSON])
def test_it_stops_when_it_is_certain(strategy):
    rng = np.random.default_rng(0)
    effects = np.r_[np.full(4, 9.0), np.zeros(36)] + 0.1 * rng.normal(size=(200, 40))
    found = search(Known(effects), np.zeros_like(effects), Search(4, 1.0, strategy, pool=40))
    assert found.certain and set(found.top) == {0, 1, 2, 3} and found.share < 0.5


def test_thompson_measures_what_the_draws_disagree_about():
    """Cells 0 and 1 lead clearly; 2 and 3 are alike; 4 to 11 are far below. Two leaders are certain
    after few pairs, three never, so the pairs go to cells 2 and 3.
    """
    rng = np.random.default_rng(0)
    effects = np.r_[9.0, 9.0, 5.0, 5.0, np.zeros(8)] + rng.normal(size=(300, 12))
    found = search(
        Known(effects), np.zeros_like(effects), Search(3, 0.4, Strategy.THOMPSON, pool=12)
    )
    n = found.table.set_index("cell")["n"]
    assert set(found.top[:2]) == {0, 1} and found.top[2] in (2, 3)
    assert n[[2, 3]].min() > 5 * n[[0, 1, *range(4, 12)]].max()


def test_standard_errors_by_hand():
    """Errors of an estimate of 0: three pairs of 1, 2, 3 and three of 5, of six pairs; the typical
    deviation is sqrt((1 + 0) / 2).
    """
    effects = np.array([[1.0, 5], [2, 5], [3, 5], [1, 5], [2, 5], [3, 5]])
    tally = Tally(Known(effects), np.zeros((6, 2)), Search(1, 1.0))
    tally.order = np.arange(6)
    tally.measure(np.array([0, 1]), 3)
    assert tally.errors() == pytest.approx([1 / math.sqrt(3), math.sqrt(0.5) / math.sqrt(3)])
    tally.measure(np.array([1]), 3)
    assert tally.errors()[1] == 0 and tally.unfinished(np.array([1, 0])).tolist() == [0]


def test_nothing_is_certain_after_a_few_pairs():
    effects, estimate = world(LEAST_SURE - 1)
    found = search(Known(effects), estimate, Search(10, 0.3))
    assert not found.certain and math.isinf(found.table["high"].max())


# ---- intervals


def test_the_radius_by_its_formula():
    n, alpha, best = 50, 0.05, 80
    r2 = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / best
    expected = 1.5 * math.sqrt(
        2 * (n * r2 + 1) / (n**2 * r2) * math.log(math.sqrt(n * r2 + 1) / alpha)
    )
    got = anytime_radius(np.array([n, 1]), np.array([1.5, 1.5]), alpha, best)
    assert got[0] == pytest.approx(expected) and math.isinf(got[1])


def test_intervals_hold_at_all_times_together():
    """Of 400 sequences, few may ever leave their interval; fixed-time intervals do so far more often."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 300))
    n = np.arange(1, 301)
    mean = x.cumsum(1) / n
    sd = np.sqrt(np.maximum((x**2).cumsum(1) / n - mean**2, 0) * n / np.maximum(n - 1, 1))
    late = n >= LEAST_SURE
    radius = anytime_radius(np.broadcast_to(n, x.shape), sd, 0.1, 150)
    ever = (np.abs(mean) > radius)[:, late].any(axis=1).mean()
    fixed = (np.abs(mean) > 1.645 * sd / np.sqrt(n))[:, late].any(axis=1).mean()
    assert ever <= 0.1 and fixed > 0.3


def test_errors_that_are_rare_are_not_taken_for_none():
    """One pair in twelve has an error; a cell where none was met must not be certain."""
    rng = np.random.default_rng(0)
    missed = []
    for _ in range(30):
        effects = rng.normal(size=(120, 40))
        rare = rng.random(effects.shape) < 1 / 12
        estimate = effects + rare * rng.normal(scale=2.0, size=effects.shape)
        found = search(Known(effects), estimate, Search(5, 0.2))
        t = found.table[np.isfinite(found.table["high"])]
        truth_ = effects.mean(0)[t["cell"]]
        outside = (truth_ < t["low"] - 1e-9) | (truth_ > t["high"] + 1e-9)
        missed.append(bool(outside.any()))
    assert np.mean(missed) <= 0.1


# ---- what is refused


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"k": 0}, "the 0 largest cells"),
        ({"budget": 0.0}, "a budget of 0 was given"),
        ({"budget": 1.5}, "a budget of 1.5 was given"),
        ({"level": 1.0}, "level 1 was given"),
        ({"pool": 9}, "a pool of 9 candidates was given for 10 cells"),
    ],
)
def test_impossible_searches(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Search(**options)


def test_more_cells_than_there_are():
    with pytest.raises(ConfigError, match="the 10 largest of 4 cells"):
        search(Known(np.zeros((3, 4))), np.zeros((3, 4)), Search(10))


# ---- on a model


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_whole_budget_is_the_full_sweep(direction):
    model = tiny("llama")
    pairs = pairs_of(model, Counterfactual(), examples=EXAMPLES)
    kinds = ["resid_post", "mlp_out", "head"]
    how = Search(3, 1.0, pool=10**6)
    found, sites = search_cells(model, pairs, kinds, how, direction=direction)
    options = {"by": "role", "metric": "logit_diff", "direction": direction, "check": False}
    effects = trace(model, pairs, kinds, **options)
    values, cells = effects.matrix("role")
    names = [
        (r.kind, r.layer, None if pd.isna(r.head) else r.head, r.role)
        for r in cells.itertuples(index=False)
    ]
    mean = dict(zip(names, np.nanmean(values, axis=0), strict=True))
    assert found.spent <= found.total == len(effects.frame)
    whole = found.table[found.table["n"] == len(pairs)]
    assert set(found.top) <= set(whole["cell"])
    for row in whole.itertuples(index=False):
        s = sites[row.cell]
        assert row.mean == pytest.approx(mean[s.kind, s.layer, s.head, s.at], abs=1e-9)
        assert row.low == row.high == row.mean


def test_roles_narrow_the_search():
    model = tiny("llama")
    pairs = pairs_of(model, Counterfactual(), examples=EXAMPLES)
    found, sites = search_cells(model, pairs, ["mlp_out"], Search(1, 0.5), roles=["query.last"])
    assert {s.at for s in sites} == {"query.last"} and sites[found.top[0]].kind == "mlp_out"
