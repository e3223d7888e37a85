"""What tracing found: one row a pair and cell, nothing averaged away.

With P the metric (the paper's: probability of the gold label), and a cell restored in the corrupted run (`denoise`):

    TE  = P_clean - P_corrupted                    total effect of a pair          `Effects.total`
    IE  = P_patched - P_corrupted                  indirect effect of a cell       column `effect`
    ATE, AIE                                       their means over pairs          `ImportanceMap`

(Meng et al. 2022, section 2.1.) In the `noise` direction IE = P_clean - P_patched. Both are positive where the cell matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..errors import ConfigError, DataError
from ..records import atomic, write_json
from ..sites import HEAD_KINDS, ROLES, Site

if TYPE_CHECKING:
    import xarray as xr

    from .importance import ImportanceMap

COLUMNS = (
    "example_id",
    "kind",
    "layer",
    "head",
    "position",
    "role",
    "clean",
    "corrupted",
    "patched",
    "effect",
    "draw_sd",
)
CONTROL_COLUMNS = ("example_id", "kind", "layer", "size", "effect")
PAIR_COLUMNS = (
    "example_id", "sentence", "aspect", "polarity", "domain", "cluster", "tokens", "roles", "labels", "p_clean", "p_corrupted",
    "corrupted_tokens", "clean", "corrupted",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of every cell of every pair.

    Attributes:
        frame: columns `COLUMNS`; `head` and `position` are -1 where there is none; `draw_sd` is the standard deviation of the effect over
            noise draws.
        pairs: columns `PAIR_COLUMNS`, one row a pair: what was asked, token texts and roles, label probabilities of both runs.
        about: model, n_layers, n_heads, corruption, direction, metric, unit, method, by, window, counts.
        controls: columns `CONTROL_COLUMNS`, in a sweep by role: effects of template tokens drawn by pair, as
            many as its roles have; None in sweeps by token and in runs of earlier versions.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")
        >>> pairs = ma.make_pairs(model, examples, ma.Counterfactual(), limit=2, keep="all")
        >>> effects = ma.trace(model, pairs, sites=("resid_post",))
        >>> effects.frame["kind"].unique().tolist()
        ['resid_post']
    """

    frame: pd.DataFrame
    pairs: pd.DataFrame
    about: dict[str, Any] = field(default_factory=dict)
    controls: pd.DataFrame | None = None

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        kinds = ", ".join(self.frame["kind"].unique())
        return f"Effects({len(self.pairs)} pairs, {len(self.frame)} cells of {kinds}; {self.about.get('method', 'exact')}, {self.about.get('direction')})"

    @property
    def total(self) -> pd.Series:
        """TE of every pair: what the corruption takes away."""
        pairs = self.pairs.set_index("example_id")
        return (pairs["clean"] - pairs["corrupted"]).rename("total_effect")

    def matrix(self, by: str = "role") -> tuple[np.ndarray, pd.DataFrame]:
        """Effects as `[pair cell]`, and what each cell is.

        Args:
            by: `role` takes, for every pair, the mean over the tokens of a role; `position` keeps absolute positions (only sensible for
                prompts that line up).

        Returns:
            values, NaN where a pair lacks the cell; and a frame with columns kind, layer, head and `by`, one row a cell, in reading order.
        """
        if by not in ("role", "position"):
            raise ConfigError(f"effects were asked for by {by!r}; accepted: role or position")
        keys = ["kind", "layer", "head", by]
        table = (
            self.frame.groupby(["example_id", *keys], observed=True, sort=False)["effect"]
            .mean()
            .unstack("example_id")
        )
        table = table.reindex(columns=self.pairs["example_id"])
        cells = table.index.to_frame(index=False)
        cells["_kind"] = cells["kind"].map(
            {k: i for i, k in enumerate(self.frame["kind"].unique())}
        )
        cells["_by"] = (
            cells[by].map({r: i for i, r in enumerate(ROLES)}) if by == "role" else cells[by]
        )
        order = cells.sort_values(["_kind", "layer", "head", "_by"], kind="stable").index
        return table.to_numpy(dtype=float)[order].T, cells.loc[order, keys].reset_index(
            drop=True
        ).astype({"kind": str, **({"role": str} if by == "role" else {})})

    def matched(self, cells: pd.DataFrame) -> np.ndarray | None:
        """Return the control of each cell of a map by role, `[pair cell]`: as many template tokens.

        Args:
            cells: columns kind, layer, head and role, from `matrix`.

        Returns:
            effects, NaN for heads and where a pair lacks the role; None where no controls were traced.
        """
        if self.controls is None or "role" not in cells:
            return None
        ids, roles = self.pairs["example_id"], [list(r) for r in self.pairs["roles"]]
        keys = ["example_id", "size", "kind", "layer"]
        wide = self.controls.groupby(keys, sort=False)["effect"].mean().unstack(["kind", "layer"])
        values = np.full((len(ids), len(cells)), np.nan)
        for role, rows in cells[cells["head"] < 0].groupby("role", sort=False):
            sizes = [min(r.count(role), r.count("template")) for r in roles]
            own = wide.reindex(pd.MultiIndex.from_arrays([ids, sizes]))
            at = pd.MultiIndex.from_frame(rows[["kind", "layer"]])
            values[:, rows.index] = own.reindex(columns=at).to_numpy(dtype=float)
        return values

    def importance(self, by: str = "role", **options: Any) -> ImportanceMap:
        """Return averages over pairs with intervals; see `ImportanceMap.of`.

        Raises:
            DataError: these are an excerpt, whose averages would pass for those of the whole run.
        """
        from .importance import ImportanceMap

        if whole := self.about.get("excerpt_of"):
            raise DataError(
                f"these effects are an excerpt: {len(self.pairs)} of {whole} pairs; the averages over all "
                "of them stand in the run's importance.csv, see ImportanceMap.load"
            )
        return ImportanceMap.of(self, by=by, **options)

    def example(self, example_id: str) -> pd.DataFrame:
        """The rows of one pair.

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
        """Effects by role as an array with axes example, kind, layer, head, role."""
        values, cells = self.matrix("role")
        index = pd.MultiIndex.from_frame(cells)
        frame = pd.DataFrame(
            values.T, index=index, columns=pd.Index(self.pairs["example_id"], name="example")
        )
        return (
            frame.stack(future_stack=True)
            .rename("effect")
            .to_xarray()
            .transpose("example", "kind", "layer", "head", "role")
        )

    def show(self, example_id: str, kind: str | None = None) -> Any:
        """Show the prompt of one pair, its tokens coloured by their largest effect over layers (CircuitsVis, offline).

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

    # ---- files -----------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """`effects.parquet`, `pairs.parquet`, `about.json`, and `controls.parquet` if any, in a folder."""
        folder = Path(folder)
        write_frame(self.frame, folder / "effects.parquet")
        write_frame(self.pairs, folder / "pairs.parquet")
        if self.controls is not None:
            write_frame(self.controls, folder / "controls.parquet")
        write_json(folder / "about.json", self.about)

    @classmethod
    def load(cls, folder: str | Path) -> Effects:
        """Effects from the folder of a run.

        A folder may hold fewer pairs than were traced, as an example beside a finished map. It is marked
        as an excerpt (`about["excerpt_of"]`), and has no averages.

        Raises:
            DataError: it holds none.
        """
        import json

        folder = Path(folder)
        for name in ("effects.parquet", "pairs.parquet", "about.json"):
            if not (folder / name).exists():
                raise DataError(
                    f"{folder} holds no trace ({name} is missing); give the --out folder of python -m mech_absa.patch"
                )
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        pairs = read_frame(folder / "pairs.parquet")
        if (about.get("kept") or 0) > len(pairs):
            about["excerpt_of"] = about["kept"]
        controls = folder / "controls.parquet"
        return cls(
            read_frame(folder / "effects.parquet"),
            pairs,
            about,
            read_frame(controls) if controls.exists() else None,
        )

    def only(self, **equal: Any) -> Effects:
        """The rows whose columns equal (or are among) the values given."""
        frame = self.frame
        for column, value in equal.items():
            frame = frame[
                frame[column].isin(value if isinstance(value, (list, tuple, set)) else [value])
            ]
        return replace(self, frame=frame)


def write_frame(frame: pd.DataFrame, path: str | Path) -> None:
    """A frame as parquet, the same bytes for the same content."""
    with atomic(path) as temporary:
        frame.to_parquet(temporary, index=False, compression="zstd")


def read_frame(path: str | Path) -> pd.DataFrame:
    return pd.read_parquet(path)


def cell_site(kind: str, layer: int, head: int, role: str | None = None) -> Site:
    """The site of a row of a table."""
    return Site(int(layer), kind, int(head) if kind in HEAD_KINDS else None, role)


@dataclass(frozen=True, eq=False)
class BothDirections:
    """Effects of the same cells traced in both directions.

    Restoring a clean state in the corrupted run measures the pure indirect effect, PIE; putting a corrupted
    state into the clean run measures the total indirect effect, TIE. Their difference is what the state does
    together with the rest: INT = TIE - PIE (the interaction; 0 where effects add up).

    Attributes:
        pie: traced with direction `denoise`.
        tie: traced with direction `noise`.

    Raises:
        ConfigError: the two were not traced on the same cells, metric and corruption.
    """

    pie: Effects
    tie: Effects

    def __post_init__(self) -> None:
        directions = (self.pie.about.get("direction"), self.tie.about.get("direction"))
        if directions != ("denoise", "noise"):
            raise ConfigError(
                f"effects of the directions {directions[0]} and {directions[1]} were given; accepted: "
                "denoise, then noise"
            )
        for key in ("model", "metric", "corruption", "by", "window"):
            a, b = self.pie.about.get(key), self.tie.about.get(key)
            if a != b:
                raise ConfigError(f"the two traces differ in {key}: {a} and {b}")
        keys = ["example_id", "kind", "layer", "head", "position", "role"]
        a, b = (e.frame[keys].reset_index(drop=True).astype(str) for e in (self.pie, self.tie))
        if not a.equals(b):
            raise ConfigError("the two traces have other cells; trace the same pairs and sites")

    @property
    def mean(self) -> Effects:
        """Return the mean of both directions, from which sites are chosen by default."""
        return combined(self.pie, self.tie, lambda pie, tie: (pie + tie) / 2, "both")

    @property
    def interaction(self) -> Effects:
        """Return INT = TIE - PIE of every cell; its map has intervals and p-values as any other."""
        return combined(self.pie, self.tie, lambda pie, tie: tie - pie, "interaction")


def combined(
    pie: Effects, tie: Effects, of: Callable[[np.ndarray, np.ndarray], np.ndarray], direction: str
) -> Effects:
    """Return a number of both directions for every cell and control of two traces of the same cells.

    Neither one patched run nor the spread over its draws belongs to a number of two runs.
    """

    def of_both(a: pd.DataFrame, b: pd.DataFrame) -> np.ndarray:
        return of(a["effect"].to_numpy(dtype=float), b["effect"].to_numpy(dtype=float))

    frame = pie.frame.assign(effect=of_both(pie.frame, tie.frame), patched=np.nan, draw_sd=np.nan)
    controls = None
    if pie.controls is not None and tie.controls is not None:
        controls = pie.controls.assign(effect=of_both(pie.controls, tie.controls))
    about = pie.about | {"direction": direction}
    return replace(pie, frame=frame, about=about, controls=controls)
