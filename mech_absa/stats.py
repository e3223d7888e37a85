"""How sure: intervals and tests for effects and scores. Thin over scipy, statsmodels and scikit-learn.

Examples that share a sentence are not independent: several aspects of one review share its words, its corruption and its mistakes.
So every interval and test here takes `clusters` (one label per row, usually the sentence) and resamples or flips whole clusters;
`clusters=None` says that every row stands for itself.

An importance map has thousands of cells, so the two workhorses, `cluster_bootstrap` and `sign_flip`, are vectorised over cells:
everything they need of the data is each cluster's sum and count, and all draws for all cells are one matrix product. Every cell sees
the same draws. A NaN is a value that this row does not have in this cell (a one-token aspect has no `aspect.first`); it is left
out of sums and counts, never taken for 0.

Limits. Bootstrap intervals are asymptotic in the number of clusters: on normal effects a nominal 95 % covers
94 to 95 % from fifty clusters on, 93 % at thirty and 90 % at ten. Skewed cells get BCa intervals, which
cover better than percentile ones; studentized intervals cover better still, and can be infinite.
`benchmarks/coverage.py` measures all three. Where an effect appears in few
clusters, no resampling helps: if 6 % of the clusters have one, 54 % of the samples of ten clusters show
none at all, and every interval of those is [0, 0]. `support` counts the clusters that show an effect;
below ten, read an interval as a lower bound on the uncertainty. A sign flip is exact at any size for
effects symmetric about 0, but k clusters cannot give a p below 2 / 2^k: see `resolution`. For skewed
effects no sign flip is exact, and `maxt` suffers most: on simulated skewed maps without any effect, it
rejects a cell in about a quarter of the maps where 5 % are nominal. The adjustment `bootstrap` keeps its level
there, and finds less (benchmarks/README.md).

All arithmetic is float64; all randomness comes from `seed`; the same seed gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from .errors import ConfigError, choices

ADJUSTMENTS = {
    "maxt": None, "bootstrap": None, "holm": "holm", "bh": "fdr_bh", "by": "fdr_by", "none": None,
}  # fmt: skip
"""Correction for many tests -> statsmodels' name, where it works on p-values alone.

`maxt`: family-wise, by the distribution of the largest statistic (Westfall and Young 1993); `holm`:
family-wise; `bh`, `by`: false discovery rate, the latter under any dependence. All of them correct p-values
of sign flips, which assume effects symmetric about 0 where nothing is there. `bootstrap`: family-wise, by the
largest studentized mean over resampled clusters (Romano and Wolf 2005), which assumes no symmetry."""
TOGETHER = ("maxt", "bootstrap")
"""Adjustments that need the data of all cells, not p-values alone."""
INTERVALS = ("auto", "percentile", "bca", "studentized")
"""Bootstrap intervals of `cluster_bootstrap`."""
FLIPS = 9_999
"""Random sign patterns; the smallest p that they can give is 1 / (1 + FLIPS)."""
SKEWED = 1.0
"""Cells whose clusters have an absolute skewness above this get BCa intervals."""
FEW = 10
"""Clusters with an effect below which an interval understates the uncertainty."""

_BUDGET = 8_000_000
"""Numbers held at once in a matrix of draws (64 MB of float64)."""


@dataclass(frozen=True)
class Interval:
    """Hold means with their intervals, cell by cell; NaN if there is no value."""

    mean: Float[np.ndarray, "*cell"]
    low: Float[np.ndarray, "*cell"]
    high: Float[np.ndarray, "*cell"]


@dataclass(frozen=True)
class Estimate:
    """Hold one number with its interval, and the p-value of "it is zero" if that was tested (else
    NaN).
    """

    value: float
    low: float
    high: float
    p: float = float("nan")


@dataclass(frozen=True)
class McNemar:
    """Hold McNemar's test on the rows where exactly one of two systems is right.

    Attributes:
        b: rows where only the first is right.
        c: rows where only the second is right.
        statistic: min(b, c) if exact, else the chi-square with continuity correction.
        p: two-sided.
        exact: from the binomial distribution, not from chi-square.
    """

    b: int
    c: int
    statistic: float
    p: float
    exact: bool


# ---------------------------------------------------------------------------------------------------- many cells at once


def cluster_bootstrap(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    method: str = "auto",
) -> Interval:
    """Return the mean and an interval of every cell, by resampling clusters.

    A draw takes as many clusters as there are, with replacement, and averages all rows of the drawn
    clusters (a ratio of sums, so long clusters weigh more, as they do in the mean itself). With
    clusters of size one it is the ordinary bootstrap. Source: Field and Welsh, Bootstrapping
    clustered data, JRSS-B 69 (2007); Efron and Tibshirani (1993), chapter 13.

    Args:
        values: `[n *cell]`; NaN = missing.
        clusters: `[n]` labels; None = every row for itself.
        level: of the interval.
        draws, seed: of the bootstrap.
        method: `percentile`; `bca`, which corrects for bias and skewness (Efron 1987); `studentized`
            (bootstrap-t), which covers skewed means best, and whose ends are infinite where many draws
            show no spread; or `auto`, which takes BCa where the clusters of a cell are skewed by more
            than `SKEWED`, and percentiles elsewhere.

    Returns:
        An Interval of shape `[*cell]`. The ends are NaN where fewer than two clusters have a value,
        all three where none has.

    Raises:
        ConfigError: no rows, lengths that differ, infinite values, a level outside (0, 1).
    """
    _check(level=level, draws=draws)
    if method not in INTERVALS:
        raise ConfigError(f"unknown interval {method!r}; accepted: {choices(INTERVALS)}")
    sums, counts, shape = _cluster_sums(values, clusters)
    k, n_cells = sums.shape
    bent = np.zeros(n_cells, dtype=bool)
    if method in ("auto", "bca"):
        bent = np.ones(n_cells, dtype=bool) if method == "bca" else _skewed(sums, counts)
    with np.errstate(invalid="ignore"):
        mean = sums.sum(axis=0) / counts.sum(axis=0)
    ends = np.full((2, n_cells), np.nan)

    weights = _resampled(k, draws, seed)
    nothing_missing = bool(
        (counts == counts[:, :1]).all()
    )  # then one column of counts serves every cell
    usable = np.flatnonzero((counts > 0).sum(axis=0) >= 2)
    step = max(1, _BUDGET // draws)
    for cells in (usable[i : i + step] for i in range(0, len(usable), step)):
        drawn = _product(weights, counts[:, :1] if nothing_missing else counts[:, cells])
        with np.errstate(
            invalid="ignore"
        ):  # a draw may miss every cluster that has a value here: NaN, left out below
            means = _product(weights, sums[:, cells]) / drawn
        if method == "studentized":
            ends[:, cells] = _studentized(
                weights.astype(float), means, sums[:, cells], counts[:, cells], level
            )
            continue
        ends[:, cells] = _percentiles(means, level)
        if (which := np.flatnonzero(bent[cells])).size:
            chosen = cells[which]
            ends[:, chosen] = _bca(means[:, which], sums[:, chosen], counts[:, chosen], level)
    return Interval(mean.reshape(shape), ends[0].reshape(shape), ends[1].reshape(shape))


def sign_flip(
    values: ArrayLike, clusters: ArrayLike | None = None, *, draws: int = 9999, seed: int = 0
) -> Float[np.ndarray, "*cell"]:
    """Return the two-sided p of "the mean is 0" for every cell, by flipping the signs of whole
    clusters.

    Exact, over all 2^k sign patterns of k clusters, where these are no more than `draws`; else (1 +
    hits) / (1 + draws) over random patterns, which is never 0 (Phipson and Smyth, Stat. Appl.
    Genet. Mol. Biol. 9 (2010), article 39). A pattern hits where its sum is at least as far from 0
    as the observed one.

    Args:
        values: `[n *cell]`; NaN = missing.
        clusters: `[n]` labels; None = every row for itself.

    Returns:
        p `[*cell]`; 1 in a cell that is 0 everywhere, NaN in a cell without values.

    Raises:
        ConfigError: no rows, lengths that differ, infinite values.
    """
    _check(draws=draws)
    sums, counts, shape = _cluster_sums(values, clusters)
    k, n_cells = sums.shape
    # Patterns that tie with the observed sum must count as hits whatever the order of summation rounds them to.
    bar = np.abs(sums.sum(axis=0)) - 1e-10 * np.abs(sums).sum(axis=0)
    hits = np.zeros(n_cells)
    patterns = 0
    exact = 2**k <= draws
    rows = max(1, _BUDGET // max(k, n_cells))
    for signs in _all_signs(k, rows) if exact else _random_signs(k, draws, rows, seed):
        hits += (np.abs(signs @ sums) >= bar).sum(axis=0)
        patterns += len(signs)
    p = hits / patterns if exact else (1 + hits) / (1 + patterns)
    p[counts.sum(axis=0) == 0] = np.nan
    return p.reshape(shape)


@dataclass(frozen=True)
class CellTests:
    """Hold p-values of many cells, from sign patterns that all cells share.

    Attributes:
        p: of each cell alone.
        adjusted: of each cell, corrected for the number of cells.
        floor: the smallest adjusted p that these clusters, cells and patterns can give.
    """

    p: Float[np.ndarray, "*cell"]
    adjusted: Float[np.ndarray, "*cell"]
    floor: float


def cell_tests(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    adjustment: str = "maxt",
    one_sided: bool = False,
    draws: int = FLIPS,
    seed: int = 0,
) -> CellTests:
    """Test "the mean is 0" in every cell, corrected for the number of cells.

    All cells see the same sign patterns, so the p-values keep their dependence, and `maxt` can use
    it: the step-down procedure of Westfall and Young (1993, algorithm 2.8) compares each cell with
    the largest statistic over the cells not yet rejected. The statistic is the sum over clusters
    divided by the root of the sum of their squares, which flips leave as it is; it orders patterns
    as Student's t.

    The tests are exact where the clusters' effects are symmetric about 0 in cells without an
    effect. Where they are skewed, no correction of sign flips controls its error rate, and `maxt`
    errs most (`benchmarks/coverage.py`). `bootstrap` resamples clusters instead and compares each
    cell with the largest |t| of the resampled means (Romano and Wolf, Econometrica 73 (2005)): it
    kept its level in all simulations, but finds little below about 20 clusters.

    Under `holm`, `bh` and `by` random patterns alone could never reject one of many cells. So where
    fewer than ten of the random patterns reach a cell's sum, its p is the saddlepoint approximation
    to the tail of the sign-flip distribution (Robinson, JRSS-B 44 (1982)), never below 2 / 2^k.

    Args:
        values: `[n *cell]`; NaN = missing. Cells that are 0 everywhere are no hypotheses: p is NaN.
        clusters: `[n]` labels; None = every row for itself.
        adjustment: one of `ADJUSTMENTS`.
        one_sided: test "the mean is 0 or less" instead.
        draws: random patterns; all 2^k are used where these are no more.
        seed: of the patterns.

    Example:
        >>> values = np.ones((8, 2)) * [1.0, 0.0]
        >>> cell_tests(values).adjusted
        array([0.0078125,       nan])
    """
    _check(draws=draws)
    if adjustment not in ADJUSTMENTS:
        raise ConfigError(f"unknown adjustment {adjustment!r}; accepted: {choices(ADJUSTMENTS)}")
    sums, counts, shape = _cluster_sums(values, clusters)
    k, n_cells = sums.shape
    tested = np.flatnonzero(np.abs(sums).max(axis=0) > 0)
    p, adjusted = np.full(n_cells, np.nan), np.full(n_cells, np.nan)
    floor = _smallest_p(k, draws, one_sided)
    if adjustment == "bootstrap":
        p[tested], adjusted[tested] = _by_resampling(
            sums[:, tested], counts[:, tested], one_sided, draws, seed
        )
        return CellTests(p.reshape(shape), adjusted.reshape(shape), _no_spread(k, draws))
    if tested.size:
        x = sums[:, tested] / np.sqrt((sums[:, tested] ** 2).sum(axis=0))
        alone, together = _flip(x, one_sided, draws, seed, adjustment == "maxt")
        if adjustment not in ("maxt", "none") and 2**k > draws:
            rare = np.flatnonzero(alone < 11 / (1 + draws))
            alone[rare] = _saddlepoint(x[:, rare], one_sided)
            floor = (1 if one_sided else 2) * 2.0**-k
        p[tested] = alone
        adjusted[tested] = together if adjustment == "maxt" else adjust(alone, adjustment)
    if adjustment in ("holm", "by", "bh"):
        floor = min(1.0, floor * _worst_factor(len(tested), adjustment))
    return CellTests(p.reshape(shape), adjusted.reshape(shape), floor)


@dataclass(frozen=True)
class Resolution:
    """Hold what a number of clusters and cells can show at all.

    Attributes:
        clusters, cells: how many.
        smallest: the smallest adjusted p that a single true effect can reach.
        alpha: the threshold asked about.
        needed: clusters needed for it.
    """

    clusters: int
    cells: int
    adjustment: str
    smallest: float
    alpha: float
    needed: int

    @property
    def possible(self) -> bool:
        """Return whether any cell can reach `alpha`."""
        return self.smallest <= self.alpha

    def __str__(self) -> str:
        sentence = (
            f"{self.clusters} sentences and {self.cells:,} cells: the smallest p after the "
            f"{self.adjustment} correction is {self.smallest:.2g}"
        )
        if self.possible:
            return sentence
        return (
            f"{sentence}, so that no cell can reach {self.alpha:g}; at least {self.needed} sentences "
            "are needed"
        )


def resolution(
    clusters: int,
    cells: int,
    adjustment: str = "maxt",
    *,
    alpha: float = 0.05,
    draws: int = FLIPS,
) -> Resolution:
    """Return whether any cell can reach `alpha` with so many clusters and cells.

    Args:
        clusters: independent units, usually sentences.
        cells: hypotheses.
        adjustment: one of `ADJUSTMENTS`.
        alpha: threshold for the adjusted p.
        draws: random sign patterns of the test.

    Example:
        >>> print(resolution(5, 100))
        5 sentences and 100 cells: the smallest p after the maxt correction is 0.062, so that no cell can reach 0.05; at least 6 sentences are needed
        >>> resolution(10, 1000, "holm").needed
        16
    """
    if adjustment not in ADJUSTMENTS:
        raise ConfigError(f"unknown adjustment {adjustment!r}; accepted: {choices(ADJUSTMENTS)}")
    if clusters < 1 or cells < 1:
        raise ConfigError(f"{clusters} clusters and {cells} cells; accepted: 1 or more of both")
    factor = _worst_factor(cells, adjustment)

    def smallest(k: int) -> float:
        if adjustment == "bootstrap":
            return _no_spread(k, draws)
        floor = 2.0 * 2.0**-k
        if adjustment in ("maxt", "none"):
            floor = _smallest_p(k, draws, False)
        return min(1.0, floor * factor)

    needed = next((k for k in range(1, 200) if smallest(k) <= alpha), clusters + 1)
    return Resolution(clusters, cells, adjustment, smallest(clusters), alpha, needed)


def spelled_p(p: float, floor: float = 0.0) -> str:
    """Return a p-value for a table; one at the floor of its test is printed with "<=".

    Example:
        >>> spelled_p(0.0001, 0.0001), spelled_p(0.034), spelled_p(float("nan"))
        ('<= 0.0001', '0.034', '')
    """
    if np.isnan(p):
        return ""
    return f"<= {p:.2g}" if p <= floor * (1 + 1e-9) else f"{p:.2g}"


def support(values: ArrayLike, clusters: ArrayLike | None = None) -> Int[np.ndarray, "*cell"]:
    """Return the number of clusters that show an effect (a sum other than 0) in each cell."""
    sums, _, shape = _cluster_sums(values, clusters)
    count: np.ndarray = (sums != 0).sum(axis=0).reshape(shape)
    return count


def skewed(values: ArrayLike, clusters: ArrayLike | None = None) -> Bool[np.ndarray, "*cell"]:
    """Return which cells have clusters that are skewed about the mean by more than `SKEWED`.

    Sign flips find too much in such cells where nothing is there: see `cell_tests`.

    Example:
        >>> skewed(np.array([[0.0, -1.0], [0.0, 0.0], [0.0, 1.0], [9.0, 0.0]]))
        array([ True, False])
    """
    sums, counts, shape = _cluster_sums(values, clusters)
    return _skewed(sums, counts).reshape(shape)


def adjust(p: ArrayLike | float, method: str = "holm") -> Float[np.ndarray, "*cell"]:
    """Return p-values corrected for their number; NaN stays NaN and counts as no test.

    Args:
        p: `[*cell]`.
        method: `holm` (family-wise error, Holm 1979), `bh` (false discovery rate, Benjamini and
            Hochberg 1995), `by` (the same under any dependence, Benjamini and Yekutieli 2001) or
            `none`.

    Raises:
        ConfigError: another method; `maxt` and `bootstrap` need the data, see `cell_tests`.
    """
    from statsmodels.stats.multitest import multipletests

    if method not in ADJUSTMENTS or method in TOGETHER:
        accepted = [m for m in ADJUSTMENTS if m not in TOGETHER]
        raise ConfigError(f"unknown adjustment {method!r}; accepted: {choices(accepted)}")
    adjusted = np.array(p, dtype=float)
    tested = ~np.isnan(adjusted)
    if not ((adjusted[tested] >= 0) & (adjusted[tested] <= 1)).all():
        raise ConfigError(
            "a p-value to adjust lies outside [0, 1]; accepted: probabilities, or NaN for no test"
        )
    if ADJUSTMENTS[method] and tested.any():
        adjusted[tested] = multipletests(adjusted[tested], method=ADJUSTMENTS[method])[1]
    return adjusted


# ---------------------------------------------------------------------------------------------------- scores of systems


def paired_bootstrap_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    level: float = 0.95,
    draws: int = 9999,
    seed: int = 0,
) -> Estimate:
    """Return the mean of a - b over the same rows, with its bootstrap interval and its sign-flip p,
    both by cluster.

    With `a` and `b` the correctness (0 or 1) of two edits it is their difference in accuracy, in
    the same units.

    Args:
        a, b: `[n]`; a row where either is NaN is left out.
        clusters: `[n]` labels; None = every row for itself.
    """
    a, b = _vectors(a, b)
    interval = cluster_bootstrap(a - b, clusters, level=level, draws=draws, seed=seed)
    p = sign_flip(a - b, clusters, draws=draws, seed=seed)
    return Estimate(float(interval.mean), float(interval.low), float(interval.high), float(p))


def bootstrap_statistic(
    fn: Callable[[Int[np.ndarray, " row"]], float],
    clusters: ArrayLike | None,
    n: int,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the percentile interval, by cluster, of a statistic that is no mean (macro-F1, a rank
    correlation).

    Args:
        fn: row indices (with repetition) -> the statistic on these rows; NaN where it is undefined,
            which leaves the draw out.
        clusters: `[n]` labels; None = every row for itself.
        n: number of rows.

    Returns:
        value = fn(all rows). The ends are NaN where there are fewer than two clusters or the
        statistic was never defined.
    """
    _check(level=level, draws=draws)
    rows, starts = _grouped(clusters, n)
    value = float(fn(np.arange(n)))
    if len(starts) < 2:
        return Estimate(value, np.nan, np.nan)
    members = np.split(rows, starts[1:])
    rng = np.random.default_rng(seed)
    picks = (rng.integers(len(members), size=len(members)) for _ in range(draws))
    drawn = np.array(
        [[fn(np.concatenate([members[c] for c in pick]))] for pick in picks], dtype=float
    )
    low, high = (np.nan, np.nan) if np.isnan(drawn).all() else _percentiles(drawn, level)[:, 0]
    return Estimate(value, float(low), float(high))


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """Test whether two systems are right equally often on the same rows (McNemar).

    Exact (binomial) where they disagree on fewer than 25 rows, else chi-square with continuity
    correction. Rows count as independent; where they share sentences, `paired_bootstrap_difference`
    is the safer reading.

    Args:
        correct_a, correct_b: `[n]`, true (or 1) where that system is right.
    """
    from statsmodels.stats.contingency_tables import mcnemar as mcnemar_test

    right_a, right_b = _vectors(correct_a, correct_b)
    if not np.isin([right_a, right_b], (0, 1)).all():
        raise ConfigError(
            "McNemar's test got a value that is neither right nor wrong; accepted: true and false, or 1 and 0"
        )
    a, b = right_a == 1, right_b == 1
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    if (
        only_a == only_b
    ):  # nothing speaks against equality; the continuity correction would overshoot
        few = only_a + only_b < 25
        return McNemar(only_a, only_b, float(only_a) if few else 0.0, 1.0, few)
    exact = only_a + only_b < 25
    result = mcnemar_test(
        [[(a & b).sum(), only_a], [only_b, (~a & ~b).sum()]], exact=exact, correction=True
    )
    return McNemar(only_a, only_b, float(result.statistic), float(result.pvalue), exact)


def wilson(k: ArrayLike | int, n: ArrayLike | int, level: float = 0.95) -> Interval:
    """Return Wilson's score interval of k successes in n independent trials, element by element;
    NaN if n is 0.

    Source: Wilson, JASA 22 (1927), 209-212.

    Args:
        k, n: `[*cell]`, of one shape or broadcast.
    """
    from statsmodels.stats.proportion import proportion_confint

    _check(level=level)
    k, n = np.asarray(k, dtype=float), np.asarray(n, dtype=float)
    try:
        k, n = np.broadcast_arrays(k, n)
    except ValueError:
        raise ConfigError(
            f"Wilson's interval got successes of shape {k.shape} and trials of shape {n.shape}; accepted: one shape"
        ) from None
    if not ((k >= 0) & (k <= n)).all():
        raise ConfigError(
            "Wilson's interval got a number of successes below 0 or above the number of trials"
        )
    trials = np.where(n > 0, n, np.nan)
    low, high = proportion_confint(k, trials, alpha=1 - level, method="wilson")
    return Interval(np.asarray(k / trials), np.asarray(low), np.asarray(high))


# ---------------------------------------------------------------------------------------------------- maps against maps


def spearman_interval(
    x: ArrayLike, y: ArrayLike, level: float = 0.95, seed: int = 0, *, draws: int = 2000
) -> Estimate:
    """Return Spearman's rank correlation, its percentile bootstrap interval over pairs, and its
    two-sided permutation p.

    Args:
        x, y: `[n]`, or two maps of one shape; a pair where either is NaN is left out.
        draws: bootstrap draws and random permutations; all n! permutations are used where these are
            fewer.

    Returns:
        All NaN where one side is constant: it ranks nothing.

    Raises:
        ConfigError: shapes that differ, or fewer than 3 pairs.
    """
    from scipy.stats import permutation_test

    _check(level=level, draws=draws)
    x, y = _pairs(x, y)
    n = len(x)
    if n < 3:
        raise ConfigError(f"a rank correlation got {n} pairs without NaN; accepted: 3 or more")
    rank_x, rank_y = _unit_ranks(x), _unit_ranks(y)
    if np.isnan(rank_x @ rank_y):
        return Estimate(np.nan, np.nan, np.nan)
    interval = bootstrap_statistic(
        lambda rows: _unit_ranks(x[rows]) @ _unit_ranks(y[rows]),
        None,
        n,
        level=level,
        draws=draws,
        seed=seed,
    )
    test = permutation_test(
        (rank_x,),
        lambda ranks, axis: (ranks * rank_y).sum(axis=axis),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=draws,
        batch=max(1, _BUDGET // n),
        random_state=np.random.default_rng(seed),
    )
    return Estimate(interval.value, interval.low, interval.high, float(test.pvalue))


def auroc(scores: ArrayLike, truth: ArrayLike) -> float:
    """Return the area under the ROC curve: the chance that a true cell outscores a false one (ties
    count half).

    Args:
        scores: `[*cell]`; a cell whose score is NaN is left out.
        truth: `[*cell]`, true where the cell belongs.

    Raises:
        ConfigError: shapes that differ, or cells that are all true or all false.
    """
    from sklearn.metrics import roc_auc_score

    s, t = _pairs(scores, truth)
    if set(np.unique(t)) != {0.0, 1.0}:
        raise ConfigError(
            f"AUROC got cells with the truth values {np.unique(t).tolist()}; accepted: both true and false, and nothing else"
        )
    return float(roc_auc_score(t, s))


def top_k_overlap(a: ArrayLike, b: ArrayLike, k: int) -> float:
    """Return the share of the k largest cells of one map that are among the k largest of another.

    If cells tie for the last places, it is the expected share when each map breaks its ties at
    random. So two flat maps score k / n (chance) and not 1.

    Args:
        a, b: `[*cell]`, two maps of one shape; a cell where either is NaN is left out.
        k: from 1 to the number of cells.
    """
    a, b = _pairs(a, b)
    if not 1 <= k <= len(a):
        raise ConfigError(
            f"the overlap of the top {k} cells was asked of maps with {len(a)} cells without NaN; accepted: 1 to that number"
        )
    return float(_top_share(a, k) @ _top_share(b, k) / k)


# ---------------------------------------------------------------------------------------------------- inside


def _check(*, level: float = 0.5, draws: int = 1) -> None:
    if not 0 < level < 1:
        raise ConfigError(
            f"level {level} of an interval; accepted: a number between 0 and 1, such as 0.95"
        )
    if draws < 1:
        raise ConfigError(f"{draws} random draws; accepted: 1 or more")


def _grouped(
    clusters: ArrayLike | None, n: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " k"]]:
    """Return row indices ordered by cluster, and where each cluster begins among them."""
    if n < 1:
        raise ConfigError("no rows to compute a statistic of; accepted: one or more")
    if clusters is None:
        return np.arange(n), np.arange(n)
    labels = np.asarray(clusters)
    if labels.shape != (n,):
        raise ConfigError(
            f"cluster labels of shape {labels.shape} came with {n} rows; accepted: one label a row"
        )
    codes = np.unique(labels, return_inverse=True)[1]
    rows = np.argsort(codes, kind="stable")
    return rows, np.flatnonzero(np.diff(codes[rows], prepend=-1))


def _cluster_sums(
    values: ArrayLike, clusters: ArrayLike | None
) -> tuple[Float[np.ndarray, "k cell"], Float[np.ndarray, "k cell"], tuple[int, ...]]:
    """Return each cluster's sum and number of values in each cell, and the shape of the cells."""
    table = np.asarray(values, dtype=float)
    if table.ndim == 0:
        raise ConfigError("a single number came as values; accepted: one row an example")
    n, *shape = table.shape
    rows, starts = _grouped(clusters, n)
    table = table.reshape(n, int(np.prod(shape)))[rows]
    if np.isinf(table).any():
        raise ConfigError(
            f"{int(np.isinf(table).sum())} infinite values have no mean; accepted: finite numbers, or NaN for missing"
        )
    present = ~np.isnan(table)
    sums = np.add.reduceat(np.where(present, table, 0.0), starts, axis=0)
    return sums, np.add.reduceat(present.astype(float), starts, axis=0), tuple(shape)


def _resampled(k: int, draws: int, seed: int) -> Int[np.ndarray, "draw k"]:
    """Return how often each draw takes each cluster; whole numbers of two bytes, since there may be
    thousands of clusters.
    """
    rng, share = np.random.default_rng(seed), np.full(k, 1 / k)
    counts = np.empty((draws, k), dtype=np.int16 if k < 2**15 else np.int32)
    for start in range(0, draws, rows := max(1, _BUDGET // k)):
        block = counts[start : start + rows]
        block[:] = rng.multinomial(k, share, size=len(block))
    return counts


def _product(
    weights: Int[np.ndarray, "draw k"], values: Float[np.ndarray, "k cell"]
) -> Float[np.ndarray, "draw cell"]:
    """Return `weights @ values`, with a part of the weights as float64 in memory at a time."""
    rows = max(1, _BUDGET // len(values))
    parts = [weights[i : i + rows].astype(float) @ values for i in range(0, len(weights), rows)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _skewed(
    sums: Float[np.ndarray, "k cell"], counts: Float[np.ndarray, "k cell"]
) -> Bool[np.ndarray, " cell"]:
    """Return which cells have clusters that are skewed about the mean by more than `SKEWED`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        d = sums - counts * (sums.sum(axis=0) / counts.sum(axis=0))
        scale = np.sqrt((d**2).mean(axis=0))
        skewness = np.where(
            scale > 1e-9 * np.abs(sums).max(axis=0), (d**3).mean(axis=0) / scale**3, 0
        )
    return np.nan_to_num(np.abs(skewness)) > SKEWED


def _bca(
    drawn: Float[np.ndarray, "draw cell"],
    sums: Float[np.ndarray, "k cell"],
    counts: Float[np.ndarray, "k cell"],
    level: float,
) -> Float[np.ndarray, "2 cell"]:
    """Return bias-corrected and accelerated ends (Efron, JASA 82 (1987)); the jackknife leaves out
    clusters.
    """
    mean = sums.sum(axis=0) / counts.sum(axis=0)
    known = (~np.isnan(drawn)).sum(axis=0)
    below = (drawn < mean).sum(axis=0) + 0.5 * (drawn == mean).sum(axis=0)
    share = np.clip(below / known, 0.5 / known, 1 - 0.5 / known)
    bias = ndtri(share)
    with np.errstate(invalid="ignore", divide="ignore"):
        left = (sums.sum(axis=0) - sums) / (counts.sum(axis=0) - counts)
        d = np.nanmean(left, axis=0) - left
        cubes, squares = np.nansum(d**3, axis=0), np.nansum(d**2, axis=0)
        pull = np.where(squares > 0, cubes / (6 * squares**1.5), 0.0)
    ends = np.empty((2, drawn.shape[1]))
    ordered = np.sort(drawn, axis=0)  # NaN last
    for row, z in enumerate(ndtri([(1 - level) / 2, (1 + level) / 2])):
        q = ndtr(bias + (bias + z) / (1 - pull * (bias + z)))
        at = q * (known - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, known - 1)
        cells = np.arange(drawn.shape[1])
        a, b = ordered[low, cells], ordered[high, cells]
        ends[row] = a + (at - low) * (b - a)
    return ends


def _studentized(
    weights: Float[np.ndarray, "draw k"],
    drawn: Float[np.ndarray, "draw cell"],
    sums: Float[np.ndarray, "k cell"],
    counts: Float[np.ndarray, "k cell"],
    level: float,
) -> Float[np.ndarray, "2 cell"]:
    """Return bootstrap-t ends (Efron and Tibshirani 1993, section 12.5), with the standard error of a ratio.

    A draw without spread counts as infinitely far away, on the side where its mean lies.
    """
    mean, error = _mean_and_error(sums, counts)
    t = _t_of_draws(weights, drawn, sums, counts)
    tail = (1 - level) / 2
    ends = np.nanquantile(t, [1 - tail, tail], axis=0, method="inverted_cdf")
    with np.errstate(invalid="ignore"):
        interval: np.ndarray = np.where(error > 0, mean - ends * error, mean)
    return interval


def _mean_and_error(
    sums: Float[np.ndarray, "k cell"], counts: Float[np.ndarray, "k cell"]
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Return the mean of every cell and the standard error of that ratio of sums."""
    mean = sums.sum(axis=0) / counts.sum(axis=0)
    return mean, np.sqrt(((sums - mean * counts) ** 2).sum(axis=0)) / counts.sum(axis=0)


def _t_of_draws(
    weights: Float[np.ndarray, "draw k"],
    drawn: Float[np.ndarray, "draw cell"],
    sums: Float[np.ndarray, "k cell"],
    counts: Float[np.ndarray, "k cell"],
) -> Float[np.ndarray, "draw cell"]:
    """Return (mean of a draw - mean) / (standard error of the draw); NaN where a draw has no value.

    A draw without spread is infinitely far away, on the side where its mean lies.
    """
    mean, error = _mean_and_error(sums, counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = weights @ sums**2 - 2 * drawn * (weights @ (sums * counts))
        squares += drawn**2 * (weights @ counts**2)
        spread = np.sqrt(np.maximum(squares, 0)) / (weights @ counts)
        spread[spread < 1e-6 * error] = 0.0
        t: np.ndarray = (drawn - mean) / spread
    t[np.isnan(t) & ~np.isnan(drawn)] = 0.0  # no spread, and no distance either
    return t


def _by_resampling(
    sums: Float[np.ndarray, "k cell"],
    counts: Float[np.ndarray, "k cell"],
    one_sided: bool,
    draws: int,
    seed: int,
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Return p of every cell alone, and by step-down over the largest t of resampled clusters.

    A draw in which a cell has no value or no spread counts against that cell.
    """
    k, n_cells = sums.shape
    if not n_cells:
        return np.empty(0), np.empty(0)
    mean, error = _mean_and_error(sums, counts)
    with np.errstate(divide="ignore"):
        observed = mean / np.where(error > 1e-12 * np.abs(mean), error, 0.0)
    observed = observed if one_sided else np.abs(observed)
    order = np.argsort(observed, kind="stable")
    sums, counts, observed = sums[:, order], counts[:, order], observed[order]
    rng, rows = np.random.default_rng(seed), max(1, _BUDGET // 8 // max(k, n_cells))

    def blocks() -> Iterator[np.ndarray]:
        for first in range(0, draws, rows):
            size = min(rows, draws - first)
            weights = rng.multinomial(k, np.full(k, 1 / k), size=size).astype(float)
            with np.errstate(invalid="ignore"):
                drawn = (weights @ sums) / (weights @ counts)
            t = _t_of_draws(weights, drawn, sums, counts)
            t = t if one_sided else np.abs(t)
            yield np.where(np.isnan(t), np.inf, t)

    hits, over, patterns = _counted(blocks(), observed, True)
    return _step_down(hits, over, patterns, 1, order)


def _no_spread(k: int, draws: int) -> float:
    """Return the smallest p of `_by_resampling`: one draw in k^(k-1) takes a single cluster k times."""
    return max(1 / (1 + draws), float(k) ** (1 - k))


def _smallest_p(k: int, draws: int, one_sided: bool) -> float:
    """Return the smallest p of a sign-flip test: over all patterns where there are few, else by
    chance.
    """
    return (1 if one_sided else 2) * 2.0**-k if 2**k <= draws else 1 / (1 + draws)


def _worst_factor(cells: int, adjustment: str) -> float:
    """Return by how much a correction multiplies the p of the one cell that has an effect."""
    if adjustment == "by":
        return cells * float((1 / np.arange(1, cells + 1)).sum())
    return float(cells) if adjustment in ("holm", "bh") else 1.0


def _flip(
    x: Float[np.ndarray, "k cell"], one_sided: bool, draws: int, seed: int, maxt: bool
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Return p of every cell alone, and by step-down max-T (the same where `maxt` is off)."""
    k, n_cells = x.shape
    exact = 2**k <= draws
    order = np.argsort(x.sum(axis=0) if one_sided else np.abs(x.sum(axis=0)), kind="stable")
    x = np.ascontiguousarray(x[:, order])  # smallest first, so that maxima accumulate along a row
    observed = x.sum(axis=0) if one_sided else np.abs(x.sum(axis=0))
    bar = observed - 1e-10 * np.abs(x).sum(axis=0)  # ties count whatever the order of summation
    rows = max(1, _BUDGET // 8 // max(k, n_cells))
    signs = _all_signs(k, rows, both=one_sided) if exact else _random_signs(k, draws, rows, seed)
    blocks = (s @ x if one_sided else np.abs(s @ x) for s in signs)
    hits, over, patterns = _counted(blocks, bar, maxt)
    alone, together = _step_down(hits, over, patterns, 0 if exact else 1, order)
    return alone, together if maxt else alone


def _counted(
    blocks: Iterator[Float[np.ndarray, "pattern cell"]],
    bar: Float[np.ndarray, " cell"],
    maxt: bool,
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"], int]:
    """Return how many patterns reach the bar: of the cell, and of the largest of it and all before.

    Args:
        blocks: statistics; they are overwritten. Cells stand in the order of the bar, smallest first.
        bar: observed statistics.
        maxt: count the second, which is 0 otherwise.
    """
    hits, over, patterns = np.zeros(len(bar)), np.zeros(len(bar)), 0
    for t in blocks:
        hits += np.count_nonzero(t >= bar, axis=0)
        if maxt:
            np.maximum.accumulate(t, axis=1, out=t)
            over += np.count_nonzero(t >= bar, axis=0)
        patterns += len(t)
    return hits, over, patterns


def _step_down(
    hits: Float[np.ndarray, " cell"],
    over: Float[np.ndarray, " cell"],
    patterns: int,
    extra: int,
    order: Int[np.ndarray, " cell"],
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Return p of every cell alone, and by step-down, in the order before sorting.

    Args:
        hits, over: as `_counted` returns them.
        patterns: that were counted.
        extra: 1 where patterns are random: the observed one counts too.
        order: original position of each sorted cell.
    """
    alone, together = np.empty(len(order)), np.empty(len(order))
    alone[order] = (extra + hits) / (extra + patterns)
    together[order] = np.maximum.accumulate(((extra + over) / (extra + patterns))[::-1])[::-1]
    return alone, together


def _saddlepoint(x: Float[np.ndarray, "k cell"], one_sided: bool) -> Float[np.ndarray, " cell"]:
    """Return P(sum of randomly signed clusters >= observed), by the Lugannani and Rice formula.

    The cumulant generating function of a randomly signed sum is the sum of log cosh(u x_i).
    """
    least = 2.0 ** -(x != 0).sum(axis=0)
    total = np.abs(x).sum(axis=0)
    target = x.sum(axis=0) if one_sided else np.abs(x.sum(axis=0))
    # The largest possible sum has no saddlepoint, and exactly one pattern reaches it.
    edge = target >= total * (1 - 1e-9)
    goal = np.where(edge, 0.5 * total, target)
    u = np.zeros_like(goal)
    high = np.full_like(goal, np.inf)
    low = np.zeros_like(goal)
    for _ in range(60):  # Newton, kept inside a bracket
        slope = (x * np.tanh(u * x)).sum(axis=0) - goal
        low, high = np.where(slope < 0, u, low), np.where(slope >= 0, u, high)
        curve = (x**2 / np.cosh(np.clip(u * x, -300, 300)) ** 2).sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            step = u - slope / curve
        inside = (step > low) & (step < high)
        middle = np.where(np.isinf(high), 2 * u + 1, (low + high) / 2)
        u = np.where(inside, step, middle)
    size = np.abs(u * x)
    cumulant = (size + np.log1p(np.exp(-2 * size)) - np.log(2)).sum(axis=0)
    curve = (x**2 / np.cosh(np.clip(u * x, -300, 300)) ** 2).sum(axis=0)
    w = np.sqrt(2 * np.maximum(u * goal - cumulant, 1e-300))
    v = u * np.sqrt(np.maximum(curve, 1e-300))
    density = np.exp(-(w**2) / 2) / np.sqrt(2 * np.pi)
    tail = ndtr(-w) + density * (1 / v - 1 / w)
    # The formula is for continuous sums; the observed pattern itself is one more, which keeps p honest.
    one = np.where(edge, least, np.maximum(tail, 0) + least)
    p: np.ndarray = np.minimum(1.0, one if one_sided else 2 * one)
    return p


def _percentiles(
    drawn: Float[np.ndarray, "draw cell"], level: float
) -> Float[np.ndarray, "2 cell"]:
    tail = (1 - level) / 2
    ends: np.ndarray = np.nanquantile(drawn, [tail, 1 - tail], axis=0)
    return ends


def _all_signs(k: int, rows: int, both: bool = False) -> Iterator[Float[np.ndarray, "pattern k"]]:
    """Give every pattern of k signs, in blocks.

    |sum| is the same for a pattern and its opposite, so that half of them will do unless `both`.
    """
    total = 2**k if both else 2 ** (k - 1)
    for first in range(0, total, rows):
        number = np.arange(first, min(first + rows, total))
        yield 1.0 - 2.0 * ((number[:, None] >> np.arange(k)) & 1)


def _random_signs(
    k: int, draws: int, rows: int, seed: int
) -> Iterator[Float[np.ndarray, "pattern k"]]:
    """Yield random patterns of k signs in blocks; the patterns do not depend on the size of the
    blocks.
    """
    rng = np.random.default_rng(seed)
    for first in range(0, draws, rows):
        yield np.where(rng.random((min(rows, draws - first), k)) < 0.5, -1.0, 1.0)


def _vectors(a: ArrayLike, b: ArrayLike) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise ConfigError(
            f"values of shapes {x.shape} and {y.shape} cannot be compared row by row; accepted: one length, not empty"
        )
    return x, y


def _pairs(a: ArrayLike, b: ArrayLike) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return two maps of one shape as flat vectors, without the cells where either is NaN."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if x.shape != y.shape or not x.size:
        raise ConfigError(
            f"maps of shapes {x.shape} and {y.shape} cannot be compared cell by cell; accepted: one shape, not empty"
        )
    known: Bool[np.ndarray, "*cell"] = ~(np.isnan(x) | np.isnan(y))
    return x[known], y[known]


def _unit_ranks(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return ranks, centred and of length 1, so that a dot product is Spearman's correlation; NaN
    for a constant x.
    """
    from scipy.stats import rankdata

    ranks = rankdata(x)
    ranks -= ranks.mean()
    length = np.sqrt(ranks @ ranks)
    return ranks / length if length else np.full_like(ranks, np.nan)


def _top_share(x: Float[np.ndarray, " n"], k: int) -> Float[np.ndarray, " n"]:
    """Return the chance of each cell to be among the k largest when ties are broken at random."""
    last = np.sort(x)[-k]
    above, tied = x > last, x == last
    weight: np.ndarray = above + tied * ((k - above.sum()) / tied.sum())
    return weight
