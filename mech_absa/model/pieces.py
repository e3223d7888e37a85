"""The parts of a transformer block that need no more than a module and its input.

Every function takes tokens in whatever shape they come: `[token d_model]` for packed tokens, where
one row is one token of any prompt, or `[batch pos d_model]`.

`Taps` are the functions that see, and may replace, the values inside a block:

| name | value | module of the hooked model |
|---|---|---|
| resid_pre, resid_mid, resid_post | the residual stream | hook_resid_pre, ... |
| ln1, ln2 | the normalised stream | ln1, ln2 |
| q, k, v | as projected | attn.hook_q, ... |
| rot_q, rot_k | as they meet: normalised and rotated where the model does so | |
| z | the weighted values of every head | attn.hook_z |
| projected | sum_h z_h W_O[h] + b_O | attn |
| attn_out, mlp_out | what is added to the stream, after any post-norm | hook_attn_out, hook_mlp_out |
| pre, pre_linear, post | inside the MLP: before the activation, the gated factor, after it | mlp.hook_pre, ... |
| mlp | the MLP's output before any post-norm | mlp |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ..axes import Resid
from .backend import MLPWeights
from .kernels import ACTIVATIONS, linear

Tap = Callable[[Tensor], Tensor | None]
"""A function from a value to its replacement; None keeps the value. It never writes into the tensor
that it gets.
"""

Taps = Mapping[str, Tap]
"""Name of a value in one block (see the module) -> its tap."""

NO_TAPS: Taps = {}

HIDDEN_BYTES, HIDDEN_BYTES_CPU = 1 << 26, 1 << 24
"""The hidden layer of an MLP is the widest tensor of a pass: without gradients, tokens go through
it in slices of this size. On a CPU smaller slices stay in its caches: a tenth less time."""


def tapped(taps: Taps, name: str, value: Tensor) -> Tensor:
    """Return what the tap of this name makes of the value; the value itself where there is none."""
    tap = taps.get(name)
    new = None if tap is None else tap(value)
    return value if new is None else new


def rows_of(stream: Resid, reads: Int[Tensor, "batch read"]) -> Float[Tensor, "batch read d_model"]:
    """Return the positions `reads` of each row."""
    return stream[torch.arange(len(stream), device=stream.device)[:, None], reads.to(stream.device)]


def norm_of(norm: Any, x: Tensor) -> Tensor:
    """Normalise tokens, by a fused kernel where TransformerLens's own arithmetic is plain float32."""
    name, weight = type(norm).__name__, getattr(norm, "w", None)
    plain = x.dtype in (torch.float32, torch.float64) and x.dtype == getattr(weight, "dtype", None)
    if plain and name == "LayerNorm":
        return F.layer_norm(x, (x.shape[-1],), norm.w, norm.b, norm.eps)
    if plain and name == "RMSNorm":
        return F.rms_norm(x, (x.shape[-1],), norm.w, norm.eps)
    y: Tensor = norm(x) if x.ndim == 3 else norm(x[None])[0]
    return y


def heads_of(
    x: Float[Tensor, "*token d_model"],
    W: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"] | None,
) -> Float[Tensor, "*token head d_head"]:
    """Return x W[h] + b[h] for every head."""
    weight = rearrange(W, "head d_model d_head -> (head d_head) d_model")
    bias = None if b is None else b.flatten()
    y: Tensor = linear(x, weight, bias).unflatten(-1, (W.shape[0], W.shape[2]))
    return y


def mlp_of(
    mlp: MLPWeights,
    x: Float[Tensor, "*token d_model"],
    taps: Taps = NO_TAPS,
    hidden_bytes: int | None = None,
) -> Float[Tensor, "*token d_model"]:
    """Return the MLP's output.

    Args:
        mlp: its weights.
        x: normalised tokens.
        taps: those of the block; `pre`, `pre_linear` and `post` act here.
        hidden_bytes: size of the slices when no gradient is needed and no tap sees inside;
            `HIDDEN_BYTES` or `HIDDEN_BYTES_CPU` where None.
    """
    inside = not taps.keys().isdisjoint(("pre", "pre_linear", "post"))
    if inside or (torch.is_grad_enabled() and x.requires_grad):
        return _mlp(mlp, x, taps)
    if hidden_bytes is None:
        hidden_bytes = HIDDEN_BYTES_CPU if x.device.type == "cpu" else HIDDEN_BYTES
    rows = max(256, hidden_bytes // (max(1, mlp.W_in.shape[-1]) * x.element_size()))
    if x[..., 0].numel() <= rows:
        return _mlp(mlp, x, taps)
    flat = torch.cat([_mlp(mlp, part, taps) for part in x.flatten(0, -2).split(rows)])
    return flat.view_as(x)


def _mlp(mlp: MLPWeights, x: Tensor, taps: Taps) -> Tensor:
    gated = mlp.W_gate is not None
    W, b = (mlp.W_gate, mlp.b_gate) if mlp.W_gate is not None else (mlp.W_in, mlp.b_in)
    hidden = ACTIVATIONS[mlp.act](tapped(taps, "pre", linear(x, W.T, b)))
    if gated:
        factor = tapped(taps, "pre_linear", linear(x, mlp.W_in.T, mlp.factor_bias))
        b_in = mlp.b_in
        hidden = hidden * factor if b_in is None else torch.addcmul(b_in, hidden, factor)
    return linear(tapped(taps, "post", hidden), mlp.W_out.T, mlp.b_out)
