"""Named places: which layers `first`, `middle`, `last` and `random` stand for beside the traced ones.

A comparison of places is fair when each has the same number of layers and none of them holds
another. `random` is a control for two claims at once: that the traced layers are better than
others, and that they are better than simply editing late. So a random window shares no layer with
the traced ones or with the last ones, and different draws give different windows until all have
been drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from itertools import combinations

from ..errors import ConfigError

NAMED = ("first", "middle", "last")
MOST_LISTED = 10_000
"""Windows that are listed and shuffled; where there are more, they are drawn one by one."""


def named_layers(name: str, width: int, n_layers: int) -> tuple[int, ...]:
    """Return the `width` layers that a name stands for.

    Args:
        name: `first`, `middle` or `last`.
        width: layers wanted.
        n_layers: layers of the model.

    >>> named_layers("middle", 2, 8), named_layers("last", 3, 8)
    ((3, 4), (5, 6, 7))
    """
    start = {"first": 0, "middle": (n_layers - width) // 2, "last": n_layers - width}[name]
    return tuple(range(start, start + width))


def random_windows(width: int, n_layers: int, traced: Collection[int] = ()) -> int:
    """Return how many different random windows there are.

    >>> random_windows(2, 8, traced=(3, 4))
    6
    """
    return math.comb(len(_others(width, n_layers, traced)), width)


def random_layers(
    width: int, n_layers: int, traced: Collection[int] = (), draw: int = 0
) -> tuple[int, ...]:
    """Return the layers of one random window.

    The window shares no layer with `traced` or with the last `width` layers. Draws 0, 1, 2, ... are
    different windows until all have been drawn; then they repeat. Tests must therefore cluster by
    window, not by draw.

    Args:
        width: layers of the window; they need not be neighbours.
        n_layers: layers of the model.
        traced: layers to stay away from.
        draw: number of the draw.

    Raises:
        ConfigError: too few layers are left to draw from.

    >>> [random_layers(2, 8, traced=(3, 4), draw=d) for d in range(3)]
    [(1, 5), (0, 5), (0, 2)]
    """
    others = _others(width, n_layers, traced)
    if len(others) < width:
        raise ConfigError(
            f"random layers need {width} layers beside the traced and the last ones, and a model of "
            f"{n_layers} layers has {len(others)} of them; trace fewer layers, or leave random out"
        )
    rng = random.Random(0)
    count = math.comb(len(others), width)
    if count <= MOST_LISTED:
        windows = list(combinations(others, width))
        rng.shuffle(windows)
        return windows[draw % count]
    seen: dict[tuple[int, ...], None] = {}
    while len(seen) <= draw:
        seen[tuple(sorted(rng.sample(others, width)))] = None
    return list(seen)[draw]


def _others(width: int, n_layers: int, traced: Collection[int]) -> list[int]:
    """Return the layers that a random window may take."""
    taken = {*traced, *named_layers("last", width, n_layers)}
    return [layer for layer in range(n_layers) if layer not in taken]
