"""The k largest cells of a map under a budget of exact work.

    found = search_cells(model, pairs, ["resid_post", "mlp_out"], Search(k=10, budget=0.1))
    found.table, found.spent, found.certain

A full sweep patches every cell (component x role) of every pair. To name the k largest averages, most
of this work is wasted on cells that are clearly small. The search spends exact cells where they
matter:

1. An estimate from gradients covers all cells and pairs. The `pool` best cells are candidates.
2. Exact effects are computed for candidates on some pairs. With e the estimate and x the exact
   effect, the mean over all pairs is estimated by mean(e over all pairs) + mean(x - e over the pairs
   measured). The estimate need not be right: its error is measured.
3. `halving` splits the budget into rounds and drops the lower half of the candidates after each
   (Karnin et al. 2013, successive halving). `ucb` measures, again and again, the leaders with the
   lowest lower bound and the challengers with the highest upper bound (LUCB, Kalyanakrishnan et al.
   2012), and stops where no challenger can be a leader. `thompson` draws every candidate's mean from
   its normal posterior, twice, and measures the cells that are leaders in one draw only (top-two
   Thompson sampling, Russo 2016, arXiv 1602.08448); it stops as `ucb` does.

Intervals hold at all times together, however often one looks and whenever one stops: they are
asymptotic confidence sequences (Waudby-Smith et al. 2021, arXiv 2103.06476, theorem 2.2), with the
level shared by all candidates. Pairs come in one random order. They are asymptotic: with few pairs and
errors that are rare and large they miss more often than the level says, and `figures.search` counts
how often. Do not read them as a guarantee below about 30 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from ..errors import ConfigError
from ..model import Model
from ..patch.pairs import Pair, Pairs, by_length
from ..patch.plan import Plan, plan
from ..patch.request import By, Request
from ..patch.trace import trace
from ..patch.traced import cell_site
from ..sites import Site
from ..words import Choice

FIRST = 6
"""Pairs on which every candidate is measured before `ucb` and `thompson` choose."""
LEAST_SURE = 12
"""Measured pairs below which no interval is trusted: it is asymptotic."""
STEP_CELLS, STEP_PAIRS = 8, 8
"""Cells and pairs of one step of `ucb` and `thompson`."""
DRAWS = 50
"""Draws after which `thompson` gives up on a second one with other leaders."""


class Strategy(Choice):
    """How exact cells are spent."""

    HALVING = "halving", "rounds over more and more pairs, the lower half dropped after each"
    UCB = "ucb", "the least certain leaders and challengers, until they are apart"
    THOMPSON = (
        "thompson",
        "cells that are leaders in one of two draws of their means, until they are apart",
    )


@dataclass(frozen=True)
class Search:
    """What is searched for, and how much may be spent.

    Attributes:
        k: cells to find.
        budget: exact cells that may be computed, as a share of the full sweep.
        strategy: how they are spent.
        pool: candidates, taken by the estimate; default 4 k, and all cells where halving may spend
            the whole sweep.
        level: at which all intervals hold together.
        seed: of the order of the pairs.

    Raises:
        ConfigError: a number is out of range.
    """

    k: int = 10
    budget: float = 0.25
    strategy: Strategy = Strategy.HALVING
    pool: int | None = None
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"the {self.k} largest cells were asked for; accepted: 1 or more")
        if not 0 < self.budget <= 1:
            raise ConfigError(
                f"a budget of {self.budget:g} was given; accepted: a share of the full sweep above 0, up to 1"
            )
        if not 0 < self.level < 1:
            raise ConfigError(f"level {self.level:g} was given; accepted: between 0 and 1")
        if self.pool is not None and self.pool < self.k:
            raise ConfigError(
                f"a pool of {self.pool} candidates was given for {self.k} cells; accepted: {self.k} or more"
            )


@runtime_checkable
class Cells(Protocol):
    """Exact effects on demand.

    Attributes:
        exists: `[pair cell]`, which cells there are.
    """

    @property
    def exists(self) -> Bool[np.ndarray, "pair cell"]: ...
    def __call__(
        self, pairs: Int[np.ndarray, " p"], cells: Int[np.ndarray, " c"]
    ) -> Float[np.ndarray, "p c"]:
        """Return exact effects, NaN for cells that a pair lacks."""
        ...


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        table: columns `cell, mean, low, high, n`, a row per candidate, the largest first; `n` counts
            the pairs that were measured exactly.
        k: how many rows are the answer.
        spent: exact cells computed.
        total: exact cells of the full sweep.
        certain: whether every leader's interval lies above those of all other candidates.
    """

    table: pd.DataFrame
    k: int
    spent: int
    total: int
    certain: bool

    @property
    def top(self) -> list[int]:
        """Return the numbers of the k cells."""
        return [int(c) for c in self.table["cell"].head(self.k)]

    @property
    def share(self) -> float:
        """Return the share of the full sweep that was computed."""
        return self.spent / self.total


def anytime_radius(
    n: Int[np.ndarray, "*cell"], sd: Float[np.ndarray, "*cell"], alpha: float, best_at: int
) -> Float[np.ndarray, "*cell"]:
    """Return half the width of a mean's interval that holds at all n >= some n_0 together.

    sd sqrt(2 (n r^2 + 1) / (n^2 r^2) log(sqrt(n r^2 + 1) / alpha)), with r so chosen that the interval
    is narrowest at `best_at` observations (Waudby-Smith et al. 2021, arXiv 2103.06476, theorem 2.2
    and appendix B.2). Infinite for fewer than two observations.
    """
    r2 = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / best_at
    count = np.maximum(n, 1).astype(float)
    inner = np.log(np.sqrt(count * r2 + 1) / alpha)
    radius = sd * np.sqrt(2 * (count * r2 + 1) / (count**2 * r2) * inner)
    return np.where(n >= 2, radius, np.inf)


@dataclass(eq=False)
class Tally:
    """Exact effects measured so far.

    Attributes:
        cells: where exact effects come from.
        estimate: `[pair cell]`, NaN for cells that a pair lacks.
        search: what is searched for.
        order: pairs in random order.
        exact: `[pair cell]`, NaN where not measured.
        next: of each cell, how far along the order it was measured.
    """

    cells: Cells
    estimate: Float[np.ndarray, "pair cell"]
    search: Search
    order: Int[np.ndarray, " pair"] = field(init=False)
    exact: Float[np.ndarray, "pair cell"] = field(init=False)
    next: Int[np.ndarray, " cell"] = field(init=False)
    spent: int = 0

    def __post_init__(self) -> None:
        n_pairs, n_cells = self.estimate.shape
        self.order = np.random.default_rng(self.search.seed).permutation(n_pairs)
        self.exact = np.full((n_pairs, n_cells), np.nan)
        self.next = np.zeros(n_cells, dtype=int)
        self.total = int(self.cells.exists.sum())
        self.most = int(self.search.budget * self.total)

    def measure(self, chosen: Int[np.ndarray, " c"], n: int) -> None:
        """Measure cells on their next `n` pairs, as far as the budget reaches."""
        for start in np.unique(self.next[chosen]):
            same = chosen[self.next[chosen] == start]
            pairs = self.order[start : start + n]
            need = self.cells.exists[np.ix_(pairs, same)].sum(axis=1).cumsum()
            pairs = pairs[: int(np.searchsorted(need, self.most - self.spent, side="right"))]
            if not len(pairs):
                continue
            self.exact[np.ix_(pairs, same)] = self.cells(pairs, same)
            self.spent += int(self.cells.exists[np.ix_(pairs, same)].sum())
            self.next[same] += len(pairs)

    @property
    def full(self) -> bool:
        """Return whether no cell can be measured any more: the budget or the pairs are used up."""
        return self.spent >= self.most

    def means(self) -> Float[np.ndarray, " cell"]:
        """Return mean(estimate) + mean(exact - estimate over the pairs measured)."""
        means: np.ndarray = np.nanmean(self.estimate, axis=0) + np.nan_to_num(self._errors()[1])
        return means

    def radii(self, candidates: int) -> Float[np.ndarray, " cell"]:
        """Return half the widths of the cells' intervals; 0 where all pairs were measured.

        Errors of an estimate are often 0 on most pairs and large on a few. So a cell's deviation counts
        as at least the typical one of all cells measured: few pairs without an error prove little.
        """
        n, sd = self._spread()
        alpha = (1 - self.search.level) / candidates
        radius = anytime_radius(n, sd, alpha, max(LEAST_SURE, len(self.order) // 2))
        radius = np.where(n < LEAST_SURE, np.inf, radius)
        whole = n == self.cells.exists.sum(axis=0)
        return np.where(whole & (n > 0), 0.0, radius)

    def errors(self) -> Float[np.ndarray, " cell"]:
        """Return the standard errors of the cells' means, sd / sqrt(n); 0 where all pairs were
        measured.
        """
        n, sd = self._spread()
        whole = n == self.cells.exists.sum(axis=0)
        return np.asarray(np.where(whole, 0.0, sd / np.sqrt(np.maximum(n, 1))))

    def unfinished(self, cells: Int[np.ndarray, " c"]) -> Int[np.ndarray, " left"]:
        """Return those of some cells that were not measured on all pairs yet, in their order."""
        return np.asarray(cells[self.next[cells] < len(self.order)])

    def _spread(self) -> tuple[Int[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
        """Return how many pairs each cell was measured on, and the deviation of exact - estimate, at
        least the typical one.
        """
        n, _, sd = self._errors()
        if (n > 1).any():
            sd = np.maximum(sd, math.sqrt(float(np.mean(sd[n > 1] ** 2))))
        return n, sd

    def _errors(
        self,
    ) -> tuple[Int[np.ndarray, " cell"], Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
        """Return how many pairs each cell was measured on, and mean and deviation of exact - estimate."""
        error = self.exact - self.estimate
        seen = ~np.isnan(error)
        n = seen.sum(axis=0)
        total = np.where(seen, error, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = total.sum(axis=0) / n
            spread = np.where(seen, (error - mean) ** 2, 0.0).sum(axis=0)
            sd = np.sqrt(spread / np.maximum(n - 1, 1))
        return n, mean, sd


def search(cells: Cells, estimate: Float[np.ndarray, "pair cell"], how: Search) -> Found:
    """Find the k cells with the largest mean effect.

    Args:
        cells: exact effects.
        estimate: of every cell, NaN for those that a pair lacks.
        how: what is searched for.

    Raises:
        ConfigError: there are no more cells than are searched for.
    """
    n_cells = estimate.shape[1]
    if how.k >= n_cells:
        raise ConfigError(
            f"the {how.k} largest of {n_cells} cells were asked for; accepted: 1 to {n_cells - 1}"
        )
    tally = Tally(cells, estimate, how)
    whole = how.budget == 1 and how.strategy is Strategy.HALVING
    usual = n_cells if whole else 4 * how.k
    size = min(n_cells, usual if how.pool is None else how.pool)
    pool = np.argsort(-np.nanmean(estimate, axis=0), kind="stable")[:size]
    if how.strategy is Strategy.HALVING:
        _halve(tally, pool)
    else:
        _until_apart(tally, pool, _contested if how.strategy is Strategy.UCB else _drawn)
    return _found(tally, pool)


def _halve(tally: Tally, pool: Int[np.ndarray, " c"]) -> None:
    """Spend the budget in rounds of equal cost; drop the lower half of the candidates after each."""
    k, left = tally.search.k, pool
    if tally.cells.exists[:, pool].sum() <= tally.most:
        return tally.measure(pool, len(tally.order))  # nothing has to be dropped
    rounds = max(1, math.ceil(math.log2(len(pool) / k)))
    for number in range(rounds):
        share = (tally.most - tally.spent) // (rounds - number)
        tally.measure(left, max(1, share // len(left)))
        if number < rounds - 1:
            left = _best(tally.means(), left)[: max(k + 1, math.ceil(len(left) / 2))]
    # What is left over: candidates were measured on all pairs before their share was spent.
    before = -1
    while tally.spent > before and (unseen := left[tally.next[left] < len(tally.order)]).size:
        before = tally.spent
        tally.measure(unseen, max(1, (tally.most - tally.spent) // len(unseen)))


Choose = Callable[["Tally", np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
"""Which cells are measured next: tally, leaders, other candidates and randomness -> cells."""


def _until_apart(tally: Tally, pool: Int[np.ndarray, " c"], choose: Choose) -> None:
    """Measure cells until the leaders' intervals lie above all others, or the budget is spent."""
    tally.measure(pool, FIRST)
    k, rng = tally.search.k, np.random.default_rng(tally.search.seed)
    while not tally.full:
        mean, radius = tally.means(), tally.radii(len(pool))
        order = _best(mean, pool)
        leaders, others = order[:k], order[k:]
        if not len(others) or (mean - radius)[leaders].min() > (mean + radius)[others].max():
            return
        chosen = choose(tally, leaders, others, rng)
        before = tally.spent
        if len(chosen):
            tally.measure(chosen, STEP_PAIRS)
        if tally.spent == before:
            return


def _contested(
    tally: Tally,
    leaders: Int[np.ndarray, " leader"],
    others: Int[np.ndarray, " other"],
    rng: np.random.Generator | None = None,
) -> Int[np.ndarray, " c"]:
    """Return the leaders with the lowest lower bound and the others with the highest upper bound."""
    mean, radius = tally.means(), tally.radii(len(leaders) + len(others))
    half = STEP_CELLS // 2
    # Infinite widths tie: the cells nearest to the border come first then.
    weak = leaders[np.lexsort((mean[leaders], (mean - radius)[leaders]))]
    strong = others[np.lexsort((-mean[others], -(mean + radius)[others]))]
    return np.concatenate([tally.unfinished(side)[:half] for side in (weak, strong)])


def _drawn(
    tally: Tally,
    leaders: Int[np.ndarray, " leader"],
    others: Int[np.ndarray, " other"],
    rng: np.random.Generator,
) -> Int[np.ndarray, " c"]:
    """Return cells that are leaders in one of two draws of their means, and not in the other.

    Where the draws agree again and again, or these cells were measured on all pairs, the cells of
    `_contested`: the draws are then surer than the intervals that decide when to stop.
    """
    pool = np.concatenate([leaders, others])
    k, mean, error = len(leaders), tally.means()[pool], tally.errors()[pool]

    def draw() -> np.ndarray:
        return pool[np.argsort(-rng.normal(mean, error), kind="stable")[:k]]

    first = draw()
    for _ in range(DRAWS):
        apart = tally.unfinished(np.setxor1d(first, draw()))
        if len(apart):
            return rng.permutation(apart)[:STEP_CELLS]
    return _contested(tally, leaders, others)


def _best(mean: Float[np.ndarray, " cell"], chosen: Int[np.ndarray, " c"]) -> np.ndarray:
    """Return cells, those with the largest mean first."""
    return np.asarray(chosen[np.argsort(-mean[chosen], kind="stable")])


def _found(tally: Tally, pool: Int[np.ndarray, " c"]) -> Found:
    mean, radius = tally.means(), tally.radii(len(pool))
    n = (~np.isnan(tally.exact)).sum(axis=0)
    order = _best(mean, pool)
    k = tally.search.k
    table = pd.DataFrame(
        {
            "cell": order,
            "mean": mean[order],
            "low": (mean - radius)[order],
            "high": (mean + radius)[order],
            "n": n[order],
        }
    )
    certain = bool(table["low"][:k].min() > table["high"][k:].max()) if len(order) > k else True
    return Found(table, k, tally.spent, tally.total, certain)


# ---- on a model ---------------------------------------------------------------------------------


class PatchedCells:
    """Exact effects by role of a model and pairs, in batches of pairs of one length.

    Args:
        p: a plan of exact effects by role, in one direction.
        sites: component and role of every cell.
    """

    def __init__(self, p: Plan, sites: Sequence[Site]):
        self.plan = p
        self.sites = list(sites)
        own = [set(q.clean.role_names) for q in p.pairs]
        self._exists = np.array([[site.at in roles for site in sites] for roles in own])
        self.component = {c: i for i, c in enumerate(p.components)}
        self.flops = 0

    @property
    def exists(self) -> Bool[np.ndarray, "pair cell"]:
        return self._exists

    def __call__(
        self, pairs: Int[np.ndarray, " p"], cells: Int[np.ndarray, " c"]
    ) -> Float[np.ndarray, "p c"]:
        found = np.full((len(pairs), len(cells)), np.nan)
        chosen = self.plan.pairs
        here = [chosen[int(i)] for i in pairs]
        for rows in by_length(here).values():
            found[rows] = self._effects([here[i] for i in rows], cells)
        return found

    def _effects(self, pairs: list[Pair], cells: Int[np.ndarray, " c"]) -> Float[np.ndarray, "p c"]:
        spans = self.plan.spans(pairs)
        place = [{span.role: s for s, span in enumerate(own)} for own in spans]
        sites = [self.sites[int(c)] for c in cells]
        at = [
            (self.component[site.everywhere], place[b].get(str(site.at)), b, c)
            for b in range(len(pairs))
            for c, site in enumerate(sites)
        ]
        there = [(i, s, b, c) for i, s, b, c in at if s is not None]
        wanted = torch.zeros(
            len(self.component), max(map(len, spans)), len(pairs), dtype=torch.bool
        )
        for i, s, b, _ in there:
            wanted[i, s, b] = True
        (values,) = self.plan.measure(pairs, spans, wanted).values()
        self.flops += values.flops
        effect = values.effect.unflatten(-1, (len(pairs), values.draws)).mean(-1).numpy()
        found = np.full((len(pairs), len(cells)), np.nan)
        for i, s, b, c in there:
            found[b, c] = effect[i, s, b]
        return found


def search_cells(
    model: Model,
    pairs: Pairs,
    kinds: Sequence[str],
    how: Search,
    *,
    metric: str = "logit_diff",
    direction: str = "denoise",
    estimate: str = "relp",
    roles: Sequence[str] | None = None,
) -> tuple[Found, list[Site]]:
    """Find the cells (component x role) with the largest average effect.

    Args:
        model, pairs: what is traced on what.
        kinds: of state.
        how: what is searched for, and the budget.
        metric, direction: as in `trace`; one direction.
        estimate: `atp`, `atpstar`, `relp` or `ig`; it covers all pairs, for about three forward passes
            each, on top of the budget.
        roles: to search in; all where None.

    Returns:
        What was found, and the site of every cell number.

    Raises:
        ConfigError, SiteError, ModelError: an argument is not accepted.
    """
    effects = trace(
        model, pairs, kinds, by="role", metric=metric, direction=direction, method=estimate, check=False,
        progress=False,
    )  # fmt: skip
    values, cells = effects.matrix("role")
    wanted = np.ones(len(cells), dtype=bool) if roles is None else cells["role"].isin(list(roles))
    rows = cells[wanted]
    sites = [cell_site(r.kind, r.layer, r.head, r.role) for r in rows.itertuples(index=False)]
    request = Request.parse(kinds, by=By.ROLE, metric=metric, direction=direction)
    oracle = PatchedCells(plan(model, pairs, request), sites)
    return search(oracle, values[:, np.asarray(wanted)], how), sites


__all__ = [
    "Cells",
    "Found",
    "PatchedCells",
    "Search",
    "Strategy",
    "anytime_radius",
    "search",
    "search_cells",
]
