"""`mech_absa.patching` returns what `transformer_lens.patching` returns, on the user's own model."""

from __future__ import annotations

import inspect
import warnings
from functools import partial

import pandas as pd
import pytest
import torch
from support import fast
from support.tiny_models import tiny_folder
from transformer_lens import patching as theirs

import mech_absa as ma
from mech_absa import patching as ours

NAMES = [n for n in ours.__all__ if n.startswith("get_act_patch")]
FAST = (
    "get_act_patch_resid_pre",
    "get_act_patch_resid_mid",
    "get_act_patch_attn_out",
    "get_act_patch_mlp_out",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_out_all_pos",
)


@pytest.fixture(scope="module", params=fast(["gpt2", "llama", "pythia", "gemma2"], ["llama"]))
def hooked(request):
    return ma.load_model(str(tiny_folder(request.param))).hooked


def prompts(hooked, batch=2, length=7, seed=0):
    """Clean and corrupted tokens that part at token 2."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(5, 90, (batch, length), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2] = (clean[:, 2] + 7) % 90
    corrupted[:, 4] = (clean[:, 4] + 3) % 90
    return clean, corrupted


def answer(logits, right=11, wrong=17):
    return (logits[:, -1, right] - logits[:, -1, wrong]).mean()


def both(name, hooked, metric=answer, length=7, **options):
    clean, corrupted = prompts(hooked, length=length)
    _, cache = hooked.run_with_cache(clean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            getattr(m, name)(hooked, corrupted, cache, metric, **options) for m in (ours, theirs)
        ]


def test_every_public_name_of_theirs_is_here():
    public = {n for n in vars(theirs) if n.startswith("get_act_patch") or n.endswith("_setter")}
    public |= {"generic_activation_patch", "make_df_from_ranges"}
    assert public <= set(ours.__all__)


@pytest.mark.parametrize("name", FAST)
def test_the_same_numbers(hooked, name):
    if name.endswith("resid_mid") and hooked.cfg.parallel_attn_mlp:
        pytest.skip("parallel blocks have no resid_mid")
    a, b = both(name, hooked)
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (b.max() - b.min()) > 1e-4, "a map that is flat proves nothing"
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


STACKED = [n for n in NAMES if n.endswith("_every")]


def check_stacked(name, hooked, length):
    a, b = both(name, hooked, length=length)
    assert (b.max() - b.min()) > 1e-4
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", fast(STACKED, ["get_act_patch_block_every"]))
def test_stacked_ones_too(name):
    check_stacked(name, ma.load_model(str(tiny_folder("llama"))).hooked, length=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKED)
def test_stacked_ones_of_every_architecture(hooked, name):
    if hooked.cfg.parallel_attn_mlp and "block" in name:
        pytest.skip("the same sweeps as above")
    check_stacked(name, hooked, length=7)


def test_indices_of_ones_own(hooked):
    cells = pd.DataFrame({"layer": [0, 1, 1], "pos": [2, 4, 6]})
    options = dict(index_df=cells, index_axis_names=None, return_index_df=True)
    (a, df), (b, _) = both("get_act_patch_resid_pre", hooked, **options)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert df is cells


def test_a_metric_of_other_positions_runs_the_exact_loop_and_says_so_once(hooked, monkeypatch):
    monkeypatch.setattr(ours, "_warned", set())
    clean, corrupted = prompts(hooked)
    _, cache = hooked.run_with_cache(clean)

    def early(logits):
        return logits[:, 3, 11].mean()

    with pytest.warns(UserWarning, match="reads logits of other positions") as said:
        a = ours.get_act_patch_resid_pre(hooked, corrupted, cache, early)
        ours.get_act_patch_attn_out(hooked, corrupted, cache, early)
    assert len([w for w in said if "reads logits" in str(w.message)]) == 1
    b = theirs.get_act_patch_resid_pre(hooked, corrupted, cache, early)
    torch.testing.assert_close(a, b)


def test_one_clean_prompt_serves_a_batch_of_corrupted_ones(hooked):
    clean, corrupted = prompts(hooked)
    _, cache = hooked.run_with_cache(clean[:1])
    a = ours.get_act_patch_resid_pre(hooked, corrupted, cache, answer)
    b = theirs.get_act_patch_resid_pre(hooked, corrupted, cache, answer)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_users_model_keeps_its_mode_and_its_gradients():
    hooked = ma.load_model(str(tiny_folder("gpt2"))).hooked
    hooked.requires_grad_(True).train()
    clean, corrupted = prompts(hooked)
    _, cache = hooked.run_with_cache(clean)
    ours.get_act_patch_resid_pre(hooked, corrupted, cache, answer)
    assert hooked.training and all(p.requires_grad for p in hooked.parameters())


def test_the_engine_ran_and_not_the_loop(hooked, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the loop ran")

    monkeypatch.setattr(theirs, "generic_activation_patch", refuse)
    clean, corrupted = prompts(hooked)
    _, cache = hooked.run_with_cache(clean)
    ours.get_act_patch_resid_pre(hooked, corrupted, cache, answer)
    ours.get_act_patch_attn_head_out_by_pos(hooked, corrupted, cache, answer)


def test_a_bridge_in_compatibility_mode_is_computed_as_it_is_folded():
    """Its weights are folded and centred; both loops run it as it is, and its logits are shifted from the raw ones."""
    model = ma.load_model(str(tiny_folder("gpt2")), backend="bridge")
    folded = model.backend.twin()
    folded.enable_compatibility_mode()
    a, b = both("get_act_patch_block_every", folded, length=5)
    assert (b.max() - b.min()) > 1e-4
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(
    "reduce" not in inspect.signature(theirs.generic_activation_patch).parameters,
    reason="TransformerLens 3.9 has no results by example",
)
def test_results_by_example_are_those_of_transformer_lens_4(hooked):
    metrics = {"right": lambda y: y[:, -1, 11], "wrong": lambda y: y[:, -1, 17]}
    for metric, options in (
        (metrics, {"reduce": "none", "baseline": True}),
        (metrics["right"], {"reduce": "mean"}),
        (answer, {"baseline": True}),
    ):
        a, b = both("get_act_patch_resid_pre", hooked, metric, length=5, **options)
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b)
        else:
            torch.testing.assert_close((a.values, a.baseline), (b.values, b.baseline))


@pytest.mark.skipif(
    not hasattr(theirs, "HookedTransformer"), reason="a bridge is folded in its own way"
)
def test_a_folded_model_is_computed_as_it_is_folded():
    """The default processing of TransformerLens folds norms and centres weights."""
    hooked = ma.load_model(str(tiny_folder("gpt2"))).hooked
    state = hooked.state_dict()
    folded = type(hooked)(hooked.cfg)
    folded.load_and_process_state_dict(state, fold_ln=True, center_writing_weights=True)
    a, b = both("get_act_patch_block_every", folded, length=5)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    clean, corrupted = prompts(hooked, length=5)
    _, cache = hooked.run_with_cache(clean)
    raw = ours.get_act_patch_block_every(hooked, corrupted, cache, partial(answer, right=12))
    assert not torch.allclose(a, raw)
