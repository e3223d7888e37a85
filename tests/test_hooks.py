"""Hooks see what they should, change what they should, are counted, and are gone afterwards."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import tiny_folder

from mech_absa.errors import HookError, SiteError
from mech_absa.model import Model, load_model
from mech_absa.model.hooks import at_site, capture, hooked_at, intervene, live_hooks
from mech_absa.sites import Site

IDS = torch.tensor([[5, 77, 120, 33, 140], [9, 8, 270, 33, 11]])
POST, ATTN, MLP, HEAD = (
    Site(1, "resid_post"),
    Site(1, "attn_out"),
    Site(1, "mlp_out"),
    Site(1, "head", 2),
)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(tiny_folder("llama"), device="cpu", check=False)


@pytest.fixture(autouse=True)
def none_left_behind(model):
    assert live_hooks(model.hooked) == []
    yield
    assert live_hooks(model.hooked) == []


def test_capture_is_transformer_lens_cache(model):
    sites = [
        Site(layer, kind)
        for layer in range(3)
        for kind in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    ]
    sites += [Site(2, "head", 1), Site(2, "k", 1)]
    _, cache = model.hooked.run_with_cache(IDS)
    with capture(model.hooked, sites) as seen:
        model.hooked(IDS)
    assert set(seen) == set(sites), "what was asked for, and nothing else"
    for site in sites:
        assert torch.equal(seen[site], cache[site.hook_name])
    assert seen[Site(2, "head", 1)].shape[2] == 4 and seen[Site(2, "k", 1)].shape[2] == 2


def test_capture_keeps_the_last_pass(model):
    with capture(model.hooked, [POST]) as seen:
        model.hooked(IDS)
        first = seen[POST]
        model.hooked(IDS.flip(0))
    assert torch.allclose(seen[POST], first.flip(0), atol=1e-5) and not torch.equal(
        seen[POST], first
    )


def test_gradients_only_where_asked(model):
    embedded = model.embed(IDS).clone().requires_grad_(True)
    with capture(model.hooked, [POST], grad=True) as seen:
        loss = model.hooked(embedded, start_at_layer=0).pow(2).sum()
    loss.backward()
    kept = seen[POST]
    assert kept.grad is not None and kept.grad.abs().max() > 0
    tail = kept.detach().requires_grad_(True)
    model.hooked(tail, start_at_layer=2).pow(2).sum().backward()
    torch.testing.assert_close(kept.grad, tail.grad, rtol=1e-4, atol=1e-4)
    with capture(model.hooked, [POST]) as seen:
        model.hooked(embedded, start_at_layer=0)
    assert not seen[POST].requires_grad


def test_zeroing_both_sublayers_is_skipping_the_block(model):
    """resid_post of a block whose two outputs are zero is its resid_pre."""
    sites = [Site(1, "resid_pre"), POST]
    with (
        capture(model.hooked, sites) as seen,
        intervene(model.hooked, {ATTN: torch.zeros_like, MLP: torch.zeros_like}),
    ):
        model.hooked(IDS)
    assert torch.equal(seen[POST], seen[sites[0]])


def test_one_head_is_one_head(model):
    """Doubling a head's z adds its z W_O to the attention's sum; the other heads are untouched."""
    with capture(model.hooked, [HEAD, ATTN]) as before:
        plain = model.hooked(IDS)
    with (
        intervene(model.hooked, {HEAD: lambda z: 2 * z}),
        capture(model.hooked, [HEAD, ATTN]) as after,
    ):
        changed = model.hooked(IDS)
    others = [0, 1, 3]
    assert torch.equal(after[HEAD][:, :, others], before[HEAD][:, :, others])
    assert torch.equal(after[HEAD][:, :, 2], 2 * before[HEAD][:, :, 2])
    delta = before[HEAD][:, :, 2] @ model.hooked.blocks[1].attn.W_O[2]
    torch.testing.assert_close(after[ATTN] - before[ATTN], delta, rtol=1e-4, atol=1e-5)
    assert (changed - plain).abs().max() > 1e-2


def test_a_function_sees_one_head_or_the_stream(model):
    shapes = {}
    sites = {
        site: lambda x, site=site: shapes.setdefault(site, tuple(x.shape)) and x
        for site in (HEAD, POST, Site(1, "v", 1))
    }
    with intervene(model.hooked, sites):
        model.hooked(IDS)
    assert shapes == {HEAD: (2, 5, 8), POST: (2, 5, 32), Site(1, "v", 1): (2, 5, 8)}


def test_two_heads_of_one_layer(model):
    with (
        intervene(model.hooked, {HEAD: torch.zeros_like, Site(1, "head", 0): torch.ones_like}),
        capture(model.hooked, [HEAD]) as seen,
    ):
        model.hooked(IDS)
    assert (
        (seen[HEAD][:, :, 2] == 0).all()
        and (seen[HEAD][:, :, 0] == 1).all()
        and (seen[HEAD][:, :, 1] != 0).all()
    )


def test_identity_changes_nothing(model):
    plain = model.hooked(IDS)
    with intervene(model.hooked, {POST: lambda x: x, HEAD: lambda z: z}):
        assert torch.equal(model.hooked(IDS), plain)
    assert torch.equal(model.hooked(IDS), plain)


@pytest.mark.parametrize(("passes", "planned"), [(0, 1), (2, 1), (1, 2), (1, 0)])
def test_another_count_than_planned(model, passes, planned):
    sentence = rf"an intervention at L1.resid_post fired \[{passes}\] times; planned was {planned}"
    with (
        pytest.raises(HookError, match=sentence) as caught,
        intervene(model.hooked, {POST: lambda x: x}, times=planned),
    ):
        for _ in range(passes):
            model.hooked(IDS)
    assert caught.value.exit_code == 1


def test_a_hook_behind_the_stop_never_fires(model):
    """A pass that stops below the site is the classic silent mistake."""
    with (
        pytest.raises(HookError, match=r"fired \[0\] times"),
        intervene(model.hooked, {POST: lambda x: x}),
    ):
        model.hooked(IDS, stop_at_layer=1)


def test_the_planned_count_and_no_plan(model):
    with intervene(model.hooked, {POST: lambda x: x}, times=3):
        for _ in range(3):
            model.hooked(IDS)
    with intervene(model.hooked, {POST: lambda x: x}, times=None):
        pass
    with hooked_at([at_site(model.hooked, POST, lambda x: x)]) as firings:
        model.hooked(IDS)
        assert firings == []
    assert firings == [1]


def test_removed_after_an_exception(model):
    plain = model.hooked(IDS)

    def broken(x):
        raise RuntimeError("inside the hook")

    with (
        pytest.raises(RuntimeError, match="inside the hook"),
        intervene(model.hooked, {ATTN: torch.zeros_like, POST: broken}),
    ):
        model.hooked(IDS)
    with pytest.raises(KeyError, match="mine"), intervene(model.hooked, {ATTN: torch.zeros_like}):
        assert live_hooks(model.hooked) == [ATTN.hook_name]
        raise KeyError("mine")  # and no HookError in its place
    assert live_hooks(model.hooked) == []
    assert torch.equal(model.hooked(IDS), plain)


def test_an_unknown_site_leaves_no_half_of_its_hooks(model):
    two = {POST: lambda x: x, Site(99, "attn_out"): lambda x: x}
    sentence = r"site L99.attn_out does not exist: the model has no hook blocks.99.hook_attn_out"
    with pytest.raises(SiteError, match=sentence), intervene(model.hooked, two):
        pass
    with (
        pytest.raises(SiteError, match=r"site L99.attn_out does not exist"),
        capture(model.hooked, [POST, Site(99, "attn_out")]),
    ):
        pass


def test_an_inner_block_leaves_the_outer_one_alone(model):
    with intervene(model.hooked, {ATTN: torch.zeros_like}, times=2):
        outer = model.hooked(IDS)
        with (
            pytest.raises(ValueError),
            intervene(model.hooked, {ATTN: lambda x: x + 1, POST: lambda x: x}),
        ):
            raise ValueError
        assert live_hooks(model.hooked) == [ATTN.hook_name]
        assert torch.equal(model.hooked(IDS), outer)


def test_hooks_run_in_the_order_given(model):
    with (
        intervene(model.hooked, {ATTN: torch.zeros_like}),
        intervene(model.hooked, {ATTN: lambda x: x + 1}),
        capture(model.hooked, [ATTN]) as seen,
    ):
        model.hooked(IDS)
    assert (seen[ATTN] == 1).all()
