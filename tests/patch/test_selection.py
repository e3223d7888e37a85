"""The choice of sites: nothing is clear where nothing is, and the account of a choice can be checked by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mech_absa.errors import DataError
from mech_absa.patch.effects import CONTROL_COLUMNS, Effects
from mech_absa.patch.importance import ImportanceMap
from mech_absa.patch.job import control_spans
from mech_absa.patch.pairs import Pair
from mech_absa.patch.selection import _candidates, _family_p, select
from mech_absa.stats import cluster_bootstrap

sys.path.insert(0, str(Path(__file__).parents[2]))
bench = pytest.importorskip("benchmarks.selection")

ROLES = ("template", "before", "opinion", "query.last", "answer")
LAYERS = 8


def a_map(values: np.ndarray, clusters: np.ndarray) -> ImportanceMap:
    cells = pd.DataFrame(
        [("resid_post", layer, -1, role) for layer in range(LAYERS) for role in ROLES],
        columns=["kind", "layer", "head", "role"],
    )
    table = cells.assign(aie=np.nanmean(values, axis=0))
    return ImportanceMap(table, values, clusters, {"level": 0.95})


def column(layer: int, role: str) -> int:
    return layer * len(ROLES) + ROLES.index(role)


def null(rng, pairs: int, per_sentence: int, template: float = 0.0) -> ImportanceMap:
    """No effect anywhere; every sentence shifts all layers of a role together."""
    clusters = np.arange(pairs) // per_sentence
    shared = rng.normal(size=(clusters.max() + 1, len(ROLES)))[clusters]
    values = np.tile(shared, LAYERS) + rng.normal(size=(pairs, LAYERS * len(ROLES)))
    values[:, ROLES.index("template") :: len(ROLES)] += template
    values[:, -len(ROLES) : -1] = 0.0  # the last layer is read at the answer only
    return a_map(values * 1e-5, clusters)


@pytest.mark.slow
@pytest.mark.parametrize(("pairs", "per_sentence"), [(10, 1), (40, 2)])
@pytest.mark.parametrize("template", [0.0, -2.0])
def test_where_nothing_is_there_nothing_is_clear(pairs, per_sentence, template):
    """The old rule called a fifth to a half of these clear, more with a control below 0."""
    rng = np.random.default_rng(0)
    false = before = 0
    windows = [(layer, layer + 1) for layer in range(LAYERS - 1)]
    for i in range(60):
        m = null(rng, pairs, per_sentence, template)
        c = _candidates(m, "resid_post", windows, ["before", "opinion", "query.last"], "template")
        effect = cluster_bootstrap(c.effect, c.clusters, draws=300, seed=i)
        above = cluster_bootstrap(c.control, c.clusters, draws=300, seed=i)
        before += bool((effect.low > above.high).any())
        stands_out = effect.low > np.maximum(0, above.high)
        false += bool((stands_out & (_family_p(c, i) <= 0.025)).any())
    assert false <= 5  # the 99.5 % point of a binomial with 60 trials at 0.025
    assert template == 0 or before > 20


def test_a_true_effect_is_clear_and_stable():
    rng = np.random.default_rng(1)
    m = null(rng, 40, 2)
    m.values[:, column(3, "query.last")] += 1e-4
    chosen = select(m, width=1)
    assert [str(s) for s in chosen] == ["L3.resid_post@query.last"] and chosen.clear
    assert chosen.stability == 1.0 and chosen.sentences == 20 and chosen.p <= 0.05
    # The same site is chosen on both halves, so that the honest mean is the mean.
    assert chosen.honest.value == pytest.approx(chosen.aie)
    assert not select(null(np.random.default_rng(2), 40, 2), width=1).clear


def test_windows_with_a_cell_that_is_zero_for_certain_are_no_candidates():
    """L6 alone is the largest, but with a width of two its window would hold L7, which is 0 by construction."""
    m = null(np.random.default_rng(3), 30, 1)
    m.values[:, column(6, "query.last")] += 1.0
    m.values[:, column(2, "query.last")] += 0.1
    assert [s.layer for s in select(m, width=1)] == [6]
    wide = select(m, width=2)
    assert 7 not in [s.layer for s in wide] and [s.layer for s in wide] == [5, 6]
    with pytest.raises(DataError, match="exactly 0"):
        select(a_map(np.zeros_like(m.values), m.clusters))


def test_a_control_below_zero_does_not_lower_the_bar():
    m = null(np.random.default_rng(4), 30, 1, template=-50.0)
    assert not select(m, width=1).clear


def test_an_effect_that_the_control_shares_is_not_clear():
    m = null(np.random.default_rng(5), 30, 1)
    for role in ("template", "query.last"):
        m.values[:, column(3, role)] += 1e-3
    chosen = select(m, width=1)
    assert str(chosen[0]) == "L3.resid_post@query.last" and not chosen.clear


def test_few_sentences_are_named():
    m = null(np.random.default_rng(6), 8, 2)
    m.values[:, column(3, "query.last")] += 1.0
    chosen = select(m, width=1)
    assert not chosen.clear  # four sentences give no p below 1/16
    assert "only 4 sentences" in str(chosen) and "can never be clear" in str(chosen)


def test_clear_needs_half_of_the_level_that_the_interval_leaves():
    """Five sentences that all agree have a one-sided p of 1/32, below 0.05 and above 0.025; six have 1/64."""
    for sentences, clear in ((5, False), (6, True)):
        m = null(np.random.default_rng(11), sentences, 1)
        m.values[:, column(3, "query.last")] += 1.0
        chosen = select(m, width=1)
        assert chosen.p == pytest.approx(2.0**-sentences) and chosen.clear == clear
        assert ("5 sentences can never be clear" in str(chosen)) == (sentences == 5)


def test_the_benchmark_simulates_the_candidates_that_select_sees():
    values, clusters = bench.null_map(np.random.default_rng(0), 12, 2, -1.0, "skewed")
    cells = [("resid_post", layer, -1, role) for layer in range(8) for role in bench.ROLES]
    table = pd.DataFrame(cells, columns=["kind", "layer", "head", "role"])
    importance = ImportanceMap(table, values.reshape(12, -1), clusters, {"level": 0.95})
    windows = [(layer, layer + 1) for layer in range(7)]
    theirs = _candidates(importance, "resid_post", windows, bench.CHOICE, "template")
    ours = bench.candidates(values, clusters)
    assert ours.spots == theirs.spots and set(np.unique(clusters)) == set(range(6))
    np.testing.assert_allclose(ours.effect, theirs.effect)
    np.testing.assert_allclose(ours.control, theirs.control)


@pytest.mark.slow
def test_the_honest_interval_is_lower_where_the_choice_is_chance():
    """Over many null maps the naive mean of the largest is positive, and the honest one is not."""
    rng = np.random.default_rng(8)
    chosen = [select(null(rng, 20, 1), width=1, draws=50) for _ in range(30)]
    naive = np.array([c.aie for c in chosen]) * 1e5
    honest = np.array([c.honest.value for c in chosen]) * 1e5
    assert naive.mean() > 0.3
    assert abs(honest.mean()) < 3 * honest.std(ddof=1) / np.sqrt(len(honest))
    assert np.mean([c.stability for c in chosen]) < 0.6


def test_the_control_has_the_size_of_the_role():
    """Two pairs by hand: roles of one, two and five tokens; the template has four."""
    roles = ["template", "query.first", "query.last", "template", "before", "before", "template"]
    roles += ["before"] * 3 + ["template"]
    pairs = pd.DataFrame({"example_id": ["a", "b"], "roles": [roles, ["template", "before"]]})
    rows = [("a", 1, 0.1), ("a", 2, 0.2), ("a", 4, 0.4), ("b", 1, 9.0)]
    controls = pd.DataFrame(
        [(i, "mlp_out", layer, n, x + layer) for i, n, x in rows for layer in (0, 1)],
        columns=list(CONTROL_COLUMNS),
    )
    cells = pd.DataFrame(
        [
            ("mlp_out", 1, pd.NA, "before"),
            ("mlp_out", 0, pd.NA, "query.last"),
            ("head", 0, 0, "before"),
        ],
        columns=["kind", "layer", "head", "role"],
    )
    matched = Effects(pd.DataFrame(), pairs, {}, controls).matched(cells)
    # "before" has five tokens in a, more than the template's four; b lacks "query.last".
    np.testing.assert_equal(matched, [[1.4, 0.1, np.nan], [10.0, np.nan, np.nan]])


def test_controls_are_template_tokens_at_which_the_runs_can_differ():
    names = ("template",) * 6 + ("query.last", "before", "before", "before", "answer")

    def pair_named(name):
        pair = object.__new__(Pair)  # no model, no example: only what the spans depend on
        parts = {"first": 3, "clean": SimpleNamespace(role_names=names)}
        vars(pair).update(parts, example=SimpleNamespace(id=name))
        return pair

    pair = pair_named("x")
    one, three, six = control_spans(pair)
    assert [s.role for s in (one, three, six)] == ["control.1", "control.3", "control.6"]
    assert set(one.positions) < set(three.positions) == {3, 4, 5}
    assert six.positions == (0, 1, 2, 3, 4, 5)
    assert control_spans(pair) == [one, three, six]
    assert len({control_spans(pair_named(name))[0] for name in "abcdefgh"}) > 1


def test_a_matched_control_decides_where_there_is_one():
    """All template tokens together outdo the role; as many as the role has do not."""
    m = null(np.random.default_rng(9), 30, 1)
    m.values[:, column(3, "query.last")] += 1e-3
    m.values[:, column(3, "template")] += 1e-2
    assert not select(m, width=1).clear
    matched = replace(m, controls=null(np.random.default_rng(10), 30, 1).values)
    chosen = select(matched, width=1)
    assert [str(s) for s in chosen] == ["L3.resid_post@query.last"] and chosen.clear
    assert "as many tokens" in chosen.rule and "as many" not in select(m, width=1).rule
