"""The numpy oracle against Hugging Face (values) and against HookedTransformer's own hooks (interventions), in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mech_absa.model import hooked_from_hf
from support import fast
from support.numpy_transformer import KINDS, NumpyTransformer, alibi_slopes
from support.tiny_models import ARCHITECTURES, float64_throughout, hf_float64, tiny_folder

TOKENS = [1, 77, 270, 33, 140, 9, 251, 300, 60, 18, 299, 145]  # longer than the sliding window


@pytest.fixture(scope="module", params=fast(ARCHITECTURES, ["gpt2", "gptj", "gemma2", "bloom"]))
def trio(request):
    """The Hugging Face model, the HookedTransformer and the oracle of one architecture, in float64."""
    hf = hf_float64(tiny_folder(request.param))
    with float64_throughout():
        hooked = hooked_from_hf(hf, dtype=torch.float64)
    return request.param, hf, hooked, NumpyTransformer(hooked)


def test_logits_are_hugging_faces(trio):
    arch, hf, _, oracle = trio
    with float64_throughout(), torch.no_grad():
        want = hf(torch.tensor([TOKENS])).logits[0].numpy()
    assert want.dtype == np.float64 and want.std() > 1
    tolerance = 1e-8 if arch == "bloom" else 1e-12  # Bloom writes sqrt(2/pi) with eight digits
    np.testing.assert_allclose(oracle.run(TOKENS)[0], want, atol=tolerance, rtol=0)


def test_every_activation_is_the_hooked_one(trio):
    arch, _, hooked, oracle = trio
    _, cache = hooked.run_with_cache(torch.tensor([TOKENS]))
    _, acts = oracle.run(TOKENS)
    kinds = [kind for kind in KINDS if not (kind == "resid_mid" and hooked.cfg.parallel_attn_mlp)]
    assert set(acts) == {(kind, layer) for kind in kinds for layer in range(hooked.cfg.n_layers)}
    for (kind, layer), value in acts.items():
        np.testing.assert_allclose(
            value,
            cache[kind, layer][0].numpy(),
            atol=1e-8 if arch == "bloom" else 1e-12,
            rtol=0,
            err_msg=f"{layer} {kind}",
        )


def test_do_is_what_a_hook_does(trio):
    """Random vectors into random places: the oracle's do() and an overwriting hook agree, and the logits feel it."""
    arch, _, hooked, oracle = trio
    rng = np.random.default_rng(0)
    clean, acts = oracle.run(TOKENS)
    for kind, layer in acts:
        pos = int(rng.integers(len(TOKENS)))
        index = (
            (pos, int(rng.integers(acts[kind, layer].shape[1])))
            if acts[kind, layer].ndim == 3
            else (pos,)
        )
        value = acts[kind, layer][index] + rng.normal(size=acts[kind, layer].shape[-1])

        def overwrite(x, hook, index=index, value=value):
            x[(0, *index)] = torch.from_numpy(value)

        prefix = "attn." if kind in "qkvz" else ""
        with torch.no_grad():
            want = hooked.run_with_hooks(
                torch.tensor([TOKENS]),
                fwd_hooks=[(f"blocks.{layer}.{prefix}hook_{kind}", overwrite)],
            )[0].numpy()
        got, _ = oracle.run(TOKENS, do={(kind, layer, *index): value})
        np.testing.assert_allclose(
            got,
            want,
            atol=1e-8 if arch == "bloom" else 1e-12,
            rtol=0,
            err_msg=f"{kind} {layer} {index}",
        )
        assert np.array_equal(got[:pos], clean[:pos])  # the past does not move
        if kind.startswith("resid"):
            assert np.abs(got[pos] - clean[pos]).max() > 0.05


def test_embeddings_take_the_place_of_tokens(trio):
    *_, oracle = trio
    embeddings = oracle.embed(TOKENS)
    assert np.array_equal(oracle.run(embeddings=embeddings)[0], oracle.run(TOKENS)[0])


def test_a_do_that_hits_nothing_is_refused(trio):
    *_, oracle = trio
    with pytest.raises(KeyError, match="resid_post"):
        oracle.run(TOKENS, do={("resid_post", 99, 0): 0.0})


def test_alibi_slopes_of_the_paper():
    assert alibi_slopes(8) == pytest.approx(
        [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    )
    assert alibi_slopes(3) == pytest.approx([2**-4, 2**-8, 2**-2])
