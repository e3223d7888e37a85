"""The forward pass of training and scoring: the model's blocks from their pieces, hooks' functions called where they belong.

    last(model, x, reads, start=3, points=edit.points(model, tokens))      the last residual stream where it is read

It gives what a hooked `HookedTransformer.forward` gives, and the same gradients, up to rounding, for less:

- the last block runs at the positions that are read; the other tokens give it their keys and values and nothing more;
- attention and norms are fused kernels, which keep no pattern for the backward pass;
- large products on a CPU run through oneDNN in both directions (`models.linear`); the weights are constants, so that only activations
  have gradients.

A point is a module of the hooked model and a function of its output, as `hooks.hooked_at` takes it; the functions are called with the
values that the module would have returned, once each. Where the pieces cannot stand for the model, a point lies
elsewhere (the scores of a prefix), or somebody else's hooks are on the model, the hooked forward pass itself runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..axes import Resid
from ..errors import HookError
from . import ACTIVATIONS, Model, heads_of, linear, norm_of
from .hooks import hooked_at

Point = tuple[nn.Module, Callable[[Tensor], Tensor | None]]
"""A module and what is done to its output; None leaves it as it is."""


def advance(
    model: Model, x: Resid, start: int = 0, stop: int | None = None, points: Sequence[Point] = ()
) -> Resid:
    """The residual stream after blocks `start` to `stop` - 1, whole.

    Args:
        x: as it enters block `start`; rows padded on the right.
        stop: the number of layers where None.
        points: in the order in which they are to act.

    Raises:
        HookError: a point lies outside these blocks.
    """
    stop = model.n_layers if stop is None else stop
    if not _lean(model, start, stop, points):
        with hooked_at(points) as firings:
            x = model.hooked.forward(x, start_at_layer=start, stop_at_layer=stop)
        _all_acted(len(points), sum(n > 0 for n in firings))
        return x
    taps = _Taps(points)
    for layer in range(start, stop):
        x = _block(model, layer, x.to(model.block_device(layer)), taps)
    _all_acted(len(points), taps.calls)
    return x


def last(
    model: Model,
    x: Resid,
    reads: Int[Tensor, "batch read"],
    start: int = 0,
    points: Sequence[Point] = (),
) -> Float[Tensor, "batch read d_model"]:
    """The residual stream after the last block, at the positions that are read.

    Args:
        x: as it enters block `start`; rows padded on the right.
        reads: positions of each row.
        points: in the order in which they are to act.

    Raises:
        HookError: a point lies outside these blocks.
    """
    final = model.n_layers - 1
    lean = (
        start <= final
        and _lean(model, start, model.n_layers, points)
        and _fused(model, final, x.shape[1])
    )
    if not lean or any(id(module) in _modules(model, final) for module, _ in points):
        return rows_of(advance(model, x, start, None, points), reads)
    x = advance(model, x, start, final, points).to(model.block_device(final))
    return _last_block(model, final, x, reads.to(x.device))


def rows_of(stream: Resid, reads: Int[Tensor, "batch read"]) -> Float[Tensor, "batch read d_model"]:
    """The positions `reads` of each row."""
    return stream[torch.arange(len(stream), device=stream.device)[:, None], reads.to(stream.device)]


class _Taps:
    """Functions by the module whose output they are given."""

    def __init__(self, points: Sequence[Point]):
        self.calls = 0
        self.of: dict[int, list[Callable[[Tensor], Tensor | None]]] = {}
        for module, fn in points:
            self.of.setdefault(id(module), []).append(fn)

    def __call__(self, module: nn.Module, y: Tensor) -> Tensor:
        for fn in self.of.get(id(module), ()):
            self.calls += 1
            new = fn(y)
            y = y if new is None else new
        return y


def _all_acted(planned: int, acted: int) -> None:
    if planned != acted:
        raise HookError(
            f"{planned} interventions were planned and {acted} acted; all must lie in the blocks that run, once each"
        )


def _modules(model: Model, layer: int) -> dict[int, nn.Module]:
    """The modules of a block whose outputs `_block` shows."""
    block = model.hooked.blocks[layer]
    found = [block.hook_resid_pre, block.ln1, block.attn, block.hook_attn_out]
    found += [block.ln2, block.mlp, block.hook_mlp_out, block.hook_resid_post]
    found += [getattr(block.attn, name) for name in ("hook_q", "hook_k", "hook_v", "hook_z")]
    found += [block.hook_resid_mid] if not model.parallel else []
    found += [
        getattr(block.mlp, name)
        for name in ("hook_pre", "hook_pre_linear", "hook_post")
        if hasattr(block.mlp, name)
    ]
    return {id(m): m for m in found}


def _lean(model: Model, start: int, stop: int, points: Sequence[Point]) -> bool:
    """Whether the pieces can stand for the hooked forward pass."""
    if model.refusal is not None or any(
        not _known(model.hooked.blocks[layer]) for layer in range(start, stop)
    ):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules):
        return False
    if not points:
        return True
    shown = {key for layer in range(start, stop) for key in _modules(model, layer)}
    return all(id(module) in shown for module, _ in points)


def _known(block: Any) -> bool:
    mlp = block.mlp
    return (
        block.attn.q_norm is None
        and type(mlp).__name__ in ("MLP", "GatedMLP")
        and mlp.cfg.act_fn in ACTIVATIONS
    )


def _fused(model: Model, layer: int, length: int) -> bool:
    """Whether the attention of a layer is softmax(q k / scale) v under a causal mask, and nothing else."""
    cfg, attn = model.cfg, model.hooked.blocks[layer].attn
    windowed = attn.attn_type == "local" and length > cfg.window_size
    return (
        not windowed and cfg.attn_scores_soft_cap <= 0 and cfg.positional_embedding_type != "alibi"
    )


def _attention(
    model: Model,
    layer: int,
    q: Float[Tensor, "batch q_pos head d_head"],
    k: Float[Tensor, "batch pos kv d_head"],
    v: Float[Tensor, "batch pos kv d_head"],
    mask: Tensor | None = None,
) -> Float[Tensor, "batch q_pos head d_head"]:
    """z of every head; without a mask, queries stand at 0, 1, ... as keys do."""
    if mask is None and not _fused(model, layer, k.shape[1]):
        return model.attend(layer, q, k, v, torch.arange(q.shape[1], device=q.device))
    scale = 1 / float(model.hooked.blocks[layer].attn.attn_scale)
    if (group := q.shape[2] // k.shape[2]) > 1:
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    z = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return z.transpose(1, 2)


def _project(
    model: Model, layer: int, z: Float[Tensor, "*token head d_head"]
) -> Float[Tensor, "*token d_model"]:
    """sum_h z_h W_O[h] + b_O."""
    attn = model.hooked.blocks[layer].attn
    return linear(
        z.flatten(-2), rearrange(attn.W_O, "head d_head d_model -> d_model (head d_head)"), attn.b_O
    )


def _mlp(
    mlp: Any, h: Float[Tensor, "*token d_model"], tap: Callable[[nn.Module, Tensor], Tensor]
) -> Float[Tensor, "*token d_model"]:
    act = ACTIVATIONS[mlp.cfg.act_fn][2]
    if type(mlp).__name__ == "MLP":
        hidden = act(tap(mlp.hook_pre, linear(h, mlp.W_in.T, mlp.b_in)))
    else:
        gate = tap(mlp.hook_pre, linear(h, mlp.W_gate.T))
        hidden = torch.addcmul(mlp.b_in, act(gate), tap(mlp.hook_pre_linear, linear(h, mlp.W_in.T)))
    return linear(tap(mlp.hook_post, hidden), mlp.W_out.T, mlp.b_out)


def _block(model: Model, layer: int, x: Resid, tap: _Taps) -> Resid:
    """One block, every value shown where a hook would see it."""
    block, both_sides = model.hooked.blocks[layer], model.cfg.use_normalization_before_and_after
    attn, positions = block.attn, torch.arange(x.shape[1], device=x.device)
    x = tap(block.hook_resid_pre, x)
    h = tap(block.ln1, norm_of(block.ln1, x))
    q, k, v = (
        tap(point, heads_of(h, W, b))
        for point, (W, b) in zip(
            (attn.hook_q, attn.hook_k, attn.hook_v), model.qkv_weights(layer), strict=True
        )
    )
    z = tap(
        attn.hook_z,
        _attention(
            model, layer, model.rotate(layer, q, positions), model.rotate(layer, k, positions), v
        ),
    )
    a = tap(attn, _project(model, layer, z))
    a = tap(block.hook_attn_out, norm_of(block.ln1_post, a) if both_sides else a)
    mid = x + a if model.parallel else tap(block.hook_resid_mid, x + a)
    m = tap(
        block.mlp,
        _mlp(block.mlp, tap(block.ln2, norm_of(block.ln2, x if model.parallel else mid)), tap),
    )
    m = tap(block.hook_mlp_out, norm_of(block.ln2_post, m) if both_sides else m)
    return tap(block.hook_resid_post, mid + m)


def _last_block(
    model: Model, layer: int, x: Resid, reads: Int[Tensor, "batch read"]
) -> Float[Tensor, "batch read d_model"]:
    """The same where the positions `reads` are all that is asked for: one query, one MLP and one sum each."""
    block, both_sides = model.hooked.blocks[layer], model.cfg.use_normalization_before_and_after
    h = norm_of(block.ln1, x)
    (W_Q, b_Q), (W_K, b_K), (W_V, b_V) = model.qkv_weights(layer)
    positions = torch.arange(x.shape[1], device=x.device)
    q = model.rotate(layer, heads_of(rows_of(h, reads), W_Q, b_Q), reads)
    k = model.rotate(layer, heads_of(h, W_K, b_K), positions)
    mask = rearrange(positions <= reads[..., None], "batch read pos -> batch 1 read pos")
    a = _project(model, layer, _attention(model, layer, q, k, heads_of(h, W_V, b_V), mask))
    x, a = rows_of(x, reads), norm_of(block.ln1_post, a) if both_sides else a
    m = _mlp(block.mlp, norm_of(block.ln2, x if model.parallel else x + a), lambda _, y: y)
    return x + a + (norm_of(block.ln2_post, m) if both_sides else m)
