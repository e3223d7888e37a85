"""The forward pass of training and scoring, with the functions of an edit called where they belong.

    last(model, x, reads, start=3, points=edit.points(model, tokens))

It gives the last residual stream at the positions that are read: what a hooked
`HookedTransformer.forward` gives, and the same gradients, up to rounding, for less.

- The last block runs at those positions; the other tokens give it their keys and values only.
- Attention and norms are fused kernels, which keep no pattern for the backward pass.
- Large products on a CPU run through oneDNN in both directions (`kernels`). The weights are
  constants, so that only activations have gradients.

A point is a module of the hooked model and a function of its output, as `hooks.hooked_at` takes
it. Each function is called once, with the value that the module would have returned. The hooked
forward pass itself runs where the pieces cannot stand for the model, where a point lies elsewhere
(the scores of a prefix), and where somebody else's hooks are on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from ..axes import Resid
from ..errors import HookError
from .block import batch_attention, block
from .hooks import hooked_at
from .model import Model
from .pieces import Tap, knows_mlp, rows_of

Point = tuple[nn.Module, Callable[[Tensor], Tensor | None]]
"""A module and what is done to its output; None leaves it as it is."""


def advance(
    model: Model, x: Resid, start: int = 0, stop: int | None = None, points: Sequence[Point] = ()
) -> Resid:
    """Return the residual stream after blocks `start` to `stop` - 1, at all positions.

    Args:
        model: what is run.
        x: as it enters block `start`; rows padded on the right.
        start: the first block that runs.
        stop: the first block that does not; the number of layers where None.
        points: in the order in which they are to act.

    Raises:
        HookError: a point lies outside these blocks.
    """
    stop = model.n_layers if stop is None else stop
    taps = _taps(model, start, stop, points)
    if taps is None:
        with hooked_at(points) as firings:
            x = model.hooked.forward(x, start_at_layer=start, stop_at_layer=stop)
        _all_acted(len(points), sum(n > 0 for n in firings))
        return x
    return _through(model, x, range(start, stop), taps)


def last(
    model: Model,
    x: Resid,
    reads: Int[Tensor, "batch read"],
    start: int = 0,
    points: Sequence[Point] = (),
) -> Float[Tensor, "batch read d_model"]:
    """Return the residual stream after the last block, at the positions that are read.

    Args:
        model: what is run.
        x: as it enters block `start`; rows padded on the right.
        reads: positions of each row.
        start: the first block that runs.
        points: in the order in which they are to act.

    Raises:
        HookError: a point lies outside these blocks.
    """
    final = model.n_layers - 1
    taps = _taps(model, start, model.n_layers, points) if start <= final else None
    if taps is None or taps[final]:
        return rows_of(advance(model, x, start, None, points), reads)
    x = _through(model, x, range(start, final), taps).to(model.block_device(final))
    reads = reads.to(x.device)
    attention = batch_attention(model, reads=reads)
    return block(model, final, x, attention, keep=lambda y: rows_of(y, reads))


def _through(model: Model, x: Resid, layers: range, taps: dict[int, dict[str, Tap]]) -> Resid:
    for layer in layers:
        x = x.to(model.block_device(layer))
        x = block(model, layer, x, batch_attention(model, taps[layer]), taps[layer])
    return x


def _taps(
    model: Model, start: int, stop: int, points: Sequence[Point]
) -> dict[int, dict[str, Tap]] | None:
    """Return the points by layer and name; None where the hooked forward pass must run."""
    if model.refusal is not None or _carries_hooks(model):
        return None
    taps: dict[int, dict[str, Tap]] = {layer: {} for layer in range(start, stop)}
    if not points:
        return taps
    places = {
        id(module): (layer, name)
        for layer in range(start, stop)
        for name, module in _modules(model, layer).items()
    }
    for module, fn in points:
        if id(module) not in places:
            return None
        layer, name = places[id(module)]
        before = taps[layer].get(name)
        taps[layer][name] = fn if before is None else _both(before, fn)
    return taps


def _both(first: Tap, second: Tap) -> Tap:
    def tap(value: Tensor) -> Tensor | None:
        new = first(value)
        value = value if new is None else new
        newer = second(value)
        return value if newer is None else newer

    return tap


def _carries_hooks(model: Model) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules)


def _all_acted(planned: int, acted: int) -> None:
    if planned != acted:
        raise HookError(
            f"{planned} interventions were planned and {acted} acted; all must lie in the blocks "
            "that run, once each"
        )


def _modules(model: Model, layer: int) -> dict[str, nn.Module]:
    """Return the modules whose outputs the values of a block are, by the names of `pieces`."""
    of = model.hooked.blocks[layer]
    modules = {name: getattr(of.attn, f"hook_{name}") for name in ("q", "k", "v", "z")}
    modules |= {"ln1": of.ln1, "projected": of.attn, "ln2": of.ln2, "mlp": of.mlp}
    kinds = ["resid_pre", "attn_out", "mlp_out", "resid_post"]
    kinds += [] if model.parallel else ["resid_mid"]
    modules |= {name: getattr(of, f"hook_{name}") for name in kinds}
    if knows_mlp(of.mlp):
        inside = ("pre", "pre_linear", "post")
        modules |= {n: m for n in inside if (m := getattr(of.mlp, f"hook_{n}", None)) is not None}
    return modules
