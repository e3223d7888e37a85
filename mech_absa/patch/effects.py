"""Hold what a trace measured: one row per pair and cell, without averaging.

With P the metric (the paper's: probability of the gold label), and a cell restored in the corrupted
run (`denoise`):

    TE  = P_clean - P_corrupted                    total effect of a pair          `Effects.total`
    IE  = P_patched - P_corrupted                  indirect effect of a cell       column `effect`
    ATE, AIE                                       their means over pairs          `ImportanceMap`

(Meng et al. 2022, section 2.1.) In the `noise` direction IE = P_clean - P_patched. Both are
positive if the cell matters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..errors import DataError
from ..sites import in_reading_order
from .importance import ImportanceMap
from .traced import COLUMNS, CONTROL_COLUMNS, PAIR_COLUMNS, Traced, as_written

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, eq=False)
class Effects(Traced):
    """Hold the effects of every cell of every pair.

    Attributes:
        frame: columns `COLUMNS`; `head` and `position` are NA where there is none (-1 in the files
            and on the axes of xarray); `draw_sd` is the
            standard deviation of the effect over noise draws.
        pairs: columns `PAIR_COLUMNS`, one row a pair: what was asked, token texts and roles, label
            probabilities of both runs.
        about: model, n_layers, n_heads, corruption, direction, metric, unit, method, by, window,
            counts.
        controls: columns `CONTROL_COLUMNS`, in a sweep by role: effects of template tokens drawn by
            pair, as many as its roles have; None in sweeps by token and in runs of earlier
            versions.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")
        >>> pairs = ma.make_pairs(model, examples, ma.Counterfactual(), limit=2, keep="all")
        >>> effects = ma.trace(model, pairs, sites=("resid_post",))
        >>> effects.frame["kind"].unique().tolist()
        ['resid_post']
    """

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        kinds = ", ".join(self.frame["kind"].unique())
        return f"Effects({len(self.pairs)} pairs, {len(self.frame)} cells of {kinds}; {self.about.get('method', 'exact')}, {self.about.get('direction')})"

    @property
    def kinds(self) -> list[str]:
        """Return the kinds of state that were traced."""
        return list(self.frame["kind"].unique())

    @property
    def total(self) -> pd.Series:
        """Return TE of every pair: what the corruption takes away."""
        pairs = self.pairs.set_index("example_id")
        return (pairs["clean"] - pairs["corrupted"]).rename("total_effect")

    def importance(self, by: str = "role", **options: Any) -> ImportanceMap:
        """Return averages over pairs with intervals; see `ImportanceMap.of`.

        Raises:
            DataError: these are an excerpt, whose averages would pass for those of the whole run.
        """
        if whole := self.about.get("excerpt_of"):
            raise DataError(
                f"these effects are an excerpt: {len(self.pairs)} of {whole} pairs; the averages over all "
                "of them stand in the run's importance.csv, see ImportanceMap.load"
            )
        return ImportanceMap.of(self, by=by, **options)

    def example(self, example_id: str) -> pd.DataFrame:
        """Return the rows of one pair.

        Raises:
            DataError: no such example was traced.
        """
        rows = self.frame[self.frame["example_id"] == example_id]
        if rows.empty:
            some = ", ".join(self.pairs["example_id"].head(3))
            raise DataError(
                f"no example {example_id!r} was traced; there are {len(self.pairs)}, such as {some}"
            )
        return rows

    def to_pandas(self) -> pd.DataFrame:
        return self.frame

    def to_xarray(self) -> xr.DataArray:
        """Return effects by role as an array with axes example, kind, layer, head, role; roles stand
        in reading order.
        """
        values, cells = self.matrix("role")
        index = pd.MultiIndex.from_frame(as_written(cells))
        frame = pd.DataFrame(
            values.T, index=index, columns=pd.Index(self.pairs["example_id"], name="example")
        )
        array: xr.DataArray = (
            frame.stack(future_stack=True)
            .rename("effect")
            .to_xarray()
            .transpose("example", "kind", "layer", "head", "role")
        )
        return array.reindex(role=in_reading_order(array["role"].values.tolist()))

    def show(self, example_id: str, kind: str | None = None) -> Any:
        """Show the prompt of one pair, its tokens coloured by their largest effect over layers
        (CircuitsVis, offline).

        Args:
            example_id: of a pair.
            kind: of state; default the first that was traced.

        Raises:
            DataError: the example or the kind was not traced.
        """
        from ..widgets import prompt_effects

        return prompt_effects(self, example_id, kind)

    def _repr_html_(self) -> str:
        from ..report import effects_html

        return effects_html(self, self.importance())

    def only(self, **equal: Any) -> Effects:
        """Return the rows whose columns equal (or are among) the given values."""
        frame = self.frame
        for column, value in equal.items():
            frame = frame[
                frame[column].isin(value if isinstance(value, (list, tuple, set)) else [value])
            ]
        return replace(self, frame=frame)


__all__ = ["COLUMNS", "CONTROL_COLUMNS", "PAIR_COLUMNS", "Effects"]
