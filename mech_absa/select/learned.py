"""Selectors that train the base model's heads: where an edit of every head ends up large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from ..edits.base import Shape
from ..edits.heads import Gates, HeadGate
from ..sites import Site
from ..train import presets
from ..train.fit import fit
from .evidence import Evidence, Selector
from .ranking import Pool


def trained_gates(evidence: Evidence, gates: Gates, epochs: int) -> Iterator[tuple[Site, HeadGate]]:
    """Yield every head with its gate, after one training of all of them together.

    Args:
        evidence: examples and the base model.
        gates: of `HeadGate`.
        epochs: passes over the examples; rates are those of `presets.bundled`.
    """
    model = evidence.edited
    sites = presets.range_sites(range(model.n_layers))
    preset = presets.bundled(sites, "head_gate", epochs=epochs, shape=Shape.of(model))
    parts = tuple(replace(part, options={"gates": gates}) for part in preset.parts)
    edit = fit(
        model,
        evidence.examples,
        preset.but(parts=parts),
        seed=evidence.seed,
        template=evidence.template,
        verbalizer=evidence.verbalizer,
        progress=False,
    )
    for gate in edit:
        assert isinstance(gate, HeadGate)
        yield gate.site, gate


class JoLA(Selector):
    """g_m + g_a: openness of a head's trained gates in evaluation; a layer's is the sum of its heads'.

    Source: Lai et al. 2025 (arXiv 2502.01179); `edits.heads` has the formulas. JoLA trains 200
    examples for 20 epochs at 5e-3; here the examples and the rates of `presets.bundled` are used.

    Args:
        epochs: passes over the examples.
    """

    name: ClassVar[str] = "jola"
    pool: ClassVar[Pool] = "sum"

    def __init__(self, epochs: int = 3):
        super().__init__()
        self.epochs = epochs

    def scores(self, evidence: Evidence) -> dict[Site, float]:
        found = trained_gates(evidence, "hard_concrete", self.epochs)
        return {site: float(gate.gates().detach().sum()) for site, gate in found}


class LoFiTScales(Selector):
    """||m||: size of a head's trained scale (1 + m) * z; a layer's is the sum of its heads'.

    Source: Yin et al. 2024 (arXiv 2406.01563), the first of its two phases; `train.lofit` does both.

    Args:
        epochs: passes over the examples.
    """

    name: ClassVar[str] = "lofit"
    pool: ClassVar[Pool] = "sum"

    def __init__(self, epochs: int = 3):
        super().__init__()
        self.epochs = epochs

    def scores(self, evidence: Evidence) -> dict[Site, float]:
        found = trained_gates(evidence, "none", self.epochs)
        return {site: float(gate.m.detach().norm()) for site, gate in found}


__all__ = ["JoLA", "LoFiTScales", "trained_gates"]
