"""The plots of the figures' folder against hand-made tables."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection, PathCollection

from mech_absa.errors import ConfigError
from mech_absa.patch.importance import ImportanceMap
from mech_absa.stats import Estimate

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "figures" / "charts.py").exists():
    pytest.skip("the figures are not part of an installed package", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from figures import charts  # noqa: E402


def by_hand(about: dict[str, str]) -> ImportanceMap:
    """Two roles, two layers, two kinds."""
    effects = {"resid_post": [0.0, 0.1, 0.5, -0.25], "mlp_out": [0.02, 0.0, 0.1, 0.3]}
    rows = [
        (kind, i % 2, -1, ("aspect.last", "answer")[i // 2], aie)
        for kind, of in effects.items()
        for i, aie in enumerate(of)
    ]
    table = pd.DataFrame(rows, columns=["kind", "layer", "head", "role", "aie"])
    return ImportanceMap(table, np.zeros((7, len(table))), np.array(list("abcdefg")), about)


def words(figure) -> str:
    """All text of a figure."""
    return "\n".join(t.get_text() for t in figure.findobj(mpl.text.Text))


def test_layer_ranges_are_percentages_in_the_order_of_the_table():
    table = pd.DataFrame(
        {
            "layers": ["0-31", "5-10"],
            "accuracy": [0.8, 0.7],
            "accuracy_low": [0.75, 0.65],
            "accuracy_high": [0.85, 0.9],
            "data": "laptop",
        }
    )
    ax = charts.layer_ranges(table).axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0-31", "5-10"]
    (line,) = [line for line in ax.get_lines() if line.get_label() == "laptop"]
    np.testing.assert_allclose(line.get_ydata(), [80, np.nan, 70])  # 32 layers and 6 are not joined
    same = charts.layer_ranges(table.assign(layers=["4-9", "5-10"])).axes[0]
    assert next(
        line for line in same.get_lines() if line.get_label() == "laptop"
    ).get_ydata() == pytest.approx([80, 70])
    (bars,) = [c for c in ax.collections if len(c.get_segments()) == 2]
    np.testing.assert_allclose([s[:, 1] for s in bars.get_segments()], [[75, 85], [65, 90]])
    with pytest.raises(ConfigError, match="'layers'"):
        charts.layer_ranges(table.drop(columns="layers"))


def test_dots_stand_at_the_score_with_their_intervals():
    """One row per place; the data sets stand side by side in it, single values beside their mean."""
    table = pd.DataFrame(
        {
            "position": ["aspect", "last"] * 2,
            "data": ["R", "R", "L", "L"],
            "accuracy": [0.9, 0.8, 0.85, 0.75],
            "accuracy_low": [0.88, 0.7, 0.85, 0.75],
            "accuracy_high": [0.92, 0.9, 0.85, 0.75],
            "single": [[0.88, 0.92], [0.7, 0.9], [0.85], [0.75]],
        }
    )
    ax = charts.dots(table).axes[0]
    means = {
        tuple(np.round(line.get_xdata(), 6)) for line in ax.get_lines() if line.get_marker() in "os"
    }
    assert {(90.0, 80.0), (85.0, 75.0)} <= means
    segments = [
        s[:, 0] for c in ax.collections if isinstance(c, LineCollection) for s in c.get_segments()
    ]
    np.testing.assert_allclose(segments[:2], [[88, 92], [70, 90]])
    faint = np.concatenate(
        [c.get_offsets() for c in ax.collections if isinstance(c, PathCollection)]
    )
    assert sorted(faint[:, 0]) == pytest.approx([70, 75, 85, 88, 90, 92])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["aspect", "last"]
    assert not ax.patches, "no bars"


def test_parameters_put_size_and_score_side_by_side_smallest_first():
    table = pd.DataFrame(
        {
            "method": ["lora"] * 3 + ["ours"],
            "parameters": [10**7] * 3 + [10**4],
            "accuracy": [0.7, 0.8, 0.9, 0.88],
        }
    )
    left, right = charts.parameters(table).axes
    assert left.get_xscale() == "log"
    assert [label.get_text() for label in left.get_yticklabels()] == ["ours", "lora"]
    sizes = np.concatenate([c.get_offsets() for c in left.collections])
    assert sizes.tolist() == [[10**4, 0], [10**7, 1]]
    (segment,) = [
        s for c in right.collections if isinstance(c, LineCollection) for s in c.get_segments()
    ]
    assert segment.tolist() == [[pytest.approx(70), 1], [pytest.approx(90), 1]], (
        "80 and an sd of 10"
    )


@pytest.mark.parametrize(
    ("draw", "x", "y"),
    [
        (charts.faithfulness, "share", "faithfulness"),
        (charts.pruning, "removed", "accuracy"),
        (charts.ranks, "rank", "accuracy"),
    ],
)
def test_curves_are_sorted_and_named(draw, x, y):
    at = [4, 1, 2] if x == "rank" else [0.4, 0.1, 0.2]
    table = pd.DataFrame(
        {
            x: at * 2,
            y: [0.9, 0.2, 0.5, 0.4, 0.1, 0.3],
            "method": ["exact"] * 3 + ["random"] * 3,
            f"{y}_low": 0.0,
            f"{y}_high": 1.0,
        }
    )
    ax = draw(table).axes[0]
    lines = {line.get_label(): line for line in ax.get_lines()}
    factor = 1 if y == "faithfulness" else 100
    assert lines["exact"].get_ydata() == pytest.approx([0.2 * factor, 0.5 * factor, 0.9 * factor])
    assert lines["random"].get_xdata() == pytest.approx([1, 2, 4] if x == "rank" else [10, 20, 40])


def test_differences_stand_in_points_and_uncertain_ones_are_hollow():
    table = pd.DataFrame(
        {
            "name": ["near", "far"],
            "difference": [0.01, -0.2],
            "low": [-0.02, -0.25],
            "high": [0.03, -0.1],
            "p": [0.4, 0.001],
        }
    )
    figure = charts.differences(table, unit="points")
    ax = figure.axes[0]
    clear, unclear = (c for c in ax.collections if isinstance(c, PathCollection))
    assert clear.get_offsets().tolist() == [[-20, 1]] and unclear.get_offsets().tolist() == [[1, 0]]
    assert unclear.get_facecolor().tolist() == [
        [1, 1, 1, 1]
    ] and clear.get_facecolor().tolist() != [[1, 1, 1, 1]]
    (bars,) = (c for c in ax.collections if isinstance(c, LineCollection))
    np.testing.assert_allclose(
        [path[:, 0] for path in bars.get_segments()], [[-2, 3], [-25, -10]], atol=1e-9
    )
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "near",
        "far",
    ] and ax.yaxis_inverted()


@pytest.mark.slow
def test_effects_and_edits_rank_each_method_by_itself():
    table = pd.DataFrame(
        {
            "aie": [0.1, 0.2, 0.3, 0.4] * 2,
            "accuracy": [0.5, 0.6, 0.7, 0.9, 0.9, 0.7, 0.6, 0.5],
            "method": ["up"] * 4 + ["down"] * 4,
            "size": [1, 1, 2, 2] * 2,
        }
    )
    figure = charts.effects_and_edits(table)
    text = words(figure)
    assert "up\nρ = 1.00" in text and "down\nρ = -1.00" in text and "2 layers" in text
    for ax, (_, rows) in zip(figure.axes, table.groupby("method", sort=False), strict=True):
        points = np.concatenate(
            [c.get_offsets() for c in ax.collections if isinstance(c, PathCollection)]
        )
        expected = sorted(zip(rows["aie"], 100 * rows["accuracy"], strict=True))
        np.testing.assert_allclose(sorted(map(tuple, points.tolist())), expected)


def test_equal_effects_are_spread_about_their_value():
    moved = charts.spread_ties(np.array([0.0, 1.0, 0.0, 0.0]), 0.1)
    assert moved.tolist() == pytest.approx([-0.1, 1.0, 0.0, 0.1])


def test_agreement_pairs_cells_by_their_names():
    about = {"model": "tiny", "method": "exact", "metric": "prob"}
    exact, estimate = by_hand(about), by_hand(about)
    estimate.table["aie"] *= 2
    shuffled = ImportanceMap(
        estimate.table.sample(frac=1, random_state=1),
        estimate.values,
        estimate.clusters,
        about | {"method": "atp"},
    )
    figure = charts.agreement(exact, shuffled, rho=Estimate(0.9, 0.5, 1.0))
    points = np.concatenate([c.get_offsets() for c in figure.axes[0].collections])
    assert len(points) == 8
    np.testing.assert_allclose(points[:, 1], 2 * points[:, 0])
    text = words(figure)
    assert "ρ = 0.900" in text and "attribution patching" in text
    assert "sum of estimates / exact: 2" in text


def test_axes_that_are_given_are_drawn_on():
    figure = mpl.figure.Figure()
    ax = figure.add_subplot()
    assert charts.ranks(pd.DataFrame({"rank": [1, 2], "accuracy": [0.5, 0.6]}), ax) is figure
    assert ax.get_title(loc="left") == "Rank of the edit"


def test_places_stand_in_the_panel_of_their_budget_with_each_interval():
    """Two budgets, two places; the second interval exists for `random` alone."""
    nan = float("nan")
    table = pd.DataFrame(
        [
            (64, 1, "first", 0.10, 0.05, 0.15, nan, nan),
            (64, 1, "random", -0.20, -0.30, -0.10, -0.40, 0.00),
            (320, 1, "first", 0.30, 0.20, 0.40, nan, nan),
        ],
        columns=[
            "budget",
            "epochs",
            "place",
            "difference",
            "low",
            "high",
            "low_window",
            "high_window",
        ],
    )
    intervals = [("samples", "low", "high"), ("windows", "low_window", "high_window")]
    figure = charts.place_grid(table, intervals, value="difference")
    top, bottom = figure.axes
    segments = lambda ax: [  # noqa: E731
        s[:, 0].tolist()
        for c in ax.collections
        if isinstance(c, LineCollection)
        for s in c.get_segments()
    ]
    expected = [[5, 15], [-30, -10], [-40, 0]]
    assert np.allclose([s for s in segments(top) if len(s) == 2], expected)
    assert np.allclose(segments(bottom), [[20, 40]])
    assert [label.get_text() for label in top.get_yticklabels()] == ["first", "random"]
    assert "64 examples, 1 epoch" in words(figure) and "320 examples, 1 epoch" in words(figure)
