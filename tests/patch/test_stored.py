"""Effects that are read a few pairs at a time are the effects in memory, and no more is read at a time."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from support import fast
from support.jobs import pairs_of, tiny

from mech_absa.errors import DataError
from mech_absa.patch import stored
from mech_absa.patch.corruption import Counterfactual
from mech_absa.patch.directions import BothDirections
from mech_absa.patch.plan import plan
from mech_absa.patch.request import Request
from mech_absa.patch.stored import join_parts, write_part


@pytest.fixture(params=fast(["role", "both", "estimate"], ["both"]))
def traced(request, tmp_path, monkeypatch):
    """(plan, effects in memory, the same in a file of several row groups)."""
    options = {
        "role": {"by": "role"},
        "both": {"by": "role", "direction": "both"},
        "estimate": {"method": "atp", "metric": "logit_diff", "exact_top": 3},
    }[request.param]
    model = tiny("gpt2")
    p = plan(model, pairs_of(model, Counterfactual()), Request.parse(["mlp_out"], **options))
    parts = []
    for index, frame in p.iterate():
        parts.append(tmp_path / f"effects-{index:06d}.parquet")
        write_part(frame, parts[-1])
    whole = p.gather([frame for _, frame in p.iterate()])
    monkeypatch.setattr(stored, "ROWS", 40)
    return p, whole, join_parts(p, parts, tmp_path / "run")


def test_the_files_hold_the_effects_in_memory(traced):
    _, whole, effects = traced
    files = type(whole).load(effects.folder) if (effects.folder / "about.json").exists() else None
    assert files is None, "the record is written last"
    stored.save_about(effects)
    files = type(whole).load(effects.folder)
    exact = {"check_exact": True, "check_dtype": False}
    pd.testing.assert_frame_equal(files.frame, whole.frame, **exact)
    pd.testing.assert_frame_equal(files.pairs, whole.pairs.assign(p_corrupted=files.pairs["p_corrupted"]), check_dtype=False)  # fmt: skip
    assert (files.controls is None) == (whole.controls is None)
    if whole.controls is not None:
        pd.testing.assert_frame_equal(files.controls, whole.controls, **exact)
    assert files.about == whole.about and len(effects) == len(whole)


def test_what_is_read_at_a_time_has_an_end(traced):
    _, whole, effects = traced
    with pq.ParquetFile(effects.folder / "effects.parquet") as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    longest = whole.frame.groupby("example_id").size().max()
    assert len(sizes) > 1 and sum(sizes) == len(whole) and max(sizes) < 40 + 2 * longest
    ids = [name for few in effects.chunks() for name in few.frame["example_id"].unique()]
    assert ids == list(whole.frame["example_id"].unique()), "every pair stands in one row group"


def test_maps_samples_and_examples_are_those_of_memory(traced):
    _, whole, effects = traced
    for by in ("role", "position") if "direction" not in whole.frame else ("role",):
        (a, cells), (b, others) = effects.matrix(by), whole.matrix(by)
        assert np.array_equal(a, b, equal_nan=True) and cells.equals(others)
    a, b = (e.importance(adjustment="none", draws=50) for e in (effects, whole))
    pd.testing.assert_frame_equal(a.table, b.table, check_exact=True)
    assert a.controls is b.controls is None or np.array_equal(
        a.controls, b.controls, equal_nan=True
    )
    name = whole.pairs["example_id"].iloc[-1]
    assert effects.example(name)["effect"].tolist() == whole.example(name)["effect"].tolist()
    with pytest.raises(DataError, match="no example 'x' was traced"):
        effects.example("x")
    rows = whole.frame[whole.frame["effect"] != 0].sample(frac=1.0, random_state=7).head(9)
    drawn = effects.sample("effect", 9, 7)
    columns = [*whole.frame.columns]
    pd.testing.assert_frame_equal(
        drawn[columns].reset_index(drop=True), rows.reset_index(drop=True), check_dtype=False
    )
    assert effects.total.equals(whole.total)


def test_a_view_of_both_directions(traced):
    _, whole, effects = traced
    if "direction" not in whole.frame:
        pytest.skip("one direction")
    view = effects.over(lambda few: BothDirections.of(few).interaction)
    a, b = view.matrix()[0], BothDirections.of(whole).interaction.matrix()[0]
    assert np.array_equal(a, b, equal_nan=True) and np.nanmax(abs(a)) > 0


def test_a_damaged_part_is_one_sentence(traced, tmp_path):
    p, _, _ = traced
    parts = sorted(tmp_path.glob("effects-*.parquet"))
    parts[0].write_bytes(parts[0].read_bytes()[:-9])
    with pytest.raises(DataError, match=r"effects-000000\.parquet is damaged"):
        join_parts(p, parts, tmp_path / "again")
    assert not (tmp_path / "again" / "effects.parquet").exists()
