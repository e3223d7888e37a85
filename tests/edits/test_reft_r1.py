"""ReFT-r1: the formula by hand and in Hugging Face, which tokens count, the charge, and that the direction keeps its length."""

from __future__ import annotations

import math

import pytest
import torch
from support.edit_cases import hugging_face, logits, loud, prompts, tiny_model
from support.training_cases import EIGHT
from support.training_cases import TEMPLATE as QUESTION

from mech_absa.edits import Edit, Part, Shape
from mech_absa.edits.loreft import ReFTr1
from mech_absa.errors import ConfigError, EditError
from mech_absa.model.hooks import capture
from mech_absa.prompts import Continuation, Tokens
from mech_absa.scoring import extend
from mech_absa.sites import Site
from mech_absa.train import PrefixCache, Preset, fit, presets
from mech_absa.train.task import Task
from mech_absa.train.training import Training


@pytest.fixture
def llama():
    return tiny_model("llama")


def by_hand(k: int = 2, charge: float = 0.5) -> ReFTr1:
    part = ReFTr1(Site(0, "resid_post"), Shape(1, 2, 1, 1, 2, 2, True), k=k, charge=charge)
    with torch.no_grad():
        part.v.copy_(torch.tensor([3.0, 4.0]))  # the direction is (0.6, 0.8), whatever the length
    return part


H = torch.tensor([[[5.0, 5.0], [5.0, 0.0], [0.0, 10.0], [-5.0, 0.0], [0.0, 1.0]]])
"""Latents 7, 3, 8, 0 (of -3), 0.8."""


@pytest.mark.parametrize(
    "k, strength, others", [(1, 8.0, 10.8), (2, 7.5, 3.8), (4, 4.7, 0.0), (9, 3.76, 0.0)]
)
def test_the_formula_by_hand(k, strength, others):
    part, read = by_hand(k), torch.ones(1, 5, dtype=torch.bool)
    got = part.strength(H, read)
    assert [x.item() for x in got] == pytest.approx([strength, others / 5], abs=1e-5)
    torch.testing.assert_close(part(H), H + strength * torch.tensor([0.6, 0.8]))


def test_only_the_tokens_of_the_site_count():
    """The 8 is not read, so that the mean of the two largest is (7 + 3) / 2; a token that is not written stays."""
    part = by_hand()
    read = torch.tensor([[True, True, False, True, False]])
    assert [x.item() for x in part.strength(H, read)] == pytest.approx([5.0, 0.0])
    want = torch.where(read[..., None], H + torch.tensor([3.0, 4.0]), H)
    torch.testing.assert_close(part(H, read), want)
    assert torch.equal(part(H, torch.zeros_like(read)), H), "no token of a role is there"


@pytest.mark.parametrize("at", ["all", "query", "-1", None])
def test_it_equals_its_equation_in_hugging_face(llama, at):
    """Token by token, with the first one left alone; what is generated is written to only without a role."""
    edit = loud(llama, Part("reft_r1", "L1.resid_post" + (f"@{at}" if at else ""), {"k": 2}))
    (part,) = edit
    tokens = prompts(llama)[1]
    n = tokens.lengths[0]
    v = part.v.detach()
    assert v.norm().item() == pytest.approx(1, abs=1e-6)
    own = {"all": range(1, n), None: range(1, n), "-1": [n - 1]}
    read = list(own[at]) if at in own else tokens.positions("query")
    longer = extend(tokens, Continuation((5, 6), ()))

    def hook(module, args, out):
        h = (out if torch.is_tensor(out) else out[0]).clone()
        latents = sorted((max(0.0, float(h[0, t] @ v)) for t in read), reverse=True)[:2]
        for t in [*read, *((n, n + 1) if at is None else ())]:
            h[0, t] += sum(latents) / len(latents) * v
        return h if torch.is_tensor(out) else (h, *out[1:])

    hf = hugging_face("llama")
    handle = hf.model.layers[1].register_forward_hook(hook)
    with torch.no_grad():
        want = hf(longer.ids).logits
    handle.remove()
    torch.testing.assert_close(logits(llama, longer, edit), want, atol=2e-4, rtol=1e-4)


def test_the_gradient_has_no_part_along_the_direction(llama):
    edit = loud(llama, Part("reft_r1", "L1.resid_post@all", {"k": 3}))
    (part,) = edit
    tokens = Tokens.stack(prompts(llama))
    with edit.applied(llama, tokens):
        llama.forward(tokens.ids).log_softmax(-1)[:, -1, 7].sum().backward()
    g, v = part.v.grad, part.v.detach()
    assert float(g.norm()) > 1e-3 and abs(float(g @ v)) < 1e-4 * float(g.norm())


def test_the_charge_by_hand(llama):
    """From captured activations: c t times the mean over prompts of the latents that do not count, over their tokens."""
    c, k, preset = (
        0.7,
        2,
        Preset("p", (Part("reft_r1", "L1.resid_post@all", {"k": 2, "charge": 0.7}),)),
    )
    task = Task(llama, "labels", QUESTION, None, PrefixCache(llama))
    training = Training(task, preset.but(epochs=4, batch_size=8, accumulate=1), EIGHT)
    (part,) = training.edit
    group = [training.items]
    losses, grads = {}, {}
    for step in (0, 3):
        training.state.step = step
        training.edit.train()
        losses[step] = training._gradients(group)
        grads[step] = part.v.grad.clone()
    training.edit.eval()
    tokens = Tokens.stack([q.prompt for q in training.items])
    with torch.no_grad(), capture(llama, [Site(1, "resid_post")]) as seen:
        llama.forward(tokens.ids)
    others = []
    for row, n in zip(seen[Site(1, "resid_post")], tokens.lengths, strict=True):
        latents = sorted(float(x) for x in torch.relu(row[1:n] @ part.v.detach()))
        others.append(sum(latents[:-k]) / (n - 1))
    assert training.steps == 4
    want = c * (3 / 4) * sum(others) / len(others)
    assert losses[3] - losses[0] == pytest.approx(want, rel=1e-3) and want > 0.01
    assert not torch.allclose(grads[0], grads[3]), "the charge trains the direction"


def test_training_silences_what_does_not_count(llama):
    """A heavy charge against none; the direction has length 1 at the end, and it takes part in accumulation as in one batch."""
    silent = {}
    for charge in (0.0, 30.0):
        part = Part("reft_r1", "L1.resid_post@all", {"k": 1, "charge": charge}, 3e-2)
        preset = Preset("p", (part,), epochs=4, batch_size=4, schedule="constant")
        edit = fit(llama, EIGHT, preset, template=QUESTION)
        (trained,) = edit
        assert trained.v.norm().item() == pytest.approx(1, abs=1e-6)
        tokens = Tokens.stack(prompts(llama))
        with torch.no_grad(), capture(llama, [Site(1, "resid_post")]) as seen:
            llama.forward(tokens.ids)
        h = seen[Site(1, "resid_post")]
        silent[charge] = trained.strength(h, tokens.roles >= 0)[1].mean().item()
    assert silent[30.0] < 0.5 * silent[0.0]
    large, small = (
        fit(
            llama,
            EIGHT,
            preset.but(batch_size=size, accumulate=8 // size, epochs=2),
            template=QUESTION,
        )
        for size in (8, 2)
    )
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_it_is_a_preset_and_what_it_cannot_do(llama):
    made = presets.named("reft_r1", presets.range_sites("0-1"), Shape.of(llama))
    assert [p.place for p in made.parts] == ["L0.resid_post@all", "L1.resid_post@all"]
    edit = Edit.fresh(llama, made.parts)
    assert edit.n_parameters == 2 * llama.d_model
    with pytest.raises(EditError, match="depends on all tokens of a prompt"):
        edit.merged(llama)
    for options, words in [
        ({"k": 0}, "k is 0"),
        ({"charge": -1.0}, "charge is -1.0"),
        ({"charge": math.nan}, "charge is nan"),
    ]:
        with pytest.raises(ConfigError, match=words):
            Edit.fresh(llama, [Part("reft_r1", "L1.resid_post", options)])
