"""Selectors of pruning, clusters and trained gates against other implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.jobs import EXAMPLES, ONE_TOKEN, TEMPLATE, tiny, tiny32

from mech_absa.errors import ConfigError
from mech_absa.prompts import Verbalizer
from mech_absa.scoring import label_scores
from mech_absa.select import Evidence, selector
from mech_absa.select import weights as pruning
from mech_absa.select.clusters import cluster_layers, linear_cka
from mech_absa.select.weights import structures
from mech_absa.sites import Site

LABELS = Verbalizer.of(ONE_TOKEN, " ")


def evidence(arch: str, **options) -> Evidence:
    return Evidence(
        tiny(arch), tuple(EXAMPLES), template=TEMPLATE, verbalizer=LABELS, keep="all", **options
    )


@pytest.fixture(scope="module")
def gpt2():
    """The evidence, and gradients of each example by autograd through TransformerLens itself."""
    seen = evidence("gpt2")
    hooked = seen.model.hooked
    ids = [i for _, (i,) in LABELS.continuations(seen.model.tokenizer, TEMPLATE)[0].labels]
    names = ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out")
    weights = {
        (layer, name): block.get_parameter(name)
        for layer, block in enumerate(hooked.blocks)
        for name in names
    }
    each = []
    try:
        for w in weights.values():
            w.requires_grad_(True)
        for prompt, gold in zip(seen.prompts, seen.gold, strict=True):
            logits = hooked(prompt.ids)[0, -1, ids]
            loss = -torch.log_softmax(logits, 0)[int(gold)]
            each.append(torch.autograd.grad(loss, list(weights.values())))
    finally:
        for w in weights.values():
            w.requires_grad_(False)
    first = {k: torch.stack([g[i] for g in each]).mean(0) for i, k in enumerate(weights)}
    second = {k: torch.stack([g[i] ** 2 for g in each]).mean(0) for i, k in enumerate(weights)}
    S = {k: w.detach() * first[k] for k, w in weights.items()}
    A = {k: w.detach() ** 2 * second[k] for k, w in weights.items()}
    return seen, S, A


def reduced(values, site: Site, reduce):
    """A function of all weights of a structure, in TransformerLens's layout."""
    if site.head is None:
        parts = [values[site.layer, "mlp.W_in"], values[site.layer, "mlp.W_out"]]
    else:
        parts = [values[site.layer, f"attn.W_{m}"][site.head] for m in "QKVO"]
    return float(reduce(torch.cat([p.flatten() for p in parts])))


def test_taylor_importance_is_that_of_autograd(gpt2):
    seen, S, A = gpt2
    first, second = (dict(selector(n)(seen)) for n in ("taylor1", "taylor2"))
    assert len(first) == seen.model.n_layers * (seen.model.n_heads + 1)
    for site in first:
        expected = reduced(S, site, lambda x: x.abs().sum())
        assert first[site] == pytest.approx(expected, rel=1e-5)
        assert second[site] == pytest.approx(reduced(A, site, torch.sum), rel=1e-5)


def test_a_layers_score_is_the_sum(gpt2):
    ranking = selector("taylor1")(gpt2[0])
    own = [score for site, score in ranking if site.layer == 1]
    assert ranking.layer_scores[1] == pytest.approx(sum(own))


def test_saap_fuses_both_importances(gpt2):
    """The mean of the fused importances is the least that any two uncertainties give."""
    seen, S, _ = gpt2
    fused = dict(selector("saap")(seen))
    v = np.array([reduced(S, s, lambda x: x.sum().abs()) for s in fused])
    e = np.array([reduced(S, s, lambda x: x.abs().sum()) for s in fused])

    def by_hand(s_v, s_e):
        return v / (2 * s_v**2) + e / (2 * s_e**2) + np.log(s_v * s_e)

    best = by_hand(np.sqrt(v.mean()), np.sqrt(e.mean()))
    np.testing.assert_allclose(list(fused.values()), best, rtol=1e-4)
    for factor in (0.9, 1.1):
        assert best.mean() < by_hand(np.sqrt(v.mean()) * factor, np.sqrt(e.mean())).mean()
        assert best.mean() < by_hand(np.sqrt(v.mean()), np.sqrt(e.mean()) * factor).mean()


def test_fluctuation_is_over_channels(gpt2):
    seen, S, _ = gpt2
    found = dict(selector("fluctuation")(seen))
    head = Site(0, "head", 1)
    q, k, v, o = (S[0, f"attn.W_{m}"][1].abs() for m in "QKVO")
    channels = q.sum(0) + k.sum(0) + v.sum(0) + o.sum(1)
    assert found[head] == pytest.approx(float(channels.std(unbiased=False)), rel=1e-5)
    into, out = S[1, "mlp.W_in"].abs(), S[1, "mlp.W_out"].abs()
    channels = into.sum(0) + out.sum(1)
    expected = float(channels.std(unbiased=False))
    assert found[Site(1, "mlp_out")] == pytest.approx(expected, rel=1e-5)


def test_the_sum_of_S_is_the_slope_of_scaling_a_structure():
    """A gated MLP and shared keys: loss((1 + t) W) has the slope sum S at t = 0."""
    seen = evidence("llama")
    model = seen.model
    found = dict(structures(seen))
    continuations = LABELS.continuations(model.tokenizer, TEMPLATE)
    gold = torch.from_numpy(seen.gold)

    def loss() -> float:
        scores = label_scores(model, seen.prompts, continuations)
        return float(torch.nn.functional.cross_entropy(scores, gold))

    mlp = model.hooked.blocks[1].mlp
    weights = [mlp.W_in, mlp.W_gate, mlp.W_out]
    before = [w.clone() for w in weights]
    values = []
    for t in (1e-4, -1e-4):
        with torch.no_grad():
            for w, b in zip(weights, before, strict=True):
                w.copy_(b * (1 + t))
            values.append(loss())
            for w, b in zip(weights, before, strict=True):
                w.copy_(b)
    slope = (values[0] - values[1]) / 2e-4
    total = float(found[Site(1, "mlp_out")].first.sum())
    assert total == pytest.approx(slope, rel=1e-3, abs=1e-6)
    a, b = (found[Site(0, "head", h)].first for h in (0, 1))
    width = model.d_model  # W_Q, W_K, W_V and W_O of a channel have this many weights each
    assert model.n_kv_heads < model.n_heads
    torch.testing.assert_close(a[:, width : 3 * width], b[:, width : 3 * width])
    assert not torch.allclose(a[:, :width], b[:, :width])


def test_four_selectors_compute_the_gradients_once(monkeypatch):
    computed = []
    compute = pruning._gradients
    monkeypatch.setattr(pruning, "_gradients", lambda e: computed.append(e) or compute(e))
    seen, other = evidence("gpt2"), evidence("gpt2")
    for name in ("taylor1", "taylor2", "saap", "fluctuation"):
        selector(name)(seen)
    assert computed == [seen]
    selector("taylor1")(other)
    assert computed == [seen, other]


def test_gradients_leave_the_weights_alone():
    seen = evidence("llama")
    before = seen.model.hash_now()
    selector("taylor1")(seen)
    assert seen.model.hash_now() == before


# ---- clusters


def test_cka_by_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 3)), rng.normal(size=(12, 5))
    H = np.eye(12) - 1 / 12

    def hsic(a, b):
        return np.sum((H @ a @ a.T @ H) * (H @ b @ b.T @ H))

    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert linear_cka(x, y) == pytest.approx(expected)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    assert linear_cka(x, 5 * x @ turn + 2) == pytest.approx(1)
    assert linear_cka(x, np.ones((12, 2))) == 0


def test_neighbours_that_are_alike_are_merged():
    rng = np.random.default_rng(0)
    a, b, c = (rng.normal(size=(20, 4)) for _ in range(3))
    states = np.stack([a, a, b, b + 0.1 * c, b + 0.5 * c, c])
    assert cluster_layers(states, 6) == [(i,) for i in range(6)]
    assert cluster_layers(states, 5)[0] == (0, 1)
    assert cluster_layers(states, 4) == [(0, 1), (2, 3), (4,), (5,)]
    assert cluster_layers(states, 3) == [(0, 1), (2, 3, 4), (5,)]
    assert cluster_layers(states, 1) == [(0, 1, 2, 3, 4, 5)]
    with pytest.raises(ConfigError, match="7 clusters of 6 layers"):
        cluster_layers(states, 7)


def test_the_centres_are_the_place():
    seen = evidence("llama", width=2)
    ranking = selector("cka")(seen)
    centres = tuple(c[len(c) // 2] for c in ranking.about["clusters"])
    assert ranking.top_layers(2) == centres and len(centres) == 2


# ---- trained gates


@pytest.mark.parametrize("name", ["jola", "lofit"])
def test_gates_of_every_head_of_the_base(name):
    seen = Evidence(
        tiny32("llama"), tuple(EXAMPLES), template=TEMPLATE, verbalizer=LABELS, keep="all"
    )
    ranking = selector(name)(seen)
    model = seen.model
    heads = {Site(x, "head", h) for x in range(model.n_layers) for h in range(model.n_heads)}
    assert {s for s, _ in ranking} == heads
    assert all(score >= 0 for _, score in ranking)
    again = dict(selector(name)(seen))
    assert dict(ranking) == again  # the same seed, the same training


def test_lofit_scores_are_those_of_its_own_training():
    from mech_absa.train import LoFiT, lofit, presets

    seen = Evidence(
        tiny32("llama"), tuple(EXAMPLES), template=TEMPLATE, verbalizer=LABELS, keep="all"
    )
    usual = presets.bundled("L0.resid_post", "both", epochs=3)
    plan = LoFiT(heads=2, epochs=(3, 1), batch_size=usual.batch_size)
    first = plan.scales(plan.places(seen.model))
    edit = lofit(seen.model, EXAMPLES, plan, template=TEMPLATE, verbalizer=LABELS)
    assert edit.record.lofit is not None and len(first.parts) == len(edit.record.lofit.sizes)
    ours = {str(site): score for site, score in selector("lofit")(seen)}
    theirs = edit.record.lofit.sizes
    assert set(ours) == set(theirs)
    assert np.corrcoef([ours[k] for k in theirs], list(theirs.values()))[0, 1] > 0.9
