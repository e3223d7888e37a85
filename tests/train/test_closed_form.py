"""Closed-form edits of W_out: the formulas against numpy, and what they promise on tiny models."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support import fast
from support.tiny_models import tiny_folder
from support.training_cases import EIGHT, TEMPLATE

from mech_absa.edits import Edit, load_edit, save_edit
from mech_absa.edits.base import Matrix
from mech_absa.errors import ConfigError, EditError, SiteError
from mech_absa.evaluate import predict
from mech_absa.model import Model, load_model, weights_hash
from mech_absa.scoring import question
from mech_absa.train import MEMIT, ROME, AlphaEdit, closed_form
from mech_absa.train.closed_form import (
    alphaedit_update,
    memit_update,
    null_space,
    rome_update,
    second_moments,
    solve,
)
from mech_absa.train.facts import Aim, Facts, Target

QUICK = Target(steps=6)


def drawn(*sizes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=generator, dtype=torch.float64)


def moment(d: int) -> torch.Tensor:
    keys = drawn(40, d, seed=9)
    return keys.T @ keys / 40


# ---- the formulas ----------------------------------------------------------------------------------------------------------------


def test_rome_gives_the_value_exactly_and_changes_the_rest_least():
    """k W' = v, and of all W' with k W' = v it has the least tr((W' - W)^T C (W' - W)): numpy's solution of
    the Lagrange conditions 2 C D + k^T m = 0, k D = v - k W."""
    W, k, v, C = drawn(5, 3), drawn(5, seed=1), drawn(3, seed=2), moment(5)
    u = solve(C, k[:, None], "C")[:, 0]
    D = torch.outer(u, rome_update(k, v - k @ W, u))
    np.testing.assert_allclose(k @ (W + D), v, rtol=1e-12, atol=1e-12)
    assert int(torch.linalg.matrix_rank(D)) == 1
    conditions = np.block(
        [[2 * C.numpy(), k.numpy()[:, None]], [k.numpy()[None], np.zeros((1, 1))]]
    )
    right = np.vstack([np.zeros((5, 3)), (v - k @ W).numpy()[None]])
    np.testing.assert_allclose(D, np.linalg.solve(conditions, right)[:5], atol=1e-10)


def test_rome_by_hand():
    """k = (1, 2), u = k: u^T (v - k W) / 5, with W = 1 and v = (6, 2)."""
    k, W, v = torch.tensor([1.0, 2.0]), torch.eye(2), torch.tensor([6.0, 2.0])
    D = torch.outer(k, rome_update(k, v - k @ W, k))
    torch.testing.assert_close(D, torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    with pytest.raises(ConfigError, match="a product of 0"):
        rome_update(torch.zeros(2), v, k)


def test_memit_solves_its_normal_equations():
    """As the paper writes them, keys in columns: dW = R K^T (weight C + K K^T)^-1; and as least squares."""
    K, R, C, weight = drawn(4, 6), drawn(4, 3, seed=1), moment(6), 0.7
    D = memit_update(K, R, C, weight).numpy()
    columns, values = K.numpy().T, R.numpy().T
    A = weight * C.numpy() + columns @ columns.T
    np.testing.assert_allclose(D.T, np.linalg.solve(A, columns @ values.T).T, atol=1e-12)
    root = np.linalg.cholesky(weight * C.numpy()).T
    stacked = np.vstack([root, K.numpy()]), np.vstack([np.zeros((6, 3)), R.numpy()])
    np.testing.assert_allclose(D, np.linalg.lstsq(*stacked, rcond=None)[0], atol=1e-12)


def test_memit_by_hand():
    """One key k = (1, 0), C = diag(1, 1), weight 3: D = (3 + 1)^-1 k^T r."""
    D = memit_update(torch.tensor([[1.0, 0.0]]), torch.tensor([[8.0]]), torch.eye(2), 3.0)
    torch.testing.assert_close(D, torch.tensor([[2.0], [0.0]]))


def test_a_singular_moment_gets_a_sentence():
    C = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    with pytest.raises(ConfigError, match="C is singular for keys of 2 numbers"):
        solve(C, torch.ones(2, 1, dtype=torch.float64), "C")


def test_alphaedit_leaves_preserved_keys_alone():
    """C of rank 4 in 6 dimensions: keys in its span keep their values to the last digits, the facts move."""
    seen = drawn(30, 4) @ drawn(4, 6, seed=1)
    C = seen.T @ seen / 30
    P = null_space(C, 1e-8)
    assert int(torch.linalg.matrix_rank(P)) == 2
    torch.testing.assert_close(P @ P, P)
    K, R = drawn(2, 6, seed=2), drawn(2, 3, seed=3)
    D = alphaedit_update(K, R, P, 1e-7)
    assert float((seen @ D).abs().max()) < 1e-12
    torch.testing.assert_close(K @ D, R, atol=1e-5, rtol=1e-5)
    again = alphaedit_update(drawn(2, 6, seed=4), R, P, 1e-9, earlier=1e9 * K.T @ K)
    assert float((K @ again).abs().max()) < 1e-6, "facts that were written before are kept"


def test_alphaedit_is_ridge_regression_without_a_projector():
    K, R = drawn(4, 6), drawn(4, 3, seed=1)
    ridge = np.linalg.solve(K.numpy().T @ K.numpy() + 2.5 * np.eye(6), K.numpy().T @ R.numpy())
    np.testing.assert_allclose(
        alphaedit_update(K, R, torch.eye(6, dtype=torch.float64), 2.5), ridge, atol=1e-12
    )


@pytest.mark.parametrize("threshold, which", [(0.1, "none"), (9.0, "all")])
def test_a_threshold_that_keeps_everything_or_nothing(threshold, which):
    C = torch.diag(torch.tensor([0.5, 4.0]))
    with pytest.raises(
        ConfigError, match=rf"has {which} of the 2 .*; accepted: between 0\.5 and 4"
    ):
        null_space(C, threshold)


# ---- on models -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    """Llama's MLP is gated."""
    return load_model(tiny_folder("llama"))


def facts_of(model: Model, n: int = 8, at="query.last", by="example") -> Facts:
    return Facts.of(model, EIGHT[:n], at, by, template=TEMPLATE)


def passes(model: Model, edit: Edit | None, module: torch.nn.Module) -> list[torch.Tensor]:
    """What a module gives for each of EIGHT, in a hooked pass of its own."""
    found = []
    for example in EIGHT:
        tokens = question(model, example, TEMPLATE)
        with nullcontext() if edit is None else edit.applied(model, tokens):
            handle = module.register_forward_hook(lambda _, a, out: found.append(out.detach()[0]))
            model.hooked(tokens.ids)
            handle.remove()
    return found


def test_keys_and_moments_are_those_of_the_cache_of_transformerlens(model):
    facts, C = facts_of(model), second_moments(model, facts_of(model).prompts, [0, 2], batch_size=3)
    keys = facts.read({"k": Matrix(2, "W_out").reads(model)}, 3)["k"]
    rows = []
    for i, prompt in enumerate(facts.prompts):
        _, cache = model.hooked.run_with_cache(prompt.ids)
        post = cache["blocks.2.mlp.hook_post"][0].double()
        torch.testing.assert_close(
            keys[i], post[prompt.role_names.index("query.last")], atol=1e-5, rtol=1e-4
        )
        rows.append(post)
    every = torch.cat(rows)
    torch.testing.assert_close(C[2], every.T @ every / len(every), atol=1e-6, rtol=1e-4)
    classes = facts_of(model, by="class")
    mean = classes.read({"k": Matrix(2, "W_out").reads(model)}, 3)["k"]
    torch.testing.assert_close(mean[0], keys[[0, 4, 7]].mean(0))


def test_a_batch_of_facts_is_each_alone_and_adam_is_torch_s(model):
    """The first fact beside a loop of its own that adds d in a hooked pass of TransformerLens."""
    target = Target(steps=4, kl=0.5, decay=0.01, clamp=0.9, lr=0.1, stop=0.0)
    together = facts_of(model).offsets(1, "mlp", target)
    alone = facts_of(model, 1).offsets(1, "mlp", target)
    torch.testing.assert_close(together.d[0], alone.d[0], atol=1e-5, rtol=1e-4)

    prompt, gold = facts_of(model, 1).prompts[0], 0
    at, d = prompt.role_names.index("query.last"), torch.zeros(model.d_model, requires_grad=True)
    adam, size = torch.optim.Adam([d], lr=0.1), None
    words, before = facts_of(model).verbalizer.label_ids(model.tokenizer, TEMPLATE), None
    for step in range(4):

        def add(out: torch.Tensor, hook: object, d: torch.Tensor = d) -> torch.Tensor:
            nonlocal size
            size = float(out[0, at].detach().norm()) if size is None else size
            out = out.clone()
            out[0, at] += d
            return out

        scores = []
        for ids in words:
            text = torch.cat([prompt.ids, torch.tensor([ids])], 1)
            logits = model.hooked.run_with_hooks(text, fwd_hooks=[("blocks.1.hook_mlp_out", add)])
            rows = logits[0, len(prompt.ids[0]) - 1 : -1].log_softmax(-1)
            scores.append(rows[range(len(ids)), list(ids)].sum())
        now = logits[0, at].log_softmax(-1)
        before = now.detach() if before is None else before
        kl = (before.exp() * (before - now)).sum()
        loss = -torch.stack(scores).log_softmax(0)[gold] + 0.5 * kl + 0.01 * d.norm() / size**2
        if step == 3:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if float(d.norm()) > 0.9 * size:
                d *= 0.9 * size / d.norm()
    torch.testing.assert_close(alone.d[0].float(), d.detach(), atol=1e-4, rtol=1e-3)
    assert float(alone.losses[0]) == pytest.approx(float(loss.detach()), rel=1e-3)


def test_a_fact_that_is_done_stands_still_and_the_norm_is_cut(model):
    module = Matrix(1, "W_out").writes(model)
    target = Target(steps=12, stop=0.3)
    aim = facts_of(model, 3).offsets(1, "mlp", target)
    longer = facts_of(model, 3).offsets(1, "mlp", Target(steps=20, stop=0.3))
    done = aim.losses < 0.3
    assert bool(done.any())
    torch.testing.assert_close(aim.d[done], longer.d[done], atol=1e-5, rtol=1e-4)
    v0 = facts_of(model, 3).read({"v": module}, 2)["v"].norm(dim=1)
    assert bool((aim.d.norm(dim=1) <= 4 * v0 * (1 + 1e-6)).all())
    held = facts_of(model, 3).offsets(1, "mlp", Target(steps=3, kl=50.0))
    free = facts_of(model, 3).offsets(1, "mlp", Target(steps=3, kl=0.0))
    assert float(held.d.norm()) < float(free.d.norm()), "the KL holds d back"


@pytest.mark.parametrize("arch", fast(["llama", "gpt2", "gemma2"], ["gemma2"]))
def test_rome_writes_the_value_into_the_matrix(arch, tmp_path):
    """One fact: W_out gives v0 + d at its token. The base stays, the edit is saved and merged as any."""
    model = load_model(tiny_folder(arch))
    module = Matrix(1, "W_out").writes(model)
    facts = facts_of(model, 1)
    aim, before = facts.offsets(1, "mlp", QUICK), weights_hash(model.hooked)
    plan = ROME(1, by="example", ridge=1e-2, target=QUICK)
    edit = closed_form(model, EIGHT[:1], plan, background=EIGHT, template=TEMPLATE)
    at = facts.at[0]
    was, now = passes(model, None, module)[0][at], passes(model, edit, module)[0][at]
    torch.testing.assert_close(now - was, aim.d[0].float(), atol=1e-4, rtol=1e-3)
    assert weights_hash(model.hooked) == before and edit.parts[0].family == "lora"
    save_edit(edit, tmp_path)
    again = load_edit(tmp_path, model)
    assert again.record == edit.record and again.record.made["facts"] == 1
    scores = predict(model, EIGHT, again).scores
    assert scores is not None and (scores == predict(model, EIGHT, edit).scores).all()
    merged = predict(edit.merged(model), EIGHT, template=TEMPLATE).scores
    np.testing.assert_allclose(merged, scores, atol=1e-4)


def test_the_last_of_several_facts_holds(model):
    plan = ROME(1, by="class", ridge=1e-2, target=QUICK)
    edit = closed_form(model, EIGHT, plan, template=TEMPLATE)
    facts = facts_of(model, by="class")
    aim = facts.offsets(1, "mlp", QUICK)
    keys = facts.read({"k": Matrix(1, "W_out").reads(model)}, 2)["k"]
    (lora,) = edit
    assert edit.parts[0].options["rank"] == 3
    change = keys @ lora.update().detach()
    torch.testing.assert_close(change[-1], aim.d[-1], atol=1e-5, rtol=1e-4)
    aims: dict[str, Aim] = {}
    for i, seen in enumerate((aims, {}, aims)):
        plan = ROME(1, by="example", adjust=i > 0, ridge=1e-2, target=QUICK)
        many = closed_form(model, EIGHT, plan, template=TEMPLATE, aims=seen)
        assert many.parts[0].options["rank"] == 8 and len(seen) == 1
        if i == 1:
            searched = [p.detach() for p in many.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(searched, many.parameters(), strict=True))


@pytest.mark.parametrize("layers", [(1,), (0, 1)])
@pytest.mark.parametrize("arch", fast(["llama", "gpt2"], ["llama"]))
def test_memit_brings_the_stream_where_it_should_be(arch, layers):
    """With next to no weight on C, the output of the last layer is z = h + d at the token of every fact."""
    model = load_model(tiny_folder(arch))
    facts, output = facts_of(model, 4), model.point(1, "resid_post")
    aim = facts.offsets(1, "resid_post", QUICK)
    plan = MEMIT(layers, weight=1e-7, target=QUICK)
    edit = closed_form(model, EIGHT[:4], plan, background=EIGHT, template=TEMPLATE)
    was, now = passes(model, None, output), passes(model, edit, output)
    moved = torch.stack([now[i][at] - was[i][at] for i, at in enumerate(facts.at)])
    torch.testing.assert_close(moved, aim.d.float(), atol=0.02, rtol=0.02)
    assert {p.family for p in edit.parts} == {"full"} and edit.layers == layers
    first = Matrix(layers[0], "W_out").writes(model)
    was, now = passes(model, None, first), passes(model, edit, first)
    share = torch.stack([now[i][at] - was[i][at] for i, at in enumerate(facts.at)])
    expected = aim.d.float() / len(layers)
    torch.testing.assert_close(share, expected, atol=0.02, rtol=0.02, msg="the first layer's share")


def test_memit_over_three_layers_is_a_loop_of_its_own_in_float64(model):
    """Layer by layer: keys and streams from the cache of TransformerLens, with the earlier layers already
    changed in its weights; R = (wanted - now) / layers left; the update by numpy.
    """
    plan, facts = MEMIT((0, 1, 2), weight=0.05, target=QUICK), facts_of(model, 4)
    edit = closed_form(model, EIGHT[:4], plan, background=EIGHT, template=TEMPLATE)
    C = second_moments(model, facts_of(model).prompts, [0, 1, 2])
    other, output = load_model(tiny_folder("llama")), "blocks.2.hook_resid_post"

    def read(name: str) -> np.ndarray:
        caches = [other.hooked.run_with_cache(prompt.ids)[1] for prompt in facts.prompts]
        rows = [cache[name][0, at] for cache, at in zip(caches, facts.at, strict=True)]
        return torch.stack(rows).detach().double().numpy()

    wanted = read(output) + facts.offsets(2, "resid_post", QUICK).d.numpy()
    for layer, part in enumerate(edit.parameters()):
        K = read(f"blocks.{layer}.mlp.hook_post")
        R = (wanted - read(output)) / (3 - layer)
        D = np.linalg.solve(0.05 * C[layer].numpy() + K.T @ K, K.T @ R)
        np.testing.assert_allclose(part.detach(), D, atol=2e-3 * np.abs(D).max())
        with torch.no_grad():
            other.hooked.blocks[layer].mlp.W_out += torch.tensor(D).float()


def test_alphaedit_keeps_what_the_prompts_of_c_need(model):
    """D lies in the span of C's eigenvectors below the threshold, so that tr(D^T C D) <= threshold ||D||^2."""
    background, plan = EIGHT[4:], AlphaEdit((1,), threshold=0.1, l2=1e-3, target=QUICK)
    edit = closed_form(model, EIGHT[:2], plan, background=background, template=TEMPLATE)
    C = second_moments(model, facts_of(model).prompts[4:], [1])[1]
    (full,) = edit
    D = full.get_parameter("D").detach().double()
    torch.testing.assert_close(null_space(C, 0.1) @ D, D, atol=1e-5, rtol=1e-4)
    assert float(D.norm()) > 0
    assert float(torch.trace(D.T @ C @ D)) <= 0.1 * float(D.norm()) ** 2 * (1 + 1e-6)


def test_impossible_requests_get_a_sentence(model):
    few = {"template": TEMPLATE}
    with pytest.raises(ConfigError, match="there are no examples to make facts of"):
        closed_form(model, [], ROME(1), **few)
    with pytest.raises(ConfigError, match=r"no token at aspect\.first, where the key"):
        closed_form(model, EIGHT, ROME(1, at="aspect.first"), **few)
    with pytest.raises(SiteError, match="3"):
        closed_form(model, EIGHT, ROME(3), **few)
    with pytest.raises(ConfigError, match=r"C of L1\.W_out is singular"):
        closed_form(model, EIGHT[:1], ROME(1, target=Target(steps=1)), **few)
    with pytest.raises(ConfigError, match="there are no background prompts"):
        closed_form(model, EIGHT, ROME(1), background=[], **few)
    with pytest.raises(ConfigError, match="by is 'layer'; accepted: example or class"):
        closed_form(model, EIGHT, MEMIT((1,), by="layer"), **few)
    for layers in ((), (2, 1), (1, 1)):
        with pytest.raises(ConfigError, match=r"layers are .*accepted: one or more"):
            MEMIT(layers)
    with pytest.raises(ConfigError, match="weight is nan; accepted: 0 or more"):
        MEMIT((1,), weight=math.nan)
    with pytest.raises(ConfigError, match="steps is 0; accepted: 1 or more"):
        Target(steps=0)
    gemma = load_model(tiny_folder("gemma2"))
    with pytest.raises(EditError, match="MEMIT adds to the stream through W_out"):
        closed_form(gemma, EIGHT, MEMIT((1,)), **few)
