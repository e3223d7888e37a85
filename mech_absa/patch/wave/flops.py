"""Step 5: the floating-point operations of a chunk, from its geometry alone.

Only matrix products are counted, a multiplication and an addition being two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...model import Model
from ...sites import Site
from .enter import enter_flops
from .packed import Packed


def walk_flops(model: Model, p: Packed, components: Sequence[Site]) -> int:
    """Return the floating-point operations of walking a chunk through the layers."""
    start, last = int(p.rows.entry[0]), model.n_layers - 1
    blocks = sum(block_flops(model, p, layer) for layer in range(start, last + 1))
    return blocks + entry_flops(model, p, components)


def block_flops(model: Model, p: Packed, layer: int) -> int:
    """Return the operations of one block on all live rows."""
    if not p.stage(layer).rows:
        return 0
    reading = layer == model.n_layers - 1
    changed = len(p.changed(layer))
    kept = len(p.read(layer)) if reading else p.stage(layer).tokens
    looks = sum(
        len(bucket.rows) * (p.n_reads if reading else p.rows.length - bucket.begin) * p.rows.length
        for bucket in p.buckets(layer)
    )
    return (
        model.flops("qkv", changed)
        + model.flops("attend", looks)
        + model.flops("project", kept)
        + model.flops("mlp", changed if model.parallel and not reading else kept)
    )


def entry_flops(model: Model, p: Packed, components: Sequence[Site]) -> int:
    """Return the operations of making the streams with which rows enter.

    Of rows that enter after the last block, only patches at positions that are read are made.
    """
    seen = p.rows.patched >= p.rows.length - p.n_reads
    made = (p.rows.entry[p.patched_row] < model.n_layers) | seen
    cost = torch.tensor([enter_flops(model, c.kind) for c in components])
    return int(cost[p.rows.component[p.patched_row[made]]].sum())
