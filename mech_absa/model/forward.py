"""The forward pass of training and scoring, with the functions of an edit called where they belong.

    last(model, x, reads, start=3, points=edit.points(model, tokens))

It gives the last residual stream at the positions that are read: what a hooked
the hooked forward pass gives, and the same gradients, up to rounding, for less.

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

import contextlib
from collections.abc import Callable, Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from ..axes import Resid
from ..errors import HookError
from .block import batch_attention, block
from .hooks import hooked_at
from .model import Model
from .pieces import Tap, rows_of

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
            x = model.backend.forward(x, start, stop)
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
        for name, module in reversed(_modules(model, layer).items())
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


_OUTSIDE = ("ln1", "q", "k", "v", "z", "projected", "attn_out", "ln2", "mlp", "mlp_out")
_STREAM = ("resid_pre", "resid_mid", "resid_post")
_INSIDE = ("pre", "pre_linear", "post")


def _modules(model: Model, layer: int) -> dict[str, nn.Module]:
    """Return the modules whose outputs the values of a block are, by the names of `pieces`."""
    names = [*_OUTSIDE, *(n for n in _STREAM if n != "resid_mid" or not model.parallel)]
    names += _INSIDE if model.backend.mlp(layer) is not None else ()
    modules: dict[str, nn.Module] = {}
    for name in names:
        with contextlib.suppress(KeyError):
            modules[name] = model.point(layer, name)
    return modules
