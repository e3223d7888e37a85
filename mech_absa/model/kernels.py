"""Matrix products through oneDNN, where torch has them and they give the right numbers.

`torch.ops.mkldnn._linear_pointwise` is a private operator of torch. On processors that torch's own
BLAS knows less well it is up to twice as fast. Nothing else in the package names it. At import, its
results are compared with `F.linear`; where the operator is missing, fails or differs, `linear` runs
`F.linear`. Two ways of using it were slower than `F.linear` on one core of an AMD processor, and are
not taken: a weight whose rows do not lie in memory one after another (5,000 tokens into 3,072
columns: 1,370 ms; 580 with `F.linear`), and the activation inside the product (GELU 580 ms, 510 when
it follows; SiLU of 1,536 columns 203 and 165).

oneDNN compiles a kernel for every shape that it meets, and it and torch keep a thousand of them each.
A sweep meets a new shape in every chunk, so kernels that nobody needs again took 350 MiB after 300
reviews. Here `KEPT` are kept, unless the environment says how many. With 32, tiny models, whose
sweep takes 40 ms, compiled the same kernels again, for 10 ms; with 128 they do not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

KEPT = "128"
"""Compiled kernels that oneDNN (the first name) and torch's binding to it (the second) keep."""
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, KEPT)  # read at the first product

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}
"""TransformerLens's names of activation functions."""

MIN_TOKENS = 64
"""Fewer rows than this are multiplied by `F.linear`: oneDNN's set-up would cost more."""


def _product(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x W^T + b through oneDNN."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
    return y


def _works() -> bool:
    """Compare oneDNN's products with torch's on a small case."""
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, MIN_TOKENS, 24, generator=draw)
    W, b = torch.randn(40, 24, generator=draw), torch.randn(40, generator=draw)
    try:
        with torch.no_grad():
            return all(
                torch.allclose(_product(x, W, bias), F.linear(x, W, bias), rtol=1e-4, atol=1e-4)
                for bias in (b, None)
            )
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False


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
        return linear(grad.contiguous(), W.T), None, None


def linear(
    x: Float[Tensor, "*token d_in"], W: Float[Tensor, "d_out d_in"], b: Tensor | None = None
) -> Float[Tensor, "*token d_out"]:
    """Return x W^T + b, differentiable in x; W and b are constants."""
    if not (
        ONEDNN
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() >= MIN_TOKENS * x.shape[-1]
        and W.stride(-1) == 1
        and not W.requires_grad
    ):
        return F.linear(x, W, b)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _product(x, W, b)
    y: Tensor = _Product.apply(x, W, b)  # type: ignore[no-untyped-call]
    return y
