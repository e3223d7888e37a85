"""Effects of the same cells in both directions of patching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..errors import ConfigError, DataError, choices
from .effects import Effects
from .importance import ImportanceMap
from .request import Direction
from .traced import Averaged

RULES = ("mean", "pie", "tie")
"""Effects that sites may be chosen by."""
Column: TypeAlias = Float[np.ndarray, " row"]
_SAME = ("model", "metric", "corruption", "by", "window")
"""What both traces must have in common."""
_CELL = ["example_id", "kind", "layer", "head", "position", "role"]


@dataclass(frozen=True, eq=False)
class BothDirections:
    """Effects of the same cells, traced in both directions.

    In the terms of mediation analysis (Vaidyanathan et al. 2026, arXiv 2606.27510), with the metric
    m and a cell c:

        PIE(c) = m(corrupted; c <- clean) - m(corrupted)      pure indirect effect, `denoise`
        TIE(c) = m(clean) - m(clean; c <- corrupted)          total indirect effect, `noise`
        INT(c) = TIE(c) - PIE(c)                              interaction

    INT is the part of a cell's effect that depends on the state of the other cells. It is 0 where
    the model is affine.

    Attributes:
        pie: traced with direction `denoise`.
        tie: traced with direction `noise`; row by row the same cells.

    Raises:
        ConfigError: the two were not traced on the same cells, metric and corruption.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")[:6]
        >>> pairs = ma.make_pairs(model, examples, ma.Counterfactual(), limit=1, keep="all")
        >>> effects = ma.trace(model, pairs, ["mlp_out"], by="role", layers=[1], direction="both")
        >>> both = ma.BothDirections.of(effects)
        >>> pie, tie = both.pie.frame["effect"], both.tie.frame["effect"]
        >>> both.interaction.frame["effect"].equals(tie - pie)
        True
    """

    pie: Effects
    tie: Effects

    def __post_init__(self) -> None:
        directions = (self.pie.about.get("direction"), self.tie.about.get("direction"))
        if directions != (Direction.DENOISE, Direction.NOISE):
            raise ConfigError(
                f"effects of the directions {directions[0]} and {directions[1]} were given; accepted: "
                "denoise, then noise"
            )
        for key in _SAME:
            a, b = self.pie.about.get(key), self.tie.about.get(key)
            if a != b:
                raise ConfigError(f"the two traces differ in {key}: {a} and {b}")
        a, b = (e.frame[_CELL].reset_index(drop=True).astype(str) for e in (self.pie, self.tie))
        if not a.equals(b):
            raise ConfigError("the two traces have other cells; trace the same pairs and sites")

    @classmethod
    def of(cls, effects: Effects) -> BothDirections:
        """Split effects that were traced with `direction="both"`.

        Raises:
            DataError: they were traced in one direction.
        """
        if "direction" not in effects.frame:
            only = effects.about.get("direction")
            raise DataError(f"effects of direction {only} were given; trace with direction='both'")

        def one(direction: Direction) -> Effects:
            rows = effects.frame[effects.frame["direction"] == direction]
            controls = effects.controls
            if controls is not None:
                controls = controls[controls["direction"] == direction]
            return replace(
                effects,
                frame=_undirected(rows),
                about=effects.about | {"direction": str(direction)},
                controls=None if controls is None else _undirected(controls),
            )

        return cls(one(Direction.DENOISE), one(Direction.NOISE))

    def by_rule(self, rule: str) -> Effects:
        """Return the effects that a rule of choice looks at: PIE, TIE or their mean.

        Raises:
            ConfigError: the rule is none of `RULES`.
        """
        if rule not in RULES:
            raise ConfigError(f"unknown rule {rule!r}; accepted: {choices(RULES)}")
        chosen = {"pie": self.pie, "tie": self.tie}.get(rule) or self.mean
        return replace(chosen, about=chosen.about | {"rule": rule})

    def table(self, **options: Any) -> pd.DataFrame:
        """Return PIE, TIE and INT of every cell of a map by role, averaged over pairs.

        Args:
            options: of `ImportanceMap.of`: level, adjustment, draws, seed.

        Returns:
            columns kind, layer, head, role, pie, tie, interaction; the interval, p-values and counts are
            those of the interaction.
        """
        return interaction_table(self.interaction, self.pie, self.tie, **options)

    @property
    def mean(self) -> Effects:
        """Return the mean of PIE and TIE of every pair and cell."""
        return self._combined(lambda pie, tie: (pie + tie) / 2, "both")

    @property
    def interaction(self) -> Effects:
        """Return INT of every pair and cell; its map has intervals and p-values as any other."""
        return self._combined(lambda pie, tie: tie - pie, "interaction")

    def _combined(self, of: Callable[[Column, Column], Column], direction: str) -> Effects:
        """Return a number of both directions for every cell and every control."""

        def joined(pie: pd.DataFrame, tie: pd.DataFrame) -> pd.DataFrame:
            columns = (x["effect"].to_numpy(dtype=float) for x in (pie, tie))
            return pie.assign(effect=of(*columns))

        # Neither one patched run nor the spread over its draws belongs to a number of two runs.
        frame = joined(self.pie.frame, self.tie.frame).assign(patched=np.nan, draw_sd=np.nan)
        controls = None
        if self.pie.controls is not None and self.tie.controls is not None:
            controls = joined(self.pie.controls, self.tie.controls)
        about = self.pie.about | {"direction": direction}
        return replace(self.pie, frame=frame, about=about, controls=controls)


def interaction_table(
    interaction: Averaged, pie: Averaged, tie: Averaged, **options: Any
) -> pd.DataFrame:
    """Return PIE, TIE and INT of every cell of a map by role; see `BothDirections.table`."""
    table = ImportanceMap.of(interaction, by="role", **options).table
    table = table.rename(columns={"aie": "interaction"})
    for at, (name, one) in enumerate((("pie", pie), ("tie", tie)), start=4):
        table.insert(at, name, np.nanmean(one.matrix("role")[0], axis=0))
    return table


def _undirected(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop(columns="direction").reset_index(drop=True)


__all__ = ["RULES", "BothDirections", "interaction_table"]
