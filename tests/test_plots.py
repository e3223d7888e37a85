"""Figures against hand-made maps: what is drawn is what the table says, and says what it is."""

from __future__ import annotations

import re
import subprocess
import sys
import zlib
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.patches import Rectangle

from mech_absa import plots
from mech_absa.errors import ConfigError, DataError
from mech_absa.patch.effects import Effects
from mech_absa.patch.importance import ImportanceMap
from mech_absa.sites import Site

ABOUT = {
    "model": "tiny-2l", "corruption": "GaussianNoise", "corruption_settings": {"scale": 3.0, "draws": 10, "span": "aspect"}, "direction": "denoise",
    "metric": "prob", "unit": "probability of the gold label", "method": "exact", "window": 1, "level": 0.9, "n_pairs": 7,
}  # fmt: skip
AIE = {"resid_post": [[0.0, 0.1], [0.5, -0.25]], "mlp_out": [[0.02, 0.0], [0.1, 0.3]]}
LOW = {"resid_post": [[-0.1, 0.05], [0.4, -0.5]], "mlp_out": [[-0.01, 0.0], [0.05, 0.2]]}
HIGH = {"resid_post": [[0.1, 0.2], [0.6, -0.1]], "mlp_out": [[0.05, 0.0], [0.2, 0.4]]}
ROLES = ("aspect.last", "answer")


def by_hand(kinds: dict[str, list[list[float]]] = AIE, heads: int = 0) -> ImportanceMap:
    """Two roles, two layers, two kinds; with heads, head h has (h + 1) times the effect."""
    rows = [
        (kind, layer, h, role, AIE[kind][i][layer] * (max(h, 0) + 1), LOW[kind][i][layer], HIGH[kind][i][layer], 0.01, 0.04, 7)
        for kind in kinds for i, role in enumerate(ROLES) for layer in (1, 0) for h in (range(heads) if heads else (-1,))
    ]  # fmt: skip
    table = pd.DataFrame(
        rows,
        columns=[
            "kind",
            "layer",
            "head",
            "role",
            "aie",
            "ci_low",
            "ci_high",
            "p",
            "p_adjusted",
            "n",
        ],
    )
    if heads:
        table["kind"] = "head"
    return ImportanceMap(table, np.zeros((7, len(table))), np.array(list("abcdefg")), dict(ABOUT))


def panels(figure):
    """Axes with a mesh that are no colour bars."""
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def mesh(ax) -> np.ndarray:
    return (
        next(c for c in ax.collections if isinstance(c, QuadMesh))
        .get_array()
        .reshape(len(ax.get_yticks()), -1)
    )


def marked(ax) -> set[tuple[int, int]]:
    """(row, column) of the dots."""
    return {
        (int(y), int(x))
        for c in ax.collections
        if isinstance(c, PathCollection)
        for x, y in c.get_offsets()
    }


def words(figure) -> str:
    """All text of a figure."""
    return "\n".join(t.get_text() for t in figure.findobj(mpl.text.Text))


def pdf_text(path: Path) -> str:
    """Characters that a PDF shows, in the order of its streams; matplotlib writes those of Latin-1 as their codes in one byte or two."""
    raw = b"".join(
        zlib.decompress(s)
        for s in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", path.read_bytes(), re.S)
        if s[:1] == b"\x78"
    )
    return (
        b"".join(re.findall(rb"\(((?:[^()\\]|\\.)*)\)", raw))
        .replace(b"\x00", b"")
        .decode("latin-1")
    )


def test_heatmap_draws_the_map():
    figure = plots.heatmap(by_hand(), [Site(1, "resid_post", None, "answer")])
    left, right = panels(figure)
    np.testing.assert_array_equal(mesh(left), AIE["resid_post"])
    np.testing.assert_array_equal(mesh(right), AIE["mlp_out"])
    assert [t.get_text() for t in left.get_yticklabels()] == list(ROLES)
    assert [t.get_text() for t in left.get_xticklabels()] == ["0", "1"]
    norms = [
        next(c for c in ax.collections if isinstance(c, QuadMesh)).norm for ax in (left, right)
    ]
    assert [(n.vmin, n.vmax) for n in norms] == [(-0.5, 0.5)] * 2, "one scale, symmetric about 0"


def test_dots_mark_what_is_significant_after_correction():
    """Of six cells one has a corrected p below 0.05; the legend says which correction."""
    importance = by_hand()
    importance.table["p_adjusted"] = np.where(importance.table["aie"] == 0.3, 0.049, 0.05)
    importance.about["adjustment"] = "holm"
    figure = plots.heatmap(importance)
    left, right = panels(figure)
    assert marked(left) == set() and marked(right) == {(1, 1)}
    assert "p < 0.05, Holm correction" in words(figure)
    importance.table["p_adjusted"] = 0.9
    assert "p < 0.05, Holm correction: no cell" in words(plots.heatmap(importance))


def test_without_tests_a_dot_marks_intervals_that_leave_zero_out():
    importance = by_hand()
    importance.table["p_adjusted"] = np.nan
    left, right = panels(plots.heatmap(importance))
    assert marked(left) == {(0, 1), (1, 0), (1, 1)}
    assert marked(right) == {(1, 0), (1, 1)}, "intervals [0, 0] and [-0.01, 0.05] hold 0"
    assert "90% interval excludes 0" in words(plots.heatmap(importance))


def test_compressed_colours_follow_the_square_root():
    """A quarter of the largest effect gets half of the colour, and 0 stays white."""
    (ax, _) = panels(plots.heatmap(by_hand(), compress=True))
    norm = next(c for c in ax.collections if isinstance(c, QuadMesh)).norm
    assert [float(norm(v)) for v in (-0.5, 0.0, 0.125, 0.5)] == pytest.approx([0, 0.5, 0.75, 1])


def test_frames_mark_selected_sites():
    chosen = [Site(0, "mlp_out", None, "answer"), Site(1, "mlp_out", None, "answer")]
    left, right = panels(plots.heatmap(by_hand(), chosen))
    frames = [p for p in right.patches if isinstance(p, Rectangle) and p.get_gid() == "selected"]
    assert [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in frames] == [
        (0, 1, 2, 1)
    ], "neighbours share one frame"
    assert not [p for p in left.patches if p.get_gid() == "selected"]


def test_the_centre_of_the_colours_is_white():
    assert plots.DIVERGING(0.5) == pytest.approx((1, 1, 1, 1), abs=0.01)


@pytest.mark.parametrize(
    "draw", [plots.heatmap, plots.lines, lambda m: plots.heads(by_hand(heads=3))]
)
def test_a_figure_explains_itself(draw):
    text = words(draw(by_hand()))
    for fact in (
        "tiny-2l",
        "n = 7",
        "Gaussian noise on the aspect in the sentence, 3 sd, mean of 10 draws",
        "clean states restored",
        "exact",
        "layer",
        "AIE",
    ):
        assert fact in text, fact
    assert "probability of the gold label" in text.replace("\n", " ")
    assert "90% interval" in text or "p < 0.05" in text


def test_lines_are_the_averages_with_their_intervals():
    figure = plots.lines(by_hand())
    ax = figure.axes[0]
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in ax.get_lines()}
    assert (
        drawn["answer"] == AIE["resid_post"][1] and drawn["aspect.last"] == AIE["resid_post"][0]
    ), "in the order of the layers"
    (band,) = [c for c in ax.collections if np.isclose(c.get_paths()[0].vertices[:, 1].max(), 0.6)]
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(-0.5)


def test_faint_roles_are_grey_and_unnamed():
    importance = by_hand()
    importance.table.loc[importance.table["role"] == "aspect.last", "aie"] = 1e-4
    named = {line.get_label() for line in plots.lines(importance).axes[0].get_lines()}
    assert "answer" in named and "aspect.last" not in named


def test_heads_are_rows_and_layers_columns():
    left, right = panels(plots.heads(by_hand({"resid_post": []}, heads=3)))
    np.testing.assert_allclose(mesh(right), np.outer([1, 2, 3], AIE["resid_post"][1]))
    assert (
        left.get_title(loc="left") == "at aspect.last"
        and right.get_title(loc="left") == "at answer"
    )


def effects() -> Effects:
    tokens = ["the", " $x$", " <b>", "\n", " ?"]
    roles = ["template", "aspect.last", "after", "template", "answer"]
    frame = pd.DataFrame(
        [
            (
                "e",
                "resid_post",
                layer,
                -1,
                i,
                role,
                0.9,
                0.1,
                0.1 + layer + i / 10,
                layer + i / 10,
                0.0,
            )
            for i, role in enumerate(roles)
            for layer in (0, 1)
        ],
        columns=[
            "example_id",
            "kind",
            "layer",
            "head",
            "position",
            "role",
            "clean",
            "corrupted",
            "patched",
            "effect",
            "draw_sd",
        ],
    )
    pairs = pd.DataFrame(
        [
            {
                "example_id": "e",
                "sentence": "s",
                "aspect": "$x$",
                "polarity": "positive",
                "tokens": tokens,
                "roles": roles,
                "clean": 0.9,
                "corrupted": 0.1,
            }
        ]
    )
    return Effects(frame, pairs, ABOUT)


@pytest.mark.slow
def test_example_map_has_the_words_on_its_axis(tmp_path):
    figure = plots.example_map(effects())
    (ax,) = panels(figure)
    np.testing.assert_allclose(mesh(ax), [[i / 10, 1 + i / 10] for i in range(5)])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["the", "$x$", "<b>", "⏎", "?"]
    plots.save(figure, tmp_path / "e")  # dollars are dollars, and no mathematics
    with pytest.raises(DataError, match="nobody"):
        plots.example_map(effects(), "nobody")


def test_example_map_of_roles_gives_every_token_its_role():
    whole = effects()
    frame = whole.frame.drop_duplicates(["role", "layer"]).assign(position=-1)
    (ax,) = panels(plots.example_map(Effects(frame, whole.pairs, ABOUT)))
    assert mesh(ax)[0].tolist() == mesh(ax)[3].tolist() == [0, 1]


@pytest.mark.slow
def test_files_are_the_same_bytes_and_text_is_text(tmp_path):
    first = plots.save(plots.heatmap(by_hand()), tmp_path / "a")
    second = plots.save(plots.heatmap(by_hand()), tmp_path / "b.pdf")
    assert [p.name for p in first] == ["a.png", "a.pdf"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    raw = first[1].read_bytes()
    assert b"CreationDate" not in raw
    assert b"/FontFile2" in raw and b"/Type3" not in raw, (
        "TrueType, which can be selected, searched and edited"
    )
    assert "model tiny-2l" in pdf_text(first[1])


@pytest.mark.slow
def test_trace_figures(tmp_path):
    importance = by_hand()
    table = pd.concat([importance.table, by_hand(heads=2).table], ignore_index=True)
    both = ImportanceMap(table, np.zeros((7, len(table))), importance.clusters, ABOUT)
    written = plots.save_trace_figures(both, tmp_path / "figures", effects=effects())
    assert sorted(p.name for p in written) == sorted(
        f"{n}.{e}" for n in ("heatmap", "lines", "heads", "example") for e in ("png", "pdf")
    )
    assert all(p.stat().st_size > 2000 for p in written)


def test_domains_print_their_numbers():
    table = pd.DataFrame(
        [("R", "R", 0.9), ("R", "L", 0.8), ("L", "R", 0.7)], columns=["train", "test", "accuracy"]
    )
    figure = plots.domains(table)
    np.testing.assert_allclose(mesh(figure.axes[0]).filled(np.nan), [[90, 80], [70, np.nan]])
    assert {"90.0", "80.0", "70.0", "–"} <= set(words(figure).split("\n"))


def test_the_noise_of_seeds_does_not_fill_the_colours_of_domains():
    """Cells of 98 and 99 % differ by a twentieth of the scale, and say their spread: sd of 97 and 99 is √2."""
    rows = [("R", "R", 0.97), ("R", "R", 0.99), ("R", "L", 0.99), ("R", "L", 0.99)]
    figure = plots.domains(pd.DataFrame(rows, columns=["train", "test", "accuracy"]))
    cells = next(c for c in figure.axes[0].collections if isinstance(c, QuadMesh))
    assert (cells.norm.vmin, cells.norm.vmax) == pytest.approx((79, 99))
    assert {"98.0", "± 1.4", "± 0.0"} <= set(words(figure).split("\n"))


def test_importing_changes_no_style_and_loads_no_model():
    code = (
        "import sys, matplotlib as m; before = dict(m.rcParams); import mech_absa.plots as p; assert dict(m.rcParams) == before; "
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_drawing_changes_no_style():
    before = dict(mpl.rcParams)
    plots.heatmap(by_hand())._repr_png_()
    assert dict(mpl.rcParams) == before


def test_what_is_not_there_is_named():
    with pytest.raises(ConfigError, match="attn_out"):
        plots.heatmap(by_hand(), kinds=["attn_out"])
    with pytest.raises(ConfigError, match="resid_post"):
        plots.heads(by_hand())


def test_costs_stand_at_their_numbers_with_the_spread_of_places():
    from mech_absa.plots.compare import costs

    table = pd.DataFrame(
        {
            "edit": ["both", "both", "lora"], "budget": ["64x2", "320x1", "64x2"], "examples": [64, 320, 64],
            "parameters": [10, 10, 99], "cpu_seconds": [1.0, 5.0, 2.0], "accuracy": [0.5, 0.9, 0.6],
            "low": [0.4, 0.8, 0.5], "high": [0.6, 1.0, 0.7], "worst": [0.3, 0.7, 0.6], "best": [0.7, 1.0, 0.6],
        }
    )  # fmt: skip
    size, seconds, examples = costs(table).axes
    dots = [line.get_xydata().tolist() for line in seconds.get_lines()]
    assert dots == [[[1.0, 50.0], [5.0, 90.0]], [[2.0, 60.0]]]
    places = size.collections[0].get_segments()
    assert [s.tolist() for s in places] == [[[10, 30], [10, 70]], [[10, 70], [10, 100]]]
    assert examples.get_xlabel() == "training examples" and size.get_xscale() == "log"
    assert [t.get_text() for t in examples.get_xticklabels()] == ["64", "100", "320"]


def test_an_agreement_whose_interval_holds_zero_stands_in_brackets():
    from mech_absa.plots.compare import selectors

    table = pd.DataFrame(
        {
            "selector": ["a", "b", "c"], "layers": ["0 1"] * 3, "difference": [0.1, 0.0, -0.1],
            "low": [0.0] * 3, "high": [0.2] * 3, "p_adjusted": [0.01, 1, 1],
        }
    )  # fmt: skip
    pairs = pd.DataFrame(
        [("b", "a", 0.9, 0.5, 1.0), ("c", "a", -0.3, -0.8, 0.4), ("c", "b", *[np.nan] * 3)],
        columns=["selector", "other", "rho", "low", "high"],
    )
    right = selectors(table, pairs).axes[1]
    shown = {text.get_position(): text.get_text() for text in right.texts}
    assert shown[1.5, 0.5] == shown[0.5, 1.5] == "0.9" and shown[0.5, 2.5] == "(-0.3)"
    assert shown[2.5, 2.5] == "1.0" and (1.5, 2.5) not in shown  # without a correlation: grey
