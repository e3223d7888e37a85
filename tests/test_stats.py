"""The statistics against hand-worked cases, enumeration, simulation where the truth is known, and scipy where it can do the same."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from mech_absa import stats
from mech_absa.errors import ConfigError

N_STUDIES = 1500  # simulated studies, side by side as cells: the binomial error of a coverage near 0.94 is 0.006


def reviews(rng, n_sentences=120, share=1.0, draw=None):
    """Effects of N_STUDIES independent studies on sentences of 1 to 4 aspects: `[n study]`, and the sentence of each row.

    Rows of a sentence share an effect with weight `share`; true mean 0.
    """
    draw = draw or rng.standard_normal
    sentence = np.repeat(np.arange(n_sentences), rng.integers(1, 5, size=n_sentences))
    shared = draw((n_sentences, N_STUDIES))[sentence]
    return share * shared + 0.5 * rng.standard_normal((len(sentence), N_STUDIES)), sentence


def covered(interval, truth=0.0):
    return float(((interval.low <= truth) & (truth <= interval.high)).mean())


# ---- cluster_bootstrap


@pytest.mark.parametrize("kind", ["normal", "skewed", "bounded"])
def test_a_95_percent_interval_covers_the_truth_at_least_93_times_in_100(kind):
    rng = np.random.default_rng(1)
    draw = {
        "normal": rng.standard_normal,
        "skewed": lambda size: rng.gamma(4.0, 0.5, size) - 2.0,  # skewness 1
        "bounded": lambda size: rng.beta(2.0, 2.0, size) - 0.5,  # a difference of two probabilities
    }[kind]
    values, sentence = reviews(rng, draw=draw)
    assert 0.93 <= covered(stats.cluster_bootstrap(values, sentence)) <= 0.965


def test_rows_of_one_sentence_taken_for_independent_cover_too_rarely_and_too_narrowly():
    values, sentence = reviews(np.random.default_rng(2))
    naive, clustered = stats.cluster_bootstrap(values), stats.cluster_bootstrap(values, sentence)
    assert covered(naive) < 0.85 < 0.93 <= covered(clustered)
    assert ((clustered.high - clustered.low) > (naive.high - naive.low)).mean() > 0.99
    np.testing.assert_allclose(naive.mean, clustered.mean, rtol=0, atol=1e-12)


def test_copies_of_a_row_add_no_knowledge():
    values = np.random.default_rng(3).normal(size=(30, 4))
    once = stats.cluster_bootstrap(values, seed=7)
    thrice = stats.cluster_bootstrap(
        np.repeat(values, 3, axis=0), np.repeat(np.arange(30), 3), seed=7
    )
    for end in ("mean", "low", "high"):
        np.testing.assert_allclose(getattr(thrice, end), getattr(once, end), rtol=0, atol=1e-12)


def test_three_clusters_by_hand():
    # 27 equally likely draws; AAA and CCC have chance 1/27 > 2.5 %, so the ends are the means of the outer clusters.
    interval = stats.cluster_bootstrap([0.0, 3.0, 2.0, 10.0], ["a", "b", "a", "c"])
    assert (float(interval.mean), float(interval.low), float(interval.high)) == (15 / 4, 1.0, 10.0)
    # All 27, weighted by hand as a ratio of sums, at a level whose ends lie inside.
    sums, sizes = np.array([2.0, 3.0, 10.0]), np.array([2, 1, 1])
    every = [sums[list(d)].sum() / sizes[list(d)].sum() for d in product(range(3), repeat=3)]
    interval = stats.cluster_bootstrap(
        [0.0, 3.0, 2.0, 10.0], ["a", "b", "a", "c"], level=0.5, draws=50_000
    )
    assert (float(interval.low), float(interval.high)) == pytest.approx(
        np.quantile(every, [0.25, 0.75], method="inverted_cdf"), abs=1e-9
    )


def test_single_rows_agree_with_scipy_bootstrap():
    x = np.random.default_rng(4).gamma(2.0, size=80)
    ours = stats.cluster_bootstrap(x, draws=20_000, method="percentile")
    theirs = scipy.stats.bootstrap(
        (x,), np.mean, n_resamples=20_000, method="percentile", random_state=0
    ).confidence_interval
    assert [float(ours.low), float(ours.high)] == pytest.approx(
        [theirs.low, theirs.high], abs=0.1 * scipy.stats.sem(x)
    )


def with_holes():
    rng = np.random.default_rng(5)
    sentence = np.repeat(np.arange(25), 3)
    values = rng.normal(0.2, 1.0, size=(75, 6))
    holes = rng.random(values.shape) < 0.3
    holes[::3] = (
        False  # each sentence keeps a value, so that dropping rows leaves the same 25 clusters
    )
    return np.where(holes, np.nan, values), sentence


def test_missing_values_are_as_if_their_rows_were_dropped():
    values, sentence = with_holes()
    interval, p = (
        stats.cluster_bootstrap(values, sentence),
        stats.sign_flip(values, sentence, draws=999),
    )
    assert np.isnan(values).any(axis=0).all()
    for cell in range(values.shape[1]):
        kept = ~np.isnan(values[:, cell])
        dropped = stats.cluster_bootstrap(values[kept, cell], sentence[kept])
        here = [interval.mean[cell], interval.low[cell], interval.high[cell]]
        np.testing.assert_allclose(
            here, [dropped.mean, dropped.low, dropped.high], rtol=0, atol=1e-12
        )
        assert p[cell] == stats.sign_flip(values[kept, cell], sentence[kept], draws=999)


def test_clusters_without_a_value_change_nothing_exact_and_little_else():
    rng = np.random.default_rng(6)
    short = rng.normal(0.5, 1.0, size=8)
    long = np.concatenate([short, np.full(3, np.nan)])
    assert stats.sign_flip(long) == stats.sign_flip(short)  # 2^11 patterns and 2^8: both enumerated
    many = rng.normal(0.5, 1.0, size=60)
    full, holed = (
        stats.cluster_bootstrap(many),
        stats.cluster_bootstrap(np.concatenate([many, np.full(60, np.nan)])),
    )
    assert float(full.mean) == pytest.approx(float(holed.mean), abs=1e-12)
    assert holed.high - holed.low == pytest.approx(full.high - full.low, rel=0.1)


def test_cells_that_say_nothing_are_nan_without_warnings(recwarn):
    values = np.array([[np.nan, 1.0, 1.0], [np.nan, np.nan, 2.0], [np.nan, 3.0, 6.0]])
    interval = stats.cluster_bootstrap(values, ["s", "t", "s"])
    np.testing.assert_array_equal(interval.mean, [np.nan, 2.0, 3.0])
    np.testing.assert_array_equal(
        np.isnan(interval.low), [True, True, False]
    )  # no value, one sentence, two sentences
    np.testing.assert_array_equal(np.isnan(interval.high), [True, True, False])
    np.testing.assert_array_equal(np.isnan(stats.sign_flip(values)), [True, False, False])
    assert not recwarn.list


def test_cells_keep_their_shape_and_their_place():
    values = np.random.default_rng(7).normal(size=(20, 2, 3))
    cube, flat = stats.cluster_bootstrap(values), stats.cluster_bootstrap(values.reshape(20, 6))
    np.testing.assert_array_equal(cube.low, flat.low.reshape(2, 3))
    np.testing.assert_array_equal(
        stats.sign_flip(values), stats.sign_flip(values.reshape(20, 6)).reshape(2, 3)
    )
    alone = stats.cluster_bootstrap(values[:, 1, 2])
    assert alone.high == pytest.approx(cube.high[1, 2], abs=1e-12)  # every cell sees the same draws


@pytest.mark.parametrize("budget", [1, 700, 5001])
def test_working_in_chunks_changes_nothing(monkeypatch, budget):
    values, sentence = with_holes()
    for table in (values, np.nan_to_num(values)):
        whole = (
            stats.cluster_bootstrap(table, sentence),
            stats.sign_flip(table, sentence, draws=999),
            stats.sign_flip(table[:9], draws=999),
        )
        with monkeypatch.context() as patch:
            patch.setattr(stats, "_BUDGET", budget)
            parts = (
                stats.cluster_bootstrap(table, sentence),
                stats.sign_flip(table, sentence, draws=999),
                stats.sign_flip(table[:9], draws=999),
            )
        np.testing.assert_allclose(parts[0].low, whole[0].low, rtol=0, atol=1e-12)
        np.testing.assert_allclose(parts[0].high, whole[0].high, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(parts[1], whole[1])
        np.testing.assert_array_equal(parts[2], whole[2])


def test_the_seed_decides():
    values, sentence = with_holes()
    again = [stats.cluster_bootstrap(values, sentence, seed=s).low for s in (0, 0, 1)]
    np.testing.assert_array_equal(again[0], again[1])
    assert (again[0] != again[2]).all()
    flips = [stats.sign_flip(values, sentence, seed=s, draws=999) for s in (0, 0, 1)]
    np.testing.assert_array_equal(flips[0], flips[1])
    assert (flips[0] != flips[2]).any()


# ---- sign_flip


def test_sign_flip_of_four_values_by_hand():
    # |sum| of the 16 patterns of 1, 2, 3, 4 is 10 twice, 8 twice, 6 twice, 4 four times, ...
    assert stats.sign_flip([1.0, 2.0, 3.0, 4.0]) == 2 / 16
    assert stats.sign_flip([-1.0, 2.0, 3.0, 4.0]) == 4 / 16
    assert stats.sign_flip([1.0, 2.0, 3.0, -4.0]) == 14 / 16
    # The first two rows are one sentence: three clusters 3, 3, 4, so 2 of 8 patterns.
    assert stats.sign_flip([1.0, 2.0, 3.0, 4.0], ["s", "s", "t", "u"]) == 2 / 8
    assert stats.sign_flip([5.0]) == 1.0
    assert stats.sign_flip([0.0, 0.0, 0.0]) == 1.0


def test_sums_that_tie_but_for_rounding_count_as_ties():
    # 0.1 + 0.2 + 0.3 rounds differently by order; whichever signs come first, |sum| = 0.6 belongs to two patterns and |sum| = 0 to two.
    for order in permutations([0.1, 0.2, -0.3]):
        assert stats.sign_flip(np.array(order)) == 1.0
    assert stats.sign_flip(np.full(40, 0.1) * np.where(np.arange(40) < 20, 1, -1), draws=500) == 1.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 3)), min_size=1, max_size=9))
def test_sign_flip_equals_enumeration(rows):
    values, clusters = np.array([v for v, _ in rows], dtype=float), np.array([c for _, c in rows])
    sums = [sum(v for v, c in rows if c == cluster) for cluster in sorted(set(clusters.tolist()))]
    patterns = list(product([-1, 1], repeat=len(sums)))
    hits = sum(
        abs(sum(s * x for s, x in zip(signs, sums, strict=True))) >= abs(sum(sums))
        for signs in patterns
    )
    assert stats.sign_flip(values, clusters) == hits / len(patterns)


def test_sign_flip_agrees_with_scipy_permutation_test():
    rng = np.random.default_rng(8)
    for n, tolerance in ((9, 1e-12), (40, 0.02)):  # enumerated by both; drawn by both
        x = rng.normal(0.25, 1.0, size=n)
        theirs = scipy.stats.permutation_test(
            (x,), np.mean, permutation_type="samples", n_resamples=9999, random_state=0
        ).pvalue
        assert float(stats.sign_flip(x)) == pytest.approx(theirs, abs=tolerance)


def test_random_patterns_estimate_the_enumerated_p():
    values = np.random.default_rng(9).normal(0.3, 1.0, size=(12, 20))
    exact, drawn = stats.sign_flip(values, draws=2**12), stats.sign_flip(values, draws=2**12 - 1)
    assert (exact * 2**12 == np.round(exact * 2**12)).all() and (exact != drawn).any()
    np.testing.assert_allclose(drawn, exact, atol=4 * 0.5 / np.sqrt(2**12))
    assert stats.sign_flip(np.ones(100), draws=99) == 1 / 100  # never 0


def test_sign_flip_p_is_uniform_when_nothing_is_there():
    values, sentence = reviews(np.random.default_rng(10), n_sentences=60)
    p = stats.sign_flip(values, sentence, draws=3999)
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.05
    assert (
        scipy.stats.kstest(stats.sign_flip(values, draws=3999), "uniform").pvalue < 1e-6
    )  # flipping rows for sentences
    assert (
        stats.sign_flip(values + 1.0, sentence, draws=3999) < 0.001
    ).mean() > 0.99  # and it does see an effect


# ---- adjust


def test_holm_and_bh_by_hand():
    p = [0.01, 0.04, 0.03, 0.005]
    np.testing.assert_allclose(stats.adjust(p, "holm"), [0.03, 0.06, 0.06, 0.02], atol=1e-12)
    np.testing.assert_allclose(stats.adjust(p, "bh"), [0.02, 0.04, 0.04, 0.02], atol=1e-12)
    np.testing.assert_array_equal(stats.adjust(p, "none"), p)


def test_adjusting_leaves_out_nan_and_keeps_the_shape_and_the_input():
    p = np.array([[0.01, np.nan, 0.04], [0.03, 0.005, np.nan]])
    before = p.copy()
    np.testing.assert_allclose(
        stats.adjust(p), [[0.03, np.nan, 0.06], [0.06, 0.02, np.nan]], atol=1e-12
    )
    np.testing.assert_array_equal(p, before)
    assert np.isnan(stats.adjust([np.nan, np.nan], "bh")).all()


# ---- two systems on the same rows


def test_paired_difference_of_two_accuracies():
    rng = np.random.default_rng(11)
    sentence = np.repeat(np.arange(100), 2)
    a, b = (rng.random(200) < 0.8).astype(float), (rng.random(200) < 0.6).astype(float)
    d = stats.paired_bootstrap_difference(a, b, sentence)
    assert d.value == pytest.approx(a.mean() - b.mean())
    per_sentence = (
        (a - b).reshape(100, 2).mean(axis=1)
    )  # equal sizes: the mean of means is the mean
    theirs = scipy.stats.bootstrap(
        (per_sentence,), np.mean, n_resamples=9999, method="percentile", random_state=0
    ).confidence_interval
    assert [d.low, d.high] == pytest.approx([theirs.low, theirs.high], abs=0.01)
    assert d.p == float(stats.sign_flip(a - b, sentence)) < 0.01
    back = stats.paired_bootstrap_difference(b, a, sentence)
    assert (back.value, back.low, back.high, back.p) == pytest.approx(
        (-d.value, -d.high, -d.low, d.p)
    )
    same = stats.paired_bootstrap_difference(a, a, sentence)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def answers(both, only_a, only_b, neither):
    counts = [both, only_a, only_b, neither]
    return np.repeat([True, True, False, False], counts), np.repeat(
        [True, False, True, False], counts
    )


def test_mcnemar_by_hand():
    few = stats.mcnemar(*answers(50, 1, 8, 10))
    assert (few.b, few.c, few.exact) == (1, 8, True)
    assert few.p == pytest.approx(2 * (1 + 9) / 2**9)
    many = stats.mcnemar(*answers(50, 20, 10, 5))
    assert (many.b, many.c, many.exact) == (20, 10, False)
    assert many.statistic == pytest.approx((20 - 10 - 1) ** 2 / 30)
    assert many.p == pytest.approx(scipy.stats.chi2.sf(2.7, df=1))
    assert (
        stats.mcnemar(*answers(0, 12, 12, 0)).exact
        and not stats.mcnemar(*answers(0, 12, 13, 0)).exact
    )
    assert stats.mcnemar(*answers(9, 0, 0, 3)).p == 1.0  # nowhere different


def test_the_exact_mcnemar_is_the_exact_sign_flip():
    a, b = answers(6, 2, 7, 3)
    assert stats.mcnemar(a, b).p == pytest.approx(
        float(stats.sign_flip(a.astype(float) - b, draws=2**18))
    )


def test_wilson_by_hand_and_by_scipy():
    z2 = scipy.stats.norm.ppf(0.975) ** 2
    none = stats.wilson(0, 10)  # the score equation at k = 0 has the roots 0 and z2 / (n + z2)
    assert (float(none.mean), float(none.low), float(none.high)) == pytest.approx(
        (0.0, 0.0, z2 / (10 + z2)), abs=1e-12
    )
    theirs = scipy.stats.binomtest(37, 50).proportion_ci(0.9, method="wilson")
    ours = stats.wilson([37, 0], [50, 0], level=0.9)
    assert [ours.low[0], ours.high[0]] == pytest.approx([theirs.low, theirs.high])
    assert np.isnan([ours.mean[1], ours.low[1], ours.high[1]]).all()  # an empty class


# ---- bootstrap_statistic


def test_every_draw_takes_whole_clusters():
    clusters = np.array(["b", "a", "b", "c", "c", "c", "d", "a"])
    seen = []

    def statistic(rows):
        seen.append(np.bincount(rows, minlength=len(clusters)))
        return 0.0

    stats.bootstrap_statistic(statistic, clusters, len(clusters), draws=200)
    assert (seen[0] == 1).all()  # the value itself, on all rows
    for times in seen[1:]:
        per_cluster = {label: set(times[clusters == label].tolist()) for label in "abcd"}
        assert all(len(t) == 1 for t in per_cluster.values())
        assert sum(next(iter(t)) for t in per_cluster.values()) == 4
    assert len({tuple(times) for times in seen[1:]}) > 20  # of the 35 multisets of four


def test_a_mean_as_any_statistic_agrees_with_cluster_bootstrap():
    values, sentence = with_holes()
    x = np.nan_to_num(values[:, 0])
    ours = stats.bootstrap_statistic(lambda rows: x[rows].mean(), sentence, len(x), draws=4000)
    known = stats.cluster_bootstrap(x, sentence, draws=4000)
    width = float(known.high - known.low)
    assert ours.value == pytest.approx(float(known.mean))
    assert [ours.low, ours.high] == pytest.approx(
        [float(known.low), float(known.high)], abs=0.05 * width
    )


@pytest.mark.slow
def test_macro_f1_agrees_with_scipy_bootstrap():
    rng = np.random.default_rng(12)
    gold = rng.integers(3, size=150)
    said = np.where(rng.random(150) < 0.7, gold, rng.integers(3, size=150))
    ours = stats.bootstrap_statistic(
        lambda rows: f1_score(gold[rows], said[rows], average="macro"), None, 150, draws=400
    )

    def macro_f1(g, s):
        return f1_score(g, s, average="macro")

    theirs = scipy.stats.bootstrap(
        (gold, said),
        macro_f1,
        paired=True,
        vectorized=False,
        n_resamples=400,
        method="percentile",
        random_state=0,
    ).confidence_interval
    assert ours.value == macro_f1(gold, said)
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=0.02)
    assert ours.high - ours.low > 0.1


def test_draws_without_a_statistic_are_left_out():
    x = np.arange(6.0)
    some = stats.bootstrap_statistic(
        lambda rows: np.nan if 0 in rows else x[rows].mean(), None, 6, draws=500
    )
    assert np.isnan(some.value) and 1.0 <= some.low < some.high <= 5.0
    never = stats.bootstrap_statistic(lambda rows: np.nan, None, 6, draws=20)
    assert np.isnan([never.low, never.high]).all()
    one = stats.bootstrap_statistic(lambda rows: x[rows].mean(), ["s"] * 6, 6)
    assert one.value == 2.5 and np.isnan([one.low, one.high]).all()


# ---- maps against maps


def test_spearman_of_five_by_hand():
    r = stats.spearman_interval([1.0, 2.0, 3.0, 4.0, 5.0], [10.0, 20.0, 30.0, 50.0, 40.0])
    assert r.value == pytest.approx(1 - 6 * 2 / (5 * 24))
    # Of 120 orders, the identity and 4 swaps of neighbours reach 0.9; two-sided twice that.
    assert r.p == pytest.approx(10 / 120)


@pytest.mark.slow
def test_spearman_agrees_with_scipy():
    rng = np.random.default_rng(13)
    x = rng.normal(size=(10, 8)).round(1)  # a map, with ties
    y = x + rng.normal(size=(10, 8))
    ours = stats.spearman_interval(x, y)
    assert ours.value == pytest.approx(scipy.stats.spearmanr(x.ravel(), y.ravel()).statistic)
    theirs = scipy.stats.bootstrap(
        (x.ravel(), y.ravel()),
        lambda a, b: scipy.stats.spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        random_state=0,
    ).confidence_interval
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=0.03)
    assert ours.p == pytest.approx(
        1 / 1000, abs=1e-3
    )  # the smallest that 2000 permutations can say, two-sided
    holed = stats.spearman_interval(
        np.append(x.ravel(), [np.nan, 5.0]), np.append(y.ravel(), [1.0, np.nan])
    )
    assert holed == ours
    weak = stats.spearman_interval(x, rng.normal(size=(10, 8)))
    assert weak.low < 0 < weak.high and weak.p > 0.05


def test_a_constant_map_ranks_nothing():
    r = stats.spearman_interval([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0])
    assert np.isnan([r.value, r.low, r.high, r.p]).all()


def test_auroc_is_the_chance_that_a_true_cell_outscores_a_false_one():
    rng = np.random.default_rng(14)
    scores, truth = rng.integers(6, size=(5, 8)).astype(float), rng.random((5, 8)) < 0.4
    pairs = [(t > f) + 0.5 * (t == f) for t in scores[truth] for f in scores[~truth]]
    assert stats.auroc(scores, truth) == pytest.approx(np.mean(pairs))
    assert stats.auroc([0.1, 0.4, 0.35, 0.8, np.nan], [0, 0, 1, 1, 1]) == 0.75


def test_top_k_overlap_by_hand():
    a, b = np.array([9.0, 8.0, 7.0, 1.0, 0.0, np.nan]), np.array([5.0, 0.0, 4.0, 6.0, 1.0, 9.0])
    assert stats.top_k_overlap(a, b, 3) == pytest.approx(2 / 3)  # {0, 1, 2} and {3, 0, 2}
    assert stats.top_k_overlap(a, b, 1) == 0.0
    assert stats.top_k_overlap(a, b, 5) == 1.0
    assert stats.top_k_overlap(a, -a, 2) == 0.0


def test_ties_in_the_top_k_give_the_expected_overlap():
    assert stats.top_k_overlap(np.zeros(20), np.zeros(20), 5) == pytest.approx(5 / 20)
    a, b = np.array([3.0, 1.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0])

    def tops(x):
        orders = [
            sorted(range(4), key=lambda i, o=order: (-x[i], o[i]))
            for order in permutations(range(4))
        ]
        return [set(o[:2]) for o in orders]

    assert stats.top_k_overlap(a, b, 2) == pytest.approx(
        np.mean([len(s & t) / 2 for s in tops(a) for t in tops(b)])
    )


# ---- bad input


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: stats.cluster_bootstrap([1.0, 2.0], ["s"]),
            "cluster labels of shape (1,) came with 2 rows",
        ),
        (lambda: stats.cluster_bootstrap(np.zeros((0, 3))), "no rows"),
        (lambda: stats.cluster_bootstrap(np.array(3.0)), "a single number"),
        (lambda: stats.cluster_bootstrap([1.0, np.inf]), "1 infinite values"),
        (lambda: stats.cluster_bootstrap([1.0, 2.0], level=95.0), "level 95.0"),
        (lambda: stats.cluster_bootstrap([1.0, 2.0], draws=0), "0 random draws"),
        (
            lambda: stats.sign_flip([1.0, 2.0], [["s", "t"]]),
            "cluster labels of shape (1, 2) came with 2 rows",
        ),
        (lambda: stats.sign_flip([]), "no rows"),
        (lambda: stats.sign_flip([1.0], draws=0), "0 random draws"),
        (lambda: stats.adjust([0.1], "bonferoni"), "accepted: holm, bh, by or none"),
        (lambda: stats.adjust([0.1, 1.5]), "outside [0, 1]"),
        (lambda: stats.paired_bootstrap_difference([1.0], [1.0, 0.0]), "shapes (1,) and (2,)"),
        (lambda: stats.paired_bootstrap_difference([], []), "not empty"),
        (lambda: stats.mcnemar([True], [True, False]), "shapes (1,) and (2,)"),
        (lambda: stats.mcnemar([0.5], [1.0]), "neither right nor wrong"),
        (lambda: stats.wilson(11, 10), "above the number of trials"),
        (lambda: stats.wilson([1, 2], [3, 4, 5]), "shape (2,) and trials of shape (3,)"),
        (lambda: stats.bootstrap_statistic(len, None, 0), "no rows"),
        (lambda: stats.bootstrap_statistic(len, ["s"], 2), "came with 2 rows"),
        (lambda: stats.spearman_interval([1.0, 2.0], [1.0, 2.0]), "2 pairs"),
        (lambda: stats.spearman_interval([1.0, 2.0, 3.0], [1.0, 2.0]), "shapes (3,) and (2,)"),
        (lambda: stats.auroc([0.1, 0.2], [True, True]), "both true and false"),
        (lambda: stats.auroc([], []), "not empty"),
        (
            lambda: stats.top_k_overlap([1.0, 2.0], [1.0, np.nan], 2),
            "maps with 1 cells without NaN",
        ),
        (lambda: stats.top_k_overlap([1.0], [1.0], 0), "top 0 cells"),
    ],
)
def test_bad_input_gives_one_sentence(call, says):
    with pytest.raises(ConfigError) as error:
        call()
    assert says in str(error.value) and "\n" not in str(error.value)


# ---- many cells: shared signs, step-down max-T, tails, what can be shown --------------------------------------------------------


def test_max_t_is_the_step_down_of_westfall_and_young_by_enumeration():
    """All 2^7 patterns, and for every rank the largest statistic over the cells not yet rejected."""
    values = np.random.default_rng(3).normal(0.6, 1, (7, 5))
    t = values / np.sqrt((values**2).sum(0))
    patterns = np.array(list(product([1, -1], repeat=7)))
    for one_sided in (False, True):
        side = (lambda x: x) if one_sided else np.abs
        observed, drawn = side(t.sum(0)), side(patterns @ t)
        expected, worst = np.zeros(5), 0.0
        order = np.argsort(-observed)
        for i, cell in enumerate(order):
            largest = drawn[:, order[i:]].max(1)
            worst = max(worst, (largest >= observed[cell] - 1e-12).mean())
            expected[cell] = worst
        got = stats.cell_tests(values, one_sided=one_sided)
        np.testing.assert_allclose(got.adjusted, expected, rtol=1e-12)
        alone = [(drawn[:, c] >= observed[c] - 1e-12).mean() for c in range(5)]
        np.testing.assert_allclose(got.p, alone, rtol=1e-12)


def test_the_p_of_a_cell_alone_is_that_of_sign_flip():
    values = np.random.default_rng(1).normal(0.3, 1, (40, 6))
    sentence = np.arange(40) // 3
    for draws in (99, 2**14):
        got = stats.cell_tests(values, sentence, draws=draws, adjustment="none").p
        np.testing.assert_allclose(got, stats.sign_flip(values, sentence, draws=draws), rtol=1e-12)


def test_max_t_is_never_below_p_nor_above_bonferroni_where_patterns_are_enumerated():
    values = np.random.default_rng(5).normal(0.4, 1, (9, 30))
    got = stats.cell_tests(values)
    assert (got.adjusted >= got.p).all()
    assert (got.adjusted <= np.minimum(1, 30 * got.p) + 1e-12).all()
    copies = stats.cell_tests(np.repeat(values[:, :1], 50, axis=1))
    np.testing.assert_allclose(copies.adjusted, copies.p)  # one hypothesis, fifty times


def test_max_t_rejects_a_true_null_in_five_percent_of_dependent_maps():
    rng = np.random.default_rng(7)
    rejected = 0
    for i in range(200):
        shared = rng.normal(size=(16, 1))
        values = shared + rng.normal(size=(16, 40))
        rejected += bool((stats.cell_tests(values, draws=499, seed=i).adjusted <= 0.05).any())
    assert rejected <= 19  # the 99.5 % point of a binomial with 200 trials at 0.05


@pytest.mark.slow
def test_rare_tails_are_those_of_all_patterns():
    """Saddlepoint against the enumeration of 2^16 patterns, for p down to 2 / 2^16."""
    values = np.random.default_rng(0).normal(0.9, 1, (16, 60))
    exact = stats.cell_tests(values, draws=2**17, adjustment="none").p
    tails = stats.cell_tests(values, draws=999, adjustment="holm").p
    rare = exact < 0.005
    assert rare.sum() > 20 and exact.min() < 2e-4
    ratio = tails[rare] / exact[rare]
    assert ratio.min() > 0.7 and ratio.max() < 1.5
    same = np.abs(values[:, :1])  # all signs alike: one pattern and its opposite reach the sum
    assert stats.cell_tests(np.repeat(same, 2, 1), draws=999, adjustment="holm").p == pytest.approx(
        [2 / 2**16] * 2
    )


def test_many_cells_can_reject_under_every_correction():
    """Random patterns alone would stop at 1 / (1 + draws), which Holm multiplies by the cells."""
    rng = np.random.default_rng(2)
    values = rng.normal(size=(40, 3000))
    values[:, 0] += 2.0
    for adjustment in ("maxt", "holm", "bh", "by"):
        got = stats.cell_tests(values, adjustment=adjustment, draws=999)
        assert got.adjusted[0] <= 0.01 and got.floor <= got.adjusted[0], adjustment
        assert (got.adjusted[1:] <= 0.05).mean() < 0.01


def test_resampled_p_values_against_all_draws():
    """Three clusters have 27 draws; the textbook's t of each, with no spread as infinitely far away."""
    values = np.array([[1.0, -2.0], [2.0, 0.5], [6.0, 1.0]])
    mean = values.mean(0)

    def t(rows, centre):
        spread = rows.std(0) / np.sqrt(3)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(np.abs(rows.mean(0) - centre) / spread, nan=0.0, posinf=np.inf)

    observed = t(values, 0.0)
    draws = np.array([t(values[list(i)], mean) for i in product(range(3), repeat=3)])
    draws[[0, 13, 26]] = np.inf  # one cluster three times: no spread, whatever the distance
    largest = (draws.max(1)[:, None] >= observed).mean(0)
    got = stats.cell_tests(values, adjustment="bootstrap", draws=40_000)
    assert got.p == pytest.approx((draws >= observed).mean(0), abs=0.01)
    first, second = np.argsort(-observed)
    assert got.adjusted[first] == pytest.approx(largest[first], abs=0.01)
    assert got.adjusted[second] == pytest.approx(max(got.p[second], got.adjusted[first]), abs=0.01)
    assert got.floor == pytest.approx(1 / 9)


def test_resampling_keeps_its_level_where_effects_are_skewed():
    """20 clusters, 30 cells without an effect, each 0 in most clusters and large in a few."""
    rng, found = np.random.default_rng(5), {"maxt": 0, "bootstrap": 0}
    for i in range(80):
        values = (rng.random((20, 30)) < 0.3) * rng.exponential(1, (20, 30)) - 0.3
        for name in found:
            tests = stats.cell_tests(values, adjustment=name, draws=499, seed=i)
            found[name] += bool((tests.adjusted <= 0.05).any())
    assert found["bootstrap"] <= 9 < found["maxt"]  # 9: the 99 % point of a binomial at 0.05


def test_resampling_finds_what_is_there():
    rng = np.random.default_rng(6)
    values = rng.normal(size=(40, 50))
    values[:, 7] += 1.5
    values[3, 9] = np.nan
    got = stats.cell_tests(values, np.arange(40) // 2 * 2, adjustment="bootstrap", draws=999)
    assert np.flatnonzero(got.adjusted <= 0.05).tolist() == [7] and got.floor == 1 / 1000
    same = stats.cell_tests(np.ones((6, 1)), adjustment="bootstrap", draws=99)
    assert same.adjusted == pytest.approx([0.01])
    with pytest.raises(ConfigError, match="unknown adjustment 'bootstrap'"):
        stats.adjust([0.1], "bootstrap")


def test_resolution_by_hand():
    """k sentences give 2 / 2^k; Holm multiplies by the cells, Benjamini-Yekutieli by their harmonic sum too."""
    assert stats.resolution(6, 10**6).possible and not stats.resolution(5, 1).possible
    assert stats.resolution(10, 100, "holm").smallest == pytest.approx(100 * 2 / 1024)
    assert stats.resolution(10, 100, "holm").needed == 12  # 100 * 2 / 2^12 = 0.0488
    assert stats.resolution(10, 2, "by").smallest == pytest.approx(2 / 1024 * 2 * 1.5)
    assert stats.resolution(30, 10).smallest == 1 / 10_000
    assert stats.resolution(3, 10, "bootstrap").smallest == pytest.approx(1 / 9)
    assert stats.resolution(3, 10, "bootstrap").needed == 4
    assert "no cell can reach 0.05" in str(stats.resolution(4, 9))
    with pytest.raises(ConfigError, match="0 clusters"):
        stats.resolution(0, 3)


def test_bca_agrees_with_scipy():
    """On single rows; scipy's own BCa of a skewed sample."""
    x = np.random.default_rng(4).exponential(1, 40)
    ours = stats.cluster_bootstrap(x, draws=20_000, method="bca")
    theirs = scipy.stats.bootstrap(
        (x,), np.mean, method="BCa", n_resamples=20_000, random_state=np.random.default_rng(1)
    ).confidence_interval
    assert (float(ours.low), float(ours.high)) == pytest.approx(tuple(theirs), abs=0.02)
    plain = stats.cluster_bootstrap(x, draws=20_000, method="percentile")
    assert float(ours.high) > float(plain.high) + 0.02  # the long tail is on the right


def test_only_skewed_cells_get_bca():
    rng = np.random.default_rng(6)
    values = np.stack([rng.normal(size=50), rng.exponential(size=50)], axis=1)
    auto, plain, bca = (
        stats.cluster_bootstrap(values, method=m) for m in ("auto", "percentile", "bca")
    )
    assert auto.low[0] == plain.low[0] != bca.low[0]
    assert auto.high[1] == bca.high[1] != plain.high[1]


def test_studentized_ends_by_a_loop_over_draws():
    """Bootstrap-t of single rows, spelled out; the draws are those of `cluster_bootstrap`."""
    x = np.random.default_rng(4).lognormal(size=12)
    got = stats.cluster_bootstrap(x, draws=400, seed=3, method="studentized")
    counts = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=400)
    t, tail = [], (1 - 0.95) / 2
    for n in counts:
        y = np.repeat(x, n)
        t.append((y.mean() - x.mean()) / (y.std() / np.sqrt(12)))
    low, high = np.quantile(t, [1 - tail, tail], method="inverted_cdf")
    error = x.std() / np.sqrt(12)
    assert float(got.low) == pytest.approx(x.mean() - low * error)
    assert float(got.high) == pytest.approx(x.mean() - high * error)


def test_studentized_ends_are_infinite_where_many_draws_show_no_spread():
    """One of ten rows differs from 0: 35 % of the draws miss it, and say nothing about how large it may be."""
    one = np.eye(10)[0]
    got = stats.cluster_bootstrap(np.stack([one, np.ones(10)], axis=1), method="studentized")
    assert np.isinf(got.high[0]) and (got.low[1], got.high[1]) == (1.0, 1.0)
    with pytest.raises(ConfigError, match="unknown interval 'student'; accepted: auto"):
        stats.cluster_bootstrap(one, method="student")


def test_support_counts_clusters_with_an_effect():
    values = [[0.0, 1.0], [0.0, -1.0], [2.0, np.nan], [1.0, 0.5]]
    assert stats.support(values, ["s", "s", "t", "u"]).tolist() == [2, 1]


def test_mcnemar_with_as_many_on_both_sides_is_certain():
    for n in (1, 5, 40):
        a = np.array([True, False] * n)
        result = stats.mcnemar(a, ~a)
        assert (result.b, result.c, result.p) == (n, n, 1.0)
