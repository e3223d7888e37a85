"""The bridge of TransformerLens 4 gives what Hugging Face, the loop and `HookedTransformer` give. Both versions run this file."""

from __future__ import annotations

import contextlib
from functools import cache

import numpy as np
import pytest
import torch
from support import fast
from support.edit_cases import EVERYWHERE, loud, prompts
from support.edit_cases import logits as edited_logits
from support.jobs import EXAMPLES, ONE_TOKEN, TEMPLATE
from support.tiny_models import ARCHITECTURES, tiny_folder
from transformers import AutoModelForCausalLM

import mech_absa as ma
from mech_absa.edits import Part
from mech_absa.errors import ConfigError, EditError
from mech_absa.model import Model
from mech_absa.model.block import run
from mech_absa.model.bridge import BridgeBackend
from mech_absa.model.hooks import capture, intervene, live_hooks
from mech_absa.model.load import unreadable
from mech_absa.patch.plan import plan
from mech_absa.patch.request import Request
from mech_absa.sites import Site

try:
    from transformer_lens import HookedTransformer  # noqa: F401

    HOOKED = True
except ImportError:
    HOOKED = False
only_with_hooked = pytest.mark.skipif(
    not HOOKED, reason="TransformerLens 4 has no HookedTransformer"
)
SOME = fast(ARCHITECTURES, ["gpt2"])


@cache
def loaded(arch: str, backend: str = "bridge") -> Model:
    return ma.load_model(tiny_folder(arch), backend=backend)


def pairs_on(model: Model, corruption: object = None) -> ma.Pairs:
    verbalizer = ma.Verbalizer.of(ONE_TOKEN)
    return ma.make_pairs(
        model,
        EXAMPLES,
        corruption or ma.Counterfactual(),
        template=TEMPLATE,
        verbalizer=verbalizer,
        keep="all",
    )


def effects_of(model: Model, kinds: list[str], corruption: object = None, **options) -> np.ndarray:
    options = {"metric": "logit_diff", "by": "role"} | options
    return ma.trace(model, pairs_on(model, corruption), kinds, **options).frame["effect"].to_numpy()


@pytest.mark.parametrize("arch", SOME)
def test_logits_are_hugging_faces_and_weights_are_read_rightly(arch):
    model = loaded(arch)
    assert model.backend.name == "bridge" and model.refusal is None
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder(arch), attn_implementation="eager").eval()
    ids = torch.randint(300, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = hf(ids).logits
        torch.testing.assert_close(model.forward(ids), theirs, atol=1e-5, rtol=0)
        last, _ = run(model, model.embed(ids))
        ours = model.finish(last.flatten(0, 1), None, "vocabulary").view_as(theirs)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    assert sum(p.numel() for p in hf.parameters()) == model.n_parameters


@pytest.mark.parametrize("arch", SOME)
def test_the_wave_is_the_loop(arch):
    model = loaded(arch)
    kinds = [k for k in model.kinds if k not in ("q", "k", "v")]
    wave = effects_of(model, kinds)
    np.testing.assert_allclose(wave, effects_of(model, kinds, engine="loop"), atol=1e-4)
    assert abs(wave).max() > 0.1


@only_with_hooked
@pytest.mark.parametrize("arch", fast(ARCHITECTURES, []))
def test_effects_are_those_of_hooked_transformer(arch):
    bridge, hooked = loaded(arch), loaded(arch, "hooked")
    assert bridge.kinds == hooked.kinds and bridge.n_ctx == hooked.n_ctx
    by_wave = [k for k in bridge.kinds if k not in ("q", "k", "v")]
    for kinds, options in (
        (by_wave, {}),
        (list(bridge.kinds), {"engine": "loop"}),
        (["resid_post"], {"by": "token", "direction": "noise"}),
        (["mlp_out"], {"method": "atp"}),
        (["mlp_out"], {"corruption": ma.GaussianNoise(draws=2)}),
        (["attn_out"], {"corruption": ma.MeanAblation()}),
    ):
        ours = effects_of(bridge, kinds, **options)
        np.testing.assert_allclose(ours, effects_of(hooked, kinds, **options), atol=1e-4)


@only_with_hooked
@pytest.mark.parametrize("arch", fast(ARCHITECTURES, ["qwen2"]))
def test_matrices_and_the_points_around_them_are_those_of_hooked_transformer(arch):
    """x W + b of the point that a matrix reads is the value at the point that it writes."""
    bridge, hooked = loaded(arch), loaded(arch, "hooked")
    names = [
        m
        for m in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")
        if m != "W_gate" or bridge.cfg.gated_mlp
    ]
    for name in names:
        (W, b), (V, c) = bridge.backend.matrix(1, name), hooked.backend.matrix(1, name)
        torch.testing.assert_close(W, V, msg=name)
        torch.testing.assert_close(
            torch.zeros(()) if b is None else b.sum(), torch.zeros(()) if c is None else c.sum()
        )
        twin = Model(bridge.backend.twin(), bridge.tokenizer, "twin")
        other = Model(hooked.backend.twin(), hooked.tokenizer, "twin")
        for model in (twin, other):
            model.backend.set_matrix(
                1, name, W.flip(0), None
            )  # a norm may follow: 0.5 W does nothing
        ids = torch.arange(9)[None] + 7
        with torch.inference_mode():
            new, theirs = twin.forward(ids), other.forward(ids)
            torch.testing.assert_close(new, theirs, atol=1e-4, rtol=0)
            assert (new - bridge.forward(ids)).abs().max() > 1e-3, name


@pytest.mark.parametrize("arch", fast(ARCHITECTURES, ["gpt2"]))
def test_what_is_put_between_attention_and_mlp_reaches_the_stream(arch):
    """A bridge's own hook_resid_mid reaches the MLP alone. The identity changes nothing; the stream of another prompt,
    put in everywhere, makes this prompt's answer that prompt's."""
    model = loaded(arch)
    if "resid_mid" not in model.kinds:
        pytest.skip("a parallel block has no such stream")
    site = Site(1, "resid_mid")
    a, b = (torch.randint(300, (1, 9), generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    with torch.inference_mode():
        with capture(model, [site]) as seen:
            wanted = model.forward(b)
        with intervene(model, {site: lambda x: seen[site]}):
            got = model.forward(a)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        plain = model.forward(a)
        with intervene(model, {site: lambda x: x}):
            torch.testing.assert_close(model.forward(a), plain, atol=1e-5, rtol=1e-5)
    assert live_hooks(model) == []


@pytest.mark.parametrize("nested", [False, True])
def test_the_stream_is_written_after_the_attention_whichever_hook_is_added_first(nested):
    """Both points of a bridge are one tensor; the stream that is put in wins over what the attention adds."""
    model = loaded("gpt2")
    ids = torch.randint(300, (1, 9), generator=torch.Generator().manual_seed(3))
    middle, added = Site(1, "resid_mid"), Site(1, "attn_out")
    with torch.inference_mode():
        with capture(model, [middle]) as seen:
            plain = model.forward(ids)
        put = {middle: lambda x: seen[middle], added: lambda x: 2 * x + 1}
        with contextlib.ExitStack() as stack:
            for one in [{s: fn} for s, fn in put.items()] if nested else [put]:
                stack.enter_context(intervene(model, one))
            torch.testing.assert_close(model.forward(ids), plain, atol=1e-4, rtol=1e-4)
    assert live_hooks(model) == []


def test_a_model_that_reads_otherwise_than_it_runs_goes_to_the_loop_and_says_so():
    model = ma.load_model(tiny_folder("gpt2"), backend="bridge")
    right = model.backend.scale

    class Odd(BridgeBackend):
        def scale(self, layer: int) -> float:
            return 2.0 * right(layer)

    odd = Odd(model.hooked)
    model.backend = odd
    odd.unreadable = unreadable(model)
    p = plan(model, pairs_on(model), Request.parse(["mlp_out"], by="role", metric="logit_diff"))
    assert "read otherwise than they run" in str(p.why_loop)
    ours = effects_of(model, ["mlp_out"])
    np.testing.assert_allclose(ours, effects_of(loaded("gpt2"), ["mlp_out"]), atol=1e-4)


def test_a_bridge_with_folded_weights_gives_its_own_logits():
    """In compatibility mode norms are folded into the weights: pieces agree with the hooked pass, or the loop runs."""
    model = loaded("gpt2")
    root = model.backend.twin()
    root.enable_compatibility_mode()
    folded = Model(root, model.tokenizer, "folded")
    folded.backend.unreadable = unreadable(folded)
    kinds = ["mlp_out", "head"]
    with torch.inference_mode():
        ids = torch.arange(9)[None] + 7
        ours, raw = (m.forward(ids).log_softmax(-1) for m in (folded, model))
        torch.testing.assert_close(ours, raw, atol=1e-3, rtol=1e-3)
    wave = effects_of(folded, kinds)
    np.testing.assert_allclose(wave, effects_of(folded, kinds, engine="loop"), atol=1e-4)


NO_PREFIX = {
    "pythia": "does not show its queries and scores before the heads' output; load the model with backend hooked",
    "gptj": "does not show its queries and scores before the heads' output; load the model with backend hooked",
    "bloom": "has ALiBi positions, which give a prefix no place",
}
"""Bridges on which a prefix cannot act, and what is said."""


@pytest.mark.parametrize("arch", fast(NO_PREFIX, ["pythia"]))
def test_a_prefix_that_cannot_act_on_a_bridge_is_one_sentence(arch):
    """Two passes: GPT-J shows its scores behind the heads, so that those of the first pass are there in the second."""
    bridge = loaded(arch)
    tokens = prompts(bridge)[0]
    for _ in range(2):
        with pytest.raises(EditError, match=NO_PREFIX[arch]):
            edited_logits(bridge, tokens, loud(bridge, Part("prefix", "L1")))


@only_with_hooked
@pytest.mark.parametrize("arch", fast(ARCHITECTURES, ["llama"]))
def test_an_edit_saved_under_one_backend_is_applied_under_the_other(arch, tmp_path):
    """A model is known by what Hugging Face holds; the edited logits are the same, and not the plain ones."""
    bridge, hooked = loaded(arch), loaded(arch, "hooked")
    assert bridge.sha256 == hooked.sha256
    with_mid, without = "resid_mid" in bridge.kinds, NO_PREFIX.get(arch)
    parts = [
        Part(f, p)
        for f, p in EVERYWHERE.items()
        if (with_mid or "resid_mid" not in p) and not (f == "prefix" and without)
    ]
    for there, here in ((hooked, bridge), (bridge, hooked)):
        folder = tmp_path / there.backend.name
        ma.save_edit(edit := loud(there, *parts), folder)
        again = ma.load_edit(folder, here)
        for tokens in prompts(here):
            wanted, got = edited_logits(there, tokens, edit), edited_logits(here, tokens, again)
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
            assert (got - edited_logits(here, tokens)).abs().max() > 1e-2


def test_words_for_backends():
    with pytest.raises(
        ConfigError, match="unknown backend 'vllm'; accepted: auto, hooked or bridge"
    ):
        ma.load_model(tiny_folder("gpt2"), backend="vllm")
    if not HOOKED:
        with pytest.raises(ConfigError, match="has no HookedTransformer; accepted: auto or bridge"):
            ma.load_model(tiny_folder("gpt2"), backend="hooked")
    assert ma.load_model(tiny_folder("gpt2")).backend.name == ("hooked" if HOOKED else "bridge")
