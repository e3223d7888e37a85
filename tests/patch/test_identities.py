"""Equations that hold in every causal decoder, whatever its weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import fast
from support.jobs import (
    BLOCK,
    EXAMPLES,
    LONG,
    furthest,
    jobs,
    nothing_skipped,
    pairs_of,
    the_job,
    tiny,
)
from transformer_lens import HookedTransformer, HookedTransformerConfig

from mech_absa.examples import Example, Polarity
from mech_absa.metrics import get_metric
from mech_absa.model import Model
from mech_absa.model.hooks import intervene
from mech_absa.patch import loop, wave
from mech_absa.patch.job import Job, Span, components, token_spans
from mech_absa.patch.pairs import Counterfactual, GaussianNoise, Pair, Resample, make_runs
from mech_absa.prompts import Continuation, Tokenised
from mech_absa.sites import ROLES, Site

ENGINES = (loop, wave)
models = pytest.mark.parametrize("arch", fast(["gpt2", "pythia", "gemma2"], ["pythia"]))


def cells(job: Job, kind: str) -> list[int]:
    return [i for i, c in enumerate(job.components) if c.kind == kind]


@models
def test_corrupted_onto_corrupted_is_nothing(arch):
    model = tiny(arch)
    job = nothing_skipped(the_job(model, pairs_of(model, Counterfactual()), (*BLOCK, "head")))
    job = replace(job, runs=replace(job.runs, clean=job.runs.corrupted))
    slow, fast = (engine.sweep(job) for engine in ENGINES)
    assert torch.equal(
        slow.patched, slow.base.expand_as(slow.patched)
    )  # the very same numbers went in
    assert (fast.patched - fast.base).abs().max() < 1e-12  # other sums of the same numbers


@models
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_whole_stream_restored_is_the_other_run(arch, direction):
    """All positions of resid_pre at layer 0 (and of any layer, and of the last resid_post) carry everything."""
    model = tiny(arch)
    for job in jobs(
        model, pairs_of(model, GaussianNoise(draws=2), LONG), ("resid_pre", "resid_post"), direction
    ):
        if not job.runs.continuation.tokens:
            continue
        whole = [[Span(tuple(range(p.length)), "template")] for p in job.runs.pairs]
        job = replace(job, spans=whole)
        for engine in ENGINES:
            got = engine.sweep(job)
            other = got.clean if direction == "denoise" else got.corrupted
            assert (got.base - other).abs().max() > 0.1
            # Label tokens come after the prompt and read its keys and values, so a later layer restores less than everything there.
            assert (got.patched[cells(job, "resid_pre")[0], 0] - other).abs().max() < 1e-10
    job = the_job(
        model, pairs_of(model, GaussianNoise(draws=2)), ("resid_pre", "resid_post"), direction
    )
    whole = [[Span(tuple(range(p.length)), "template")] for p in job.runs.pairs]
    job = replace(job, spans=whole)
    for engine in ENGINES:
        got = engine.sweep(job)
        other = got.clean if direction == "denoise" else got.corrupted
        assert (
            got.patched - other
        ).abs().max() < 1e-10  # every layer: nothing stands right of the prompt


@models
def test_after_a_block_is_before_the_next(arch):
    model = tiny(arch)
    job = the_job(model, pairs_of(model, Counterfactual()), ("resid_pre", "resid_post"))
    for engine in ENGINES:
        patched = engine.sweep(job).patched
        after, before = patched[cells(job, "resid_post")[:-1]], patched[cells(job, "resid_pre")[1:]]
        assert (after - before).abs().max() < 1e-11
        assert (after[0] - before[1]).abs().max() > 1e-3


@models
def test_nothing_happens_left_of_the_first_difference(arch):
    model = tiny(arch)
    job = the_job(model, pairs_of(model, Counterfactual()), (*BLOCK, "head"))
    skipped = {engine: engine.sweep(job) for engine in ENGINES}
    computed = {engine: engine.sweep(nothing_skipped(job)) for engine in ENGINES}
    firsts = [p.first for p in job.runs.pairs]
    assert max(firsts) > 2 and len(set(firsts)) > 1
    for b, first in enumerate(firsts):
        for engine in ENGINES:
            assert torch.equal(
                skipped[engine].patched[:, :first, b],
                skipped[engine].base[b].expand_as(skipped[engine].patched[:, :first, b]),
            )
            assert (
                (computed[engine].patched[:, :first, b] - computed[engine].base[b]).abs().max()
                < 1e-12
                if first
                else True
            )
            assert (
                computed[engine].patched[cells(job, "resid_pre")[0], first, b]
                - computed[engine].base[b]
            ).abs().max() > 1e-3


def test_a_block_is_the_sum_of_its_parts_at_the_last_token():
    """Nobody stands right of the last token, so restoring a block's input, attention and MLP there restores its output there."""
    for arch in ("gpt2", "gptj", "gemma2"):
        model = tiny(arch)
        job = the_job(
            model,
            pairs_of(model, Counterfactual()),
            ("resid_post", *(["resid_mid"] if not model.parallel else [])),
        )
        answers = wave.sweep(job)
        last = job.runs.length - 1
        _, clean = loop.states(
            model,
            job.runs.clean,
            {(m, k) for m in range(model.n_layers) for k in ("resid_pre", "attn_out", "mlp_out")},
        )
        for c, site in enumerate(job.components):
            parts = ["resid_pre", "attn_out"] + (["mlp_out"] if site.kind == "resid_post" else [])

            def put(key, clean=clean, last=last):
                return lambda x: torch.cat([x[:, :last], clean[key][:, last:]], 1)

            with (
                torch.inference_mode(),
                intervene(model.hooked, {Site(site.layer, k): put((site.layer, k)) for k in parts}),
            ):
                stream = model.hooked.forward(
                    job.runs.corrupted, start_at_layer=0, stop_at_layer=model.n_layers
                )[:, -1]
            ids = torch.tensor([ids[0] for _, ids in job.runs.continuation.labels])
            torch.testing.assert_close(
                answers.patched[c, last], model.finish(stream, ids, "labels"), atol=1e-10, rtol=0
            )


def native(seed: int = 0) -> Model:
    """No norms, parallel blocks: the last block's attention reaches the logits by addition alone."""
    torch.manual_seed(seed)
    cfg = HookedTransformerConfig(
        n_layers=2, n_heads=3, d_model=12, d_head=4, d_mlp=20, n_ctx=7, d_vocab=11, act_fn="gelu", normalization_type=None,
        parallel_attn_mlp=True, dtype=torch.float64, device="cpu", init_weights=False,
    )  # fmt: skip
    model = HookedTransformer(cfg, move_to_device=False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return Model(model.double(), None, "native")


def test_heads_sum_to_their_attention_where_the_read_out_is_linear():
    model = native()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 2, 9, 4, 5, 10, 7]])
    tokens = [Tokenised(row[None], torch.full((1, 7), ROLES.index("before")), (7,)) for row in ids]
    pair = Pair(
        Example("a sentence", "sentence", Polarity.POSITIVE, (2, 10)),
        tokens[0],
        tokens[1],
        0,
        1,
        Counterfactual(),
        first=2,
    )
    runs = make_runs(model, [pair], Continuation((), ((0, (4,)), (1, (8,)))))
    job = Job(
        model,
        runs,
        components(model, ["attn_out", "head"]),
        [token_spans(pair)],
        get_metric("logit_diff"),
    )
    for engine in ENGINES:
        answers = engine.sweep(job)
        effect = (answers.patched - answers.base)[:, -1, 0]
        heads = [i for i in cells(job, "head") if job.components[i].layer == 1]
        whole = [i for i in cells(job, "attn_out") if job.components[i].layer == 1]
        assert len(heads) == 3 and effect[heads].abs().min() > 1e-3
        torch.testing.assert_close(effect[heads].sum(0), effect[whole[0]], atol=1e-12, rtol=0)
        lower = [i for i in cells(job, "head") if job.components[i].layer == 0]
        assert (
            effect[lower].sum(0) - effect[cells(job, "attn_out")[0]]
        ).abs().max() > 1e-4  # below, a gelu stands between: no such law


@models
@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, ids=["loop", "wavefront"])
def test_pairs_do_not_feel_their_companions(arch, engine):
    """The three short pairs in another order, and each by itself: the same numbers in other places."""
    model = tiny(arch)
    corruption = GaussianNoise(draws=2)
    kinds = ("resid_pre", "attn_out", "head")
    together = engine.sweep(
        the_job(model, pairs_of(model, corruption, LONG), kinds)
    ).patched.unflatten(2, (3, 2))
    pairs = pairs_of(model, corruption, LONG)  # the noise was measured on all of them
    turned = replace(pairs, items=tuple(pairs.items[i] for i in (2, 0, 1)))
    got = engine.sweep(the_job(model, turned, kinds)).patched.unflatten(2, (3, 2))
    torch.testing.assert_close(got, together[:, :, [2, 0, 1]], atol=1e-10, rtol=0)
    alone = engine.sweep(the_job(model, replace(pairs, items=pairs.items[1:2]), kinds)).patched
    torch.testing.assert_close(alone, together[:, :, 1], atol=1e-10, rtol=0)
    assert (together[:, :, 0] - together[:, :, 1]).abs().max() > 0.1


def test_no_noise_has_no_effect():
    model = tiny("gpt2")
    pairs = pairs_of(model, GaussianNoise(scale=0.0, draws=3))
    assert pairs.sigma == 0 and pairs.draw_sd == pytest.approx(0, abs=1e-15)
    for direction in ("denoise", "noise"):
        for engine in ENGINES:
            answers = engine.sweep(the_job(model, pairs, BLOCK, direction))
            assert (answers.clean - answers.corrupted).abs().max() < 1e-12
            assert torch.equal(answers.patched, answers.base.expand_as(answers.patched))


@pytest.mark.slow
def test_a_pair_and_its_edit_exchange_roles():
    """Breaking a with b is restoring in the pair (b, a): the two directions are one computation with the runs exchanged."""
    model = tiny("llama")
    job = the_job(
        model, pairs_of(model, Counterfactual(), examples=EXAMPLES[:2]), (*BLOCK, "head"), "noise"
    )
    turned = replace(
        job,
        direction="denoise",
        runs=replace(job.runs, clean=job.runs.corrupted, corrupted=job.runs.clean),
    )
    for engine in ENGINES:
        a, b = engine.sweep(job), engine.sweep(turned)
        torch.testing.assert_close(a.patched, b.patched, atol=1e-11, rtol=0)
        torch.testing.assert_close(a.clean, b.corrupted, atol=1e-11, rtol=0)


def test_ablations_have_one_direction_and_no_corrupted_run():
    model = tiny("gpt2")
    pairs = pairs_of(model, Resample())
    a, b = (the_job(model, pairs, ("resid_pre",), direction) for direction in ("denoise", "noise"))
    assert a.direction == b.direction == "noise"
    answers = [engine.sweep(a) for engine in ENGINES]
    assert all(x.corrupted.isnan().all() and torch.equal(x.base, x.clean) for x in answers)
    assert furthest(*answers) < 1e-10
