"""Estimates against theorems, hand-worked softmaxes, planted circuits and the exact engine."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from support import fast
from support.estimates import (
    LABELS,
    P,
    exact,
    linear_model,
    make_job,
    of_kind,
    random_ids,
    small,
    tokens,
)
from support.planted import LOUDNESS, planted_absa
from support.tiny_models import ARCHITECTURES, tiny_folder

from mech_absa.errors import ConfigError, ModelError
from mech_absa.examples import Example
from mech_absa.metrics import get_metric
from mech_absa.model import Model, load_model
from mech_absa.model.hooks import intervene, live_hooks
from mech_absa.patch import gradients, loop
from mech_absa.patch.corruption import ZeroStates
from mech_absa.patch.gradients import METHODS, Estimator, agreement
from mech_absa.patch.job import Job, components, role_spans, token_spans
from mech_absa.patch.pairs import GaussianNoise, Pair, make_runs
from mech_absa.patch.request import SWEPT, Method
from mech_absa.prompts import Continuation
from mech_absa.sites import HEAD_KINDS, Site

STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head")


def nudged(job: Job, size: float) -> Job:
    """The same job with corrupted runs that are the clean ones plus a little noise everywhere."""
    noise = torch.randn(
        job.runs.clean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    pairs = tuple(replace(p, first=0) for p in job.runs.pairs)
    return replace(
        job, runs=replace(job.runs, pairs=pairs, corrupted=job.runs.clean + size * noise)
    )


def estimated(model: Model, job: Job, method: str = "atp", steps: int = 16, **more) -> torch.Tensor:
    return gradients.sweep(job, how=Estimator(Method(method), steps), **more).effect


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of an estimate from the exact effects, in units of their size."""
    return float((a - b).norm() / b.norm())


def some(job: Job, layers: str) -> Job:
    """Return the job of the first layer and the last, or of all layers; one head of each."""
    ends = (0, job.model.n_layers - 1)
    kept = [c for c in job.components if layers == "all" or c.layer in ends]
    return replace(job, components=[c for c in kept if c.head in (None, 1)])


in_layers = pytest.mark.parametrize("layers", fast(("ends", "all"), ("ends",)))


@cache
def tiny_double(arch: str) -> Model:
    return load_model(tiny_folder(arch), dtype="float64", device="cpu", check=False)


# ---- theorems -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", fast(["denoise", "noise"], ["denoise"]))
@pytest.mark.parametrize("by", fast([token_spans, role_spans], [role_spans]))
@pytest.mark.parametrize("method", METHODS)
def test_every_estimate_is_exact_on_a_linear_model(method, by, direction):
    model = linear_model()
    job = make_job(model, *random_ids(model), (*STREAM, "v"), direction=direction, by=by)
    truth = exact(model, job)
    assert truth.abs().max() > 0.5
    torch.testing.assert_close(estimated(model, job, method, steps=3), truth, atol=1e-10, rtol=0)


def test_a_foil_of_minus_one_is_the_mean_of_the_other_labels():
    model = linear_model()
    job = make_job(model, *random_ids(model), STREAM, foil=-1)
    torch.testing.assert_close(estimated(model, job), exact(model, job), atol=1e-10, rtol=0)


@pytest.mark.parametrize("arch", fast(["gpt2", "llama"], ["llama"]))
def test_integrated_gradients_are_complete_at_the_inputs(arch):
    model = tiny_double(arch)
    job = make_job(model, *random_ids(model), ("resid_pre",), metric="prob_label")
    scores = gradients.sweep(job).unpatched
    gold, foil = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    whole = job.metric(scores.clean, gold, foil) - job.metric(scores.corrupted, gold, foil)
    assert whole.abs().max() > 0.01
    gaps = [
        float((estimated(model, job, "ig", steps)[0].sum(0) - whole).norm() / whole.norm())
        for steps in (4, 16, 64)
    ]
    assert gaps[1] < gaps[0] and gaps[2] < gaps[1] / 4 and gaps[2] < 1e-2, gaps


@in_layers
@pytest.mark.parametrize("arch", fast(ARCHITECTURES, ["gemma2"]))
def test_atp_is_the_derivative_of_the_exact_effect(arch, layers):
    """The error of a first-order term falls with the square of the perturbation: halved, it is a quarter."""
    model = tiny_double(arch)
    kinds = [k for k in SWEPT if k in model.kinds]
    job = make_job(model, *random_ids(model, n=1, length=5), kinds, direction="noise")
    job = some(job, layers)
    truths = {size: exact(model, nudged(job, size)) for size in (1e-4, 5e-5)}
    errors = {}
    for method in ("atp", "atpstar"):
        for size, truth in truths.items():
            guess = estimated(model, nudged(job, size), method)
            for kind in kinds:
                errors[method, size, kind] = distance(
                    of_kind(job, guess, kind), of_kind(job, truth, kind)
                )
    assert max(errors.values()) < 0.01, errors
    for method in ("atp", "atpstar"):
        ratio = sum(errors[method, 1e-4, k] for k in kinds) / sum(
            errors[method, 5e-5, k] for k in kinds
        )
        assert 1.7 < ratio < 2.3, (method, ratio)  # relative to the effect, which itself is halved


@pytest.mark.parametrize("arch", fast(["gpt2", "qwen2", "bloom"], ["qwen2"]))
@pytest.mark.parametrize("method", ["atp", "ig"])
def test_heads_sum_to_their_attention(arch, method):
    """attn_out = sum of z_h W_O[h] + b: without a norm behind it, the estimates of the heads sum to that of attn_out."""
    model = tiny_double(arch)
    job = make_job(model, *random_ids(model), ("attn_out", "head"), metric="logprob")
    effect = estimated(model, job, method, steps=2)
    heads = of_kind(job, effect, "head").unflatten(0, (model.n_layers, model.n_heads)).sum(1)
    torch.testing.assert_close(heads, of_kind(job, effect, "attn_out"), atol=1e-12, rtol=1e-9)


def test_a_role_is_the_sum_of_its_tokens_and_a_window_the_sum_of_its_layers():
    model = tiny_double("gpt2")
    ids = random_ids(model, length=9)  # template stands twice
    single = make_job(model, *ids, ("mlp_out",))
    tokenwise = estimated(model, single)
    roles = make_job(model, *ids, ("mlp_out",), by=role_spans)
    wide = make_job(model, *ids, ("mlp_out",), window=3)
    rolewise, windows = estimated(model, roles), estimated(model, wide)
    for s, span in enumerate(roles.spans[0]):
        torch.testing.assert_close(rolewise[:, s], tokenwise[:, list(span.positions)].sum(1))
    torch.testing.assert_close(windows[1], tokenwise[0:3].sum(0))
    torch.testing.assert_close(windows[3], tokenwise[2:4].sum(0))
    assert any(len(span.positions) > 1 for span in roles.spans[0]) and windows.abs().max() > 0.01


# ---- planted circuits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", fast(STREAM, ["resid_mid", "mlp_out"]))
def test_on_the_dead_relu_atp_is_silent_and_integrated_gradients_are_right(kind):
    planted = planted_absa(dead=True, dtype=torch.float64)
    model = Model(planted.model, None, "planted", bos=False)
    clean, corrupted = planted.prompts()
    job = make_job(model, clean, corrupted, (kind,), labels=planted.labels)

    def as_map(effect: torch.Tensor) -> np.ndarray:
        effect = effect[:, :, 0] / (4 * LOUDNESS)  # 0 in the corrupted run, 1 in the clean one
        if kind == "head":
            return effect.unflatten(0, (3, 2)).transpose(1, 2).numpy()
        return effect.numpy()

    truth, silent = planted.truth(kind), planted.atp(kind)
    assert kind == "mlp_out" or silent.sum() < truth.sum()
    np.testing.assert_allclose(as_map(exact(model, job)), truth, atol=1e-12)
    np.testing.assert_allclose(as_map(estimated(model, job, "atp")), silent, atol=1e-12)
    np.testing.assert_allclose(as_map(estimated(model, job, "ig", steps=16)), truth, atol=1e-12)
    odd = np.abs(
        as_map(estimated(model, job, "ig", steps=5)) - truth
    ).max()  # the midpoint on the kink counts as flat
    assert odd <= 1 / 5 + 1e-12


# ---- the query and key correction -------------------------------------------------------------------------------------------------


@cache
def readout() -> Model:
    """One head reads dimension 0 into the labels. Queries come from dimension 1, keys from dimension 2; the word decides all three.

    Words: 10 = (0, 1, 0), 11 = (0, 1, ln 3), 12 = (1, 1, 0), 13 = (1, 1, 20), 14 = (1, 2, 0), as (value, query, key).
    """
    hooked = small(n_layers=1, n_heads=1, d_model=4, d_head=1)
    with torch.no_grad():
        table = {
            10: (0, 1, 0),
            11: (0, 1, math.log(3)),
            12: (1, 1, 0),
            13: (1, 1, 20),
            14: (1, 2, 0),
        }
        for word, values in table.items():
            hooked.embed.W_E[word, :3] = torch.tensor(values, dtype=torch.float64)
        attn = hooked.blocks[0].attn
        attn.W_V[0, 0, 0] = attn.W_Q[0, 1, 0] = attn.W_K[0, 2, 0] = attn.W_O[0, 0, 3] = 1
        hooked.unembed.W_U[3, LABELS[0]] = 1
    return Model(hooked, None, "readout", bos=False)


def words(*ids: int) -> torch.Tensor:
    return torch.tensor([ids])


@pytest.mark.parametrize(
    ("base", "source", "kind", "position", "linear", "right"),
    [
        # Two equal scores: the last token's own weight is 1/2. A key of ln 3 at the first token takes it to 1/(1+3).
        ((10, 12), (11, 12), "k", 0, -math.log(3) / 4, -1 / 4),
        ((10, 12), (11, 12), "resid_pre", 0, -math.log(3) / 4, -1 / 4),
        # Scores ln 3 and 0: the weight is 1/4. A query of 2 doubles them: 1/(1+9).
        ((11, 12), (11, 14), "q", 1, -math.log(3) * 3 / 16, 1 / 10 - 1 / 4),
        # Saturated: scores 0 and 20. Taking the key back to 0 takes the weight from 1 to 1/2, of which the gradient knows nothing.
        (
            (10, 13),
            (10, 12),
            "k",
            1,
            -20 * math.exp(-20) / (1 + math.exp(-20)) ** 2,
            1 / 2 - 1 / (1 + math.exp(-20)),
        ),
    ],
    ids=["key", "stream", "query", "saturated"],
)
def test_atpstar_takes_the_softmax_exactly(base, source, kind, position, linear, right):
    model = readout()
    job = make_job(model, words(*source), words(*base), (kind,))
    assert float(exact(model, job)[0, position]) == pytest.approx(right, abs=1e-12)
    assert float(estimated(model, job, "atpstar")[0, position]) == pytest.approx(right, abs=1e-12)
    assert float(estimated(model, job, "atp")[0, position]) == pytest.approx(linear, abs=1e-12)


@pytest.mark.parametrize("by", [token_spans, role_spans])
@pytest.mark.parametrize("arch", fast(["gpt2", "llama", "mistral", "bloom", "gptj"], ["llama"]))
def test_atpstar_is_exact_for_queries_and_keys_where_only_the_softmax_bends(arch, by):
    """The last attention of a real architecture, with what follows made linear: no last norm, and an MLP that writes nothing."""
    folder = tiny_folder(arch)
    model = load_model(folder, dtype="float64", device="cpu", check=False)
    mlp = model.hooked.blocks[-1].mlp
    mlp.W_out.zero_()
    model.hooked.ln_final = torch.nn.Identity()
    model.cfg.normalization_type = (
        None if model.cfg.normalization_type is None else model.cfg.normalization_type
    )
    job = make_job(model, *random_ids(model, length=8), ("q", "k", "v"), by=by)
    job = replace(job, components=[c for c in job.components if c.layer == model.n_layers - 1])
    truth = exact(model, job)
    assert of_kind(job, truth, "k").abs().max() > 0.1
    torch.testing.assert_close(estimated(model, job, "atpstar"), truth, atol=1e-10, rtol=1e-9)
    assert distance(estimated(model, job, "atp"), truth) > 0.05


@pytest.mark.parametrize("arch", fast(["gpt2", "gemma2", "pythia"], []))
def test_atpstar_ranks_saturated_queries_and_keys_better_than_atp(arch):
    """Queries and keys are what the correction is exact about. States of the stream pass through further attentions, which stay linear, so
    there a better ranking is no theorem (on a random GPT-2 with sharp attention AtP ranked them better)."""
    model = load_model(tiny_folder(arch), dtype="float64", device="cpu", check=False)
    for block in model.hooked.blocks:
        block.attn.W_Q.mul_(4.0)
    job = make_job(model, *random_ids(model, n=2), ("q", "k"))
    truth = exact(model, job)
    star, plain = (
        agreement(truth.flatten(), estimated(model, job, method).flatten(), k=10)
        for method in ("atpstar", "atp")
    )
    assert star["spearman"] > plain["spearman"], (star, plain)


def test_what_enters_after_the_last_block_has_nothing_to_correct():
    model = tiny_double("llama")
    job = make_job(model, *random_ids(model), ("resid_pre", "resid_post", "attn_out", "head"))
    last = [c.layer == model.n_layers - 1 and c.kind != "resid_pre" for c in job.components]
    plain, star = estimated(model, job, "atp"), estimated(model, job, "atpstar")
    assert torch.equal(plain[last], star[last])
    assert distance(star[[not x for x in last]], plain[[not x for x in last]]) > 0.01


# ---- every model, every metric ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["prob", "prob_label", "logprob", "logit_diff", "kl"])
@pytest.mark.parametrize("direction", fast(["denoise", "noise"], ["noise"]))
def test_every_metric_is_differentiated_in_both_directions(metric, direction):
    """At the clean run kl has its maximum and no slope: first-order estimates of `noise` are silent about it."""
    model = tiny_double("llama")
    job = make_job(
        model,
        *random_ids(model, length=6),
        ("resid_post", "mlp_out"),
        metric=metric,
        direction=direction,
    )
    if metric == "kl" and direction == "noise":
        assert estimated(model, job).abs().max() < 1e-12 and exact(model, job).abs().max() > 0.01
        return
    near = replace(
        job,
        runs=replace(
            job.runs, corrupted=job.runs.clean + 0.002 * (job.runs.corrupted - job.runs.clean)
        ),
    )
    if (
        metric == "kl"
    ):  # second order in what is left of the difference, so the slope at its end is twice the mean slope
        assert float(estimated(model, near).sum() / exact(model, near).sum()) > 1
        return
    assert distance(estimated(model, near), exact(model, near)) < 0.01


@in_layers
@pytest.mark.parametrize("arch", fast(ARCHITECTURES, ["gpt2", "bloom"]))
def test_scores_are_those_of_the_exact_engine_and_zero_cells_are_zero(arch, layers):
    model = tiny_double(arch)
    kinds = [k for k in SWEPT if k in model.kinds]
    job = some(make_job(model, *random_ids(model), kinds, metric="prob", by=role_spans), layers)
    answers = loop.sweep(job)
    for method in METHODS:
        found = gradients.sweep(job, how=Estimator(method, 2))
        assert found.effect.shape == (len(job.components), job.n_spans, job.rows) and bool(
            found.effect.isfinite().all()
        )
        for name in ("base", "clean", "corrupted"):
            torch.testing.assert_close(
                getattr(found.unpatched, name), getattr(answers, name), atol=1e-12, rtol=0
            )
        assert found.effect[job.zero()].abs().max() == 0 and found.effect.abs().max() > 0


def test_rows_in_chunks_give_the_same_numbers_and_every_cell_is_ticked():
    model = tiny_double("llama")
    job = make_job(model, *random_ids(model, n=5), ("resid_pre", "head"))
    for method in METHODS:
        done: list[int] = []
        chunked = estimated(model, job, method, steps=2, memory=1, tick=done.append)
        torch.testing.assert_close(
            chunked, estimated(model, job, method, steps=2), atol=1e-12, rtol=0
        )
        assert len(done) == 5 and sum(done) == chunked.numel()


@pytest.mark.slow
def test_noise_draws_are_rows_of_their_own():
    model = tiny_double("gpt2")
    clean, _ = random_ids(model, n=2)
    pairs = [
        Pair(Example("a b", "a", P, (0, 1), id=str(i)), t := tokens(ids), t, 0, -1, GaussianNoise(draws=3), sigma=0.003)
        for i, ids in enumerate(clean)
    ]  # fmt: skip
    continuation = Continuation((), tuple((i, (t,)) for i, t in enumerate(LABELS)))
    for direction in ("denoise", "noise"):
        job = Job(
            model, make_runs(model, pairs, continuation), components(model, ("mlp_out", "v")), [token_spans(p) for p in pairs],
            get_metric("logit_diff"), direction,
        )  # fmt: skip
        assert job.rows == 6
        assert distance(estimated(model, job), exact(model, job)) < 0.02


def test_half_precision_stays_near():
    model, half = (
        tiny_double("gpt2"),
        load_model(tiny_folder("gpt2"), dtype="bfloat16", device="cpu", check=False),
    )
    ids = random_ids(model)
    for method in METHODS:
        job, coarse = (
            make_job(model, *ids, ("resid_pre", "head")),
            make_job(half, *ids, ("resid_pre", "head")),
        )
        found = estimated(half, coarse, method, steps=2)
        assert found.dtype == torch.float32
        assert distance(found.double(), estimated(model, job, method, steps=2)) < 0.15


def test_edits_on_the_model_are_in_force():
    """An edit that doubles an MLP doubles, in a linear model, what passes through it; AtP sees it, AtP* says that it cannot."""
    model = linear_model()
    job = make_job(model, *random_ids(model), ("resid_pre", "mlp_out"))
    plain = estimated(model, job)
    with intervene(model.hooked, {Site(1, "mlp_out"): lambda act: 2 * act}, times=None):
        edited, truth = estimated(model, job), exact_with_edit(model, job)
        with pytest.raises(ModelError, match="carries hooks"):
            gradients.sweep(job, how=Estimator(Method.ATPSTAR))
    torch.testing.assert_close(
        of_kind(job, edited, "resid_pre"), of_kind(job, truth, "resid_pre"), atol=1e-10, rtol=0
    )
    assert distance(edited, plain) > 0.1
    assert not live_hooks(model.hooked)


def exact_with_edit(model: Model, job: Job) -> torch.Tensor:
    with torch.no_grad():
        return exact(model, job)


# ---- ablations and refusals -----------------------------------------------------------------------------------------------------


def test_ablations_are_estimated_without_a_source_run():
    model = linear_model()
    clean, _ = random_ids(model)
    job = make_job(
        model,
        clean,
        clean.flip(1),
        (*STREAM, "v"),
        direction="noise",
        ablation=ZeroStates(),
    )
    job = replace(
        job, runs=replace(job.runs, pairs=tuple(replace(p, first=0) for p in job.runs.pairs))
    )
    found = gradients.sweep(job)
    torch.testing.assert_close(found.effect, exact(model, job), atol=1e-10, rtol=0)
    assert bool(found.unpatched.corrupted.isnan().all())
    with pytest.raises(ConfigError, match="an ablation has none; use --method atp"):
        gradients.sweep(job, how=Estimator(Method.IG))


def test_labels_that_need_several_runs_are_refused_by_name():
    model = tiny_double("gpt2")
    job = make_job(model, *random_ids(model), ("resid_pre",))
    longer = Continuation((9,), ((2, (9, 10)),))
    with pytest.raises(ConfigError, match=r"only '.+' .* single token"):
        gradients.sweep(replace(job, runs=make_runs(model, job.runs.pairs, longer)))
    known = tuple(replace(p, clean_scores=torch.zeros(4)) for p in job.runs.pairs)
    with pytest.raises(ConfigError, match=r"only .+, .+, .+ \(of 4\)"):
        gradients.sweep(replace(job, runs=replace(job.runs, pairs=known)))


# ---- agreement ------------------------------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    """Ranks of the estimate: 1 3 2 4 against 1 2 3 4, so rho = 1 - 6 (1 + 1) / (4 * 15) = 0.8; the two largest share one cell."""
    found = agreement(np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[0.0, 4.0], [1.0, 5.0]]), k=2)
    assert (
        found["spearman"] == pytest.approx(0.8)
        and found["spearman_low"] <= 0.8 <= found["spearman_high"]
    )
    assert found["top_k_overlap"] == 0.5 and found["mean_absolute_error"] == pytest.approx(1.5)
    assert found["pearson"] == pytest.approx(np.corrcoef([0, 1, 2, 3], [0, 4, 1, 5])[0, 1])
    assert (found["k"], found["n"]) == (2, 4)


def test_agreement_leaves_out_missing_cells_and_knows_no_rank_of_a_flat_map():
    nan = float("nan")
    found = agreement([0.0, 1.0, 2.0, nan], [0.0, 2.0, 4.0, 9.0], k=1)
    assert (
        found["n"] == 3
        and found["spearman"] == pytest.approx(1)
        and found["pearson"] == pytest.approx(1)
    )
    flat = agreement([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], k=1)
    assert (
        math.isnan(flat["spearman"])
        and math.isnan(flat["pearson"])
        and flat["top_k_overlap"] == pytest.approx(1 / 3)
    )


def test_head_kinds_are_summed_where_they_are_shared():
    """A key head of a grouped model serves several query heads; its estimate is one cell, not one for each of them."""
    model = tiny_double("llama")
    job = make_job(model, *random_ids(model), HEAD_KINDS)
    assert (
        sum(c.kind == "k" for c in job.components)
        == model.n_layers * model.n_kv_heads
        < model.n_layers * model.n_heads
    )
    near = nudged(job, 1e-4)
    assert (
        distance(
            of_kind(near, estimated(model, near, "atpstar"), "k"),
            of_kind(near, exact(model, near), "k"),
        )
        < 1e-3
    )
