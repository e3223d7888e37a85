"""Hold the tables of a trace: the effect of every cell, and the pairs they were measured on.

`Effects` adds the methods for users. `ImportanceMap` is made from this class, and `Effects` makes
maps, so that neither needs to import the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from ..errors import ConfigError, DataError
from ..records import About, atomic, read_json, read_table, write_json
from ..schemas import ABOUT
from ..sites import HEAD_KINDS, Site, in_reading_order

if TYPE_CHECKING:
    from typing_extensions import Self

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


_WHOLE = {"head": "Int16", "position": "Int32"}
"""Columns that are NA where a cell has no head, or no position."""


def with_absent(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with NA for "no head" and "no position", which files write as -1.

    Example:
        >>> with_absent(pd.DataFrame({"head": [-1, 3]}))["head"].tolist()
        [<NA>, 3]
    """
    columns = {n: table[n] for n, kind in _WHOLE.items() if n in table and table[n].dtype != kind}
    return table.assign(**{n: c.astype(_WHOLE[n]).mask(c < 0) for n, c in columns.items()})


def as_written(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table as files have it: plain whole numbers, -1 for NA."""
    columns = [n for n in _WHOLE if n in table]
    kinds = {n: _WHOLE[n].lower() for n in columns}
    return table.assign(**{n: table[n].fillna(-1) for n in columns}).astype(kinds)


@dataclass(frozen=True, eq=False)
class Traced:
    """Hold the effects of every cell of every pair, and their files.

    Attributes:
        frame, pairs, about, controls: as in `Effects`.
    """

    frame: pd.DataFrame
    pairs: pd.DataFrame
    about: About = field(default_factory=About)
    controls: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "frame", with_absent(self.frame))

    def matrix(self, by: str = "role") -> tuple[np.ndarray, pd.DataFrame]:
        """Return effects as `[pair cell]`, and what each cell is.

        Args:
            by: `role` takes the mean over the tokens of a role, for every pair; `position` keeps
                absolute positions, which makes sense only for prompts that line up.

        Returns:
            values, NaN if a pair lacks the cell; and a frame with columns kind, layer, head and
            `by`, one row per cell, in reading order.
        """
        return matrix_of([self.frame], self.pairs, by)

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
        for role, rows in cells[cells["head"].isna()].groupby("role", sort=False):
            sizes = [min(r.count(role), r.count("template")) for r in roles]
            own = wide.reindex(pd.MultiIndex.from_arrays([ids, sizes]))
            at = pd.MultiIndex.from_frame(rows[["kind", "layer"]])
            values[:, rows.index] = own.reindex(columns=at).to_numpy(dtype=float)
        return values

    # ---- files ------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write `effects.parquet`, `pairs.parquet`, `about.json`, and `controls.parquet` if any, to
        a folder.
        """
        folder = Path(folder)
        write_frame(as_written(self.frame), folder / "effects.parquet")
        write_frame(self.pairs, folder / "pairs.parquet")
        if self.controls is not None:
            write_frame(self.controls, folder / "controls.parquet")
        write_json(folder / "about.json", self.about)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Load effects from the folder of a run.

        A folder may hold fewer pairs than were traced, such as an example beside a finished map. It
        is then marked as an excerpt (`about["excerpt_of"]`) and has no averages.

        Raises:
            DataError: the folder holds none.
        """
        folder = Path(folder)
        for name in ("effects.parquet", "pairs.parquet", "about.json"):
            if not (folder / name).exists():
                raise DataError(
                    f"{folder} holds no trace ({name} is missing); give the --out folder of python -m mech_absa.patch"
                )
        about: About = read_json(folder / "about.json", ABOUT, DataError)
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


@runtime_checkable
class Averaged(Protocol):
    """Describe what a map is made of: effects in memory, or in a file."""

    @property
    def pairs(self) -> pd.DataFrame: ...
    @property
    def about(self) -> About: ...
    def matrix(self, by: str = "role") -> tuple[np.ndarray, pd.DataFrame]: ...
    def matched(self, cells: pd.DataFrame) -> np.ndarray | None: ...


def matrix_of(
    frames: Iterable[pd.DataFrame], pairs: pd.DataFrame, by: str
) -> tuple[np.ndarray, pd.DataFrame]:
    """Return effects as `[pair cell]`, and what each cell is; see `Traced.matrix`.

    Args:
        frames: effects of some pairs after the other; all rows of a pair stand in one frame.
        pairs: all pairs, in order.
        by: `role` or `position`.

    Raises:
        ConfigError: `by` is another word.
    """
    if by not in ("role", "position"):
        raise ConfigError(f"effects were asked for by {by!r}; accepted: role or position")
    keys = ["kind", "layer", "head", by]
    kinds: dict[str, int] = {}
    means = []
    for frame in frames:
        for kind in frame["kind"].unique():
            kinds.setdefault(kind, len(kinds))
        groups = as_written(frame).groupby(["example_id", *keys], observed=True, sort=False)
        means.append(groups["effect"].mean().unstack("example_id"))
    table = means[0] if len(means) == 1 else pd.concat(means, axis=1)
    table = table.reindex(columns=pairs["example_id"])
    cells = table.index.to_frame(index=False)
    cells["_kind"] = cells["kind"].map(kinds)
    cells["_by"] = (
        cells[by].map({r: i for i, r in enumerate(_roles(pairs, set(cells[by])))})
        if by == "role"
        else cells[by]
    )
    order = cells.sort_values(["_kind", "layer", "head", "_by"], kind="stable").index
    cells = cells.loc[order, keys].reset_index(drop=True)
    cells = cells.astype({"kind": str, **({"role": str} if by == "role" else {})})
    return table.to_numpy(dtype=float)[order].T, with_absent(cells)


def _roles(pairs: pd.DataFrame, present: set[str]) -> list[str]:
    """Return roles in reading order; named spans in the order of the prompts."""
    told = dict.fromkeys(role for roles in pairs["roles"] for role in roles if role in present)
    return in_reading_order([*told, *sorted(present)])


def write_frame(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a frame as parquet; the same content gives the same bytes."""
    with atomic(path) as temporary:
        frame.to_parquet(temporary, index=False, compression="zstd")


def read_frame(path: str | Path) -> pd.DataFrame:
    """Read a table of a trace.

    Raises:
        DataError: the file is damaged.
    """
    return read_table(path, error=DataError)


def cell_site(kind: str, layer: int, head: Any, role: str | None = None) -> Site:
    """Return the site of a row of a table; `head` is a whole number, NA or -1."""
    return Site(int(layer), kind, int(head) if kind in HEAD_KINDS else None, role)
