"""The comparison with random places, worked by hand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr, t

from mech_absa.errors import ConfigError, DataError
from mech_absa.examples import Example, Polarity
from mech_absa.select.compared import (
    Landscape,
    agreement_pairs,
    agreement_table,
    compare_selectors,
    cost_table,
    mean_over_samples,
    place_table,
    rank_relation,
)
from mech_absa.select.ranking import SiteRanking, layer_site
from mech_absa.select.trainings import Budget, Settings, all_places, draw, random_places

PLACES = list(combinations(range(4), 2))


def ranking(name: str, scores) -> SiteRanking:
    return SiteRanking.of(name, {layer_site(i): float(s) for i, s in enumerate(scores)}, 4)


def trainings(accuracy: dict) -> pd.DataFrame:
    rows = []
    for place, values in accuracy.items():
        name = " ".join(map(str, place))
        rows += [(name, "scored", s, v) for s, v in enumerate(values)]
        rows.append((name, "tuning", -1, 0.0))
    return pd.DataFrame(rows, columns=["layers", "stage", "sample", "accuracy"])


def landscape(accuracy=None, random=PLACES) -> Landscape:
    """Accuracy 0.5 + 0.1 * (sum of layers) + 0.01 * sample, unless given."""
    usual = {p: [0.5 + 0.1 * sum(p) + 0.01 * s for s in range(3)] for p in PLACES}
    return Landscape.of(trainings(accuracy or usual), random)


def test_the_difference_by_hand():
    table = compare_selectors(
        [ranking("last", range(4)), ranking("first", [3, 2, 1, 0])], 2, landscape()
    )
    last, first = table.iloc[0], table.iloc[1]
    # Sums of layers over the six places have mean 3; the last two layers have 5, the first two 1.
    assert last["layers"] == "2 3" and first["layers"] == "0 1"
    assert last["difference"] == pytest.approx(0.2) and first["difference"] == pytest.approx(-0.2)
    assert last["accuracy"] == pytest.approx(0.5 + 0.5 + 0.01)
    assert last["share"] == 1 and first["share"] == pytest.approx(1 / 6)
    assert last["regret"] == pytest.approx(0) and first["regret"] == pytest.approx(0.4)
    assert last["rho"] == pytest.approx(1) and first["rho"] == pytest.approx(-1)


def test_the_interval_is_students():
    x = np.array([0.1, 0.3, 0.2, 0.6])
    mean = mean_over_samples(x)
    low, high = t.interval(0.95, 3, loc=x.mean(), scale=x.std(ddof=1) / 2)
    assert (mean.low, mean.high) == (pytest.approx(low), pytest.approx(high))
    assert mean.p == pytest.approx(t.sf(x.mean() / (x.std(ddof=1) / 2), 3))


def test_samples_that_are_all_equal():
    assert mean_over_samples(np.full(3, 0.1)).p == 0
    assert mean_over_samples(np.zeros(3)).p == 1
    assert math.isnan(mean_over_samples(np.array([0.1, math.nan])).p)
    with pytest.raises(DataError, match="over 1 samples"):
        mean_over_samples(np.array([0.1]))


def test_p_values_are_corrected_over_selectors():
    noisy = {p: [0.5 + 0.1 * sum(p) + e for e in (0.0, 0.05, -0.04)] for p in PLACES}
    noisy[2, 3] = [1.0, 0.9, 1.2]
    several = [ranking("a", range(4)), ranking("b", range(4)), ranking("c", [3, 2, 1, 0])]
    table = compare_selectors(several, 2, landscape(noisy))
    smallest = table["p"].min()
    assert 0 < smallest < 0.3
    assert table["p_adjusted"][0] == pytest.approx(3 * smallest)


def test_random_places_alone_make_the_mean():
    some = landscape(random=[(0, 1), (0, 2)])
    assert some.by_chance.tolist() == pytest.approx([0.65, 0.66, 0.67])
    table = compare_selectors([ranking("last", range(4))], 2, some)
    assert table["difference"][0] == pytest.approx(0.35)


def test_a_lost_place_has_no_part():
    known = {p: [0.5 + 0.1 * sum(p)] * 3 for p in PLACES}
    known[2, 3] = [0.9, math.nan, 0.9]
    lost = landscape(known)
    assert lost.lost == ((2, 3),) and len(lost.places) == 5
    table = compare_selectors([ranking("last", range(4)), ranking("a", [3, 2, 1, 0])], 2, lost)
    assert math.isnan(table["difference"][0]) and math.isnan(table["share"][0])
    assert not math.isnan(table["difference"][1])


def test_no_random_place_is_left():
    with pytest.raises(DataError, match="no random place"):
        landscape(random=[(7, 8)])


def test_rho_is_spearmans_and_its_p_knows_that_places_overlap():
    scores, land = np.array([0.3, 0.1, 0.9, 0.4]), landscape()
    rho, p = rank_relation(scores, land)
    sums = [scores[list(place)].sum() for place in PLACES]
    assert rho == pytest.approx(spearmanr(sums, [sum(place) for place in PLACES]).statistic)
    _, best = rank_relation(np.arange(4.0), land)
    # Of the 24 orders of four layers, the true one and its reverse are as extreme.
    assert best == pytest.approx(2 / 24, abs=0.03) and p > best


def test_rho_of_a_ranking_that_ranks_nothing():
    assert all(math.isnan(x) for x in rank_relation(np.ones(4), landscape()))


def test_layers_without_a_score_take_the_lowest():
    with_nan = rank_relation(np.array([np.nan, 1.0, 2.0, 3.0]), landscape())
    assert with_nan == rank_relation(np.array([1.0, 1.0, 2.0, 3.0]), landscape())


def test_agreement_is_a_symmetric_matrix():
    table = agreement_table(
        [ranking("a", range(4)), ranking("b", [3, 2, 1, 0]), ranking("c", [1] * 4)]
    )
    assert table.loc["a", "b"] == table.loc["b", "a"] == pytest.approx(-1)
    assert table.loc["a", "a"] == 1 and math.isnan(table.loc["a", "c"])


def test_places_are_listed_best_first():
    table = place_table(landscape())
    assert table["layers"].tolist()[0] == "2 3" and table["accuracy"].is_monotonic_decreasing


# ---- places, samples, budgets


def test_every_place_once():
    assert len(all_places(2, 8)) == 28 and len(random_places(2, 8, 100)) == 28
    some = random_places(3, 12, 20, seed=1)
    assert len(set(some)) == 20 and all(len(set(p)) == 3 and p == tuple(sorted(p)) for p in some)
    assert some == random_places(3, 12, 20, seed=1) != random_places(3, 12, 20, seed=2)


def test_random_places_are_uniform():
    drawn = [random_places(1, 4, 1, seed=s)[0][0] for s in range(400)]
    assert np.bincount(drawn, minlength=4).min() > 60


def test_places_of_a_large_model_are_drawn_one_by_one():
    some = random_places(6, 80, 5)
    assert len(some) == 5 and all(len(set(p)) == 6 and max(p) < 80 for p in some)


@pytest.mark.parametrize("width", [0, 4, 5])
def test_impossible_places(width):
    with pytest.raises(ConfigError, match=f"places of {width} layers .* accepted are 1 to 3"):
        all_places(width, 4)


def rows(n: int) -> list[Example]:
    return [
        Example(f"food {i // 2}", "food", Polarity.POSITIVE, (0, 4), id=str(i)) for i in range(n)
    ]


def test_samples_are_drawn_without_replacement():
    chosen = draw(rows(20), 8, seed=3)
    assert len({e.id for e in chosen}) == 8
    assert [int(e.id) for e in chosen] == sorted(int(e.id) for e in chosen)
    assert chosen == draw(rows(20), 8, seed=3) != draw(rows(20), 8, seed=4)


def test_a_sample_of_all_rows_is_a_bootstrap_of_sentences():
    chosen = draw(rows(20), 0, seed=3)
    assert len(chosen) == 20 and len({e.id for e in chosen}) < 20
    counts = pd.Series([e.id for e in chosen]).value_counts()
    assert all(counts[str(i)] == counts[str(i + 1)] for i in range(0, 20, 2) if str(i) in counts)


@pytest.mark.parametrize("word", ["64", "x", "64x", "ax2", "64x2x3", "-1x2", "64x0"])
def test_budgets_that_are_none(word):
    with pytest.raises(ConfigError, match="budget"):
        Budget.parse(word)


def test_settings_are_checked():
    for wrong, sentence in (
        (Settings(samples=1), "at least 2"),
        (Settings(rates=()), "no rates"),
        (Settings(rates=(0.0,)), "a rate of 0.0"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            wrong.check()


def test_rows_of_other_domains_by_hand():
    """In the domain all places are alike; elsewhere the last two layers are 0.2 above the mean of all."""
    table = trainings({p: [0.7, 0.8] for p in PLACES})
    table["accuracy_out"] = [
        0.3 + 0.1 * sum(map(int, name.split())) + 0.05 * s
        for name, s in zip(table["layers"], table["sample"], strict=True)
    ]
    out = Landscape.of(table, PLACES, "accuracy_out")
    row = compare_selectors(
        [ranking("last", range(4))], 2, Landscape.of(table, PLACES), out=out
    ).iloc[0]
    assert row["difference"] == pytest.approx(0)
    assert row["accuracy_out"] == pytest.approx(0.3 + 0.5 + 0.025)
    assert row["difference_out"] == pytest.approx(0.2)
    assert row["low_out"] == pytest.approx(0.2) and row["high_out"] == pytest.approx(0.2)


def test_agreement_of_two_selectors_has_the_interval_of_a_rank_correlation():
    def wide(name, scores):
        return SiteRanking.of(name, {layer_site(i): float(v) for i, v in enumerate(scores)}, 9)

    rng = np.random.default_rng(1)
    up, noise = np.arange(9.0), rng.normal(size=9)
    rankings = [wide("up", up), wide("down", -up), wide("noise", noise), wide("flat", np.ones(9))]
    table = agreement_pairs(rankings).set_index(["selector", "other"])
    assert len(table) == 6
    assert table.loc[("down", "up"), ["rho", "low", "high"]].tolist() == pytest.approx([-1] * 3)
    row = table.loc["noise", "up"]
    assert row["rho"] == pytest.approx(spearmanr(noise, up).statistic)
    assert row["low"] < row["rho"] < row["high"] and row["p"] > 0.05
    assert table.loc["flat"].isna().all(axis=None)
    matrix = agreement_table(rankings)
    for (a, b), rho in table["rho"].items():
        assert matrix.loc[a, b] == pytest.approx(rho, nan_ok=True)


def test_costs_are_means_over_random_places_alone():
    accuracy = {(0, 1): [0.5, 0.7], (0, 2): [0.7, 0.7], (2, 3): [0.0, 0.1]}
    rows = trainings(accuracy).assign(edit="both", budget="64x2", examples=64, parameters=10)
    rows["cpu_seconds"] = np.where(
        rows["stage"] == "tuning", 99.0, np.arange(len(rows), dtype=float)
    )
    row = cost_table(rows, [(0, 1), (0, 2)]).iloc[0]
    # Rows 0, 1 (place 0 1) and 3, 4 (place 0 2); row 2 and 5 tune, the third place is a selector's.
    assert row["cpu_seconds"] == pytest.approx((0 + 1 + 3 + 4) / 4)
    assert row["accuracy"] == pytest.approx(0.65)
    assert (row["worst"], row["best"]) == (pytest.approx(0.6), pytest.approx(0.7))
    low, high = t.interval(0.95, 1, loc=0.65, scale=np.std([0.6, 0.7], ddof=1) / math.sqrt(2))
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))
