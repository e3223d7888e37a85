"""From trainings and rankings to an answer: is a selector's place better than random places?

With acc(P, s) the accuracy of an edit that was trained on sample s at the layers P, and R the places
drawn at random (or all of them), a selector's place P has the difference

    D_s = acc(P, s) - mean over R of acc(., s)

for every sample s. Its mean over samples has a t interval, and a one-sided p-value that is corrected
over the selectors. Samples do not cover the chance that a ranking hits a good place by luck. For
that, `share` is the share of random places that are at most as accurate, and `rho` relates the
selector's scores with the accuracies of all places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats as scipy_stats

from ..errors import DataError
from ..stats import Estimate, adjust
from .ranking import SiteRanking
from .trainings import Layers

PERMUTATIONS = 2000
"""Random orders of the layers behind the p-value of `rho`."""


class Mean(NamedTuple):
    """A mean over samples, its interval, and the one-sided p-value of a mean above 0."""

    value: float
    low: float
    high: float
    p: float


def mean_over_samples(x: Float[np.ndarray, " sample"], level: float = 0.95) -> Mean:
    """Return the mean of independent samples with its t interval and the p-value of one above 0.

    Samples that are all equal have an interval of no width, and p 0 or 1. NaN gives NaN.

    Raises:
        DataError: fewer than two samples.

    >>> [round(v, 3) for v in mean_over_samples(np.array([1.0, 2.0, 3.0]))]
    [2.0, -0.484, 4.484, 0.037]
    """
    if len(x) < 2:
        raise DataError(f"an interval over {len(x)} samples was asked for; at least 2 are needed")
    mean = float(x.mean())
    if math.isnan(mean):
        return Mean(mean, mean, mean, mean)
    if np.ptp(x) < 1e-9:  # shares that differ by rounding alone
        return Mean(mean, mean, mean, 0.0 if mean > 0 else 1.0)
    test = scipy_stats.ttest_1samp(x, 0.0, alternative="greater")
    half = float(scipy_stats.t.ppf(0.5 + level / 2, len(x) - 1) * scipy_stats.sem(x))
    return Mean(mean, mean - half, mean + half, float(test.pvalue))


class Landscape(NamedTuple):
    """Accuracy of one edit and budget at every place that was trained.

    Attributes:
        places: layers of each.
        accuracy: `[place sample]`.
        random: which of the places stand for random ones.
        lost: places where a training diverged or is missing; they have no part in anything.
    """

    places: tuple[Layers, ...]
    accuracy: Float[np.ndarray, "place sample"]
    random: Bool[np.ndarray, " place"]
    lost: tuple[Layers, ...] = ()

    @classmethod
    def of(
        cls, trainings: pd.DataFrame, random: Sequence[Layers], accuracy: str = "accuracy"
    ) -> Landscape:
        """Return the landscape of the scored trainings of one edit and budget.

        Args:
            trainings: a row per training.
            random: the places that stand for random ones.
            accuracy: the column; `accuracy_out` for rows of other domains.

        Raises:
            DataError: no random place is whole.
        """
        scored = trainings[trainings["stage"] == "scored"]
        wide = scored.pivot(index="layers", columns="sample", values=accuracy)
        whole = wide.notna().all(axis=1)
        places, lost = (
            tuple(tuple(int(x) for x in str(name).split()) for name in wide.index[rows])
            for rows in (whole, ~whole)
        )
        drawn = set(random)
        chosen = np.array([p in drawn for p in places], dtype=bool)
        if not chosen.any():
            raise DataError(
                "no random place has an accuracy on every sample; at least one is needed"
            )
        return cls(places, wide[whole].to_numpy(dtype=float), chosen, lost)

    def at(self, place: Layers) -> Float[np.ndarray, " sample"]:
        """Return the accuracies at a place; NaN where it was lost."""
        if place not in self.places:
            return np.full(self.accuracy.shape[1], np.nan)
        return np.asarray(self.accuracy[self.places.index(place)])

    @property
    def by_chance(self) -> Float[np.ndarray, " sample"]:
        """Return the mean accuracy of the random places."""
        return np.asarray(self.accuracy[self.random].mean(axis=0))


def rank_relation(
    scores: Float[np.ndarray, " layer"], landscape: Landscape, seed: int = 0
) -> tuple[float, float]:
    """Return Spearman's correlation of mean layer scores with mean accuracy, and its p-value.

    Places overlap, so that they are not independent: the p-value is two-sided over permutations of
    the layers. Layers without a score take the lowest. NaN where all layers score alike.
    """
    known = np.where(np.isnan(scores), np.nanmin(scores), scores)
    member = np.zeros((len(landscape.places), len(known)))
    for i, place in enumerate(landscape.places):
        member[i, list(place)] = 1 / len(place)
    truth = _centred_ranks(landscape.accuracy.mean(axis=1)[None])
    rng = np.random.default_rng(seed)
    orders = np.stack([rng.permutation(len(known)) for _ in range(PERMUTATIONS)])
    drawn = _centred_ranks(known[orders] @ member.T) @ truth[0]
    rho = float((_centred_ranks((member @ known)[None]) @ truth[0])[0])
    if math.isnan(rho):
        return math.nan, math.nan
    return rho, float((1 + np.sum(np.abs(drawn) >= abs(rho) - 1e-12)) / (1 + PERMUTATIONS))


def _centred_ranks(x: Float[np.ndarray, "row place"]) -> Float[np.ndarray, "row place"]:
    """Return ranks of each row, centred and of length 1; NaN for a constant row."""
    ranks = scipy_stats.rankdata(x, axis=1)
    ranks = ranks - ranks.mean(axis=1, keepdims=True)
    size = np.sqrt((ranks**2).sum(axis=1, keepdims=True))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(size > 0, ranks / np.where(size > 0, size, 1), np.nan))


def compare_selectors(
    rankings: Sequence[SiteRanking],
    width: int,
    landscape: Landscape,
    seed: int = 0,
    out: Landscape | None = None,
) -> pd.DataFrame:
    """Return a row per selector: its place, and how much better than random places it is.

    Args:
        rankings: of the selectors.
        width: layers of a place.
        landscape: accuracies, at least at every selector's place.
        seed: of the permutations.
        out: accuracies of the same trainings on rows of other domains.

    Returns:
        Columns `selector, layers, accuracy`; `difference, low, high, p, p_adjusted` (Holm over the
        selectors); `share` of random places that are at most as accurate; `regret`, the best
        trained place's accuracy minus the selector's; `rho, p_rho`; `cpu_seconds` of the selector.
        With `out`, `accuracy_out, difference_out, low_out, high_out` too: the same on rows of other
        domains, without a p-value, which the plan keeps for one measure. Accuracies are shares.
    """
    chance, mean = landscape.by_chance, landscape.accuracy.mean(axis=1)
    rows: list[dict[str, Any]] = []
    for ranking in rankings:
        place = ranking.top_layers(width)
        own = landscape.at(place)
        difference = mean_over_samples(own - chance)
        rho, p_rho = rank_relation(ranking.layer_scores, landscape, seed)
        rows.append(
            {
                "selector": ranking.selector,
                "layers": " ".join(map(str, place)),
                "accuracy": float(own.mean()),
                "difference": difference.value,
                "low": difference.low,
                "high": difference.high,
                "p": difference.p,
                "share": _share(mean[landscape.random], own.mean()),
                "regret": float(mean.max() - own.mean()),
                "rho": rho,
                "p_rho": p_rho,
                "cpu_seconds": ranking.about.get("cpu_seconds", math.nan),
            }
        )
        if out is not None:
            rows[-1] |= _elsewhere(out, place)
    table = pd.DataFrame(rows)
    table.insert(7, "p_adjusted", adjust(table["p"].to_numpy(), "holm"))
    return table


def _elsewhere(out: Landscape, place: Layers) -> dict[str, float]:
    """Return the accuracy of a place on rows of other domains, and its difference from random places."""
    own = out.at(place)
    difference = mean_over_samples(own - out.by_chance)
    return {
        "accuracy_out": float(own.mean()),
        "difference_out": difference.value,
        "low_out": difference.low,
        "high_out": difference.high,
    }


def cost_table(trainings: pd.DataFrame, random: Sequence[Layers]) -> pd.DataFrame:
    """Return a row per edit and budget: what a training costs, and what it reaches at a random place.

    Args:
        trainings: a row per training.
        random: the places that stand for random ones.

    Returns:
        Columns `edit, budget, examples, parameters, cpu_seconds`, means over the scored trainings at
        random places; `accuracy, low, high`, of the mean over random places with a t interval over
        samples; `worst, best` of these places' means.
    """
    rows = []
    for (edit, budget), part in trainings.groupby(["edit", "budget"], sort=False):
        landscape = Landscape.of(part, random)
        mean, by_place = mean_over_samples(landscape.by_chance), landscape.accuracy.mean(axis=1)
        drawn = {" ".join(map(str, p)) for p in np.array(landscape.places)[landscape.random]}
        scored = part[(part["stage"] == "scored") & part["layers"].astype(str).isin(drawn)]
        costs = [float(scored[c].mean()) for c in ("examples", "parameters", "cpu_seconds")]
        ends = by_place[landscape.random]
        rows.append((edit, budget, *costs, *mean[:3], float(ends.min()), float(ends.max())))
    names = ["edit", "budget", "examples", "parameters", "cpu_seconds"]
    return pd.DataFrame(rows, columns=[*names, "accuracy", "low", "high", "worst", "best"])


def _share(random: Float[np.ndarray, " place"], own: float) -> float:
    """Return the share of random places that are at most as accurate; NaN without an accuracy."""
    return math.nan if math.isnan(own) else float(np.mean(random <= own + 1e-12))


def agreement_table(rankings: Sequence[SiteRanking]) -> pd.DataFrame:
    """Return Spearman's correlation of the layer scores of every two selectors, as a matrix.

    NaN where fewer than three layers have both scores, or where one side is constant.
    """
    names = [r.selector for r in rankings]
    scores = pd.DataFrame({r.selector: r.layer_scores for r in rankings})
    table = scores.corr("spearman", min_periods=3)
    return table.reindex(index=names, columns=names).rename_axis("selector")


def agreement_pairs(rankings: Sequence[SiteRanking], draws: int = 500) -> pd.DataFrame:
    """Return a row per two selectors: the correlation of their layer scores with its interval.

    The interval resamples layers, and the p-value permutes them (`stats.spearman_interval`).

    Args:
        rankings: of the selectors.
        draws: resamples and permutations.

    Returns:
        Columns `selector, other, rho, low, high, p`; NaN where fewer than three layers have both
        scores, or where one side is constant.
    """
    rows = []
    for i, one in enumerate(rankings):
        for other in rankings[:i]:
            both = ~(np.isnan(one.layer_scores) | np.isnan(other.layer_scores))
            found = one.agreement(other, draws) if both.sum() >= 3 else Estimate(*[math.nan] * 3)
            rows.append((one.selector, other.selector, found.value, found.low, found.high, found.p))
    return pd.DataFrame(rows, columns=["selector", "other", "rho", "low", "high", "p"])


def place_table(landscape: Landscape) -> pd.DataFrame:
    """Return a row per place: its layers, its mean accuracy with a t interval, the best first."""
    rows = []
    for place, values, drawn in zip(*landscape[:3], strict=True):
        mean = mean_over_samples(values)
        rows.append((" ".join(map(str, place)), mean.value, mean.low, mean.high, bool(drawn)))
    table = pd.DataFrame(rows, columns=["layers", "accuracy", "low", "high", "random"])
    return table.sort_values("accuracy", ascending=False, kind="stable", ignore_index=True)


__all__ = [
    "Landscape",
    "Mean",
    "agreement_pairs",
    "agreement_table",
    "compare_selectors",
    "cost_table",
    "mean_over_samples",
    "place_table",
    "rank_relation",
]
