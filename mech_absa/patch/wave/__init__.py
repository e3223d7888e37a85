"""The engine: compute every cell of a sweep exactly, in one walk over the layers.

In a causal decoder, a state restored at (layer l, position t) changes nothing below l and nothing
left of t. So a cell needs no forward pass of its own. It is a *perturbation of the residual stream
at a few positions that enters at one layer*. From there on it needs only the positions from t on;
it reads keys and values of the positions before t from the base run.

| component | enters | work before it enters |
|---|---|---|
| resid_pre(l) | at l | none |
| resid_post(l), mlp_out(l) | at l+1 | none: swap, or add source - base |
| resid_mid(l), attn_out(l) | at l+1 | one MLP on the patched positions (none in parallel blocks) |
| head(l, h) | at l+1 | (z_source - z_base) W_O[h], then as attn_out |

Read the files in this order; each is one step:

    cells    one row per (component, span, base run) that has to be computed       `Rows`
    packed   the tokens of a chunk of rows, end to end, one matrix row per token   `Packed`
    enter    what a restored state makes of the residual stream                    `ENTER`
    walk     the layers: rows join, the block runs once on all of them             `Walk`
    flops    what a chunk costs, from its geometry alone                           `walk_flops`
    sweep    the two unpatched runs, then chunk after chunk                        `sweep`

Against one forward pass per cell this saves a factor of 4 for large models and 7 for GPT-2 small
(`benchmarks/README.md` derives the floor). The weights are read once per layer and chunk instead
of once per layer and cell, which is worth as much again.

With a window of layers (ROME: 10 for attention and MLP) a row joins at the window's first layer,
and the source's state is put back inside every further block of the window. Noise draws are rows.
Label tokens are positions like any other. What this engine cannot run it refuses by name
(`refusal`), and `trace` runs the loop instead.
"""

from .enter import FIELD
from .sweep import Ran, base_bytes, refusal, run_unpatched, source_bytes, sweep, token_bytes

__all__ = [
    "FIELD",
    "Ran",
    "base_bytes",
    "refusal",
    "run_unpatched",
    "source_bytes",
    "sweep",
    "token_bytes",
]
