"""The study of places: what is compared, how rates are chosen, and differences with their intervals, all by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from mech_absa.examples import Example, Polarity
from mech_absa.records import write_json
from mech_absa.sites import Site

study = pytest.importorskip("figures.places", reason="the figures are not part of the package")
TRACED = [Site(3, "resid_post", None, "query.last"), Site(4, "resid_post", None, "query.last")]


def test_all_places_are_of_one_size_and_random_ones_keep_away():
    rows = study.places(TRACED, 8, 4, 5)
    assert [(r.name, r.layers) for r in rows[:3]] == [
        ("traced", (3, 4)),
        ("first", (0, 1)),
        ("last", (6, 7)),
    ]  # the middle layers are the traced ones
    windows = [r.layers for r in rows if r.name == "random"]
    assert sorted(windows) == [(0, 2), (0, 5), (1, 2), (1, 5), (2, 5)]
    sizes = {r.name: r.rank * len(r.layers) for r in rows}
    assert sizes.pop("all") == 32 and set(sizes.values()) == {8}
    assert {r.position for r in rows} == {"query.last", "before", "answer"}


def test_the_rate_with_the_lowest_validation_loss_is_taken(tmp_path):
    s = study.Study(study.Config(rates=(1.0, 2.0, 4.0), samples=2, out=tmp_path))
    place = study.Place("traced", (3, 4), "query.last", 4)
    assert s.best_rate(place, (64, 1)) is None and s.final(place, (64, 1)) == []
    for job, loss in zip(s.tuning(place, (64, 1)), (0.5, 0.2, None), strict=True):
        write_json(s.path(job), {"rate": job.rate, "validation_loss": loss})
    assert [(j.rate, j.sample) for j in s.final(place, (64, 1))] == [(2.0, 0), (2.0, 1)]


def test_a_training_that_somebody_has_is_left_to_them(tmp_path):
    s = study.Study(study.Config(out=tmp_path))
    job = study.Job(study.Place("last", (6, 7), "query.last", 4), 64, 1, 1.0, 0)
    with s.claim(job) as mine, s.claim(job) as other:
        assert mine and not other
    write_json(s.path(job), {})
    with s.claim(job) as mine:
        assert not mine


def test_samples_are_drawn_by_seed():
    rows = [
        Example(f"s{i // 2} a{i}", f"a{i}", Polarity.POSITIVE, (3, 5), id=str(i)) for i in range(8)
    ]
    assert study.sample(rows, 3, 1) == study.sample(rows, 3, 1) != study.sample(rows, 3, 2)
    whole = study.sample(rows, 0, 1)
    assert whole != rows and {e.id for e in whole} < {e.id for e in rows}


def test_differences_and_intervals_by_hand():
    """Two samples, two random windows: t(1) = 12.706, and the half width is 12.706 * |a - b| / 2."""
    accuracy = {
        ("traced", "3 4"): (0.9, 0.8), ("random", "0 5"): (0.7, 0.7), ("random", "1 2"): (0.9, 0.7), ("last", "6 7"): (0.5,),
    }  # fmt: skip
    table = pd.DataFrame(
        {
            "stage": "scored", "budget": 64, "epochs": 1, "name": name, "window": window, "sample": k, "accuracy": value, "position": "query.last",
            "parameters": 10, "steps": 4, "rate": 1.0, "accuracy_mixed": value, "loss": 0.1,
        }
        for (name, window), values in accuracy.items()
        for k, value in enumerate(values)
    )  # fmt: skip
    rows = study.compared(table, samples=2).set_index("place")
    assert list(rows.index) == ["traced", "random"], "a place that lacks a training has no row"
    random = rows.loc["random"]
    assert random["accuracy"] == pytest.approx(0.75) and random["windows"] == 2
    # Over samples: (0.8 - 0.9, 0.7 - 0.8). Over windows: (-0.2, -0.1) averages to -0.15 and (0, -0.1) to -0.05.
    assert random["difference"] == pytest.approx(-0.1)
    assert random["low_sample"] == pytest.approx(-0.1) == random["high_sample"]
    half = 12.706 * 0.1 / 2
    assert random["low_window"] == pytest.approx(-0.1 - half, abs=1e-4)
    assert random["high_window"] == pytest.approx(-0.1 + half, abs=1e-4)
    assert math.isnan(rows.loc["traced", "difference"])
