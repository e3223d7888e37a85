"""The sweep over ranks: means and slopes by hand, a resumed study, and what its text calls shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "figures" / "make.py").exists():
    pytest.skip("the figures are not part of an installed package", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from figures import make, rank_fairness  # noqa: E402
from figures.rank_fairness import by_rank, measures, trends  # noqa: E402
from figures.study import Study  # noqa: E402
from mech_absa.errors import ConfigError  # noqa: E402


def edits() -> pd.DataFrame:
    """Two worlds, ranks 1, 2 and 4, three samples: the gap falls by 0.1, 0.1 and 0.4 per doubling in one."""
    rows = []
    for world, slopes in (("built-in", (-0.1, -0.1, -0.4)), ("harder", (0.1, -0.1, 0.0))):
        for rank in (1, 2, 4):
            for sample, slope in enumerate(slopes):
                gap = 0.9 + slope * np.log2(rank)
                one = {"class_gap": gap, "class_gap_low": 0.0, "class_gap_high": 1.0}
                lens = {"class_gap_base": 0.5, "accuracy": 0.5, "accuracy_base": 0.4, "recall_neutral": 0.3, "lens_L0": 0.0, "lens_L1": 0.1 * rank}  # fmt: skip
                groups = {f"{kind}_gap": 0.0 for kind in rank_fairness.KINDS}
                kls = {"kl_labels": 1.0 * rank, "kl_vocabulary": 2.0}
                rows.append({"world": world, "rank": rank, "sample": sample, "rate": 1.0, "n": 8, **one, **lens, **groups, **kls})  # fmt: skip
    return pd.DataFrame(rows)


def test_means_over_samples_by_hand():
    """At rank 4: 0.7, 0.7 and 0.1, mean 0.5, sd 0.3464, t(2) 4.3027: half a width 0.8606."""
    table = by_rank(edits()).set_index(["world", "measure", "rank"])
    row = table.loc[("built-in", "class_gap", 4)]
    assert row["mean"] == pytest.approx(0.5)
    assert row["high"] - row["mean"] == pytest.approx(4.30265 * np.sqrt(0.12) / np.sqrt(3), rel=1e-4)  # fmt: skip
    assert (table["samples"] == 3).all()
    assert "class_gap_low" not in measures(edits()) and "sample" not in measures(edits())


def test_slopes_per_doubling_by_hand():
    """-0.1, -0.1 and -0.4 have the mean -0.2; a measure that grows with the rank itself has the slope of a
    least-squares line through (0, 1), (1, 2), (2, 4), which is 1.5.
    """
    table = trends(edits()).set_index(["world", "measure"])
    assert table.loc[("built-in", "class_gap"), "slope"] == pytest.approx(-0.2)
    assert table.loc[("harder", "class_gap"), "slope"] == pytest.approx(0.0)
    assert table.loc[("harder", "kl_labels"), "slope"] == pytest.approx(1.5)
    assert table.loc[("harder", "kl_labels"), "low"] == pytest.approx(1.5)
    one_rank = edits()[lambda t: t["rank"] == 2]
    assert trends(one_rank).empty


def kept(folder: Path) -> Path:
    """Results as the study leaves them."""
    home = folder / "rank_fairness"
    home.mkdir(parents=True)
    by_rank(edits()).to_csv(home / "ranks.csv", index=False)
    trends(edits()).to_csv(home / "trends.csv", index=False)
    model = {"name": "bundled", "sha256": "0" * 64}
    record = {
        "study": "rank_fairness", "date": "2026-11-29", "model": model, "versions": {},
        "rows": {"train": 8, "validation": 0, "test": 8}, "trainings": {"done": 18, "planned": 18},
    }  # fmt: skip
    (home / "run.json").write_text(json.dumps(record))
    return home


def test_only_changes_whose_interval_leaves_0_out_are_shown(tmp_path):
    said = rank_fairness.says(Study(kept(tmp_path)))
    assert (
        "Built-in reviews: shown: KL over the labels +1.50 [1.50, 1.50] nats; not shown: " in said
    )
    assert "the gap of classes -20.00 [-63.03, 23.03] points" in said


def test_the_table_and_the_figure_are_drawn_from_the_results(tmp_path):
    kept(tmp_path / "results")
    names = ("rank_fairness", "table_rank_fairness")
    config = make.Config(runs=tmp_path / "results", out=tmp_path / "out", only=names)
    assert make.run(config) == list(names)
    text = (tmp_path / "out" / "table_rank_fairness.md").read_text()
    assert "| none | 40.0 | – | 50.0 |" in text and "| 2 | 50.0 [50.0, 50.0] | 30.0 [30.0, 30.0] |" in text  # fmt: skip
    drift = rank_fairness.drifts(pd.read_csv(tmp_path / "results" / "rank_fairness" / "ranks.csv"), "harder")  # fmt: skip
    assert drift[drift["layer"] == 1].set_index("rank")["mean"].tolist() == pytest.approx([0.1, 0.2, 0.4])  # fmt: skip


def test_a_resumed_study_trains_what_is_missing_and_says_its_budget(tmp_path, monkeypatch, capsys):
    """No model: a training is a row, and the second run has one to make."""
    trained = []

    def train(self, job):
        trained.append(job.name)
        rows = edits()
        row = rows[(rows["world"] == job.world.name) & (rows["rank"] == job.rank)].iloc[job.sample]
        return {"system": job.name, **row.to_dict()}

    monkeypatch.setattr(rank_fairness.Sweep, "train", train)
    config = rank_fairness.Config(fast=True, out=tmp_path / "work", results=tmp_path / "kept")
    rank_fairness.main(config)
    assert "8 trainings of 8 steps in all" in capsys.readouterr().out
    assert len(trained) == 8 == len(set(trained))
    record = json.loads((tmp_path / "kept" / "run.json").read_text())
    assert record["trainings"] == {"done": 8, "planned": 8} and len(record["sites"]) == 2
    next((tmp_path / "work" / "parts").glob("harder-*-r4-*-s1-*.json")).unlink()
    rank_fairness.main(config)
    assert len(trained) == 9
    assert len(pd.read_csv(tmp_path / "kept" / "edits.csv")) == 8
    with pytest.raises(ConfigError, match="no edit has been measured in"):
        rank_fairness.main(rank_fairness.Config(fast=True, collect=True, out=tmp_path / "none"))
    with pytest.raises(ConfigError, match="--samples 1, --ranks 1 and --frames 3 were given"):
        rank_fairness.main(rank_fairness.Config(samples=1, ranks=(1,)))
