"""The self-check: it compares cells that matter, and nothing that is broken passes."""

from __future__ import annotations

import pytest
import torch
from support import fast
from support.jobs import BLOCK, pairs_of, tiny

from mech_absa.errors import SelfCheckError
from mech_absa.patch import wave
from mech_absa.patch.corruption import Counterfactual, MeanAblation
from mech_absa.patch.plan import plan
from mech_absa.patch.request import Request
from mech_absa.patch.self_check import self_check, worse
from mech_absa.patch.wave import enter


def the_plan(corruption=None, kinds=("attn_out", "mlp_out"), **words):
    model = tiny("gpt2")
    pairs = pairs_of(model, corruption or Counterfactual())
    return plan(model, pairs, Request.parse(list(kinds), metric="logit_diff", **words))


def test_the_largest_and_a_median_cell_are_among_those_compared():
    p = the_plan()
    frame = p.gather([frame for _, frame in p.iterate()]).frame
    for seed in range(4):
        first, second, *others = self_check(p, seed=seed)["cells_compared"]
        assert len(others) == 2

        def size(text: str) -> tuple[float, list[float]]:
            cell, example_id = text.split(" of ")
            site, position = cell.split("@")
            layer, kind = site.removeprefix("L").split(".")
            own = frame[frame["example_id"] == example_id]
            row = own[
                (own["layer"] == int(layer))
                & (own["kind"] == kind)
                & (own["position"] == int(position))
            ]
            return float(row["effect"].abs().iloc[0]), sorted(own["effect"].abs())

        value, all_of_pair = size(first)
        assert value == pytest.approx(all_of_pair[-1])
        value, all_of_pair = size(second)
        above = [x for x in all_of_pair if x > 0]
        assert value == pytest.approx(above[(len(above) - 1) // 2], rel=1e-6)


@pytest.mark.parametrize("direction", fast(["denoise", "noise", "both"], ["both"]))
def test_every_check_holds(direction):
    found = self_check(the_plan(kinds=BLOCK, direction=direction, by="role"))
    names = [
        "engine_against_loop",
        "same_onto_same",
        "all_of_resid_pre_0",
        "left_of_first_difference",
    ]
    assert all(0 <= found[name] < 1e-9 for name in names)
    assert len(found["cells_compared"]) == (8 if direction == "both" else 4)


def test_an_ablation_is_compared_with_the_loop_alone():
    found = self_check(the_plan(MeanAblation()))
    assert found["engine_against_loop"] < 1e-9 and "same_onto_same" not in found


def test_nan_never_passes(monkeypatch):
    """`max(0.0, nan)` is 0.0: that is how it once passed."""
    nan = float("nan")
    assert max(0.0, nan) == 0.0 and all(x != x for x in (worse(0.0, nan), worse(nan, 0.0)))
    p, sweep = the_plan(), wave.sweep

    def broken(*args, **kwargs):
        answers = sweep(*args, **kwargs)
        answers.patched = torch.full_like(answers.patched, nan)
        return answers

    monkeypatch.setattr(wave, "sweep", broken)
    with pytest.raises(SelfCheckError, match="engine_against_loop is off by nan"):
        self_check(p)


def test_an_engine_that_is_wrong_in_its_largest_cells_is_caught(monkeypatch):
    """Half of the MLP's output is lost: where the effect is 0 nobody can see it."""
    right = enter.ENTER["mlp_out"]
    monkeypatch.setitem(
        enter.ENTER, "mlp_out", lambda here: (right(here) + here.base("resid_mid")) / 2
    )
    for seed in range(5):
        with pytest.raises(SelfCheckError, match="engine_against_loop"):
            self_check(the_plan(kinds=["mlp_out"]), seed=seed)
