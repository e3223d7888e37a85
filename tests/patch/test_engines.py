"""The wave is the loop: the same numbers for every architecture, kind, corruption, direction, window, metric and budget."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import fast
from support.jobs import BLOCK, EXAMPLES, LONG, ONE_TOKEN, furthest, jobs, pairs_of, the_job, tiny
from support.tiny_models import ARCHITECTURES
from torch.utils.flop_counter import FlopCounterMode

from mech_absa.errors import HookError, ModelError
from mech_absa.metrics import get_metric
from mech_absa.model import weights_hash
from mech_absa.model.hooks import intervene, live_hooks
from mech_absa.patch import loop, wave
from mech_absa.patch.job import Job, components, token_spans
from mech_absa.patch.pairs import (
    Counterfactual,
    GaussianNoise,
    MeanAblation,
    Resample,
    ZeroAblation,
    make_runs,
)
from mech_absa.patch.plan import plan
from mech_absa.patch.request import Request
from mech_absa.patch.wave.walk import Walk
from mech_absa.sites import Site

COMBINATIONS = {  # name: corruption, labels, kinds, direction, window, metric, spans, bytes in flight
    "noise restored": (GaussianNoise(draws=2), ONE_TOKEN, BLOCK, "denoise", 1, "logit_diff", "token", 1 << 20),
    "edit broken, long labels": (Counterfactual(), LONG, (*BLOCK, "head"), "noise", 1, "prob", "role", 1 << 14),
    "edit restored in a window": (Counterfactual(), LONG, BLOCK, "denoise", 3, "logprob", "token", 1),
    "mean of roles": (MeanAblation(), ONE_TOKEN, (*BLOCK, "head"), "denoise", 1, "kl", "role", 1 << 20),
    "noise on the question, broken": (GaussianNoise(draws=2, span="query"), LONG, BLOCK, "noise", 2, "prob_label", "role", 1 << 13),
    "another's states": (Resample(seed=3), ONE_TOKEN, ("resid_pre", "attn_out", "head"), "noise", 1, "logit_diff", "token", 1),
    "zero in every layer": (ZeroAblation(), LONG, BLOCK, "noise", 10, "logprob", "role", 1 << 20),
}  # fmt: skip


CORE = {  # every architecture once, every combination at least once
    "gpt2": "mean of roles",
    "llama": "another's states",
    "pythia": "edit broken, long labels",
    "gptj": "noise restored",
    "qwen2": "edit restored in a window",
    "mistral": "zero in every layer",
    "gemma2": "noise on the question, broken",
    "bloom": "noise restored",
}


def check_the_wave_is_the_loop(arch, name, examples):
    model = tiny(arch)
    corruption, labels, kinds, direction, window, metric, by, memory = COMBINATIONS[name]
    pairs = pairs_of(model, corruption, labels, examples)
    moved = 0.0
    for job in jobs(model, pairs, kinds, direction, window, metric, by):
        expected, got = loop.sweep(job), wave.sweep(job, memory=memory)
        assert expected.patched.dtype == torch.float64
        assert furthest(expected, got) < 1e-10
        moved = max(moved, float((expected.patched - expected.base).abs().max()))
    assert moved > 0.05  # two engines that do nothing would agree as well


@pytest.mark.parametrize("arch", fast(CORE, ["bloom", "llama"]))
def test_the_wave_is_the_loop(arch):
    check_the_wave_is_the_loop(arch, CORE[arch], EXAMPLES[:2])


def test_the_core_leaves_no_architecture_and_no_combination_out():
    assert set(CORE) == set(ARCHITECTURES) and set(CORE.values()) == set(COMBINATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_wave_is_the_loop_in_every_combination(arch, name):
    """With prompts of two lengths."""
    check_the_wave_is_the_loop(arch, name, EXAMPLES)


asked = given(
    arch=st.sampled_from(["gpt2", "gemma2", "gptj"]),
    corruption=st.one_of(
        st.builds(
            GaussianNoise,
            st.floats(0.5, 4),
            st.integers(1, 3),
            st.sampled_from(["all", "sentence", "aspect", "query"]),
            st.integers(0, 9),
        ),
        st.just(Counterfactual()),
        st.builds(MeanAblation, st.sampled_from(["role", "site"])),
        st.just(ZeroAblation()),
        st.builds(Resample, st.integers(0, 9)),
    ),
    labels=st.sampled_from([ONE_TOKEN, LONG]),
    kinds=st.sets(st.sampled_from([*BLOCK, "head"]), min_size=1, max_size=2),
    direction=st.sampled_from(["denoise", "noise"]),
    window=st.integers(1, 6),
    metric=st.sampled_from(["prob", "prob_label", "logprob", "logit_diff", "kl"]),
    by=st.sampled_from(["token", "role"]),
    memory=st.integers(1, 1 << 18),
)
drawn = partial(settings, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def check_whatever_is_asked(
    examples, arch, corruption, labels, kinds, direction, window, metric, by, memory
):
    model = tiny(arch)
    kinds = sorted(k for k in kinds if k in model.kinds) or ["resid_pre"]
    window = 1 if "head" in kinds else window
    pairs = pairs_of(model, corruption, labels, examples)
    for job in jobs(model, pairs, kinds, direction, window, metric, by):
        assert furthest(loop.sweep(job), wave.sweep(job, memory=memory)) < 1e-10


@pytest.mark.slow
@drawn(max_examples=10)
@asked
def test_the_wave_is_the_loop_whatever_is_asked(**question):
    check_whatever_is_asked(EXAMPLES[:2], **question)


@pytest.mark.slow
@drawn(max_examples=40)
@asked
def test_the_wave_is_the_loop_whatever_is_asked_of_prompts_of_two_lengths(**question):
    check_whatever_is_asked(EXAMPLES, **question)


@pytest.mark.slow
def test_some_layers_only():
    """A sweep of the last and a middle layer gives those rows of the whole one."""
    model = tiny("gpt2")
    pairs = pairs_of(model, Counterfactual(), LONG)
    whole = the_job(model, pairs, BLOCK)
    part = the_job(model, pairs, BLOCK)
    part = replace(part, components=[site for site in whole.components if site.layer in (1, 3)])
    index = [i for i, site in enumerate(whole.components) if site.layer in (1, 3)]
    for engine in (loop, wave):
        torch.testing.assert_close(
            engine.sweep(part).patched,
            engine.sweep(whole).patched[index],
            atol=1e-11,
            rtol=0,
        )


def test_both_engines_count_every_cell_once():
    model = tiny("llama")
    job = the_job(
        model, pairs_of(model, GaussianNoise(draws=2, span="query")), ("resid_pre", "mlp_out")
    )
    for engine in (loop, wave):
        told: list[int] = []
        engine.sweep(job, tick=told.append)
        assert sum(told) == len(job.components) * job.n_spans * job.rows == job.cells


@pytest.mark.parametrize("metric", ["logit_diff", "prob_label"])
def test_labels_of_one_token_and_of_two_are_compared_as_log_probabilities(metric):
    """A bare logit beside a summed log-probability would be a difference of unlike things."""
    model = tiny("gpt2")
    pairs = pairs_of(model, Counterfactual(), ("staff", "the staff", "was"), EXAMPLES[:2])
    for engine in ("loop", "wavefront"):
        made = plan(model, pairs, Request.parse(["mlp_out"], metric=metric, engine=engine))
        (got,) = made.measure(list(pairs), [token_spans(p) for p in pairs]).values()
        for b, p in enumerate(pairs):
            for scores, found in (
                (p.clean_scores, got.clean),
                (p.corrupted_scores[0], got.corrupted),
            ):
                odds = scores[p.gold] - (
                    scores[p.foil] if metric == "logit_diff" else scores.logsumexp(0)
                )
                assert float(found[b]) == pytest.approx(
                    float(odds if metric == "logit_diff" else odds.exp()), abs=1e-10
                )


# ---- memory ---------------------------------------------------------------------------------------------------------------------


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Spy:
    """Stands before the walk: notes how many rows each chunk has and lets the first `failures` attempts run out of memory."""

    def __init__(self, monkeypatch, failures=0, error=FULL):
        self.rows: list[int] = []
        walk = Walk.__call__

        def call(this, packed):
            self.rows.append(len(packed.rows))
            if len(self.rows) <= failures:
                raise error
            return walk(this, packed)

        monkeypatch.setattr(Walk, "__call__", call)


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
        ),
    ],
    ids=["accelerator", "cpu"],
)
def test_out_of_memory_halves_the_chunk_and_goes_on(monkeypatch, error):
    model = tiny("llama")
    job = the_job(model, pairs_of(model, Counterfactual()), BLOCK)
    expected = wave.sweep(job)
    spy = Spy(monkeypatch, 1, error)
    told: list[int] = []
    got = wave.sweep(job, tick=told.append)  # a budget far larger than the work
    whole, *rest = spy.rows
    assert sum(rest) == whole and len(rest) >= 2
    assert 0.3 * whole < rest[0] < 0.8 * whole  # half of the tokens
    assert sum(told) == job.zero().numel()
    assert furthest(expected, got) < 1e-10


def test_out_of_memory_ends_where_one_row_does_not_fit(monkeypatch):
    model = tiny("llama")
    job = the_job(model, pairs_of(model, Counterfactual()), ("resid_pre",))
    spy = Spy(monkeypatch, 1000)
    with pytest.raises(torch.OutOfMemoryError):
        wave.sweep(job)
    assert (
        2 < len(spy.rows) < 12
        and spy.rows == sorted(set(spy.rows), reverse=True)
        and spy.rows[-1] == 1
    )


def test_another_error_is_not_swallowed(monkeypatch):
    spy = Spy(monkeypatch, 1, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        wave.sweep(
            the_job(tiny("llama"), pairs_of(tiny("llama"), Counterfactual()), ("resid_pre",)),
        )
    assert len(spy.rows) == 1


def test_a_budget_of_one_token_runs_row_by_row_at_most_one_prompt_at_a_time(monkeypatch):
    model = tiny("gpt2")
    job = the_job(model, pairs_of(model, Counterfactual()), ("resid_mid",))
    spy = Spy(monkeypatch)
    wave.sweep(job, memory=1)
    computed = int((~job.zero()).sum())
    assert sum(spy.rows) == computed and len(spy.rows) > computed / 4


# ---- what is refused, and what the loop does with hooks ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_states_inside_the_attention_are_refused_by_name(kind):
    model = tiny("llama")
    job = the_job(model, pairs_of(model, Counterfactual()), ("resid_pre", kind))
    with pytest.raises(
        ModelError, match=rf"kind {kind} are inside the attention; use --engine loop"
    ):
        wave.sweep(job)
    assert wave.refusal(model, [Site(0, "resid_pre")]) is None


def test_a_model_with_a_live_hook_is_refused():
    model = tiny("llama")
    job = the_job(model, pairs_of(model, Counterfactual()), ("resid_pre",))
    with (
        intervene(model.hooked, {Site(1, "mlp_out"): lambda x: x}, times=None),
        pytest.raises(ModelError, match=r"hooks \(blocks\.1\.hook_mlp_out\)"),
    ):
        wave.sweep(job)
    wave.sweep(job)  # the hook is gone, and so is the refusal


@pytest.mark.slow
def test_the_loop_obeys_the_hooks_of_an_outer_context_and_leaves_them():
    """Scaling the mlp of layer 1 outside is the same as scaling its weights."""
    model = tiny("gpt2")
    job = the_job(model, pairs_of(model, Counterfactual()), ("resid_pre", "mlp_out", "head"))
    mlp = model.hooked.blocks[1].mlp
    with intervene(model.hooked, {Site(1, "mlp_out"): lambda x: 0.5 * x}, times=None):
        got = loop.sweep(job)
        assert live_hooks(model.hooked) == ["blocks.1.hook_mlp_out"]
    assert live_hooks(model.hooked) == []
    with torch.no_grad():
        kept = mlp.W_out.clone(), mlp.b_out.clone()
        try:
            mlp.W_out.mul_(0.5), mlp.b_out.mul_(0.5)
            expected = loop.sweep(job)
        finally:
            mlp.W_out.copy_(kept[0]), mlp.b_out.copy_(kept[1])
    assert furthest(expected, got) < 1e-11
    assert furthest(expected, loop.sweep(job)) > 0.01


def test_a_forward_pass_too_many_is_an_error_and_leaves_no_hook(monkeypatch):
    model = tiny("llama")
    job = the_job(model, pairs_of(model, Counterfactual()), ("resid_post",))
    forward = model.hooked.forward

    def twice(*args, **kwargs):
        forward(*args, **kwargs)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.hooked, "forward", twice)
    with pytest.raises(HookError, match=r"L0\.resid_post fired \[2\] times; planned was 1"):
        loop.sweep(job)
    assert live_hooks(model.hooked) == []


def test_no_hook_is_left_after_an_exception(monkeypatch):
    model = tiny("llama")
    job = the_job(model, pairs_of(model, Counterfactual()), ("resid_post",))
    forward, calls, seen = model.hooked.forward, [], []

    def fail_later(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            seen.extend(live_hooks(model.hooked))
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.hooked, "forward", fail_later)
    with pytest.raises(KeyboardInterrupt):
        loop.sweep(job)
    assert seen and live_hooks(model.hooked) == []


@pytest.mark.slow
def test_the_engines_write_into_nothing_they_were_given():
    """Inputs, weights and source states are the same bytes afterwards."""
    model = tiny("gemma2")
    job = the_job(model, pairs_of(model, Resample()), (*BLOCK, "head"))
    before, runs = weights_hash(model.hooked), (job.runs.clean.clone(), job.runs.corrupted.clone())
    loop.sweep(job), wave.sweep(job)
    assert weights_hash(model.hooked) == before
    assert torch.equal(job.runs.clean, runs[0]) and torch.equal(job.runs.corrupted, runs[1])


@pytest.mark.parametrize("arch", fast(["gpt2", "llama", "pythia"], ["llama"]))
def test_planned_flops_are_those_that_torch_counts(arch):
    model = tiny(arch)
    pairs = pairs_of(model, GaussianNoise(draws=2), examples=EXAMPLES[:1])
    kinds = [
        k for k in ("resid_pre", "resid_mid", "attn_out", "mlp_out", "head") if k in model.kinds
    ]
    for continuation in pairs.continuations[:2]:
        job = Job(
            model,
            make_runs(model, pairs.items, continuation),
            components(model, kinds),
            [token_spans(pairs[0])],
            get_metric("prob"),
        )
        with FlopCounterMode(display=False) as counted:
            answers = wave.sweep(job)
        assert answers.flops == counted.get_total_flops()
