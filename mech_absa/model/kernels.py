"""Matrix products through oneDNN, where torch has them and they give the right numbers.

`torch.ops.mkldnn._linear_pointwise` is a private operator of torch: a product, a bias and an
activation in one kernel. On processors that torch's own BLAS knows less well it is twice as fast.
Nothing else in the package names it. At import, its results are compared with `F.linear`; where
the operator is missing, fails or differs, `linear` runs `F.linear`.

oneDNN compiles a kernel for every shape that it meets, and it and torch keep a thousand of them each.
A sweep meets a new shape in every chunk, so kernels that nobody needs again took 350 MiB after 300
reviews. Here `KEPT` are kept, unless the environment says how many. With 32, tiny models, whose
sweep takes 40 ms, compiled the same kernels again, for 10 ms; with 128 they do not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

KEPT = "128"
"""Compiled kernels that oneDNN (the first name) and torch's binding to it (the second) keep."""
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, KEPT)  # read at the first product

Activation = tuple[str, str, Callable[[Tensor], Tensor]]
_PLAIN: Activation = ("none", "", lambda y: y)
ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": ("gelu", "tanh", lambda x: F.gelu(x, approximate="tanh")),
    "gelu_pytorch_tanh": ("gelu", "tanh", lambda x: F.gelu(x, approximate="tanh")),
    "gelu": ("gelu", "none", F.gelu),
    "silu": ("swish", "", F.silu),
    "relu": ("relu", "", F.relu),
}
"""TransformerLens's name -> oneDNN's name and algorithm, and torch's function."""

MIN_TOKENS = 64
"""Fewer rows than this are multiplied by `F.linear`: oneDNN's set-up would cost more."""


def _product(x: Tensor, W: Tensor, b: Tensor | None, name: str = "none", how: str = "") -> Tensor:
    """act(x W^T + b) through oneDNN."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, W, b, name, [], how)
    return y


def _works() -> bool:
    """Compare oneDNN's products and fused activations with torch's on a small case."""
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, MIN_TOKENS, 24, generator=draw)
    W, b = torch.randn(40, 24, generator=draw), torch.randn(40, generator=draw)
    try:
        with torch.no_grad():
            for name, how, function in [_PLAIN, *ACTIVATIONS.values()]:
                for weight, bias in ((W, b), (W, None), (W.T.contiguous().T, b)):
                    ours, theirs = _product(x, weight, bias, name, how), F.linear(x, weight, bias)
                    if not torch.allclose(ours, function(theirs), rtol=1e-4, atol=1e-4):
                        return False
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
    return True


ONEDNN = _works()
"""Whether large float32 products on a CPU run through oneDNN; they agree to rounding."""


class _Product(torch.autograd.Function):
    """x W^T + b through oneDNN, with a gradient for x alone: the model's weights are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(W)
        return _product(x, W, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (W,) = ctx.saved_tensors
        return _product(grad.contiguous(), W.T, None), None, None


def linear(
    x: Float[Tensor, "*token d_in"],
    W: Float[Tensor, "d_out d_in"],
    b: Tensor | None = None,
    act: str | None = None,
) -> Float[Tensor, "*token d_out"]:
    """Return act(x W^T + b), differentiable in x; W and b are constants."""
    name, how, function = ACTIVATIONS[act] if act is not None else ("none", "", None)
    if (
        ONEDNN
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() >= MIN_TOKENS * x.shape[-1]
        and not W.requires_grad
    ):
        if not (torch.is_grad_enabled() and x.requires_grad):
            return _product(x, W, b, name, how)
        y: Tensor = _Product.apply(x, W, b)  # type: ignore[no-untyped-call]
    else:
        y = F.linear(x, W, b)
    return y if function is None else function(y)
