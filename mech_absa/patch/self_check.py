"""Identities that must hold in every trace, checked on a few pairs of the trace itself."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SelfCheckError
from ..sites import Site
from .corruption import GaussianNoise
from .job import Span
from .pairs import Pair
from .plan import Plan
from .request import Direction, Engine
from .table import Values


def self_check(
    p: Plan, cells: int = 4, seed: int = 0, tolerance: float | None = None
) -> dict[str, Any]:
    """Check identities that must hold.

    - `engine_against_loop`: cells agree with the loop. Among them are the cell with the largest
      effect of one pair and one of median size; the others are random, and may well be 0.
    - `same_onto_same`: patching the base run onto itself changes nothing.
    - `all_of_resid_pre_0`: restoring all of resid_pre at layer 0 gives the other run.
    - `left_of_first_difference`: cells there are zero even where they are computed.

    Args:
        p: the plan.
        cells: compared with the loop.
        seed: of the draws.
        tolerance: on differences of the metric; default by the dtype (float32: 1e-4).

    Returns:
        name -> largest difference seen (NaN fails), the tolerance, and which cells were compared.

    Raises:
        SelfCheckError: an identity does not hold.
    """
    half = p.model.dtype in (torch.bfloat16, torch.float16)
    tolerance = (0.1 if half else 1e-4) if tolerance is None else tolerance
    seen: dict[str, float] = {}
    compared: list[str] = []
    for way in p.request.direction.single:
        for name, difference in _differences(p.one_way(way).exactly(), cells, seed, compared):
            seen[name] = worse(seen.get(name, 0.0), difference)
    if broken := {name: value for name, value in seen.items() if not value <= tolerance}:
        names = ", ".join(f"{name} is off by {value:.3g}" for name, value in broken.items())
        raise SelfCheckError(
            f"a self-check failed ({names}; allowed {tolerance:g}); the trace would be wrong, "
            "please report it with the model's name"
        )
    return {**seen, "cells_compared": compared, "tolerance": tolerance}


def worse(a: float, b: float) -> float:
    """Return the larger difference; NaN is worse than any number.

    Example:
        >>> worse(0.5, float("nan"))
        nan
    """
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _differences(
    p: Plan, cells: int, seed: int, compared: list[str]
) -> Iterator[tuple[str, float]]:
    """Yield (name, difference) of every check in one direction."""
    rng = random.Random(seed)
    for component, pair, span in _drawn(p, cells, rng):
        one = p.exactly([component])
        a, b = _values(one, pair, [span]), _values(one.by_loop(), pair, [span])
        compared.append(f"{component}@{span} of {pair.id}")
        yield "engine_against_loop", _difference(a.patched - a.base, b.patched - b.base)
    if p.source is None:
        pair = rng.choice(p.pairs)
        few = rng.sample(p.components, min(8, len(p.components)))
        yield "same_onto_same", _same_onto_same(p.exactly(few), pair)
        yield "all_of_resid_pre_0", _all_of_the_input(p, pair)
        if left := [Span((i,), "template", i) for i in range(min(pair.first, pair.length - 1))]:
            # By the loop, from pairs that claim to differ from the first token on.
            some = rng.sample(left, min(2, len(left)))
            v = _values(p.exactly(few).by_loop(), replace(pair, first=0), some)
            yield "left_of_first_difference", _difference(v.patched, v.base.expand_as(v.patched))


def _drawn(p: Plan, cells: int, rng: random.Random) -> list[tuple[Site, Pair, Span]]:
    """Draw the cells that are compared: the largest and a median one of a pair, then any."""
    drawn = []
    if p.request.engine == Engine.WAVEFRONT:
        pair = rng.choice(p.pairs)
        spans = p.spans([pair])[0]
        size = _values(p, pair, spans).effect.mean(-1).abs().nan_to_num(math.inf)
        order = size.flatten().argsort(descending=True)[: max(1, int((size > 0).sum()))]
        for index in (int(order[0]), int(order[len(order) // 2]))[:cells]:
            c, s = divmod(index, len(spans))
            drawn.append((p.components[c], pair, spans[s]))
    while len(drawn) < cells:
        pair = rng.choice(p.pairs)
        drawn.append((rng.choice(p.components), pair, rng.choice(p.spans([pair])[0])))
    return drawn


def _values(p: Plan, pair: Pair, spans: Sequence[Span]) -> Values:
    (values,) = p.measure([pair], [spans]).values()
    return values


def _same_onto_same(p: Plan, pair: Pair) -> float:
    """Patch the base run onto itself, by noise of scale 0 with as many draws."""
    nothing = GaussianNoise(scale=0.0, draws=pair.draws)
    same = replace(pair, corrupted=pair.clean, corruption=nothing, sigma=0.0, first=0)
    v = _values(p, same, p.spans([pair])[0])
    return _difference(v.patched, v.base.expand_as(v.patched))


def _all_of_the_input(p: Plan, pair: Pair) -> float:
    """Restore the whole stream before block 0."""
    whole = Span(tuple(range(pair.length)), "template")
    first = replace(p, request=replace(p.request, window=1)).exactly([Site(0, "resid_pre")])
    v = _values(first, pair, [whole])
    other = v.clean if p.request.direction == Direction.DENOISE else v.corrupted
    return _difference(v.patched[0, 0], other)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


__all__ = ["self_check", "worse"]
