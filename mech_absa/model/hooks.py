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
    points = getattr(model, "hook_points", None)  # a method of TransformerLens's modules
    named: Mapping[str, Any] = points if isinstance(points, Mapping) else model.hook_dict
    return named


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


_BY_HEAD = ("ReshapeForAttentionHeads", "TransposeRotaryHeads")
"""Conversions of a bridge's hook points that show heads which its tensors hold side by side."""


def _as_shown(module: torch.nn.Module, fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `fn` made to see what a hook of `HookedTransformer` sees at a point of a bridge."""
    conversion: Any = getattr(module, "hook_conversion", None)
    if type(conversion).__name__ not in _BY_HEAD:
        return fn

    def shown(output: Tensor) -> Tensor | None:
        new = fn(conversion.convert(output))
        return None if new is None else conversion.revert(new)

    return shown


class Middle(torch.nn.Module):
    """The residual stream between attention and MLP of a bridge, as one point.

    A bridge's own `hook_resid_mid` is what the second norm reads: what is put there reaches the
    MLP, but not the stream that goes on. Here it reaches both, as in a `HookedTransformer`: a new
    stream m becomes a new output of the attention, m - resid_pre. Hooks on that output itself act
    before, in whatever order they were added.

    Args:
        before: the hook point that the first norm reads.
        attn_out: that of what the attention adds.
    """

    def __init__(self, before: torch.nn.Module, attn_out: torch.nn.Module):
        super().__init__()
        self._points = (before, attn_out)  # a tuple: the points have their homes in the model

    def register_forward_hook(self, hook: Callable[..., Any], **options: Any) -> Any:
        """Add a hook that sees the stream; return a handle whose `remove` takes it away."""
        before, attn_out = self._points
        streams: list[Tensor] = []

        def remember(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            streams[:] = args[:1]

        def act(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            (x,) = streams
            middle = x + output
            new = hook(self, args, middle)
            if new is None and not middle.requires_grad:
                return None
            return (middle if new is None else new) - x

        act.of_stream = True  # type: ignore[attr-defined]
        handles = [
            before.register_forward_hook(remember),
            attn_out.register_forward_hook(act, **options),
        ]
        _put_streams_last(attn_out)
        return _Handles(handles)


def _put_streams_last(module: torch.nn.Module) -> None:
    """Let hooks that `Middle` has put on a module run after all others there."""
    hooks: Any = module._forward_hooks
    for key in [k for k, hook in hooks.items() if hasattr(hook, "of_stream")]:
        hooks.move_to_end(key)


class _Handles:
    """Several handles of hooks as one."""

    def __init__(self, handles: list[Any]):
        self.handles = handles

    def remove(self) -> None:
        """Remove all of them."""
        for handle in self.handles:
            handle.remove()


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
    first: bool = False,
) -> Iterator[list[int]]:
    """Add forward hooks to modules, output -> output (None keeps it), while the block runs.

    Args:
        points: (module, function) in the order in which they run.
        times: how often each must have fired at the end; None does not check.
        what: names the hooks in the error.
        first: act before the hooks that are there already.

    Raises:
        HookError: one fired another number of times.
    """
    counted: list[_Counted] = []
    handles = []
    firings: list[int] = []
    try:
        for module, fn in points:
            counted.append(_Counted(_as_shown(module, fn)))
            handles.append(module.register_forward_hook(counted[-1], prepend=first))
            _put_streams_last(module)
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
