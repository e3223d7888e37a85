"""RelP: rules by hand, values that stay, and a conservation law."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import fast
from support.estimates import make_job, of_kind, random_ids
from support.jobs import tiny
from support.tiny_models import ARCHITECTURES

from mech_absa.model import Model
from mech_absa.model.hooks import live_hooks
from mech_absa.patch import gradients
from mech_absa.patch.corruption import ZeroStates
from mech_absa.patch.gradients import Estimator
from mech_absa.patch.job import Job, Span
from mech_absa.patch.loop import states
from mech_absa.patch.request import DEFAULT_RULES, Method, Rule
from mech_absa.patch.rules import half_rule, identity_rule, relevance


def relp(job: Job, *rules: Rule) -> torch.Tensor:
    return gradients.sweep(job, how=Estimator(Method.RELP, rules=rules)).effect


@pytest.mark.parametrize("x", [-2.0, 0.5, 3.0])
def test_the_identity_rule_has_the_slope_of_the_secant_from_zero(x):
    """gelu(x) / x is the normal distribution function at x."""
    at = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    y = identity_rule(at, torch.nn.functional.gelu(at))
    y.backward()
    below = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(x, dtype=torch.float64))
    assert float(at.grad) == pytest.approx(float(below), abs=1e-5)
    assert float(y.detach()) == pytest.approx(x * float(below), abs=1e-9)


def test_the_half_rule_shares_the_gradient():
    """Of a b, the product rule gives b and a; half of each keeps the sum a (b/2) + b (a/2) = a b."""
    a, b = (torch.tensor([v], requires_grad=True) for v in (3.0, 5.0))
    half_rule(a * b).backward()
    assert (float(a.grad), float(b.grad)) == (2.5, 1.5)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_last_residual_stream_by_hand(arch):
    """Behind it stand the final norm, with its scale held, and two columns of the unembedding."""
    model = tiny(arch)
    job = make_job(model, *random_ids(model), ("resid_post",))
    top = model.n_layers - 1
    key = {(top, "resid_post")}
    base, source = (
        states(model, x, key)[1][top, "resid_post"][:, -1]
        for x in (job.base.inputs, job.source.inputs)
    )
    centre = (lambda y: y - y.mean(-1, keepdim=True)) if arch == "gpt2" else (lambda y: y)
    norm, W_U = model.hooked.ln_final, model.hooked.W_U
    scale = (centre(base).pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    columns = [ids[0] for _, ids in job.runs.continuation.labels]
    direction = W_U[:, columns[0]] - W_U[:, columns[1]]
    by_hand = (centre(source - base) / scale * norm.w) @ direction
    frozen = relp(job, Rule.LN)[top, -1]
    torch.testing.assert_close(frozen, by_hand, atol=1e-10, rtol=0)
    free = relp(job)[top, -1]  # without a rule this is AtP
    plain = gradients.sweep(job).effect[top, -1]
    assert torch.equal(free, plain) and (free - by_hand).abs().max() > 1e-3


def test_a_gated_mlp_by_hand():
    """At the last token: W_gate^T [linear act(gate) / gate] / 2 + W_in^T act(gate) / 2, through the norm."""
    model = tiny("llama")
    job = make_job(model, *random_ids(model), ("resid_mid",))
    top = model.n_layers - 1
    base, source = (
        states(model, x, {(top, "resid_mid")})[1][top, "resid_mid"][:, -1]
        for x in (job.base.inputs, job.source.inputs)
    )
    block, norm = model.hooked.blocks[top], model.hooked.ln_final
    mlp = block.mlp

    def scale(x: torch.Tensor, eps: float) -> torch.Tensor:
        return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    inside = base / scale(base, block.ln2.eps) * block.ln2.w
    gate, linear = inside @ mlp.W_gate, inside @ mlp.W_in
    act = torch.nn.functional.silu(gate)
    after = base + (act * linear + mlp.b_in) @ mlp.W_out + mlp.b_out
    columns = [ids[0] for _, ids in job.runs.continuation.labels]
    W_U = model.hooked.W_U
    wanted = (W_U[:, columns[0]] - W_U[:, columns[1]]) * norm.w / scale(after, norm.eps)
    hidden = wanted @ mlp.W_out.T
    back = (hidden * linear * act / gate / 2) @ mlp.W_gate.T + (hidden * act / 2) @ mlp.W_in.T
    relevances = wanted + back * block.ln2.w / scale(base, block.ln2.eps)
    by_hand = ((source - base) * relevances).sum(-1)
    torch.testing.assert_close(relp(job, *DEFAULT_RULES)[top, -1], by_hand, atol=2e-5, rtol=0)


@pytest.mark.parametrize("arch", fast(ARCHITECTURES, ["llama", "gemma2"]))
def test_values_stay_to_the_last_bit_and_no_hook_is_left(arch):
    model = tiny(arch)
    x = model.embed(random_ids(model)[0])
    with torch.no_grad():
        plain = model.hooked.forward(x, start_at_layer=0, return_type="logits")
        with relevance(model, tuple(Rule)):
            ruled = model.hooked.forward(x, start_at_layer=0, return_type="logits")
    assert torch.equal(plain, ruled)
    job = make_job(model, *random_ids(model), ("mlp_out", "head"))
    ours, theirs = relp(job, *Rule), gradients.sweep(job)
    assert bool(ours.isfinite().all()) and (ours - theirs.effect).abs().max() > 1e-4
    assert live_hooks(model.hooked) == [] and not any(m._forward_hooks for m in model.modules)


def whole(model: Model, job: Job) -> Job:
    """The same job, with the whole prompt as its one span."""
    spans = [[Span(tuple(range(p.length)), "template")] for p in job.runs.pairs]
    pairs = tuple(replace(p, first=0) for p in job.runs.pairs)
    return replace(job, spans=spans, runs=replace(job.runs, pairs=pairs))


def test_relevance_is_conserved_in_every_layer():
    """With all four rules, a model without biases is homogeneous: all of the stream carries all of the metric.

    Setting the whole stream to zero then takes away the metric itself, in every layer alike.
    """
    model = tiny("llama")
    ids = random_ids(model)[0]
    job = make_job(
        model, ids, ids.flip(1), ("resid_pre",), direction="noise", ablation=ZeroStates()
    )
    job = whole(model, job)
    found = gradients.sweep(job, how=Estimator(Method.RELP, rules=tuple(Rule)))
    scores = found.unpatched.base
    metric = scores[:, 0] - scores[:, 1]
    assert metric.abs().min() > 0.01
    everywhere = (-metric).expand(model.n_layers, -1)
    torch.testing.assert_close(found.effect[:, 0], everywhere, atol=1e-4, rtol=1e-4)
    loose = relp(job, Rule.IDENTITY, Rule.HALF, Rule.PATTERN)[:, 0]
    assert (loose - everywhere).abs().max() > 0.01  # a norm that is not held takes relevance away


def test_rules_leave_parts_without_them_alone():
    """relu has its own derivative under the identity rule, and a model without norms no scale to hold."""
    from support.estimates import linear_model

    model = linear_model()
    job = make_job(model, *random_ids(model), ("resid_pre", "head"))
    assert torch.equal(relp(job, Rule.LN, Rule.IDENTITY), gradients.sweep(job).effect)
    assert of_kind(job, relp(job, *DEFAULT_RULES), "head").abs().max() > 0
