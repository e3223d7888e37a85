"""Test a ranking of sites: run the model on the first k alone and see how much of the answer is
left.

`faithfulness` runs pairs of a clean and a corrupted prompt with the first k sites of the ranking,
in one of three modes:

| mode | the run | at k = 0 | at k = all |
|---|---|---|---|
| `keep` | clean; every ranked site outside the first k has its corrupted value (a circuit, run alone) | nothing kept | the clean run |
| `restore` | corrupted; the first k sites have their clean value | the corrupted run | all restored |
| `ablate` | clean; the first k sites have their corrupted value | the clean run | all ablated |

With m the metric's mean over pairs, f(k) = (m(k) - m(empty)) / (m(full) - m(empty)), where full is
the clean run. The two summaries are those of the mechanistic interpretability benchmark MIB
(Mueller et al. 2025, arXiv 2504.13151), over the share x of sites:

    CPR = area under f(x)         large if few sites carry the answer; may pass 1 if others oppose it
    CMD = area under |1 - f(x)|   small if few sites give just what the model gives

Both use trapezoids over the shares that were run. Two protocols compute them:

| | `ours` | `mib` |
|---|---|---|
| counts of n sites | every k of few sites; else k = 0 and ceil(share n) | int(share n), without k = 0 |
| x | k / n | the benchmark's ten shares themselves |
| order | by score, or by |score| on request | by score for CPR, by |score| for CMD |
| empty | k = 0 of `keep`; the corrupted run for the other modes | the corrupted run |
| mode | any | `keep` |

`mib` follows the evaluation of the benchmark's circuit track. Its graphs keep the input node: the
embeddings stay clean. A restored site carries what all sites before it did, so `restore` says
little about sets of sites; `keep` is the default.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import trapezoid
from torch import Tensor

from ..errors import ConfigError
from ..metrics import Metric, foil_indices, get_metric
from ..model import Model
from ..model.hooks import capture, hook_point, hooked_at
from ..model.pieces import rows_of
from ..patch.pairs import (
    Pairs,
    Runs,
    answer_ids,
    by_length,
    columns_of,
    make_runs,
    own_labels,
)
from ..scoring import by_label, positions_read, read_labels
from ..sites import HEAD_KINDS, Site
from ..stats import Estimate, bootstrap_statistic
from ..words import Choice, expect
from .ranking import RANDOM, Ranking, check_counts, in_order

if TYPE_CHECKING:
    import pandas as pd


class Mode(Choice):
    """Name the run in which the first k sites of a ranking are tried."""

    KEEP = "keep", "Clean run; ranked sites outside the first k get their corrupted value."
    RESTORE = "restore", "Corrupted run; the first k sites get their clean value."
    ABLATE = "ablate", "Clean run; the first k sites get their corrupted value."


class Protocol(Choice):
    """Name how CPR and CMD are computed."""

    OURS = "ours", "Every k of few sites, shares k / n, empty is k = 0 of the mode."
    MIB = (
        "mib",
        "Ten nominal shares, int(share n) sites, |score| for CMD, empty is the corrupted run.",
    )


SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of sites at which the benchmark runs its circuits."""

FEW = 32
"""Up to this many sites, every k is run."""


def default_counts(n: int) -> tuple[int, ...]:
    """Return the k that the protocol `ours` tries: all if there are few sites, else the benchmark's
    shares.
    """
    return (
        tuple(range(n + 1)) if n <= FEW else tuple(sorted({0, *(math.ceil(s * n) for s in SHARES)}))
    )


def mib_counts(n: int) -> tuple[int, ...]:
    """Return the number of sites at each of MIB's shares: int(share n), which may be 0 or
    repeat.
    """
    return tuple(int(share * n) for share in SHARES)


def areas(
    shares: Sequence[float | int] | np.ndarray,
    faithfulness: Sequence[float | int] | np.ndarray,
) -> tuple[float, float]:
    """Return (CPR, CMD): the areas under f and under |1 - f|, by trapezoids."""
    f = np.asarray(faithfulness, dtype=float)
    return float(trapezoid(f, shares)), float(trapezoid(np.abs(1 - f), shares))


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """Hold f(k) of one ranking and of random orders of its sites.

    Attributes:
        protocol, mode, metric: as asked.
        sites: in the order of the ranking.
        counts: the k that were run.
        shares: x of each count.
        metric_mean: mean metric at each k.
        full, empty: mean metric of the two runs that f is measured between.
        faithfulness: f at each k, with its bootstrap interval over sentences.
        by_magnitude: f at each k in the order of |score|, where `cmd` is computed on that order
            (protocol `mib`); else None.
        cpr, cmd: the two areas, with their intervals.
        random: f of random orders, `[order count]`.
        random_cpr, random_cmd: the two areas of each random order.
        n: pairs.
    """

    protocol: Protocol
    mode: Mode
    metric: str
    sites: tuple[Site, ...] = field(repr=False)
    counts: tuple[int, ...]
    shares: tuple[float, ...]
    metric_mean: Float[np.ndarray, " count"]
    full: float
    empty: float
    faithfulness: tuple[Estimate, ...]
    by_magnitude: Float[np.ndarray, " count"] | None
    cpr: Estimate
    cmd: Estimate
    random: Float[np.ndarray, "order count"]
    random_cpr: Float[np.ndarray, " order"]
    random_cmd: Float[np.ndarray, " order"]
    n: int

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per count, for the ranking and for the mean of the random orders.

        Columns: `method, k, share, added, metric, faithfulness, faithfulness_low,
        faithfulness_high`.
        """
        import pandas as pd

        own = pd.DataFrame(
            {
                "method": "ranking",
                "k": self.counts,
                "share": self.shares,
                "added": ["" if k == 0 else str(self.sites[k - 1]) for k in self.counts],
                "metric": self.metric_mean,
                "faithfulness": [e.value for e in self.faithfulness],
                "faithfulness_low": [e.low for e in self.faithfulness],
                "faithfulness_high": [e.high for e in self.faithfulness],
            }
        )
        if not len(self.random):
            return own
        chance = pd.DataFrame(
            {
                "method": RANDOM,
                "k": self.counts,
                "share": self.shares,
                "faithfulness": self.random.mean(0),
            }
        )
        return pd.concat([own, chance], ignore_index=True)

    def _repr_html_(self) -> str:
        chance = (
            f"; random orders {self.random_cpr.mean():.3f} and {self.random_cmd.mean():.3f}"
            if len(self.random)
            else ""
        )
        head = (
            f"<div><b>{self.mode}</b>, {self.metric}, {self.n} pairs, protocol {self.protocol}: "
            f"CPR {self.cpr.value:.3f}, CMD {self.cmd.value:.3f}{chance}</div>"
        )
        html: str = head + self.to_pandas().to_html(index=False, float_format="{:.3f}".format)
        return html


def faithfulness(
    model: Model,
    pairs: Pairs,
    ranking: Ranking,
    *,
    metric: str = "logit_diff",
    mode: Mode | str = Mode.KEEP,
    protocol: Protocol | str = Protocol.OURS,
    counts: Sequence[int] | None = None,
    magnitude: bool = False,
    randoms: int = 5,
    batch_size: int = 32,
    level: float = 0.95,
    draws: int = 500,
    seed: int = 0,
) -> FaithfulnessCurve:
    """Measure how much of the answer the first k sites of a ranking carry.

    Args:
        pairs: with a corrupted run (noise or counterfactual).
        ranking: (site, score); a site with a role or a position stands for its tokens, one without
            for all tokens.
        metric: any that needs labels only; see `metrics`.
        mode, protocol: see the module.
        counts: which k; `default_counts` where None. Only for the protocol `ours`.
        magnitude: rank by |score|. Only for the protocol `ours`; `mib` uses both orders.
        randoms: random orders of the same sites, for comparison.
        batch_size: rows (pairs times noise draws) per forward pass, at least one pair.

    Raises:
        ConfigError: an unknown mode, protocol or metric; counts beyond the sites; pairs without a
            corrupted run; full and empty runs alike; options that the protocol `mib` fixes.
        SiteError: the model lacks a site.
    """
    measure = _checked(model, pairs, metric)
    mode, protocol = Mode.parse(mode, "mode"), Protocol.parse(protocol, "protocol")
    if protocol is Protocol.MIB and (mode is not Mode.KEEP or counts is not None or magnitude):
        raise ConfigError("the protocol mib fixes mode, counts and magnitude; leave them out")
    sites = in_order(ranking, model, magnitude)
    rng = np.random.default_rng(seed)
    chance = [rng.permutation(len(sites)) for _ in range(randoms)]
    if protocol is Protocol.MIB:
        plan = _mib_plan(sites, in_order(ranking, model, magnitude=True), chance)
    else:
        plan = _own_plan(mode, sites, counts, chance)
    table = _measured(model, pairs, plan, measure, batch_size)
    if math.isclose(table.full.mean(), table.empty.mean(), abs_tol=1e-9):
        raise ConfigError(
            f"the full and the empty run have the same {metric} ({table.full.mean():.4g}); there is nothing to be faithful to"
        )
    clusters = np.array([p.example.cluster for p in pairs])

    def interval(statistic: Callable[[np.ndarray], float]) -> Estimate:
        return bootstrap_statistic(
            statistic, clusters, len(pairs), level=level, draws=draws, seed=seed
        )

    return _curve(table, plan, metric, interval)


def _checked(model: Model, pairs: Pairs, metric: str) -> Metric:
    """Return the metric, after rejecting everything that cannot be measured."""
    expect(model, Model, "faithfulness(model=...)", "a model of load_model")
    expect(pairs, Pairs, "faithfulness(pairs=...)", "pairs of make_pairs")
    measure = get_metric(metric)
    if measure.need == "vocabulary":
        raise ConfigError(
            f"metric {metric} reads the whole vocabulary; accepted here: prob, prob_label, logprob or logit_diff"
        )
    pairs.check_model(model)
    if pairs.corruption.is_ablation:
        raise ConfigError(
            f"pairs by {pairs.corruption.name} have no corrupted run; GaussianNoise or Counterfactual is needed"
        )
    return measure


@dataclass(frozen=True, eq=False)
class _Plan:
    """Hold which runs are made.

    Attributes:
        sites: in the order of the ranking.
        counts, shares: k and x of every point of the curve.
        orders: indices of `sites`: the ranking itself, its order by |score| (protocol `mib`), then
            random orders.
        cmd_order: index of the order that CMD is computed on.
    """

    mode: Mode
    protocol: Protocol
    sites: list[Site]
    counts: tuple[int, ...]
    shares: tuple[float, ...]
    orders: list[np.ndarray]
    cmd_order: int


def _own_plan(
    mode: Mode, sites: list[Site], counts: Sequence[int] | None, chance: list[np.ndarray]
) -> _Plan:
    """Return the runs of the protocol `ours`."""
    n = len(sites)
    ks = check_counts(counts, n) if counts is not None else default_counts(n)
    shares = tuple(k / n for k in ks)
    return _Plan(mode, Protocol.OURS, sites, ks, shares, [np.arange(n), *chance], 0)


def _mib_plan(sites: list[Site], by_magnitude: list[Site], chance: list[np.ndarray]) -> _Plan:
    """Return the runs of the protocol `mib`."""
    n = len(sites)
    second = np.array([sites.index(site) for site in by_magnitude])
    orders = [np.arange(n), second, *chance]
    return _Plan(Mode.KEEP, Protocol.MIB, sites, mib_counts(n), SHARES, orders, 1)


@dataclass(frozen=True, eq=False)
class _Table:
    """Hold the metric of every run, `[pair order count]`, and of the full and the empty run,
    `[pair]`.
    """

    metric: Float[np.ndarray, "pair order count"]
    full: Float[np.ndarray, " pair"]
    empty: Float[np.ndarray, " pair"]

    def f(self, rows: np.ndarray, order: int) -> Float[np.ndarray, " count"]:
        """Return f at every count, over these pairs."""
        full, empty = self.full[rows].mean(), self.empty[rows].mean()
        f: np.ndarray = (self.metric[rows, order].mean(0) - empty) / (full - empty)
        return f


def _measured(model: Model, pairs: Pairs, plan: _Plan, measure: Metric, rows: int) -> _Table:
    """Run every pair with the first k sites of every order, `rows` rows per forward pass."""
    metric = np.zeros((len(pairs), len(plan.orders), len(plan.counts)))
    ends = np.zeros((len(pairs), 2))
    per_pass = max(1, rows // pairs[0].draws)
    points = defaultdict(list)
    for c, k in enumerate(plan.counts):
        points[k].append(c)
    for group in by_length(list(pairs)).values():
        for start in range(0, len(group), per_pass):
            chosen = group[start : start + per_pass]
            bench = _Bench(model, pairs, chosen, plan.sites, plan.mode, measure)
            ends[chosen] = bench.ends(plan.protocol)
            for o, order in enumerate(plan.orders):
                for k, columns in points.items():
                    value = bench.run(order[k:] if plan.mode is Mode.KEEP else order[:k])
                    for c in columns:
                        metric[chosen, o, c] = value
    return _Table(metric, ends[:, 0], ends[:, 1])


def _curve(
    table: _Table,
    plan: _Plan,
    metric: str,
    interval: Callable[[Callable[[np.ndarray], float]], Estimate],
) -> FaithfulnessCurve:
    """Return the curve of measured runs."""
    everything, shares, cmd_order = np.arange(len(table.full)), plan.shares, plan.cmd_order
    random_orders = range(cmd_order + 1, len(plan.orders))
    by_chance = np.array([table.f(everything, o) for o in random_orders])
    by_chance = by_chance.reshape(len(random_orders), len(plan.counts))
    chance_areas = np.array([areas(shares, row) for row in by_chance]).reshape(-1, 2)

    def f_at(c: int, rows: np.ndarray) -> float:
        return float(table.f(rows, 0)[c])

    return FaithfulnessCurve(
        protocol=plan.protocol,
        mode=plan.mode,
        metric=metric,
        sites=tuple(plan.sites),
        counts=plan.counts,
        shares=shares,
        metric_mean=table.metric[:, 0].mean(0),
        full=float(table.full.mean()),
        empty=float(table.empty.mean()),
        faithfulness=tuple(interval(partial(f_at, c)) for c in range(len(plan.counts))),
        by_magnitude=table.f(everything, cmd_order) if cmd_order else None,
        cpr=interval(lambda rows: areas(shares, table.f(rows, 0))[0]),
        cmd=interval(lambda rows: areas(shares, table.f(rows, cmd_order))[1]),
        random=by_chance,
        random_cpr=chance_areas[:, 0],
        random_cmd=chance_areas[:, 1],
        n=len(table.full),
    )


class _Bench:
    """Hold pairs of one length, ready to run with any set of their sites replaced."""

    def __init__(
        self,
        model: Model,
        pairs: Pairs,
        rows: Sequence[int],
        sites: Sequence[Site],
        mode: Mode,
        measure: Metric,
    ):
        self.model, self.sites, self.mode, self.measure = model, sites, mode, measure
        self.chosen = [pairs[i] for i in rows]
        continuations = pairs.continuations
        self.own: Tensor | None = None  # [pair label]: columns of the labels of prompt pairs
        if self.chosen[0].answers is not None:
            continuations = (own_labels(self.chosen),)
            self.own = columns_of(self.chosen, answer_ids(self.chosen))
        self.prepared = [
            (c, *self._states(make_runs(model, self.chosen, c))) for c in continuations
        ]
        self.gold = torch.tensor([p.gold for p in self.chosen])
        self.foil = foil_indices(p.foil for p in self.chosen)

    @torch.inference_mode()
    def _states(self, runs: Runs) -> tuple[Tensor, Tensor, Tensor, dict[tuple[int, str], Tensor]]:
        """Return the clean input of each row, the corrupted one, the mask [site row pos], and the
        values put in.
        """
        clean = runs.clean.repeat_interleave(runs.draws, 0)
        points = {(s.layer, s.kind): s for s in self.sites}
        with capture(self.model, points.values()) as seen:
            self._last(clean if self.mode is Mode.RESTORE else runs.corrupted)
        masks = torch.zeros(len(self.sites), len(self.chosen), runs.length, dtype=torch.bool)
        for i, site in enumerate(self.sites):
            for row, p in enumerate(self.chosen):
                masks[i, row, slice(None) if site.at is None else p.clean.positions(site.at)] = True
        return (
            clean,
            runs.corrupted,
            masks.repeat_interleave(runs.draws, 1),
            {key: seen[s] for key, s in points.items()},
        )

    def _last(self, x: Tensor) -> Tensor:
        return self.model.run_hooked(x)

    @torch.inference_mode()
    def _metric(self, corrupted: bool, replaced: Sequence[int]) -> Float[np.ndarray, " pair"]:
        parts = []
        for continuation, clean_x, corrupted_x, masks, values in self.prepared:
            x = corrupted_x if corrupted else clean_x
            with hooked_at(replacing(self.model, self.sites, replaced, masks, values), times=1):
                read = rows_of(self._last(x), positions_read([x.shape[1]] * len(x), continuation))
            parts.append(read_labels(self.model, read, continuation).double().cpu())
        scores = by_label(parts, [prepared[0] for prepared in self.prepared])
        draws = len(scores) // len(self.chosen)
        if self.own is not None:
            scores = scores.gather(1, self.own.repeat_interleave(draws, 0))
        value = self.measure(
            scores, self.gold.repeat_interleave(draws), self.foil.repeat_interleave(draws)
        )
        mean: np.ndarray = value.unflatten(0, (len(self.chosen), draws)).mean(1).numpy()
        return mean

    def run(self, replaced: Sequence[int] | np.ndarray) -> Float[np.ndarray, " pair"]:
        """Return the metric with these sites replaced."""
        return self._metric(self.mode is Mode.RESTORE, [int(i) for i in replaced])

    def ends(self, protocol: Protocol) -> Float[np.ndarray, "pair 2"]:
        """Return (full, empty) of every pair."""
        full = self._metric(False, [])
        if self.mode is Mode.KEEP and protocol is Protocol.OURS:
            empty = self.run(range(len(self.sites)))
        else:
            empty = self._metric(True, [])
        return np.stack([full, empty], 1)


def replacing(
    model: Model,
    sites: Sequence[Site],
    chosen: Sequence[int],
    masks: Tensor,
    values: dict[tuple[int, str], Tensor],
) -> list[tuple[torch.nn.Module, Callable[[Tensor], Tensor]]]:
    """Return one hook per hook point, which puts `values` in at the masked tokens of the chosen
    sites.
    """
    together: dict[tuple[int, str], list[int]] = defaultdict(list)
    for i in chosen:
        together[sites[i].layer, sites[i].kind].append(i)

    def put(key: tuple[int, str], members: list[int]) -> Callable[[Tensor], Tensor]:
        def replace(activation: Tensor) -> Tensor:
            if key[1] not in HEAD_KINDS:
                mask = masks[members].any(0)[..., None]
            else:
                mask = torch.zeros(*activation.shape[:3], 1, dtype=torch.bool)
                for i in members:
                    mask[:, :, sites[i].head, 0] |= masks[i]
            return torch.where(mask.to(activation.device), values[key].to(activation), activation)

        return replace

    return [
        (hook_point(model, sites[members[0]]), put(key, members))
        for key, members in together.items()
    ]
