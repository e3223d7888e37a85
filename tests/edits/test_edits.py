"""What every edit must do whatever its formula: begin as nothing, act where it says, leave nothing behind, refuse the wrong model."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.edit_cases import EVERYWHERE, examples, logits, loud, prompts, tiny_model
from support.tiny_models import tiny_folder
from transformers import AutoModelForCausalLM

from mech_absa.edits import FAMILIES, LLAMA_2_7B, Edit, Part, Shape, count, parse_place
from mech_absa.edits.record import TrainingRecord
from mech_absa.errors import ConfigError, EditError, HookError, SiteError
from mech_absa.examples import content_hash
from mech_absa.model import load_model, weights_hash
from mech_absa.model.hooks import capture, live_hooks
from mech_absa.prompts import Continuation, PromptTemplate, Tokens, Verbalizer
from mech_absa.scoring import extend
from mech_absa.sites import Site

WEIGHT = ("lora", "dora", "bitfit", "full", "tinylora")


@pytest.fixture
def llama():
    return tiny_model("llama")


def test_a_case_of_every_family():
    assert set(EVERYWHERE) == set(FAMILIES)


@pytest.mark.parametrize(
    "arch", ["llama", "gpt2", "gemma2", "pythia", "qwen2", "mistral", "gptj", "bloom"]
)
@pytest.mark.parametrize("family", WEIGHT)
def test_a_fresh_weight_edit_changes_no_bit(arch, family):
    model = tiny_model(arch)
    edit = Edit.fresh(
        model, [Part(family, f"L{layer}.{m}") for layer in (0, 2) for m in Shape.of(model).matrices]
    )
    tokens = Tokens.stack(prompts(model))
    assert torch.equal(logits(model, tokens, edit), logits(model, tokens))


@pytest.mark.parametrize("family", EVERYWHERE)
def test_a_batch_gives_what_its_rows_give(llama, family):
    edit, rows = loud(llama, Part(family, EVERYWHERE[family])), prompts(llama)
    batch = Tokens.stack(rows)
    assert len(set(batch.lengths)) == 3
    together, base = logits(llama, batch, edit), logits(llama, batch)
    assert (together - base).abs().max() > 1e-3
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            together[i, : row.lengths[0]], logits(llama, row, edit)[0], atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize("family", EVERYWHERE)
def test_nothing_stays_behind(llama, family):
    """The hooks are gone and the weights are untouched, also after an exception in the middle of a pass."""
    edit, tokens = loud(llama, Part(family, EVERYWHERE[family])), Tokens.stack(prompts(llama))
    before, plain = weights_hash(llama.hooked), logits(llama, tokens)
    logits(llama, tokens, edit)
    with pytest.raises(ZeroDivisionError), edit.applied(llama, tokens):
        assert live_hooks(llama.hooked) or any(m._forward_hooks for m in llama.hooked.modules())
        llama.forward(tokens.ids)
        raise ZeroDivisionError
    assert not any(m._forward_hooks for m in llama.hooked.modules())
    assert weights_hash(llama.hooked) == before and torch.equal(logits(llama, tokens), plain)


@pytest.mark.parametrize("at", ["query.last", "aspect", "before", "all", 0, 2, -1, -3, None])
def test_an_edit_acts_where_it_says_and_nowhere_else(llama, at):
    """At its own site exactly the named tokens differ; generated tokens and padding never do, unless every token is meant."""
    site = Site(1, "resid_post", None, at)
    edit = loud(llama, Part("steering", str(site)))
    batch = extend(Tokens.stack(prompts(llama)), Continuation((5, 6), ()))
    seen = {}
    for name, e in (("base", None), ("edited", edit)):
        with capture(llama.hooked, [Site(2, "resid_pre")]) as states:
            logits(llama, batch, e)
        seen[name] = states[Site(2, "resid_pre")]
    changed = (seen["base"] != seen["edited"]).any(-1)
    for i, row in enumerate(prompts(llama)):
        want = row.positions(at) if at is not None else list(range(changed.shape[1]))
        assert changed[i].nonzero()[:, 0].tolist() == want
        assert want, "the case must have a token"
    torch.testing.assert_close(
        (seen["edited"] - seen["base"])[changed],
        next(iter(edit)).v.detach().expand(int(changed.sum()), -1),
        atol=1e-5,
        rtol=1e-5,
    )


def test_earlier_tokens_do_not_see_a_later_edit(llama):
    edit, tokens = loud(llama, Part("loreft", "L0.resid_post@-2")), prompts(llama)[1]
    n = tokens.lengths[0]
    same = (logits(llama, tokens, edit) == logits(llama, tokens)).all(-1)[0]
    assert same[: n - 2].all() and not same[n - 2 :].any()


@pytest.mark.parametrize("family", EVERYWHERE)
def test_gradients_are_those_of_finite_differences(family):
    """Along a random direction, in float64, through the rest of the model."""
    model = tiny_model("llama", "float64")
    if model.backend.name == "bridge":
        pytest.skip("Hugging Face's norms compute in float32: too coarse for differences of 1e-5")
    edit, tokens = loud(model, Part(family, EVERYWHERE[family])).double(), prompts(model)[1]

    def value() -> torch.Tensor:
        with edit.applied(model, tokens):
            return model.forward(tokens.ids)[0, -1].log_softmax(-1)[7]

    value().backward()
    generator = torch.Generator().manual_seed(0)
    for name, p in edit.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
        way = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if family == "dora" and not name.endswith("m"):
            continue  # its norm is held constant in the backward pass, as its authors advise
        step, at = 1e-5, p.data.clone()
        with torch.no_grad():
            p.copy_(at + step * way)
            up = value()
            p.copy_(at - step * way)
            down = value()
            p.copy_(at)
        assert float((p.grad * way).sum()) == pytest.approx(
            float(up - down) / (2 * step), rel=2e-4, abs=1e-7
        ), name


def test_dora_survives_a_column_of_zeros():
    """Heads that training has emptied have columns of zeros: no direction, and no number in m / norm."""
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    with torch.no_grad():
        hf.model.layers[1].self_attn.q_proj.weight[3:9] = 0
    model = load_model((hf, tiny_model("llama").tokenizer))
    edit, tokens = Edit.fresh(model, [Part("dora", "L1.W_Q")]), prompts(model)[1]
    assert torch.equal(logits(model, tokens, edit), logits(model, tokens))
    with edit.applied(model, tokens):
        model.forward(tokens.ids).log_softmax(-1)[0, -1, 7].backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in edit.parameters())
    torch.testing.assert_close(
        logits(edit.merged(model), tokens), logits(model, tokens), atol=1e-5, rtol=1e-5
    )


def test_settling_makes_rows_orthonormal_and_keeps_what_they_span(llama):
    edit = loud(llama, Part("loreft", "L1.resid_post", {"rank": 5}))
    (i,) = edit
    assert torch.allclose(i.R @ i.R.T, torch.eye(5), atol=1e-6)
    kept = i.R.detach().clone()
    with torch.no_grad():
        i.R.copy_(torch.randn(5, 5).triu().fill_diagonal_(2.0) @ kept)
    i.settle()
    assert torch.allclose(i.R @ i.R.T, torch.eye(5), atol=1e-6)
    assert torch.allclose(i.R.T @ i.R, kept.T @ kept, atol=1e-5)
    again = i.R.detach().clone()
    i.settle()
    assert torch.allclose(again, i.R, atol=1e-6)


@pytest.mark.parametrize(
    "B, kept",
    [
        ([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]], [5.0, 0.0, 7.0]),
        ([[3.0, 0.0, 0.0], [6.0, 0.0, 0.0]], [0.0, 6.0, 7.0]),  # two rows, one direction
        ([[1.0, 1.0, 0.0], [0.0, 0.0, 0.1]], [-0.5, 0.5, 0.0]),  # (5, 6) along (1, 1) is (5.5, 5.5)
        ([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [5.0, 6.0, 7.0]),  # a fresh LoRA writes nothing
        ([[math.inf, 0.0, 0.0], [0.0, math.nan, 0.0]], [5.0, 6.0, 7.0]),
    ],
)
def test_a_steerer_may_not_read_what_the_lora_of_its_layer_writes(B, kept):
    """By hand, for W_down = (5, 6, 7): the part along the rows of B goes, the rest stays."""
    shape = Shape(1, 3, 1, 1, 3, 4, True)
    parts = (
        Part("post_block", "L0.resid_post", {"rank": 1, "orthogonal_to": "L0.W_out"}),
        Part("lora", "L0.W_out", {"rank": 2}),
        Part("post_block", "L0.resid_post", {"rank": 1}),
    )
    edit = Edit(parts, shape, "", "")
    steerer, lora, free = edit
    with torch.no_grad():
        lora.B.copy_(torch.tensor(B))
        for s in (steerer, free):
            s.W_down.copy_(torch.tensor([[5.0], [6.0], [7.0]]))
    edit.settle()
    torch.testing.assert_close(steerer.W_down[:, 0].detach(), torch.tensor(kept))
    assert free.W_down[:, 0].tolist() == [5.0, 6.0, 7.0]
    assert edit.n_parameters == count(parts, shape) == 2 * 6 + 2 * (4 + 3)


@pytest.mark.parametrize("other", [("dora", "L1.W_out"), ("lora", "L1.W_Q"), ("lora", "L2.W_out")])
def test_a_steerer_needs_the_lora_that_it_names(llama, other):
    named = {"orthogonal_to": other[1] if other[1] != "L2.W_out" else "L1.W_out"}
    with pytest.raises(ConfigError, match="no lora of W_O or W_out there; add one"):
        Edit.fresh(llama, [Part("post_block", "L1.resid_post", named), Part(*other)])


def test_dropout_is_that_of_training_only(llama):
    edit, tokens = loud(llama, Part("lora", "L1.W_O", {"dropout": 0.5})), prompts(llama)[1]
    still = logits(llama, tokens, edit)
    assert torch.equal(still, logits(llama, tokens, edit))
    edit.train()
    assert not torch.equal(logits(llama, tokens, edit), logits(llama, tokens, edit))
    edit.eval()
    assert torch.equal(still, logits(llama, tokens, edit))


def test_same_seed_same_parameters(llama):
    parts = [Part(f, p) for f, p in EVERYWHERE.items()]
    a, b, c = (Edit.fresh(llama, parts, seed) for seed in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))


def test_two_edits_of_one_layer_act_in_the_order_of_the_pass(llama):
    """A head's output is steered before the edited output projection reads it."""
    both = loud(llama, Part("lora", "L1.W_O"), Part("steering", "L1.head0"))
    lora, steer = both
    hf_like = logits(llama, prompts(llama)[0], both)
    W, _ = lora.matrix.weight(llama)
    kept = W.clone()
    lora.matrix.set_weight(llama, kept + lora.update().float())
    alone = Edit(both.parts[1:], both.shape, both.base, both.sha256)
    alone.load_state_dict({"interventions.0.v": steer.v})
    try:
        want = logits(llama, prompts(llama)[0], alone)
    finally:
        lora.matrix.set_weight(llama, kept)
    torch.testing.assert_close(hf_like, want, atol=1e-5, rtol=1e-5)


def test_an_edit_that_takes_part_in_half_a_pass_is_an_error(llama):
    edit, tokens = (
        loud(llama, Part("red", "L0.resid_post"), Part("red", "L2.resid_post")),
        prompts(llama)[0],
    )
    with pytest.raises(HookError, match="passes"), edit.applied(llama, tokens):
        llama.run_hooked(llama.embed(tokens.ids), 0, 2)


def test_another_model_is_refused(llama):
    edit = Edit.fresh(llama, [Part("lora", "L1.W_O")])
    other = tiny_model("mistral")
    with (
        pytest.raises(EditError, match=r"made for .* and .* has other weights"),
        edit.applied(other, prompts(other)[0]),
    ):
        pass


@pytest.mark.parametrize(
    "part, error, words",
    [
        (
            Part("lora", "L1.W_O", {"rank": 0}),
            ConfigError,
            "rank 0 was asked for at L1.W_O; accepted: 1 to 32",
        ),
        (Part("loreft", "L1.resid_post", {"rank": 33}), ConfigError, "accepted: 1 to 32"),
        (Part("loreft", "L1.head0", {"rank": 9}), ConfigError, "accepted: 1 to 8"),
        (Part("tinylora", "L1.W_O", {"rank": 33}), ConfigError, "accepted: 1 to 32"),
        (Part("tinylora", "L1.W_O", {"u": 0}), ConfigError, "u is 0 at L1.W_O; accepted: 1"),
        (
            Part("tinylora", "L1.W_O", {"shared_with": "L1.W_O"}),
            ConfigError,
            "no tinylora there with 4 scalars of its own",
        ),
        (Part("lora", "L7.W_O"), SiteError, "3 layers"),
        (Part("loreft", "L3.resid_post"), SiteError, "3 layers"),
        (Part("loreft", "L1.head9"), SiteError, "heads"),
        (Part("loreft", "L1.W_O"), SiteError, "acts on activations"),
        (Part("lora", "L1.resid_post"), SiteError, "acts on weight matrices"),
        (Part("lora", "L1.W_X"), SiteError, "unknown weight matrix"),
        (Part("prefix", "L1.W_O"), SiteError, "write L1"),
        (Part("prefix", "L1", {"length": 0}), ConfigError, "accepted: 1 or more"),
        (Part("adapter", "L1.mlp_out", {"f": "swish"}), ConfigError, "relu"),
        (Part("post_block", "L1.mlp_out"), SiteError, "write L1.resid_post"),
        (
            Part("post_block", "L1.resid_post", {"orthogonal_to": "L1.W_out"}),
            ConfigError,
            "the edit has no lora of W_O or W_out there",
        ),
        (Part("post_block", "L1.resid_post", {"rank": 33}), ConfigError, "accepted: 1 to 32"),
        (Part("head_gate", "L1.attn_out"), SiteError, "one head"),
        (Part("lora", "L1.W_O", {"dropout": 1.0}), ConfigError, "dropout"),
        (Part("lora", "L1.W_O", {"ranks": 4}), ConfigError, "its options are rank, alpha"),
        (Part("lorra", "L1.W_O"), ConfigError, "unknown family"),
        (Part("loreft", "L1.k0"), SiteError, "not offered"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(llama, part, error, words):
    with pytest.raises(error, match=words) as caught:
        Edit.fresh(llama, [part])
    assert "\n" not in str(caught.value)


def test_gates_are_missing_where_the_mlp_has_none():
    with pytest.raises(SiteError, match="no W_gate"):
        Edit.fresh(tiny_model("gpt2"), [Part("lora", "L1.W_gate")])


@given(
    st.sampled_from(
        [
            "L0",
            "L12",
            "L3.W_O",
            "L10.W_gate",
            "L5.resid_post@query.last",
            "L5.head3@-1",
            "L5.attn_out",
        ]
    )
)
@settings(max_examples=20, deadline=None)
def test_places_parse_back(text):
    assert str(parse_place(text)) == text


def test_counts_need_no_weights_and_agree_with_them(llama):
    """Counted by hand for a small one; built for the others."""
    assert count([Part("lora", "L31.W_O", {"rank": 4})], LLAMA_2_7B) == 4 * (4096 + 4096)
    assert (
        count([Part("loreft", "L31.resid_post", {"rank": 4})], LLAMA_2_7B)
        == 4 * 4096 + 4 * 4096 + 4
    )
    for family, place in EVERYWHERE.items():
        edit = Edit.fresh(llama, [Part(family, place)])
        assert edit.n_parameters == count([Part(family, place)], Shape.of(llama))


def test_the_kv_matrices_of_grouped_queries_have_their_true_sizes(llama):
    assert (llama.n_heads, llama.n_kv_heads, llama.d_head) == (4, 2, 8)
    assert count([Part("lora", "L0.W_K", {"rank": 2})], Shape.of(llama)) == 2 * (32 + 16)
    assert count([Part("prefix", "L0", {"length": 3})], Shape.of(llama)) == 2 * 3 * 16


def test_a_record_names_its_examples_and_its_question():
    """As three places that make edits once wrote it, each for itself."""
    found = examples()
    record = TrainingRecord.of(found, PromptTemplate("{sentence} {aspect}:"), Verbalizer(), seed=3)
    counts = Counter(e.polarity.value for e in found)
    assert (record.examples, record.seed) == (len(found), 3)
    assert {k: v for k, v in record.classes.items() if v} == counts
    assert record.data_sha256 == content_hash(found) != content_hash(found[::-1])
    assert record.template == "{sentence} {aspect}:" and record.separator == " "
    assert record.labels == ("positive", "negative", "neutral")
    assert record.versions["torch"] == torch.__version__ and not record.made
