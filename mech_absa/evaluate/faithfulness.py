"""Is a ranking of sites right? Run the model on its first k alone, and see how much of the answer is left.

A ranking is a list of (site, score), from tracing, from gradients, from a learned gate, or made up: everything here takes the plain list,
so that all of them are held to the same measure, and every curve comes with the same curve of random orders of the same sites.

`faithfulness` runs pairs of a clean and a corrupted prompt with the first k sites of the ranking, in one of three modes:

| mode | the run | at k = 0 | at k = all |
|---|---|---|---|
| `keep` | clean; every ranked site outside the first k has its corrupted value (a circuit, run alone) | nothing kept | the clean run |
| `restore` | corrupted; the first k sites have their clean value | the corrupted run | all restored |
| `ablate` | clean; the first k sites have their corrupted value | the clean run | all ablated |

With m the metric's mean over pairs, f(k) = (m(k) - m(empty)) / (m(full) - m(empty)), where full is the clean run and empty is k = 0 of
`keep` and the corrupted run of the other two. The two summaries are those of the mechanistic interpretability benchmark MIB (Mueller et
al. 2025, arXiv 2504.13151), by their definition, over the share x = k / n of sites:

    CPR = area under f(x)            large where few sites carry the answer; may pass 1 where others work against it
    CMD = area under |1 - f(x)|      small where few sites give just what the model gives

both by trapezoids over the shares that were run. A restored site carries what all sites before it did, so `restore` says little of sets;
`keep` is the benchmark's mode and the default.

`prune` is the same question put to the task: the accuracy left when the least important sites are removed for good.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.integrate import trapezoid
from torch import Tensor

from ..errors import ConfigError, choices
from ..examples import Example
from ..metrics import foil_indices, get_metric
from ..model import Model
from ..model.forward import rows_of
from ..model.hooks import capture, hook_point, hooked_at
from ..patch.pairs import Pairs, Runs, by_length, make_runs
from ..prompts import PromptTemplate, Tokens, Verbalizer
from ..scoring import Applicable, by_label, positions_read, question, read_labels
from ..sites import HEAD_KINDS, Site
from ..stats import Estimate, bootstrap_statistic
from .predictions import asked_with, predict
from .scores import score

Ranking = Sequence[tuple[Site, float]]
Mode = Literal["keep", "restore", "ablate"]
MODES = ("keep", "restore", "ablate")
How = Literal["mean", "zero"]

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of sites at which the benchmark runs its circuits."""

RANDOM = "random order"
"""The method's name of the control, in tables."""

FEW = 32
"""Up to so many sites every k is run."""


def in_order(ranking: Ranking, model: Model, magnitude: bool = False) -> list[Site]:
    """The sites, most important first; equal scores keep the order they came in.

    Args:
        magnitude: by |score|, which counts sites that work against the answer as important. It changes CMD; say which was used.

    Raises:
        ConfigError: no sites, a site twice, or a score that is no number.
        SiteError: the model lacks a site.
    """
    sites = [model.check_site(site) for site, _ in ranking]
    if not sites:
        raise ConfigError("the ranking holds no sites; at least one is needed")
    if len(set(sites)) < len(sites):
        repeated = next(s for i, s in enumerate(sites) if s in sites[:i])
        raise ConfigError(f"the ranking holds {repeated} more than once; each site once is needed")
    if unscored := [s for s, value in ranking if math.isnan(value)]:
        raise ConfigError(f"the score of {unscored[0]} is not a number")
    weight = [abs(value) if magnitude else value for _, value in ranking]
    return [sites[i] for i in sorted(range(len(sites)), key=lambda i: -weight[i])]


def default_counts(n: int) -> tuple[int, ...]:
    """How many of `n` sites are tried: all numbers where they are few, the benchmark's shares where they are many."""
    return (
        tuple(range(n + 1)) if n <= FEW else tuple(sorted({0, *(math.ceil(s * n) for s in SHARES)}))
    )


def areas(shares: ArrayLike, faithfulness: ArrayLike) -> tuple[float, float]:
    """(CPR, CMD): the areas under f and under |1 - f|, by trapezoids."""
    f = np.asarray(faithfulness, dtype=float)
    return float(trapezoid(f, shares)), float(trapezoid(np.abs(1 - f), shares))


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """f(k) of one ranking, and of random orders of its sites.

    Attributes:
        mode, metric: as asked.
        sites: in the order of the ranking.
        counts: the k that were run.
        metric_mean: mean metric at each k.
        full, empty: mean metric of the two runs that f is measured between.
        faithfulness: f at each k, with its bootstrap interval over sentences.
        cpr, cmd: the two areas, with theirs.
        random: f of random orders, `[order count]`.
        random_cpr, random_cmd: their areas, an order each.
        n: pairs.
    """

    mode: Mode
    metric: str
    sites: tuple[Site, ...] = field(repr=False)
    counts: tuple[int, ...]
    metric_mean: Float[np.ndarray, " count"]
    full: float
    empty: float
    faithfulness: tuple[Estimate, ...]
    cpr: Estimate
    cmd: Estimate
    random: Float[np.ndarray, "order count"]
    random_cpr: Float[np.ndarray, " order"]
    random_cmd: Float[np.ndarray, " order"]
    n: int

    @property
    def shares(self) -> list[float]:
        """x = k / n of each count."""
        return [k / len(self.sites) for k in self.counts]

    def to_pandas(self):
        """One row a count, for the ranking and for the mean of the random orders: `method, k, share, added, metric, faithfulness` and its
        their ends."""
        import pandas as pd

        f = self.faithfulness
        own: dict[str, Any] = {"method": "ranking", "k": self.counts, "share": self.shares}
        own |= {
            "added": ["" if k == 0 else str(self.sites[k - 1]) for k in self.counts],
            "metric": self.metric_mean,
        }
        own |= {
            "faithfulness": [e.value for e in f],
            "faithfulness_low": [e.low for e in f],
            "faithfulness_high": [e.high for e in f],
        }
        chance = {"method": RANDOM, "k": self.counts, "share": self.shares}
        by_chance = [chance | {"faithfulness": self.random.mean(0)}] if len(self.random) else []
        return pd.concat([pd.DataFrame(part) for part in (own, *by_chance)], ignore_index=True)

    def _repr_html_(self) -> str:
        chance = (
            f"; random orders {self.random_cpr.mean():.3f} and {self.random_cmd.mean():.3f}"
            if len(self.random)
            else ""
        )
        head = f"<div><b>{self.mode}</b>, {self.metric}, {self.n} pairs: CPR {self.cpr.value:.3f}, CMD {self.cmd.value:.3f}{chance}</div>"
        return head + self.to_pandas().to_html(index=False, float_format="{:.3f}".format)


def faithfulness(
    model: Model,
    pairs: Pairs,
    ranking: Ranking,
    *,
    metric: str = "logit_diff",
    mode: Mode = "keep",
    counts: Sequence[int] | None = None,
    magnitude: bool = False,
    randoms: int = 5,
    batch_size: int = 32,
    level: float = 0.95,
    draws: int = 500,
    seed: int = 0,
) -> FaithfulnessCurve:
    """How much of the answer the first k sites of a ranking carry.

    Args:
        pairs: with a corrupted run (noise or counterfactual).
        ranking: (site, score); a site with a role or a position stands for its tokens, one without for all tokens.
        metric: any that needs labels only; see `metrics`.
        counts: which k; `default_counts` where None.
        randoms: random orders of the same sites, for comparison.
        batch_size: rows (pairs times noise draws) a forward pass, at least one pair.

    Raises:
        ConfigError: an unknown mode or metric; counts beyond the sites; pairs without a corrupted run; full and empty runs alike.
        SiteError: the model lacks a site.
    """
    if mode not in MODES:
        raise ConfigError(f"mode is {mode!r}; accepted: {choices(MODES)}")
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
    sites = in_order(ranking, model, magnitude)
    n = len(sites)
    ks = tuple(sorted(set(counts))) if counts is not None else default_counts(n)
    if not ks or ks[0] < 0 or ks[-1] > n:
        raise ConfigError(f"counts {ks} of {n} sites were asked for; accepted: 0 to {n}")
    rng = np.random.default_rng(seed)
    orders = [np.arange(n), *(rng.permutation(n) for _ in range(randoms))]
    table = np.zeros((len(pairs), len(orders), len(ks)))
    ends = np.zeros((len(pairs), 2))
    per_pass = max(1, batch_size // pairs[0].draws)
    for rows in by_length(list(pairs)).values():
        for start in range(0, len(rows), per_pass):
            chosen = rows[start : start + per_pass]
            bench = _Bench(model, pairs, chosen, sites, mode, measure)
            ends[chosen] = bench.ends()
            for o, order in enumerate(orders):
                for c, k in enumerate(ks):
                    table[chosen, o, c] = bench.run(order[k:] if mode == "keep" else order[:k])
    full, empty = ends[:, 0], ends[:, 1]
    if math.isclose(full.mean(), empty.mean(), abs_tol=1e-9):
        raise ConfigError(
            f"the full and the empty run have the same {metric} ({full.mean():.4g}); there is nothing to be faithful to"
        )

    def f(rows: np.ndarray, order: int = 0) -> np.ndarray:
        a, b = full[rows].mean(), empty[rows].mean()
        return (table[rows, order].mean(0) - b) / (a - b)

    def f_at(count: int, rows: np.ndarray) -> float:
        return float(f(rows)[count])

    everything = np.arange(len(pairs))
    shares = [k / n for k in ks]
    clusters = np.array([p.example.cluster for p in pairs])

    def sure(fn: Callable[[np.ndarray], float]) -> Estimate:
        return bootstrap_statistic(fn, clusters, len(pairs), level=level, draws=draws, seed=seed)

    by_chance = np.array([f(everything, o) for o in range(1, len(orders))]).reshape(
        randoms, len(ks)
    )
    chance_areas = np.array([areas(shares, row) for row in by_chance]).reshape(randoms, 2)
    return FaithfulnessCurve(
        mode=mode,
        metric=metric,
        sites=tuple(sites),
        counts=ks,
        metric_mean=table[:, 0].mean(0),
        full=float(full.mean()),
        empty=float(empty.mean()),
        faithfulness=tuple(sure(partial(f_at, c)) for c in range(len(ks))),
        cpr=sure(lambda rows: areas(shares, f(rows))[0]),
        cmd=sure(lambda rows: areas(shares, f(rows))[1]),
        random=by_chance,
        random_cpr=chance_areas[:, 0],
        random_cmd=chance_areas[:, 1],
        n=len(pairs),
    )


class _Bench:
    """Pairs of one length, ready to be run with any set of their sites replaced."""

    def __init__(
        self,
        model: Model,
        pairs: Pairs,
        rows: Sequence[int],
        sites: Sequence[Site],
        mode: Mode,
        measure: Any,
    ):
        self.model, self.sites, self.mode, self.measure = model, sites, mode, measure
        self.chosen = [pairs[i] for i in rows]
        self.prepared = [
            (c, *self._states(make_runs(model, self.chosen, c))) for c in pairs.continuations
        ]
        self.gold = torch.tensor([p.gold for p in self.chosen])
        self.foil = foil_indices(p.foil for p in self.chosen)

    @torch.inference_mode()
    def _states(self, runs: Runs) -> tuple[Tensor, Tensor, Tensor, dict[tuple[int, str], Tensor]]:
        """The clean input a row, the corrupted input, the mask [site row pos], and what is put in."""
        clean = runs.clean.repeat_interleave(runs.draws, 0)
        points = {(s.layer, s.kind): s for s in self.sites}
        with capture(self.model.hooked, points.values()) as seen:
            self._last(clean if self.mode == "restore" else runs.corrupted)
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
        return self.model.hooked.forward(x, start_at_layer=0, stop_at_layer=self.model.n_layers)

    @torch.inference_mode()
    def _metric(self, corrupted: bool, replaced: Sequence[int]) -> Float[np.ndarray, " pair"]:
        parts = []
        for continuation, clean_x, corrupted_x, masks, values in self.prepared:
            x = corrupted_x if corrupted else clean_x
            with hooked_at(_replacing(self.model, self.sites, replaced, masks, values), times=1):
                read = rows_of(self._last(x), positions_read([x.shape[1]] * len(x), continuation))
            parts.append(read_labels(self.model, read, continuation).double().cpu())
        scores = by_label(parts, [prepared[0] for prepared in self.prepared])
        draws = len(scores) // len(self.chosen)
        value = self.measure(
            scores, self.gold.repeat_interleave(draws), self.foil.repeat_interleave(draws)
        )
        return value.unflatten(0, (len(self.chosen), draws)).mean(1).numpy()

    def run(self, replaced: Sequence[int] | np.ndarray) -> Float[np.ndarray, " pair"]:
        """The metric with these sites replaced."""
        return self._metric(self.mode == "restore", [int(i) for i in replaced])

    def ends(self) -> Float[np.ndarray, "pair 2"]:
        """(full, empty) of every pair."""
        full = self._metric(False, [])
        empty = self.run(range(len(self.sites))) if self.mode == "keep" else self._metric(True, [])
        return np.stack([full, empty], 1)


def _replacing(
    model: Model,
    sites: Sequence[Site],
    chosen: Sequence[int],
    masks: Tensor,
    values: dict[tuple[int, str], Tensor],
) -> list[tuple[torch.nn.Module, Callable[[Tensor], Tensor]]]:
    """One hook a hook point that puts `values` in at the masked tokens of the chosen sites."""
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
        (hook_point(model.hooked, sites[members[0]]), put(key, members))
        for key, members in together.items()
    ]


# ---------------------------------------------------------------------------------------------------- pruning


class Ablation:
    """Sites that give a fixed value, whatever they read: an `Applicable`, as an edit is.

    Args:
        sites: what is ablated; a site without a token at all tokens.
        values: (layer, kind) -> `[d_model]`, or `[head d_head]` for kinds of heads; zero where None.
        edit: in force at the same time, below the ablation.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        values: dict[tuple[int, str], Tensor] | None = None,
        edit: Applicable | None = None,
    ):
        self.sites, self.values, self.edit = list(sites), values, edit

    @contextlib.contextmanager
    def applied(self, model: Model, tokens: Tokens) -> Iterator[None]:
        masks = torch.zeros(len(self.sites), *tokens.ids.shape, dtype=torch.bool)
        for i, site in enumerate(self.sites):
            for row in range(len(tokens)):
                masks[
                    i, row, slice(None) if site.at is None else tokens.positions(site.at, row)
                ] = True
        keys = {(s.layer, s.kind) for s in self.sites}
        values = {key: torch.zeros(()) if self.values is None else self.values[key] for key in keys}
        below = (
            self.edit.applied(model, tokens) if self.edit is not None else contextlib.nullcontext()
        )
        with below, hooked_at(_replacing(model, self.sites, range(len(self.sites)), masks, values)):
            yield


@torch.inference_mode()
def mean_activations(
    model: Model,
    prompts: Sequence[Tokens],
    sites: Sequence[Site],
    edit: Applicable | None = None,
    batch_size: int = 32,
) -> dict[tuple[int, str], Tensor]:
    """Mean activation over all tokens of the prompts: (layer, kind) -> `[d_model]`, or `[head d_head]` for kinds of heads."""
    points = {(s.layer, s.kind): s for s in sites}
    sums: dict[tuple[int, str], Tensor] = {}
    order = sorted(prompts, key=lambda t: t.lengths[0])
    for start in range(0, len(order), batch_size):
        tokens = Tokens.stack(order[start : start + batch_size])
        real = (tokens.roles >= 0).to(model.device)
        below = edit.applied(model, tokens) if edit is not None else contextlib.nullcontext()
        with (
            below,
            capture(model.hooked, points.values()) as seen,
        ):  # in this order, so that what is seen is what the edit leaves
            model.hooked.forward(
                model.embed(tokens.ids), start_at_layer=0, stop_at_layer=model.n_layers
            )
        for key, site in points.items():
            total = seen[site][real.to(seen[site].device)].double().sum(0)
            sums[key] = sums[key] + total if key in sums else total
    n = sum(t.lengths[0] for t in order)
    return {key: total / n for key, total in sums.items()}


@dataclass(frozen=True, eq=False)
class PruningCurve:
    """What is left of the task as the least important sites are removed.

    Attributes:
        how: `mean` or `zero`: what stands in for a removed site.
        removed: the sites, in the order of their removal.
        counts: how many were removed.
        accuracy, macro_f1: at each count, with their intervals.
        random: accuracy when random sites are removed, `[order count]`.
        majority: accuracy of the most frequent class.
    """

    how: How
    removed: tuple[Site, ...] = field(repr=False)
    counts: tuple[int, ...]
    accuracy: tuple[Estimate, ...]
    macro_f1: tuple[Estimate, ...]
    random: Float[np.ndarray, "order count"]
    majority: float

    def to_pandas(self):
        """One row a count, for the ranking and for the mean of the random orders: `method, count, removed` (the share of the sites),
        `accuracy, macro_f1` with their ends, `majority`."""
        import pandas as pd

        steps: dict[str, Any] = {
            "count": self.counts,
            "removed": [k / len(self.removed) for k in self.counts],
            "majority": self.majority,
        }
        own = {"method": "least important first"} | steps
        for name, estimates in (("accuracy", self.accuracy), ("macro_f1", self.macro_f1)):
            own |= {name: [e.value for e in estimates]}
            own |= {
                f"{name}_low": [e.low for e in estimates],
                f"{name}_high": [e.high for e in estimates],
            }
        chance = (
            [{"method": RANDOM, "accuracy": self.random.mean(0)} | steps]
            if len(self.random)
            else []
        )
        return pd.concat([pd.DataFrame(part) for part in (own, *chance)], ignore_index=True)

    def _repr_html_(self) -> str:
        return self.to_pandas().to_html(index=False, float_format="{:.3f}".format)


def prune(
    model: Model,
    examples: Sequence[Example],
    ranking: Ranking,
    edit: Applicable | None = None,
    *,
    how: How = "mean",
    reference: Sequence[Example] | None = None,
    counts: Sequence[int] | None = None,
    randoms: int = 3,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
    batch_size: int = 32,
    level: float = 0.95,
    draws: int = 500,
    seed: int = 0,
) -> PruningCurve:
    """Accuracy with the least important sites removed.

    Args:
        ranking: usually all heads and all `mlp_out`.
        edit: in force throughout.
        how: `mean` puts in each site's mean over the tokens of `reference`; `zero` puts in zero, which is a strange value to most models.
        reference: examples the means are taken over; the examples themselves where None.
        counts: how many are removed; eleven steps from none to all where None.
        randoms: random orders, for comparison.

    Raises:
        ConfigError: an unknown way; counts beyond the sites.
        SiteError: the model lacks a site.
    """
    if how not in ("mean", "zero"):
        raise ConfigError(f"how is {how!r}; accepted: mean or zero")
    worst_first = in_order(ranking, model)[::-1]
    n = len(worst_first)
    ks = (
        tuple(sorted(set(counts)))
        if counts is not None
        else tuple(sorted({round(n * i / 10) for i in range(11)}))
    )
    if not ks or ks[0] < 0 or ks[-1] > n:
        raise ConfigError(f"counts {ks} of {n} sites were asked for; accepted: 0 to {n}")
    own = asked_with(edit)
    template, verbalizer = template or own[0], verbalizer or own[1]
    values = None
    if how == "mean":
        prompts = [
            question(model, e, template) for e in (examples if reference is None else reference)
        ]
        values = mean_activations(model, prompts, worst_first, edit, batch_size)

    def answers(order: Sequence[Site], k: int):
        ablated = Ablation(order[:k], values, edit)
        return predict(
            model,
            examples,
            ablated,
            template=template,
            verbalizer=verbalizer,
            batch_size=batch_size,
            name=f"{k} removed",
        )

    scores = [score(answers(worst_first, k), level=level, draws=draws, seed=seed).all for k in ks]
    rng = np.random.default_rng(seed)
    orders = [[worst_first[i] for i in rng.permutation(n)] for _ in range(randoms)]
    by_chance = np.array(
        [[answers(order, k).correct.mean() for k in ks] for order in orders]
    ).reshape(randoms, len(ks))
    return PruningCurve(
        how,
        tuple(worst_first),
        ks,
        tuple(s.accuracy for s in scores),
        tuple(s.macro_f1 for s in scores),
        by_chance,
        scores[0].majority,
    )
