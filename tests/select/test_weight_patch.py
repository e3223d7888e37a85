"""Weight patching against models whose weights were overwritten."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from support import fast
from support.jobs import EXAMPLES, LONG, ONE_TOKEN, TEMPLATE, tiny

from mech_absa.edits.base import Matrix, Shape
from mech_absa.edits.edit import Edit
from mech_absa.errors import ConfigError
from mech_absa.metrics import METRICS
from mech_absa.model import Model
from mech_absa.prompts import Verbalizer
from mech_absa.scoring import label_scores
from mech_absa.select import Evidence, selector
from mech_absa.select.weight_patch import WeightPatching, WeightPatchingBack, WeightPatchingGradient
from mech_absa.sites import Site
from mech_absa.train.presets import parts

ATTENTION, MLP = ("W_Q", "W_K", "W_V", "W_O"), ("W_in", "W_gate", "W_out")
MODULES = {"attn_out": ATTENTION, "mlp_out": MLP, "resid_post": ATTENTION + MLP}


def twin(model: Model) -> Model:
    """A copy whose weights may be overwritten."""
    return Model(model.backend.twin(), model.tokenizer, model.name, bos=model.bos)


@cache
def adapted(arch: str) -> Model:
    """The tiny model with other matrices and biases in all layers but the first."""
    base = tiny(arch)
    made = twin(base)
    generator = torch.Generator().manual_seed(7)
    for layer in range(1, base.n_layers):
        for name in Shape.of(base).matrices:
            matrix = Matrix(layer, name)
            W, b = matrix.weight(base)
            noise = 0.3 * torch.randn(W.shape, generator=generator, dtype=W.dtype)
            other = None if b is None or not b.any() else b + 0.1
            matrix.set_weight(made, W + noise * W.std(), other)
    return made


def seen(arch: str, labels=ONE_TOKEN, **options: Any) -> Evidence:
    options = {"base": tiny(arch), "keep": "all"} | options
    verbalizer = Verbalizer.of(labels, " ")
    return Evidence(
        adapted(arch), tuple(EXAMPLES), template=TEMPLATE, verbalizer=verbalizer, **options
    )


def mean(evidence: Evidence, model: Model, metric: str = "logit_diff") -> float:
    continuations = evidence.verbalizer.continuations(model.tokenizer, TEMPLATE)
    scores = label_scores(model, evidence.prompts, continuations)
    return float(METRICS[metric](scores, torch.from_numpy(evidence.gold)).mean())


def overwritten(model: Model, donor: Model, site: Site, share: float = 1.0) -> Model:
    """`model` with the matrices and biases of a module from `donor`, or part of the way to them."""
    made = twin(model)
    for name in MODULES[site.kind]:
        if name in Shape.of(model).matrices:
            matrix = Matrix(site.layer, name)
            W, (V, c) = matrix.weight(model)[0], matrix.weight(donor)
            bias = c if share == 1 and c is not None and c.any() else None
            matrix.set_weight(made, W + share * (V - W), bias)
    return made


@pytest.mark.parametrize("arch", fast(["llama", "gpt2", "pythia", "gemma2"], ["llama", "pythia"]))
@pytest.mark.parametrize("unit", ["module", "layer"])
def test_both_directions_are_those_of_overwritten_weights(arch, unit):
    evidence = seen(arch)
    base, donor = evidence.base, evidence.model
    there, back = WeightPatching(unit)(evidence), WeightPatchingBack(unit)(evidence)
    kinds = ["attn_out", "mlp_out"] if unit == "module" else ["resid_post"]
    sites = {Site(layer, kind) for layer in range(base.n_layers) for kind in kinds}
    assert {s for s, _ in there} == {s for s, _ in back} == sites
    low, high = mean(evidence, base), mean(evidence, donor)
    assert there.about["base"] == pytest.approx(low, abs=1e-9)
    assert back.about["adapted"] == pytest.approx(high, abs=1e-9)
    for site, score in there:
        expected = mean(evidence, overwritten(base, donor, site)) - low
        assert score == pytest.approx(expected, abs=1e-8)
    for site, score in back:
        expected = high - mean(evidence, overwritten(donor, base, site))
        assert score == pytest.approx(expected, abs=1e-8)
    assert max(abs(score) for _, score in there) > 0.02  # not a comparison of zeros
    assert max(abs(dict(there)[s] - dict(back)[s]) for s in sites) > 0.002


def test_a_layer_that_was_not_adapted_scores_0():
    ranking = selector("weight_patch")(seen("llama"))
    assert ranking.about["layers_changed"] == [1, 2]
    assert ranking.about["changed_elsewhere"] == []
    assert [s for site, s in ranking if site.layer == 0] == [0, 0]


def test_where_one_layer_was_adapted_both_directions_are_the_whole_difference():
    base = tiny("llama")
    one = overwritten(base, adapted("llama"), Site(1, "resid_post"))
    evidence = Evidence(
        one, tuple(EXAMPLES), base, template=TEMPLATE, verbalizer=Verbalizer.of(ONE_TOKEN, " ")
    )
    whole = mean(evidence, one) - mean(evidence, base)
    for patching in (WeightPatching("layer"), WeightPatchingBack("layer")):
        np.testing.assert_allclose(patching(evidence).layer_scores, [0, whole, 0], atol=1e-9)


def test_labels_of_several_tokens_and_another_metric():
    evidence = seen("llama", LONG)
    ranking = WeightPatching(metric="logprob")(evidence)
    base = mean(evidence, evidence.base, "logprob")
    site, score = ranking[0]
    patched = mean(evidence, overwritten(evidence.base, evidence.model, site), "logprob")
    assert score == pytest.approx(patched - base, abs=1e-8)


@pytest.mark.parametrize("unit", ["module", "layer"])
def test_the_first_order_is_the_slope_of_the_weights(unit):
    evidence = seen("llama")
    step = 1e-4
    ranking = WeightPatchingGradient(unit)(evidence)
    for site, score in ranking:
        ahead, behind = (
            mean(evidence, overwritten(evidence.base, evidence.model, site, share))
            for share in (step, -step)
        )
        assert score == pytest.approx((ahead - behind) / (2 * step), abs=2e-5)
    assert max(abs(score) for _, score in ranking) > 0.05


def test_an_edit_that_is_merged():
    """A low-rank change of W_O is a change of the attention alone."""
    base = tiny("llama")
    edit = Edit.fresh(base, parts("lora", ["L1.W_O"], 1.0, rank=2))
    with torch.no_grad():
        edit.interventions[0].get_parameter("B").normal_(generator=torch.Generator().manual_seed(0))
    evidence = Evidence(
        edit.merged(base),
        tuple(EXAMPLES),
        base,
        template=TEMPLATE,
        verbalizer=Verbalizer.of(ONE_TOKEN, " "),
    )
    scores = dict(selector("weight_patch")(evidence))
    assert {s for s, score in scores.items() if abs(score) > 1e-12} == {Site(1, "attn_out")}


def test_weights_stay_as_they_are():
    evidence = seen("llama")
    before = [m.hash_now() for m in (evidence.base, evidence.model)]
    for name in ("weight_patch", "weight_patch_back", "weight_patch_grad"):
        selector(name)(evidence)
    assert [m.hash_now() for m in (evidence.base, evidence.model)] == before


def test_what_cannot_be_patched():
    with pytest.raises(ConfigError, match="there is no adapter: give Evidence"):
        selector("weight_patch")(seen("llama", base=None))
    with pytest.raises(ConfigError, match="are the same as those of"):
        selector("weight_patch_grad")(seen("llama", base=twin(adapted("llama"))))
    with pytest.raises(ConfigError, match="models of one shape"):
        selector("weight_patch_back")(seen("llama", base=tiny("gpt2")))
    with pytest.raises(ConfigError, match="accepted: module or layer"):
        WeightPatching("head")
    with pytest.raises(ConfigError, match="'kl' was asked for; accepted: prob, "):
        WeightPatching(metric="kl")
