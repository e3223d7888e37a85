"""Average effects over pairs: where, how much, and how sure.

An `ImportanceMap` holds for every cell (component x role) the average indirect effect, a bootstrap
interval and a sign-flip p-value, both by sentence because aspects of one sentence are not
independent, the p-value corrected over all cells of the map, and the number of pairs and sentences.

`selection.py` chooses sites from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..errors import ConfigError, DataError, choices
from ..records import About, atomic, read_table
from ..sites import Site, in_reading_order, sites_file, traced_in
from ..stats import cell_tests, cluster_bootstrap, resolution, skewed, support
from .selection import CONTROL, Selection, select
from .traced import Averaged, Traced, as_written, cell_site, with_absent

if TYPE_CHECKING:
    import xarray as xr

COLUMNS = (
    "kind",
    "layer",
    "head",
    "role",
    "aie",
    "ci_low",
    "ci_high",
    "p",
    "p_adjusted",
    "n",
    "sentences",
    "support",
)


@dataclass(frozen=True, eq=False)
class ImportanceMap:
    """Hold averages of effects with labelled axes.

    Attributes:
        table: columns `COLUMNS`, one row per cell; `n` counts pairs, `sentences` the sentences they
            come from, `support` those that show an effect; `head` is NA where there is none (-1 in the file and on the axes of xarray); with
            `by="position"` the column `role` is `position`.
        values: the effects behind it, `[pair cell]`, NaN where a pair lacks the cell.
        clusters: the sentence of every pair.
        about: as in `Effects`, with level and adjustment.
        controls: of every cell of a sweep by role, `[pair cell]`: the effect of as many template
            tokens, drawn by pair; None where they were not traced.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")
        >>> pairs = ma.make_pairs(model, examples, ma.Counterfactual(), limit=2, keep="all")
        >>> effects = ma.trace(model, pairs, sites=("resid_post",))
        >>> importance = effects.importance(by="role")
        >>> "aie" in importance.table
        True
    """

    table: pd.DataFrame
    values: np.ndarray = field(repr=False)
    clusters: np.ndarray = field(repr=False)
    about: About = field(default_factory=About)
    controls: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", with_absent(self.table))

    @classmethod
    def of(
        cls,
        effects: Averaged,
        by: str = "role",
        *,
        level: float = 0.95,
        adjustment: str = "maxt",
        draws: int = 2000,
        seed: int = 0,
    ) -> ImportanceMap:
        """Average some effects into a map.

        Args:
            effects: from `trace`.
            by: `role` or `position`.
            level: of the intervals.
            adjustment: of the p-values over all cells, one of `stats.ADJUSTMENTS`: `maxt`, `bootstrap` and
                `holm` (family-wise), `bh` and `by` (false discovery rate) or `none`.
            draws: of the bootstrap.
            seed: of the bootstrap and of the sign flips.

        Returns:
            the map. Cells that are zero for certain are no hypotheses: their p is NaN.
        """
        values, cells = effects.matrix(by)
        clusters = effects.pairs["cluster"].to_numpy()
        interval = cluster_bootstrap(values, clusters, level=level, draws=draws, seed=seed)
        tests = cell_tests(values, clusters, adjustment=adjustment, seed=seed)
        table = cells.assign(
            aie=interval.mean,
            ci_low=interval.low,
            ci_high=interval.high,
            p=tests.p,
            p_adjusted=tests.adjusted,
            n=(~np.isnan(values)).sum(0),
            sentences=_sentences(values, clusters),
            support=support(values, clusters),
        )
        k = len(np.unique(clusters))
        tested = max(1, int((~np.isnan(tests.p)).sum()))
        about = effects.about | {
            "level": level,
            "adjustment": adjustment,
            "by": by,
            "traced_by": effects.about.get("by"),
            "n_pairs": len(effects.pairs),
            "n_sentences": k,
            "p_floor": tests.floor,
            "tested_cells": tested,
            "skewed_cells": int((skewed(values, clusters) & ~np.isnan(tests.p)).sum()),
            "resolution": str(resolution(k, tested, adjustment)),
        }
        return cls(table, values, clusters, about, effects.matched(cells))

    def __repr__(self) -> str:
        kinds = ", ".join(self.table["kind"].unique())
        return (
            f"ImportanceMap({len(self.table)} cells of {kinds}; {len(self.values)} pairs, "
            f"{len(np.unique(self.clusters))} sentences)"
        )

    def _repr_html_(self) -> str:
        from ..report import importance_html

        return importance_html(self)

    def top(self, n: int = 10) -> pd.DataFrame:
        """Return the cells with the largest effects, as a table with their sites spelled out."""
        best = self.table.sort_values("aie", ascending=False, kind="stable").head(n)
        by = "role" if "role" in best else "position"
        sites = [
            str(cell_site(r["kind"], r["layer"], r["head"], r[by])) for _, r in best.iterrows()
        ]
        return best.assign(site=sites)[
            ["site", "aie", "ci_low", "ci_high", "p_adjusted", "n"]
        ].reset_index(drop=True)

    def to_pandas(self) -> pd.DataFrame:
        return self.table

    def to_xarray(self) -> xr.Dataset:
        """Return aie, ci_low, ci_high, p, p_adjusted and n over the axes kind, layer, head, role;
        roles stand in reading order.
        """
        by = "role" if "role" in self.table else "position"
        arrays: xr.Dataset = (
            as_written(self.table).set_index(["kind", "layer", "head", by]).to_xarray()
        )
        if by == "role":
            return arrays.reindex(role=in_reading_order(arrays["role"].values.tolist()))
        return arrays

    def grid(self, kind: str, column: str = "aie") -> pd.DataFrame:
        """Return one kind as a matrix, roles (in reading order) x layers; heads are averaged.

        Raises:
            ConfigError: the map has no such kind.
        """
        rows = self.table[self.table["kind"] == kind]
        if rows.empty:
            raise ConfigError(
                f"the map has no kind {kind!r}; it has {choices(self.table['kind'].unique())}"
            )
        by = "role" if "role" in rows else "position"
        grid = rows.pivot_table(index=by, columns="layer", values=column, aggfunc="mean", sort=True)
        return grid.reindex(in_reading_order(rows[by])) if by == "role" else grid

    def save(self, path: str | Path) -> None:
        """Write `importance.csv`."""
        with atomic(path) as temporary:
            as_written(self.table).to_csv(temporary, index=False, float_format="%.8g")

    @classmethod
    def load(cls, path: str | Path) -> ImportanceMap:
        """Load the map of a run.

        Args:
            path: the folder of a run, or its importance.csv.

        Returns:
            the map, with the pairs' effects where the folder holds them all; a map from importance.csv
            alone has no `values`, and no sites can be chosen from it.

        Raises:
            DataError: there is no map.
        """
        folder = Path(path)
        file = folder / "importance.csv" if folder.is_dir() else folder
        if not file.exists():
            raise DataError(f"{folder} holds no map (importance.csv is missing)")
        table = read_table(file, error=DataError)
        if not (file.parent / "about.json").exists():
            return cls(table, np.empty((0, len(table))), np.empty(0), About())
        effects = Traced.load(file.parent)
        if "excerpt_of" in effects.about:
            return cls(table, np.empty((0, len(table))), np.empty(0), effects.about)
        return replace(cls.of(effects, adjustment="none"), table=table)

    # ---- choosing sites -----------------------------------------------------------------------------

    def select(
        self,
        kind: str | None = None,
        *,
        width: int | None = None,
        roles: Sequence[str] | None = None,
        control: str = CONTROL,
        draws: int = 2000,
        seed: int = 0,
    ) -> Selection:
        """Choose sites; see `mech_absa.patch.selection.select`."""
        return select(self, kind, width=width, roles=roles, control=control, draws=draws, seed=seed)

    @property
    def changed_roles(self) -> tuple[str, ...]:
        """Return the roles whose own tokens the corrupted text changes."""
        return tuple(self.about.get("changed_roles") or ())

    def window(
        self, kind: str, role: str, layers: Sequence[int]
    ) -> Float[np.ndarray, "pair layer"]:
        """Return every pair's effects in some layers at a role; NaN where the pair lacks the role."""
        return self.values[:, self._columns(kind, role, layers)]

    def _columns(self, kind: str, role: str, layers: Sequence[int]) -> list[int]:
        rows = self.table[(self.table["kind"] == kind) & (self.table["role"] == role)]
        return [int(rows.index[rows["layer"] == layer][0]) for layer in layers]

    def control(
        self, kind: str, layers: Sequence[int], control: str = CONTROL, role: str | None = None
    ) -> Float[np.ndarray, " pair"]:
        """Return every pair's mean effect of the control in some layers; NaN without one.

        Args:
            kind, layers: where.
            control: a role.
            role: take a control of the size of this role, where there is one.
        """
        if role is not None and control == CONTROL and self.controls is not None:
            matched: np.ndarray = self.controls[:, self._columns(kind, role, layers)].mean(axis=1)
            return matched
        if not ((self.table["kind"] == kind) & (self.table["role"] == control)).any():
            return np.full(len(self.values), np.nan)
        mean: np.ndarray = self.window(kind, control, layers).mean(axis=1)
        return mean


def _sentences(values: Float[np.ndarray, "pair cell"], clusters: np.ndarray) -> np.ndarray:
    """Return the number of sentences with a value in each cell."""
    labels = np.unique(clusters, return_inverse=True)[1]
    present = ~np.isnan(values)
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    count: np.ndarray = (np.add.reduceat(present[order], starts, axis=0) > 0).sum(axis=0)
    return count


def load_sites(path: str | Path) -> list[Site]:
    """Return the sites of a `sites.json`.

    Args:
        path: of the file, or of the folder of a traced run.

    Raises:
        SiteError: it is not one.

    Example:
        >>> import mech_absa as ma
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "sites.json"
        >>> _ = path.write_text('{"sites": ["L3.resid_post@query.last"]}')
        >>> [str(site) for site in ma.load_sites(path)]
        ['L3.resid_post@query.last']
    """
    return sites_file(path)[0]


__all__ = [
    "COLUMNS",
    "CONTROL",
    "ImportanceMap",
    "Selection",
    "load_sites",
    "traced_in",
]
