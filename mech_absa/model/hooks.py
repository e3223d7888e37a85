"""Read and write activations inside a model. This is the only module that adds hooks.

Two context managers remove exactly the hooks that they added, also after an exception, and leave
those of an outer context alone:

    with capture(model, [Site(3, "resid_post")]) as seen:
        ...  # seen[site] is the activation of the last forward pass
    with intervene(model, {site: fn}, times=1):
        ...  # activation -> fn(activation)

A function given to `intervene` returns a new tensor and never writes into the one that it gets, so
that caches and gradients stay right. Hooks that never fire, or fire twice, give wrong maps without
a warning. So every hook counts how often it fires, and leaving `intervene` with another count than
planned is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import HookError, SiteError
from ..sites import Site
from .hooked import HookedBackend
from .model import Model

Edit = Callable[[Tensor], Tensor]
"""A function from an activation to an activation of the same shape."""


def hook_point(hooked: Any, site: Site) -> torch.nn.Module:
    """Return the hook point of a site.

    Raises:
        SiteError: the model has none of that name.
    """
    try:
        point: torch.nn.Module = _points(hooked)[site.hook_name]
    except KeyError:
        raise SiteError(
            f"site {site} does not exist: the model has no hook {site.hook_name}"
        ) from None
    return point


def _points(model: Any) -> Mapping[str, Any]:
    """Return the hook points of a `Model`, or of a module of TransformerLens, by name."""
    backend = model.backend if isinstance(model, Model) else HookedBackend(model)
    return backend.hook_points


def _select(site: Site, activation: Tensor) -> Tensor:
    return activation if site.head is None else activation[:, :, site.head]


def _replace(site: Site, activation: Tensor, new: Tensor) -> Tensor:
    if site.head is None:
        return new
    heads = list(activation.unbind(2))
    heads[site.head] = new
    return torch.stack(heads, dim=2)


def at_site(hooked: Any, site: Site, fn: Edit) -> tuple[torch.nn.Module, Edit]:
    """Return the hook point of a site, and `fn` restricted to its part of what passes there: one
    head, or the whole stream.

    Raises:
        SiteError: the model has no such site.
    """
    return hook_point(hooked, site), lambda activation: _replace(
        site, activation, fn(_select(site, activation))
    )


class _Counted:
    """Count how often a forward hook fires."""

    def __init__(self, fn: Callable[[Tensor], Tensor | None]):
        self.fn, self.fired = fn, 0

    def __call__(self, module: torch.nn.Module, args: Any, output: Tensor) -> Tensor | None:
        self.fired += 1
        return self.fn(output)


@contextlib.contextmanager
def hooked_at(
    points: Iterable[tuple[torch.nn.Module, Callable[[Any], Any]]],
    times: int | None = None,
    what: str = "a hook",
) -> Iterator[list[int]]:
    """Add forward hooks to modules, output -> output (None keeps it), while the block runs.

    Args:
        points: (module, function) in the order in which they run.
        times: how often each must have fired at the end; None does not check.
        what: names the hooks in the error.

    Raises:
        HookError: one fired another number of times.
    """
    counted: list[_Counted] = []
    handles = []
    firings: list[int] = []
    try:
        for module, fn in points:
            counted.append(_Counted(fn))
            handles.append(module.register_forward_hook(counted[-1]))
        yield firings
    finally:
        for handle in handles:
            handle.remove()
        firings.extend(c.fired for c in counted)
    if times is not None and any(n != times for n in firings):
        raise HookError(f"{what} fired {sorted(set(firings))} times; planned was {times}")


@contextlib.contextmanager
def intervene(
    hooked: Any, interventions: Mapping[Site, Edit], times: int | None = 1
) -> Iterator[None]:
    """Replace the activation at each site by a function of itself.

    Args:
        hooked: a `Model`, or TransformerLens's module.
        interventions: site -> function. For a head, it gets `[batch pos d_head]`, otherwise `[batch
            pos d_model]`. A site's `at` is not used: the function decides which positions change.
        times: forward passes planned inside the block; None does not check.

    Raises:
        SiteError: the model has no such site.
        HookError: a hook fired another number of times than planned.
    """

    points = [at_site(hooked, site, fn) for site, fn in interventions.items()]
    with hooked_at(
        points, times, what=f"an intervention at {', '.join(map(str, list(interventions)[:3]))}"
    ):
        yield


@contextlib.contextmanager
def capture(hooked: Any, sites: Iterable[Site], grad: bool = False) -> Iterator[dict[Site, Tensor]]:
    """Keep the activations at `sites` of the last forward pass inside the block.

    Args:
        hooked: a `Model`, or TransformerLens's module.
        sites: what to keep; nothing else is kept. Heads are kept as a whole: name any head of a
            layer.
        grad: keep the tensors in the graph, with their gradients after a backward pass; otherwise
            they are detached.
    """
    seen: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], None]:
        def hook(activation: Tensor) -> None:
            if grad:
                activation.retain_grad()
                seen[site] = activation
            else:
                seen[site] = activation.detach()

        return hook

    with hooked_at([(hook_point(hooked, site), keep(site)) for site in sites]):
        yield seen


def live_hooks(hooked: Any) -> list[str]:
    """Return the names of the hook points that carry a hook now; empty for a model without
    hooks.
    """
    return [
        name
        for name, point in _points(hooked).items()
        if isinstance(point, torch.nn.Module) and point._forward_hooks
    ]
