"""RelP: layer-wise relevance propagation as a backward pass with other derivatives.

Attribution patching takes the gradient of the metric at the base run. That gradient is small where
the model is flat: a norm removes the part along the stream, an activation function saturates. RelP
(Rezaei Jafari, Eberle, Khakzar and Nanda 2025, arXiv 2508.21258) replaces the gradient by relevance
coefficients. The values of the forward pass stay what they are; the backward pass takes some
factors as constants:

| rule | forward | taken as constant | slope |
|---|---|---|---|
| `ln` | y = (x - mean) / scale | scale | 1 / scale, behind the centring |
| `identity` | y = act(x) | act(x) / x | act(x) / x; at 0, act(e) / e with e = 1e-6 |
| `half` | y = act(gate) * linear | each factor in turn, half of the gradient each | half of the product rule |
| `pattern` | z = pattern v | the attention pattern | through the values alone |

Linear layers keep their gradient (the 0-rule). The paper's code uses the first three; on a linear
model no rule applies and RelP is exact. `ln` acts on every norm, the final one included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from ..model import Model
from ..model.hooks import hooked_at
from .request import Rule

Point = tuple[torch.nn.Module, Callable[[Tensor], Tensor | None]]
"""A module and what is done to its output."""


@contextlib.contextmanager
def relevance(model: Model, rules: Collection[str]) -> Iterator[None]:
    """Make backward passes through the model follow these rules for as long as the block lasts."""
    with hooked_at(points_of(model, rules), what="a rule of RelP"):
        yield


def points_of(model: Model, rules: Collection[str]) -> list[Point]:
    """Return the hooks that put rules in force."""
    points: list[Point] = []
    if Rule.LN in rules:
        points += [(scale, Tensor.detach) for scale in model.scales_of_norms()]
    for layer in range(model.n_layers):
        if Rule.PATTERN in rules:
            points.append((model.point(layer, "pattern"), Tensor.detach))
        if {Rule.IDENTITY, Rule.HALF} & set(rules):
            with contextlib.suppress(KeyError):  # a mixture of experts has no such point
                points += _mlp_points(model, layer, rules)
    return points


def _mlp_points(model: Model, layer: int, rules: Collection[str]) -> list[Point]:
    """Return the hooks on an MLP: two remember what comes in, one rebuilds the product."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[Tensor], None]:
        return lambda value: seen.__setitem__(name, value)

    def rebuilt(post: Tensor) -> Tensor:
        pre = seen.pop("pre")
        acted = model.backend.act(layer, pre)
        if Rule.IDENTITY in rules and model.cfg.act_fn != "relu":
            acted = identity_rule(pre, acted)
        if "linear" in seen:
            acted = acted * seen.pop("linear")
            acted = half_rule(acted) if Rule.HALF in rules else acted
        return same_value(post, acted)

    points: list[Point] = [
        (model.point(layer, "pre"), remember("pre")),
        (model.point(layer, "post"), rebuilt),
    ]
    if model.cfg.gated_mlp:
        points.append((model.point(layer, "pre_linear"), remember("linear")))
    return points


def identity_rule(x: Tensor, y: Tensor, least: float = 1e-6) -> Tensor:
    """Return x (y / x) with y / x constant: the value of y, with slope y / x.

    Example:
        >>> x = torch.tensor([2.0], requires_grad=True)
        >>> identity_rule(x, x**2).backward()
        >>> round(float(x.grad), 4)
        2.0
    """
    steady = x + torch.where(x < 0, -least, least)
    return steady * (y / steady).detach()


def half_rule(product: Tensor) -> Tensor:
    """Return the product with half of its gradient, so that two factors share one relevance.

    Example:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> half_rule(x * x).backward()
        >>> float(x.grad)
        3.0
    """
    return product / 2 + (product / 2).detach()


def same_value(value: Tensor, slope: Tensor) -> Tensor:
    """Return `value` to the last bit, with the gradient of `slope`."""
    return value.detach() + (slope - slope.detach()).to(value.dtype)


def final_norm(model: Model, rules: Collection[str]) -> Callable[[Tensor], Tensor] | None:
    """Return the final norm as `Model.finish` needs it under these rules; None where it stays."""
    if Rule.LN not in rules or model.cfg.normalization_type is None:
        return None

    def frozen(x: Tensor) -> Tensor:
        # The module, whose scale is hooked, gives the gradient; the kernel that `finish` uses
        # otherwise gives the value.
        return same_value(model.backend.norm(None, "ln_final", x), model.backend.hooked_norm(x))

    return frozen
