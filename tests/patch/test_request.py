"""What a trace is asked for: words, numbers and sites are refused at the door, in one sentence."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from support import fast
from support.jobs import BLOCK, LONG, ONE_TOKEN, pairs_of, tiny

from mech_absa.errors import ConfigError, MechAbsaError, SiteError
from mech_absa.patch.corruption import Counterfactual, MeanAblation
from mech_absa.patch.plan import plan
from mech_absa.patch.request import Direction, Method, Request, check_memory, parse_sites, whole
from mech_absa.patch.trace import trace
from mech_absa.patch.traced import as_written
from mech_absa.sites import Site


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"by": "word"}, r"unknown by 'word'; accepted: token or role"),
        ({"direction": "up"}, r"unknown direction 'up'; accepted: denoise, noise or both"),
        ({"method": "atp*"}, r"unknown method 'atp\*'; accepted: exact, atp, atpstar, ig or relp"),
        ({"engine": "steam"}, r"unknown engine 'steam'; accepted: wavefront or loop"),
        ({"rules": ("ln", "h")}, r"unknown rule 'h'; accepted: ln, identity, half or pattern"),
        ({"window": 0}, r"window 0 was given; it must be a whole number, 1 or more"),
        ({"steps": 0}, r"steps 0 was given"),
        ({"exact_top": 3}, r"exact_top was given with method exact"),
        ({"exact_top": -1, "method": "atp"}, r"exact_top -1 was given"),
        ({"layers": [-1]}, r"a layer -1 was given"),
        ({"memory": math.nan}, r"budget of nan bytes"),
        ({"memory": math.inf}, r"budget of inf bytes"),
        (
            {"memory": 1e30},
            r"budget of 1e\+30 bytes was given; it must lie between 1 MiB and 1 PiB",
        ),
        ({"memory": 1000}, r"budget of 1000 bytes"),
        ({"sites": "head"}, r"sites='head' was given; accepted: a list"),
        ({"sites": []}, r"no sites were given"),
        ({"sites": ["thought"]}, r"unknown kind of site 'thought'"),
    ],
)
def test_what_is_not_accepted_is_refused_in_one_sentence(given, match):
    with pytest.raises(MechAbsaError, match=match) as error:
        Request.parse(given.pop("sites", ["mlp_out"]), **given)
    assert str(error.value).count("\n") == 0 and len(str(error.value)) < 200


def test_other_types_are_refused_where_they_are_read():
    for value in (1.5, True, "2", None):
        with pytest.raises(ConfigError, match="must be a whole number, 1 or more"):
            whole("window", value)
    for value in ("much", True, None):
        with pytest.raises(ConfigError, match="between 1 MiB and 1 PiB"):
            check_memory(value)
    with pytest.raises(SiteError, match="3 is no site"):
        parse_sites([3])


def test_words_and_members_are_the_same():
    a = Request.parse(["mlp_out"], direction="noise", method="relp")
    b = Request.parse(["mlp_out"], direction=Direction.NOISE, method=Method.RELP)
    assert a == b and all(m.sentence for m in (*Direction, *Method))


def test_a_site_with_a_role_keeps_its_role():
    """L1.mlp_out@query is traced at the roles of the query alone; the same site without one, at all."""
    model = tiny("gpt2")
    pairs = pairs_of(model, Counterfactual())
    asked = [Site(1, "mlp_out", at="query"), "L2.head1@answer"]
    for by in ("token", "role"):
        every = trace(model, pairs, ["L1.mlp_out", "L2.head1"], by=by).frame
        part = trace(model, pairs, asked, by=by).frame
        kept = ((every["kind"] == "mlp_out") & every["role"].str.startswith("query")) | (
            (every["kind"] == "head") & (every["role"] == "answer")
        )
        assert 0 < kept.sum() < len(every)
        # Other rows share the walk, so that sums may be rounded otherwise.
        pd.testing.assert_frame_equal(part, every[kept].reset_index(drop=True), rtol=0, atol=1e-12)
    everywhere = trace(model, pairs, ["mlp_out", "L1.mlp_out@query"], layers=[1], by="role").frame
    assert set(everywhere["role"]) > {"answer", "query.last"}  # the kind asks for all roles


def test_a_position_counts_from_the_end_and_has_no_meaning_by_role():
    model = tiny("gpt2")
    pairs = pairs_of(model, Counterfactual())
    frame = trace(model, pairs, ["L1.mlp_out@-1"]).frame
    lengths = {p.id: p.length for p in pairs}
    assert [lengths[i] - 1 for i in frame["example_id"]] == frame["position"].tolist()
    with pytest.raises(ConfigError, match=r"L1\.mlp_out@-1 names a position"):
        plan(model, pairs, Request.parse(["L1.mlp_out@-1"], by="role"))


def test_sites_that_the_model_lacks_are_refused():
    model = tiny("gpt2")
    with pytest.raises(SiteError, match="L99"):
        plan(model, pairs_of(model, Counterfactual()), Request.parse(["L99.mlp_out"]))
    with pytest.raises(ConfigError, match="leave heads out"):
        plan(model, pairs_of(model, Counterfactual()), Request.parse(["head"], window=2))


@pytest.mark.parametrize("labels", [ONE_TOKEN, LONG], ids=["one token", "several tokens"])
@pytest.mark.parametrize("direction", ["denoise", "both"])
@pytest.mark.parametrize("engine", fast(["wavefront", "loop"], ["wavefront"]))
def test_progress_ends_at_the_number_of_cells(labels, direction, engine):
    """Labels of several tokens are several passes, and pairs lack roles: neither counts twice."""
    model = tiny("llama")
    request = Request.parse(["mlp_out", "head"], by="role", direction=direction, engine=engine)
    p = plan(model, pairs_of(model, Counterfactual(), labels), request)
    told: list[int] = []
    frames = [frame for _, frame in p.iterate(tick=told.append)]
    assert sum(told) == p.cells == sum(map(len, frames)) and min(told) >= 0


def test_progress_of_an_estimate_ends_at_the_number_of_cells():
    model = tiny("llama")
    request = Request.parse(["mlp_out"], by="role", method="atp", metric="logit_diff")
    p = plan(model, pairs_of(model, Counterfactual()), request)
    told: list[int] = []
    list(p.iterate(tick=told.append))
    assert sum(told) == p.cells


def test_both_directions_are_the_two_single_ones():
    """Shared runs change no number, and the interaction is their difference."""
    from mech_absa.patch.directions import BothDirections

    model = tiny("gemma2")
    for labels, kinds in ((LONG, BLOCK), (ONE_TOKEN, ("head",))):
        pairs = pairs_of(model, Counterfactual(), labels)
        options = {"by": "role", "metric": "logprob", "check": False}
        one, other = (
            trace(model, pairs, kinds, direction=d, **options) for d in ("denoise", "noise")
        )
        both = trace(model, pairs, kinds, direction="both", **options)
        ways = BothDirections.of(both)
        assert ways.pie.frame.equals(one.frame) and ways.tie.frame.equals(other.frame)
        difference = other.frame["effect"] - one.frame["effect"]
        assert ways.interaction.frame["effect"].equals(difference)
        assert difference.abs().max() > 0.01
        assert both.about["direction"] == "both" and ways.tie.about["direction"] == "noise"
        keys = ["example_id", "kind", "layer", "head", "role"]
        mean, own = (
            frame.groupby(keys, dropna=False)["effect"].mean()
            for frame in (both.frame, ways.mean.frame)
        )
        assert len(mean) == len(own) > 0 and np.abs(mean.to_numpy() - own.to_numpy()).max() < 1e-12


def test_an_ablation_has_one_direction_whatever_is_asked():
    model = tiny("gpt2")
    effects = trace(
        model, pairs_of(model, MeanAblation()), ["mlp_out"], direction="both", by="role"
    )
    assert effects.about["direction"] == "noise" and "direction" not in effects.frame


def test_the_interaction_of_a_linear_model_is_zero():
    """TIE = PIE where the metric is affine in the inputs (`test_gradients` builds the model)."""
    from support.estimates import exact, linear_model, make_job, random_ids

    model = linear_model()
    ids = random_ids(model)
    restored, broken = (
        exact(model, make_job(model, *ids, ("mlp_out", "head"), direction=d))
        for d in Direction("both").single
    )
    assert restored.abs().max() > 0.1 and (restored + broken).abs().max() < 1e-10


@pytest.mark.parametrize("method", fast(["atp", "relp"], ["relp"]))
def test_screen_then_exact(method):
    """The leading cells hold the exact effects, all others the estimates, and a column tells which."""
    model = tiny("llama")
    pairs = pairs_of(model, Counterfactual())
    options = {"metric": "logit_diff", "direction": "noise"}
    exact = trace(model, pairs, ["mlp_out", "head"], **options).frame
    plain = trace(model, pairs, ["mlp_out", "head"], method=method, **options).frame
    some = trace(model, pairs, ["mlp_out", "head"], method=method, exact_top=4, **options)
    frame, top = some.frame, some.frame["exact"]
    cells = as_written(frame).loc[top, ["kind", "layer", "head", "role"]].drop_duplicates()
    assert len(cells) == 4 and some.about["exact_top"] == 4
    assert abs(frame["effect"] - exact["effect"])[top].max() < 1e-10
    assert abs(frame["patched"] - exact["patched"])[top].max() < 1e-10
    assert frame["effect"][~top].equals(plain["effect"][~top])
    assert frame["estimate"].equals(plain["effect"])
    assert abs(exact["effect"] - plain["effect"])[top].max() > 1e-3  # it was worth while
    keys = ["kind", "layer", "head", "role"]
    by_cell = as_written(plain).groupby(keys)["effect"].mean().abs().sort_values(ascending=False)
    assert set(by_cell.index[:4]) == set(cells.itertuples(index=False, name=None))


def test_exact_effects_of_rows_are_those_of_a_trace():
    model = tiny("llama")
    p = plan(
        model, pairs_of(model, Counterfactual(), LONG), Request.parse(["mlp_out"], direction="both")
    )
    effects = p.gather([frame for _, frame in p.iterate()])
    some = effects.frame.sample(30, random_state=0)
    assert abs(p.exact(some) - some["effect"].to_numpy()).max() < 1e-12
