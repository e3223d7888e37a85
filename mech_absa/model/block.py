"""The transformer block, once.

    y = block(model, layer, x, attention, taps, keep=keep, mlp=mlp)

    x          the residual stream of some tokens, [batch pos d_model] or packed [token d_model]
    attention  (layer, x) -> z [*kept head d_head]: the part in which tokens meet. It normalises,
               projects and rotates (`Model.qkv`), and decides who sees whose keys.
    keep       x -> the rows of x that go on; given where the block is asked for some tokens only
    mlp        (layer, x) -> what the MLP adds; given where it need not run on every token
    taps       name -> function that sees, and may replace, a value (`pieces`)

Three users differ in `attention` alone:

- `run` keeps activations of whole batches: `batch_attention`, with taps that store;
- `forward` trains and scores: `batch_attention` through fused kernels, the functions of an edit as
  taps, and in the last block only the positions that are read (`reads`);
- the engine's wave runs packed tokens. Only some of them have new queries, keys and values, and the
  others' come from the base run: its own `attention`, and its own `mlp` in parallel blocks.

A tap sees the tokens at hand: before attention all of x, from z on those that `keep` kept.
The hooked forward pass of TransformerLens stays apart: it is the check of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ..axes import Resid
from .model import Model
from .pieces import NO_TAPS, Tap, Taps, tapped

Attention = Callable[[int, Tensor], Tensor]
"""(layer, the block's input) -> z of the tokens that are kept, [*kept head d_head]."""


def block(
    model: Model,
    layer: int,
    x: Float[Tensor, "*token d_model"],
    attention: Attention,
    taps: Taps = NO_TAPS,
    *,
    keep: Callable[[Tensor], Tensor] | None = None,
    mlp: Callable[[int, Tensor], Tensor] | None = None,
) -> Float[Tensor, "*kept d_model"]:
    """Return the residual stream after one block.

    Args:
        model: whose block it is.
        layer: its number.
        x: the stream as it enters, on the block's device.
        attention: see the module.
        taps: functions on the values of this block; those of `ln1`, `q`, `k`, `v`, `rot_q` and
            `rot_k` are the business of `attention`.
        keep: picks the tokens that go on; all where None.
        mlp: what the MLP adds, given the stream that it reads (the kept part of the block's input
            where attention and MLP are parallel); `Model.mlp_out` where None.
    """
    x = tapped(taps, "resid_pre", x)
    z = tapped(taps, "z", attention(layer, x))
    out = tapped(taps, "projected", model.project(layer, z))
    del z
    out = tapped(taps, "attn_out", model.attn_out(layer, out))
    x = x if keep is None else keep(x)
    mid = tapped(taps, "resid_mid", x + out)
    del out
    read = x if model.parallel else mid
    added = mlp(layer, read) if mlp is not None else model.mlp_out(layer, read, taps)
    return tapped(taps, "resid_post", mid + tapped(taps, "mlp_out", added))


def batch_attention(
    model: Model,
    taps: Taps = NO_TAPS,
    reads: Int[Tensor, "batch read"] | None = None,
    fused: bool = True,
) -> Attention:
    """Return the attention of whole prompts, padded on the right.

    Args:
        model: whose attention it is.
        taps: those of the block.
        reads: the positions that have queries; all where None.
        fused: use one kernel that keeps no pattern, where softmax(q k) v under a causal mask is all
            that the layer does; otherwise `Model.attend`, whose arithmetic the engine's wave shares.
    """

    def attention(layer: int, x: Resid) -> Float[Tensor, "batch query head d_head"]:
        length = x.shape[1]
        positions = torch.arange(length, device=x.device)
        q, k, v = model.qkv(layer, x, positions, taps, reads)
        if fused and is_plain(model, layer, length):
            return _fused(model, layer, q, k, v, reads)
        return model.attend(layer, q, k, v, positions if reads is None else reads)

    return attention


def is_plain(model: Model, layer: int, length: int) -> bool:
    """Return whether a layer's attention is softmax(q k / scale) v under a causal mask, no more."""
    cfg, window = model.cfg, model.backend.window(layer)
    windowed = window is not None and length > window
    alibi = cfg.positional_embedding_type == "alibi"
    return not (windowed or alibi or cfg.attn_scores_soft_cap > 0)


def _fused(
    model: Model,
    layer: int,
    q: Float[Tensor, "batch q_pos head d_head"],
    k: Float[Tensor, "batch pos kv d_head"],
    v: Float[Tensor, "batch pos kv d_head"],
    reads: Int[Tensor, "batch q_pos"] | None,
) -> Float[Tensor, "batch q_pos head d_head"]:
    """Return z of every head by torch's attention kernel."""
    mask = None
    if reads is not None:
        positions = torch.arange(k.shape[1], device=k.device)
        mask = rearrange(positions <= reads[..., None], "batch read pos -> batch 1 read pos")
    if (group := q.shape[2] // k.shape[2]) > 1:
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    z = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=1 / model.backend.scale(layer),
    )
    return z.transpose(1, 2)


# ---- a whole run, with what was asked for kept --------------------------------------------------


class LayerStates(dict[str, Tensor]):
    """Activations of one block over prompts of equal length, by name and as attributes.

    | name | shape |
    |---|---|
    | resid_pre, resid_mid, resid_post, attn_out, mlp_out | batch pos d_model |
    | q, z; k, v | batch pos head d_head; batch pos kv d_head. q and k after rotation |
    | projected | batch pos d_model: the attention's sum before any post-norm |

    Only what was asked for is there. `resid_mid` of a parallel block is resid_pre + attn_out, which
    no MLP reads.
    """

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"{name!r} was not kept; there are {', '.join(self) or 'no states'}"
            ) from None


def run(model: Model, x: Resid, keep: Set[str] = frozenset()) -> tuple[Resid, list[LayerStates]]:
    """Run all blocks over whole prompts of equal length, and keep the named states of every block.

    Args:
        model: what is run.
        x: the residual stream before block 0.
        keep: names of `LayerStates` fields.

    Returns:
        the last residual stream, and one `LayerStates` per block.
    """
    states = []
    for layer in range(model.n_layers):
        kept = LayerStates()
        taps = {_TAPPED.get(name, name): _store(kept, name) for name in keep}
        attention = batch_attention(model, taps, fused=False)
        x = block(model, layer, x.to(model.block_device(layer)), attention, taps)
        states.append(kept)
    return x, states


_TAPPED = {"q": "rot_q", "k": "rot_k"}
"""Field of `LayerStates` -> the value that it holds, where the names differ."""


def _store(kept: LayerStates, name: str) -> Tap:
    return partial(kept.__setitem__, name)
