"""The planted circuits do what their closed form says, according to TransformerLens's own patching."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformer_lens import patching

from support import fast
from support.numpy_transformer import NumpyTransformer
from support.planted import Planted, planted_absa, random_planted

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head")


def sweep(planted: Planted, kind: str, denoise: bool = True) -> np.ndarray:
    """The map by transformer_lens.patching, one hooked forward a cell."""
    clean, corrupted = planted.prompts()
    if not denoise:
        clean, corrupted = corrupted, clean
    _, cache = planted.model.run_with_cache(clean)
    head = kind == "head"
    with torch.no_grad():
        result = patching.generic_activation_patch(
            planted.model,
            corrupted,
            cache,
            lambda logits: planted.metric(logits)[0],
            patch_setter=patching.layer_pos_head_vector_patch_setter
            if head
            else patching.layer_pos_patch_setter,
            activation_name="z" if head else kind,
            index_axis_names=("layer", "pos", "head") if head else ("layer", "pos"),
        )
    return result.numpy()


@pytest.fixture(scope="module", params=[False, True], ids=["linear", "dead-relu"])
def absa(request):
    return planted_absa(dead=request.param)


@pytest.mark.parametrize("kind", fast(KINDS, ["resid_post", "head"]))
def test_the_absa_map_is_exact(absa, kind):
    assert np.array_equal(sweep(absa, kind), absa.truth(kind))
    assert np.array_equal(1 - sweep(absa, kind, denoise=False), absa.truth(kind))


def test_the_absa_map_is_the_one_on_paper(absa):
    """The closed form itself, against the map written out by hand."""
    opinion, aspect, last = (absa.positions[role] for role in ("opinion", "aspect", "last"))
    on_paper = {
        "resid_pre": {(0, opinion), (1, aspect), (2, last)},
        "resid_mid": {(0, aspect), (1, last), (2, last)},
        "resid_post": {(0, aspect), (1, last), (2, last)},
        "attn_out": {(0, aspect), (1, last)},
        "mlp_out": {(2, last)},
        "head": {(0, aspect, 0), (1, last, 1)},
    }
    for kind, ones in on_paper.items():
        truth = absa.truth(kind)
        assert {
            tuple(map(int, cell)) for cell in np.argwhere(truth == 1)
        } == ones and truth.sum() == len(ones), kind


@pytest.mark.parametrize("seed", fast(range(12), range(1)))
@pytest.mark.slow
def test_random_maps_are_exact(seed):
    planted = random_planted(seed, dead=seed % 3 == 0)
    for kind in KINDS:
        assert np.array_equal(sweep(planted, kind), planted.truth(kind)), kind


def test_random_circuits_differ():
    circuits = [random_planted(seed) for seed in range(12)]
    assert len({c.steps for c in circuits}) == 12
    assert {len(c.steps) for c in circuits} >= {2, 3, 4}
    assert len({c.model.cfg.n_layers for c in circuits}) == 3


@pytest.mark.parametrize("planted", [planted_absa(), random_planted(3)], ids=["absa", "random"])
def test_decoys_are_busy(planted):
    """Every sublayer speaks, and speaks differently of the two prompts: an engine that mixes cells up would be seen."""
    clean, corrupted = (planted.model.run_with_cache(tokens)[1] for tokens in planted.prompts())
    first = min(planted.positions["opinion"], planted.positions["distractor"])
    for layer in range(planted.model.cfg.n_layers):
        for kind in ("z", "attn_out", "mlp_out"):
            change = (clean[kind, layer] - corrupted[kind, layer])[0].flatten(1).abs().amax(-1)
            assert clean[kind, layer].std() > 0.2
            assert not change[:first].any()
            assert (change[first:] > 1e-3).float().mean() > 0.6, (kind, layer)


def test_every_filler_gives_the_same_answer():
    planted = random_planted(5)
    clean, corrupted = planted.prompts(8)
    assert len({tuple(row) for row in clean.tolist()}) == 8
    assert planted.metric(planted.model(clean)).tolist() == [1.0] * 8
    assert planted.metric(planted.model(corrupted)).tolist() == [0.0] * 8
    assert planted.model(clean)[:, -1].argmax(-1).tolist() == [planted.labels[0]] * 8


def attribution(planted: Planted, kind: str, steps: int | None) -> np.ndarray:
    """First-order (steps None) or integrated-gradients estimate of every cell, from the oracle's definition: clean minus
    corrupted times the gradient at the corrupted value, or its mean over the midpoints of the straight path of that activation."""
    clean, corrupted = planted.prompts()
    name = {"head": "z"}.get(kind, kind)
    _, good = planted.model.run_with_cache(clean)
    _, bad = planted.model.run_with_cache(corrupted)
    out = np.zeros_like(planted.truth(kind))
    for layer in range(planted.model.cfg.n_layers):
        total = 0
        for alpha in [0.0] if steps is None else [(i + 0.5) / steps for i in range(steps)]:
            point = (
                (bad[name, layer] + alpha * (good[name, layer] - bad[name, layer]))
                .detach()
                .requires_grad_()
            )
            hook = f"blocks.{layer}.{'attn.' if kind == 'head' else ''}hook_{name}"
            logits = planted.model.run_with_hooks(
                corrupted, fwd_hooks=[(hook, lambda x, hook, point=point: point)]
            )
            total = total + torch.autograd.grad(planted.metric(logits).sum(), point)[0]
        out[layer] = (
            (total / (steps or 1) * (good[name, layer] - bad[name, layer])).sum(-1)[0].numpy()
        )
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_first_order_attribution_fails_on_the_dead_relu_and_integrated_gradients_do_not(kind):
    linear, dead = planted_absa(), planted_absa(dead=True)
    np.testing.assert_allclose(attribution(linear, kind, None), linear.truth(kind), atol=1e-6)
    np.testing.assert_allclose(attribution(dead, kind, None), dead.atp(kind), atol=1e-6)
    np.testing.assert_allclose(
        attribution(dead, kind, 2), dead.truth(kind), atol=1e-6
    )  # flat, then steep: half of the midpoints each
    assert dead.atp("resid_pre").sum() == 0 and dead.atp("mlp_out").sum() == 1


def test_the_numpy_oracle_finds_the_map_too():
    planted = planted_absa(dtype=torch.float64)
    oracle = NumpyTransformer(planted.model)
    clean, corrupted = (tokens[0].numpy() for tokens in planted.prompts())
    _, acts = oracle.run(clean)
    for kind in KINDS[:-1]:
        for layer, pos in np.ndindex(planted.truth(kind).shape):
            logits, _ = oracle.run(corrupted, do={(kind, layer, pos): acts[kind, layer][pos]})
            assert (
                planted.metric(torch.from_numpy(logits)[None]).item()
                == planted.truth(kind)[layer, pos]
            )
