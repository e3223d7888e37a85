"""Rankings by hand, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mech_absa.errors import ConfigError
from mech_absa.select.ranking import SiteRanking, layer_site
from mech_absa.sites import Site

HEADS = {Site(0, "head", 0): 1.0, Site(0, "head", 1): 2.5, Site(2, "head", 0): 3.0}


def test_layers_take_the_largest_score_or_the_sum():
    most = SiteRanking.of("a", HEADS, 4)
    total = SiteRanking.of("a", HEADS, 4, pool="sum")
    np.testing.assert_array_equal(most.layer_scores, [2.5, np.nan, 3.0, np.nan])
    np.testing.assert_array_equal(total.layer_scores, [3.5, np.nan, 3.0, np.nan])
    assert most.top_layers(1) == (2,) and total.top_layers(1) == (0,)
    assert most.top_layers(2) == total.top_layers(2) == (0, 2)
    assert [str(s) for s in most.top(2)] == ["L2.head0", "L0.head1"]


def test_of_equal_layers_the_lower_one_is_taken():
    flat = SiteRanking.of("flat", {layer_site(layer): 1.0 for layer in (3, 1, 2, 0)}, 4)
    assert flat.top_layers(2) == (0, 1)
    assert flat.top(1) == [layer_site(3)]  # sites keep the order in which they were scored


def test_agreement_is_that_of_the_layers():
    up = SiteRanking.of("up", {layer_site(layer): float(layer) for layer in range(5)}, 5)
    down = SiteRanking.of("down", {layer_site(layer): -float(layer) for layer in range(5)}, 5)
    assert up.agreement(down, draws=20).value == pytest.approx(-1)
    assert up.agreement(up, draws=20).value == pytest.approx(1)


def test_the_table_is_in_order():
    table = SiteRanking.of("a", HEADS, 4).to_pandas()
    assert table["site"].tolist() == ["L2.head0", "L0.head1", "L0.head0"]
    assert table["score"].is_monotonic_decreasing and set(table["selector"]) == {"a"}


@pytest.mark.parametrize("k", [0, 3, -1])
def test_more_layers_than_have_a_score(k):
    with pytest.raises(ConfigError, match=f"the {k} best layers of a .* accepted: 1 to 2"):
        SiteRanking.of("a", HEADS, 4).top_layers(k)


def test_more_sites_than_there_are():
    with pytest.raises(ConfigError, match=r"the 4 best sites of a .* accepted: 1 to 3"):
        SiteRanking.of("a", HEADS, 4).top(4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_are_finite(value):
    with pytest.raises(ConfigError, match=r"scored L0\.mlp_out with"):
        SiteRanking.of("a", {Site(0, "mlp_out"): value}, 2)


def test_a_ranking_of_nothing():
    with pytest.raises(ConfigError, match="the selector a scored no site"):
        SiteRanking.of("a", {}, 2)
