"""Other people's numbers: transformer_lens.patching in float32, and a float64 numpy transformer with do()."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import fast
from support.jobs import (
    BLOCK,
    EXAMPLES,
    LONG,
    ONE_TOKEN,
    Expected,
    jobs,
    nothing_skipped,
    pairs_of,
    the_job,
    tiny,
    tiny32,
)
from support.numpy_transformer import NumpyTransformer
from support.tiny_models import ARCHITECTURES
from transformer_lens import patching

from mech_absa.patch import loop, wave
from mech_absa.patch.pairs import (
    Counterfactual,
    GaussianNoise,
    MeanAblation,
    Resample,
    ZeroAblation,
)

ENGINES = (loop, wave)


@pytest.mark.parametrize("arch", fast(["gpt2", "llama", "pythia", "gemma2", "qwen2"], ["llama"]))
def test_transformer_lens_patching_cell_by_cell(arch):
    model = tiny32(arch)
    pairs = pairs_of(model, Counterfactual(), examples=EXAMPLES[:2])
    job = the_job(model, pairs, ("resid_pre", "attn_out", "mlp_out", "head"))
    gold, foil = (torch.tensor([getattr(p, name) for p in pairs]) for name in ("gold", "foil"))
    found = [
        torch.stack(
            [job.metric(span, gold, foil) for cell in e.sweep(job).patched for span in cell]
        )
        for e in ENGINES
    ]
    found = [x.reshape(len(job.components), job.n_spans, len(pairs)) for x in found]
    labels = {index: ids[0] for index, ids in job.runs.continuation.labels}
    biggest = 0.0
    for b, pair in enumerate(pairs):
        _, cache = model.hooked.run_with_cache(pair.clean.ids)
        right, wrong = labels[pair.gold], labels[pair.foil]

        def metric(logits, right=right, wrong=wrong):
            return logits[0, -1, right] - logits[0, -1, wrong]

        with torch.no_grad():
            start = metric(model.hooked(pair.corrupted.ids))
            theirs = {
                kind: patch(model.hooked, pair.corrupted.ids, cache, metric)
                for kind, patch in (
                    ("resid_pre", patching.get_act_patch_resid_pre),
                    ("attn_out", patching.get_act_patch_attn_out),
                    ("mlp_out", patching.get_act_patch_mlp_out),
                    ("head", patching.get_act_patch_attn_head_out_by_pos),
                )
            }
        for c, site in enumerate(job.components):
            for pos in range(pair.length):
                want = theirs[site.kind][
                    (site.layer, pos) if site.head is None else (site.layer, pos, site.head)
                ]
                for ours in found:
                    assert abs(float(ours[c, pos, b] - want)) < 1e-4, (str(site), pos)
                biggest = max(biggest, abs(float(want - start)))
    assert biggest > 0.5


def errors(model, job, sources=None):
    expected = Expected(model, job, sources)
    return [expected.error(engine.sweep(job)) for engine in ENGINES]


def tolerance(arch: str) -> float:
    return (
        1e-7 if arch == "bloom" else 1e-10
    )  # TransformerLens writes Bloom's sqrt(2/pi) with eight digits


@pytest.mark.parametrize("n", fast((1, 2), (1,)))
@pytest.mark.parametrize("arch", fast(ARCHITECTURES, ["gemma2"]))
def test_numpy_do_gives_every_cell_of_a_counterfactual(arch, n):
    """All kinds, also the cells that no engine computes because their effect is zero for certain."""
    model = tiny(arch)
    job = the_job(model, pairs_of(model, Counterfactual(), examples=EXAMPLES[:n]), (*BLOCK, "head"))
    assert max(errors(model, job)) < tolerance(arch)


@pytest.mark.parametrize(
    ("arch", "direction"),
    [
        pytest.param("gptj", "denoise", marks=pytest.mark.slow),
        pytest.param("gpt2", "noise", marks=pytest.mark.slow),
        pytest.param("gemma2", "noise", marks=pytest.mark.slow),
    ],
)
def test_numpy_do_gives_noise_in_windows_with_long_labels(arch, direction):
    model = tiny(arch)
    pairs = pairs_of(model, GaussianNoise(draws=2, span="sentence"), LONG, EXAMPLES[1:3])
    for window, metric, kinds in (
        (1, "prob", ("resid_post", "head")),
        (3, "logprob", BLOCK),
        (4, "kl", ("attn_out", "mlp_out")),
    ):
        for job in jobs(model, pairs, kinds, direction, window, metric, by="role"):
            assert max(errors(model, job)) < tolerance(arch), (window, job.runs.continuation.tokens)


@pytest.mark.parametrize("arch", fast(["llama", "pythia"], ["llama"]))
def test_numpy_do_gives_queries_keys_and_values(arch):
    """By the loop only; grouped keys and values have fewer heads than queries."""
    model = tiny(arch)
    job = the_job(model, pairs_of(model, Counterfactual(), examples=EXAMPLES[:2]), ("q", "k", "v"))
    groups = {kind: 1 + max(c.head for c in job.components if c.kind == kind) for kind in "qkv"}
    assert groups == ({"q": 4, "k": 2, "v": 2} if arch == "llama" else {"q": 4, "k": 4, "v": 4})
    expected, got = Expected(model, job), loop.sweep(job)
    assert expected.error(got) < 1e-10
    assert all(
        np.abs(expected.patched[[c.kind == k for c in job.components]] - expected.base).max() > 0.01
        for k in "qkv"
    )


def acts_of(model, pairs):
    """For every pair (kind, layer) -> [pos ...] of its clean run, and its roles, by numpy alone."""
    oracle = NumpyTransformer(model.hooked)
    return [(oracle.run(p.clean.ids[0].tolist())[1], p.clean.roles[0].numpy()) for p in pairs]


def check_ablation(model, pairs, kinds, source):
    """`source(states, roles, key)` -> what each clean state is replaced by."""
    for job in jobs(model, pairs, kinds, by="role"):
        assert job.direction == "noise"
        here = [(acts, roles) for acts, roles in acts_of(model, job.runs.pairs)]
        sources = [{key: source(acts, roles, key) for key in acts} for acts, roles in here]
        assert max(errors(model, job, sources)) < 1e-10


@pytest.mark.parametrize("by", fast(["role", "site"], ["role"]))
@pytest.mark.slow
def test_mean_ablation_from_numpy(by):
    """Means over all tokens of all four clean prompts, those of other lengths included."""
    model = tiny("gpt2")
    pairs = pairs_of(model, MeanAblation(by))
    known = acts_of(model, pairs)
    role_of_all = np.concatenate([roles for _, roles in known])

    def source(acts, roles, key):
        pool = np.concatenate([other[key] for other, _ in known])
        return np.stack([pool[(role_of_all == r) | (by == "site")].mean(0) for r in roles])

    check_ablation(model, pairs, ("resid_mid", "mlp_out", "head"), source)


@pytest.mark.parametrize("n", fast((2, 4), (2,)))
@pytest.mark.slow
def test_zero_ablation_from_numpy(n):
    model = tiny("gemma2")
    check_ablation(
        model,
        pairs_of(model, ZeroAblation(), examples=EXAMPLES[:n]),
        ("resid_pre", "attn_out", "head"),
        lambda acts, roles, key: 0 * acts[key],
    )


def test_resampling_from_numpy():
    """Two examples of unlike length are each other's partner; a role counts from its right end, and one the partner lacks stays."""
    model = tiny("llama")
    pairs = pairs_of(model, Resample(), ONE_TOKEN, [EXAMPLES[1], EXAMPLES[3]])
    known = acts_of(model, pairs)

    def source(acts, roles, key):
        ((other, theirs),) = [(a, r) for a, r in known if len(r) != len(roles)]
        out = acts[key].copy()
        for i, r in enumerate(roles):
            where = np.flatnonzero(theirs == r)
            if len(where):
                out[i] = other[key][
                    where[max(0, len(where) - 1 - int((roles[i + 1 :] == r).sum()))]
                ]
        assert any(r not in theirs for r in roles) == (
            len(roles) > 12
        )  # nothing follows the aspect of the short one
        return out

    check_ablation(model, pairs, ("resid_post", "attn_out", "head"), source)


@pytest.mark.slow
def test_the_zero_cells_are_zero_by_do():
    """The mask itself: what it marks has no effect in numpy, and it is not merely empty or full."""
    model = tiny("mistral")
    job = the_job(model, pairs_of(model, Counterfactual(), LONG), (*BLOCK, "head"))
    zero = job.zero().numpy()
    effect = np.abs(Expected(model, job).patched - Expected(model, job).base).max(-1)
    assert effect[zero].max() < 1e-12
    assert 0.2 < zero.mean() < 0.8
    assert (effect[~zero] > 1e-9).mean() > 0.6  # and little of what is computed is zero
    assert nothing_skipped(job).zero().numpy().sum() < zero.sum()
