"""The forward pass from pieces against the hooked one: the same numbers, the same gradients, and the same edits in force."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import fast
from support.tiny_models import ARCHITECTURES

sys.path.insert(0, str(Path(__file__).parent / "edits"))
from support.edit_cases import loud, prompts, tiny_model

from mech_absa.edits import Part, Shape
from mech_absa.errors import HookError
from mech_absa.model import forward, kernels
from mech_absa.model.hooks import intervene
from mech_absa.prompts import Tokens
from mech_absa.sites import Site

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def case(arch: str, dtype: str = "float64"):
    """A model, a padded batch, its embeddings, and two positions of each row: the last, and one before it."""
    model = tiny_model(arch, dtype)
    tokens = Tokens.stack(prompts(model))
    reads = torch.tensor(tokens.lengths)[:, None] - torch.tensor([[1, 3]])
    return model, tokens, model.embed(tokens.ids), reads


def hooked_rows(model, tokens, x, reads, edit=None, start=0):
    """What the hooked forward pass gives."""
    if edit is None:
        whole = model.hooked.forward(x, start_at_layer=start, stop_at_layer=model.n_layers)
    else:
        with edit.applied(model, tokens):
            whole = model.hooked.forward(x, start_at_layer=start, stop_at_layer=model.n_layers)
    return whole[torch.arange(len(x))[:, None], reads]


def parts_of(model, layers=(1,)) -> dict[str, list[Part]]:
    """Every family at every sort of place that the model has."""
    matrices = [f"L{layer}.{m}" for layer in layers for m in Shape.of(model).matrices]
    kinds = [k for k in model.kinds if k.startswith("resid") or k.endswith("_out")]
    sites = [f"L{layer}.{k}@query.last" for layer in layers for k in kinds] + [
        f"L{layer}.head1" for layer in layers
    ]
    made = {
        family: [Part(family, m) for m in matrices] for family in ("lora", "dora", "bitfit", "full")
    }
    made |= {
        family: [Part(family, s) for s in sites]
        for family in ("loreft", "noreft", "direft", "red", "steering")
    }
    made["tinylora"] = [
        Part("tinylora", m, {"shared_with": matrices[0]} if m == matrices[1] else {})
        for m in matrices
    ]
    made["adapter"] = [Part("adapter", s, {"rank": 3}) for s in sites]
    made["post_block"] = [Part("post_block", f"L{layer}.resid_post") for layer in layers]
    made["head_gate"] = [
        Part("head_gate", f"L{layer}.head{h}") for layer in layers for h in range(model.n_heads)
    ]
    made["several"] = [*made["lora"], *made["loreft"], *made["bitfit"], *made["adapter"]]
    return made


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_stream_and_its_gradient_are_the_hooked_ones(arch):
    model, tokens, x, reads = case(arch)
    assert model.refusal is None
    for start in (0, 2):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        a = forward.last(model, ours, reads, start)
        b = hooked_rows(model, tokens, theirs, reads, start=start)
        torch.testing.assert_close(a, b, **CLOSE)
        weight = torch.randn(b.shape, generator=torch.Generator().manual_seed(0), dtype=b.dtype)
        (a * weight).sum().backward()
        (b * weight).sum().backward()
        assert theirs.grad.abs().max() > 1e-3
        torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)


@pytest.mark.parametrize("arch", fast(["llama", "gpt2", "pythia", "gemma2", "qwen2"], ["gemma2"]))
def test_every_family_acts_and_learns_as_through_hooks(arch):
    """Also in the last layer, which then runs whole; prefixes are handed to the hooked pass."""
    model, tokens, x, reads = case(arch)
    for layers in ((1,), (1, model.n_layers - 1)):
        for family, parts in parts_of(model, layers).items():
            edit = loud(model, *parts, size=0.1)
            values, grads = [], []
            for way in (
                lambda e: forward.last(model, x, reads, 0, e.points(model, tokens)),
                lambda e: hooked_rows(model, tokens, x, reads, e),
            ):
                edit.zero_grad()
                out = way(edit)
                (
                    out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
                ).sum().backward()
                values.append(out.detach())
                grads.append(
                    {n: p.grad.clone() for n, p in edit.named_parameters() if p.grad is not None}
                )
            base = forward.last(model, x, reads)
            assert (values[0] - base).abs().max() > 1e-4, f"{family} does something"
            torch.testing.assert_close(
                values[0], values[1], rtol=1e-7, atol=1e-7
            )  # parameters are float32
            assert grads[0].keys() == grads[1].keys() and grads[0]
            for name in grads[0]:
                torch.testing.assert_close(
                    grads[0][name],
                    grads[1][name],
                    rtol=1e-4,
                    atol=1e-5,
                    msg=lambda m, f=family, n=name: f"{f} {n}: {m}",
                )


def test_prefixes_run_hooked():
    model, tokens, x, reads = case("llama")
    edit = loud(model, Part("prefix", "L1", {"length": 2}))
    got = forward.last(model, x, reads, 0, edit.points(model, tokens))
    torch.testing.assert_close(got, hooked_rows(model, tokens, x, reads, edit), **CLOSE)
    assert (got - forward.last(model, x, reads)).abs().max() > 1e-4


def test_somebody_elses_hooks_are_honoured():
    model, tokens, x, reads = case("llama")
    plain = forward.last(model, x, reads)
    with intervene(model.hooked, {Site(1, "resid_post"): lambda h: h * 2}, times=2):
        doubled = forward.last(model, x, reads)
        torch.testing.assert_close(doubled, hooked_rows(model, tokens, x, reads), **CLOSE)
    assert (doubled - plain).abs().max() > 1e-2
    assert torch.equal(forward.last(model, x, reads), plain)


def test_a_point_outside_the_blocks_is_an_error():
    model, tokens, x, reads = case("llama")
    edit = loud(model, Part("steering", "L0.resid_post@query.last"))
    with pytest.raises(HookError, match="planned and 0 acted"):
        forward.last(model, x, reads, 1, edit.points(model, tokens))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_products_of_one_dnn_have_the_right_gradient(arch):
    """float32 against float64, with enough tokens that the large products take their other way."""
    if not kernels.ONEDNN:
        pytest.skip("torch is built without oneDNN")
    (model, *_), (exact, *_) = case(arch, "float32"), case(arch)
    x = torch.randn(4, 40, model.d_model, generator=torch.Generator().manual_seed(3))
    reads = torch.tensor([[39]] * 4)
    grads = []
    for m, stream in ((model, x.clone().requires_grad_()), (exact, x.double().requires_grad_())):
        out = forward.last(m, stream, reads)
        out.square().sum().backward()
        grads.append((out.detach().double(), stream.grad.double()))
    size = grads[1][1].abs().max()
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-4, atol=1e-4)
    assert (grads[0][1] - grads[1][1]).abs().max() < 1e-5 * size


def test_one_dnn_is_given_only_weights_whose_rows_lie_together(monkeypatch):
    """Others take three times as long through it; the gradient of a product has the other order."""
    if not kernels.ONEDNN:
        pytest.skip("torch is built without oneDNN")
    product, taken = kernels._product, []
    monkeypatch.setattr(kernels, "_product", lambda *args: taken.append(args[1]) or product(*args))
    generator = torch.Generator().manual_seed(5)
    x, W, b = (torch.randn(*size, generator=generator) for size in ((70, 6), (9, 6), (9,)))
    other = W.T.contiguous().T
    for weight, times in ((W, 1), (other, 0)):
        taken.clear()
        stream = x.clone().requires_grad_()
        y = kernels.linear(stream, weight, b)
        assert len(taken) == times
        torch.testing.assert_close(y, x @ W.T + b)
        y.backward(torch.ones_like(y))
        assert len(taken) == times  # W^T has columns together where W has rows
        torch.testing.assert_close(stream.grad, W.sum(0).expand(70, 6))


@pytest.mark.slow  # two processes
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_kernels_of_shapes_that_are_over_are_not_kept():
    """oneDNN keeps a thousand compiled kernels by itself; here a process that meets many shapes stays small."""
    code = (
        "import sys, torch\nfrom mech_absa.model import kernels\n"
        "torch.set_num_threads(1)\nW, b = torch.randn(64, 48), torch.randn(64)\n"
        "def size():\n    text = open('/proc/self/status').read().split('VmRSS:')[1]\n    return int(text.split()[0])\n"
        "before = size()\n"
        "for n in range(64, 864):\n    kernels.linear(torch.randn(n, 48), W, b)\n"
        "print(size() - before)"
    )
    grown = {}
    for kept in (kernels.KEPT, "1024"):
        caches = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": kept, "LRU_CACHE_CAPACITY": kept}
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | caches, capture_output=True, text=True, check=True)  # fmt: skip
        grown[kept] = int(done.stdout)
    assert grown[kernels.KEPT] < grown["1024"] / 3, grown
