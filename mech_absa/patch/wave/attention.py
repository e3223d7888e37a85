"""The attention of packed rows: keys and values left of a row's first token are the base run's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ...model import LayerStates, Model
from .packed import Packed


def attention(
    model: Model, layer: int, p: Packed, qkv: Sequence[Tensor], base: LayerStates, memory: int
) -> Float[Tensor, "kept head d_head"]:
    """Return z of every head at all live tokens; in the last block, at the tokens that are read.

    Args:
        model, layer: whose attention it is.
        p: where the tokens stand.
        qkv: queries, keys and values of all live tokens.
        base: states of the base runs in this layer.
        memory: bytes that one call may take.
    """
    q, k, v = qkv
    T, reading = p.rows.length, layer == model.n_layers - 1
    read = p.read(layer).to(q.device) if reading else None
    z = q.new_empty(len(q) if read is None else len(read), *q.shape[1:])
    for bucket in p.buckets(layer):
        begin = T - p.n_reads if reading else bucket.begin
        asked = torch.arange(begin, T, device=q.device)
        looks = 3 * model.n_heads * len(asked) * (model.d_head + T)
        row_bytes = q.element_size() * (2 * model.n_kv_heads * T * model.d_head + looks)
        for rows in bucket.rows.split(max(1, memory // row_bytes)):
            count, run = p.count[rows], p.rows.base_run[rows].to(q.device)
            local = torch.arange(len(rows)).repeat_interleave(count)
            ends = count.cumsum(0)
            tokens = torch.arange(len(local)) - (ends - count)[local] + p.begin[rows][local]
            local, pos, tokens = (y.to(q.device) for y in (local, p.pos[tokens], tokens))
            keys, values = base.k[run], base.v[run]
            keys[local, pos], values[local, pos] = k[tokens], v[tokens]
            if read is not None:
                where = rows[:, None] * p.n_reads + torch.arange(p.n_reads)
                queries = q[read[where.to(q.device)]]
                heads = model.attend(layer, queries, keys, values, asked)
                z[where.flatten().to(q.device)] = heads.flatten(0, 1)
                continue
            queries = q.new_zeros(len(rows), len(asked), *q.shape[1:])
            queries[local, pos - begin] = q[tokens]
            z[tokens] = model.attend(layer, queries, keys, values, asked)[local, pos - begin]
    return z
