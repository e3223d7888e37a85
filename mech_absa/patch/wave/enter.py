"""Step 3: what a restored state makes of the residual stream, one formula per kind of state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...model import Model

FIELD = {
    "resid_pre": "resid_pre",
    "resid_mid": "resid_mid",
    "resid_post": "resid_post",
    "attn_out": "attn_out",
    "mlp_out": "mlp_out",
    "head": "z",
}
"""Kind of site -> its name in `LayerStates`. These are the kinds that this engine computes."""


class Here(NamedTuple):
    """States at the patched tokens of rows that enter after one block (before it, for resid_pre).

    Attributes:
        base: name of a state -> the base run's, at these tokens.
        source: the source's state of the kind that is patched; every head's z for heads.
        head: which head is patched.
    """

    model: Model
    layer: int
    base: Callable[[str], Tensor]
    source: Tensor
    head: Int[Tensor, " patch"]


def _after_attention(here: Here, attn_out: Tensor) -> Tensor:
    """Finish the block with another attention output: one MLP, except where blocks are parallel."""
    mid = here.base("resid_pre") + attn_out
    if here.model.parallel:
        return mid + here.base("mlp_out")
    return mid + here.model.mlp_out(here.layer, mid)


def _with_head(here: Here) -> Tensor:
    """Replace z of one head in the attention's sum: it changes by (z_source - z_base)[h] W_O[h]."""
    W_O, _ = here.model.backend.output(here.layer)
    z, projected = here.base("z"), here.base("projected")
    delta = torch.empty_like(projected)
    for head in here.head.unique().tolist():
        mine = here.head == head
        delta[mine] = (here.source[mine, head] - z[mine, head]) @ W_O[head]
    return here.model.attn_out(here.layer, projected + delta)


ENTER: dict[str, Callable[[Here], Float[Tensor, "patch d_model"]]] = {
    "resid_pre": lambda here: here.source,
    "resid_post": lambda here: here.source,
    "resid_mid": lambda here: here.source + here.model.mlp_out(here.layer, here.source),
    "mlp_out": lambda here: here.base("resid_mid") + here.source,
    "attn_out": lambda here: _after_attention(here, here.source),
    "head": lambda here: _after_attention(here, _with_head(here)),
}
"""Kind -> the residual stream after the block (before it, for resid_pre) with the state restored."""


def needed(model: Model, kinds: set[str]) -> set[str]:
    """Return the states of the base run that the walk and the formulas above read."""
    names = {"resid_pre", "q", "k", "v"}
    if "mlp_out" in kinds:
        names.add("resid_mid")
    if "head" in kinds:
        names |= {"z", "projected"}
    if model.parallel:
        names.add("mlp_out")
    return names


def enter_flops(model: Model, kind: str) -> int:
    """Return the floating-point operations of a formula, per patched token."""
    mlp = model.flops("mlp")
    head = 2 * model.d_head * model.d_model
    return {
        "resid_mid": mlp,
        "attn_out": 0 if model.parallel else mlp,
        "head": head + (0 if model.parallel else mlp),
    }.get(kind, 0)
