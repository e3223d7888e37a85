"""Selectors that look at nothing: what every other one has to be better than."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ..sites import Site
from .evidence import Evidence, Selector
from .ranking import layer_site


class First(Selector):
    """score(l) = -l: the first layers."""

    name: ClassVar[str] = "first"

    def scores(self, evidence: Evidence) -> dict[Site, float]:
        return {layer_site(layer): -float(layer) for layer in range(evidence.edited.n_layers)}


class Last(Selector):
    """score(l) = l: the last layers."""

    name: ClassVar[str] = "last"

    def scores(self, evidence: Evidence) -> dict[Site, float]:
        return {layer_site(layer): float(layer) for layer in range(evidence.edited.n_layers)}


class Middle(Selector):
    """score(l) = -|l - (L - 1) / 2|: the layers nearest to the middle of the depth.

    CogSteer (arXiv 2410.17714) takes the middle third without looking further.
    """

    name: ClassVar[str] = "middle"

    def scores(self, evidence: Evidence) -> dict[Site, float]:
        middle = (evidence.edited.n_layers - 1) / 2
        return {
            layer_site(layer): -abs(layer - middle) for layer in range(evidence.edited.n_layers)
        }


class Random(Selector):
    """score(l) ~ U(0, 1), drawn by the evidence's seed."""

    name: ClassVar[str] = "random"

    def scores(self, evidence: Evidence) -> dict[Site, float]:
        drawn = np.random.default_rng(evidence.seed).random(evidence.edited.n_layers)
        return {layer_site(layer): float(x) for layer, x in enumerate(drawn)}


__all__ = ["First", "Last", "Middle", "Random"]
