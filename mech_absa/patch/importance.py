"""Effects averaged over pairs: where, how much, and how sure.

An `ImportanceMap` holds for every cell (component x role) the average indirect effect, a cluster-bootstrap interval (sentences are
resampled, since aspects of one sentence are not independent), a sign-flip p-value, adjusted over all cells of the map, and n.

`select` turns a map into sites by a rule that is written down before looking: of all windows of neighbouring layers and all roles, the
one with the largest mean effect whose interval lies above the control role's in the same layers. The control is `template`: tokens that
every prompt shares and that name neither aspect nor opinion. Two kinds of role are left out of the choice by default: `answer`, since late
layers of the last token carry every decision of every model and say nothing of where it was made; and, with a counterfactual, the roles whose
own tokens the edit changes (the opinion), since restoring their early states only undoes the edit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..errors import ConfigError, DataError, choices
from ..model import Model
from ..records import plain, write_json
from ..sites import HEAD_KINDS, ROLES, Site
from ..stats import adjust, cluster_bootstrap, sign_flip
from .effects import Effects, cell_site

if TYPE_CHECKING:
    import xarray as xr

COLUMNS = ("kind", "layer", "head", "role", "aie", "ci_low", "ci_high", "p", "p_adjusted", "n")
CONTROL = "template"


@dataclass(frozen=True, eq=False)
class ImportanceMap:
    """Averages of effects with labelled axes.

    Attributes:
        table: columns `COLUMNS`, one row a cell; `head` is -1 where there is none; with `by="position"` the column `role` is `position`.
        values: the effects behind it, `[pair cell]`, NaN where a pair lacks the cell.
        clusters: the sentence of every pair.
        about: as in `Effects`, with level and adjustment.
    """

    table: pd.DataFrame
    values: np.ndarray = field(repr=False)
    clusters: np.ndarray = field(repr=False)
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        effects: Effects,
        by: str = "role",
        *,
        level: float = 0.95,
        adjustment: str = "holm",
        draws: int = 2000,
        seed: int = 0,
    ) -> ImportanceMap:
        """The map of some effects.

        Args:
            effects: from `trace`.
            by: `role` or `position`.
            level: of the intervals.
            adjustment: of the p-values over all cells: `holm` (family-wise), `bh` (false discovery rate) or `none`.
            draws: of the bootstrap. The sign flips take as many as let an adjusted p-value come down to 0.01.
            seed: of both.
        """
        values, cells = effects.matrix(by)
        clusters = effects.pairs["cluster"].to_numpy()
        interval = cluster_bootstrap(values, clusters, level=level, draws=draws, seed=seed)
        # Cells that are zero for certain are no hypotheses: testing them would only cost the others power.
        tested = np.nan_to_num(np.abs(values)).max(axis=0) > 0
        p = np.full(values.shape[1], np.nan)
        if tested.any():
            flips = min(max(9999, 100 * int(tested.sum()) - 1), 499_999)
            p[tested] = sign_flip(values[:, tested], clusters, draws=flips, seed=seed)
        table = cells.assign(
            aie=interval.mean,
            ci_low=interval.low,
            ci_high=interval.high,
            p=p,
            p_adjusted=adjust(p, adjustment),
            n=(~np.isnan(values)).sum(0),
        )
        about = effects.about | {
            "level": level,
            "adjustment": adjustment,
            "by": by,
            "n_pairs": len(effects.pairs),
        }
        return cls(table, values, clusters, about)

    def __repr__(self) -> str:
        return f"ImportanceMap({len(self.table)} cells of {', '.join(self.table['kind'].unique())}; {self.about.get('n_pairs')} pairs)"

    def _repr_html_(self) -> str:
        from ..report import importance_html

        return importance_html(self)

    def top(self, n: int = 10) -> pd.DataFrame:
        """The cells with the largest effects, as a table with their sites spelled out."""
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
        """Variables aie, ci_low, ci_high, p, p_adjusted, n over the axes kind, layer, head, role."""
        by = "role" if "role" in self.table else "position"
        return self.table.set_index(["kind", "layer", "head", by]).to_xarray()

    def grid(self, kind: str, column: str = "aie") -> pd.DataFrame:
        """One kind as a matrix, roles (in reading order) x layers; heads are averaged over.

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
        return grid.reindex([r for r in ROLES if r in grid.index]) if by == "role" else grid

    def save(self, path: str | Path) -> None:
        """`importance.csv`."""
        from ..records import atomic

        with atomic(path) as temporary:
            self.table.to_csv(temporary, index=False, float_format="%.8g")

    # ---- choosing sites -----------------------------------------------------------------------------------------------------

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
        """The window of neighbouring layers and the role with the largest mean effect above the control.

        Args:
            kind: of state; default `resid_post` (the paper's) where the map has it, else its first.
            width: layers in the window; default the paper's share of the depth, 6 of 32.
            roles: to choose from; default all but the control, `answer`, and roles whose tokens a counterfactual changes.
            control: the role whose interval must lie below.
            draws, seed: of the bootstrap.

        Returns:
            the sites, and how they were chosen; `clear` is False where no candidate's interval lies above the control's, and the
            largest is given all the same.
        """
        kinds = list(self.table["kind"].unique())
        kind = kind or ("resid_post" if "resid_post" in kinds else kinds[0])
        if kind not in kinds:
            raise ConfigError(
                f"sites of kind {kind!r} were asked for; the map has {choices(kinds)}"
            )
        if kind in HEAD_KINDS:
            raise ConfigError(
                "neighbouring layers share no heads; select heads from ImportanceMap.top instead"
            )
        if "role" not in self.table:
            raise ConfigError("sites are chosen by role; make the map with by='role'")
        rows = self.table[self.table["kind"] == kind]
        layers = sorted(int(x) for x in rows["layer"].unique())
        width = max(1, round(len(layers) * 6 / 32)) if width is None else width
        if not 1 <= width <= len(layers):
            raise ConfigError(
                f"a window of {width} layers was asked for; the map has {len(layers)}"
            )
        present = [r for r in ROLES if (rows["role"] == r).any()]
        left_out = {control} if roles else {control, "answer", *self.about.get("changed_roles", ())}
        candidates = [r for r in (roles or present) if r in present and r not in left_out]
        if not candidates:
            raise DataError(f"no role is left to choose from; the map has {choices(present)}")

        windows = [tuple(layers[i : i + width]) for i in range(len(layers) - width + 1)]
        spots = [
            (role, window)
            for window in windows
            for role in [*candidates, *([control] if control in present else [])]
        ]
        means = np.stack([self._window(rows, role, window) for role, window in spots], axis=1)
        interval = cluster_bootstrap(means, self.clusters, draws=draws, seed=seed)
        found = pd.DataFrame(
            {
                "role": [r for r, _ in spots],
                "layers": [w for _, w in spots],
                "aie": interval.mean,
                "ci_low": interval.low,
                "ci_high": interval.high,
            }
        )
        found["n"] = (~np.isnan(means)).sum(0)
        ceiling = found[found["role"] == control].set_index("layers")["ci_high"]
        found["control_high"] = found["layers"].map(ceiling) if len(ceiling) else np.nan
        found = found[found["role"] != control]
        clear = found[found["ci_low"] > found["control_high"].fillna(0.0)]
        best = (
            (clear if len(clear) else found)
            .sort_values("aie", ascending=False, kind="stable")
            .iloc[0]
        )
        sites = tuple(Site(int(layer), kind, None, str(best["role"])) for layer in best["layers"])
        return Selection(
            sites,
            rule=self._rule(kind, width, control, left_out - {control}),
            aie=float(best["aie"]), ci_low=float(best["ci_low"]), ci_high=float(best["ci_high"]),
            control_high=float(best["control_high"]), n=int(best["n"]), clear=bool(len(clear)),
        )  # fmt: skip

    def _rule(self, kind: str, width: int, control: str, left_out: set[str]) -> str:
        """How sites are chosen, in a sentence."""
        layers = "layer" if width == 1 else f"{width} neighbouring layers"
        others = f", {', '.join(r for r in ROLES if r in left_out)} left out" if left_out else ""
        return (
            f"the {layers} and the role with the largest mean {kind} effect whose {self.about.get('level', 0.95):.0%} interval lies above that of "
            f"the control role {control!r} in the same layers{others}"
        )

    def _window(self, rows: pd.DataFrame, role: str, window: tuple[int, ...]) -> np.ndarray:
        """Every pair's mean effect over the layers of a window at a role; NaN where the pair lacks the role."""
        columns = rows.index[(rows["role"] == role) & rows["layer"].isin(window)]
        return self.values[:, columns].mean(axis=1)


@dataclass(frozen=True)
class Selection(Sequence[Site]):
    """Sites chosen from a map, and why.

    Attributes:
        sites: in order of layers.
        rule: in words.
        aie, ci_low, ci_high, n: of the chosen window and role.
        control_high: upper end of the control role's interval in the same layers.
        clear: whether the interval lies above the control's.
    """

    sites: tuple[Site, ...]
    rule: str
    aie: float
    ci_low: float
    ci_high: float
    control_high: float
    n: int
    clear: bool

    def __getitem__(self, index):
        return self.sites[index]

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __str__(self) -> str:
        verdict = "" if self.clear else " (not clear: no interval lies above the control's)"
        return f"{', '.join(map(str, self.sites))}: mean effect {self.aie:.4g} [{self.ci_low:.4g}, {self.ci_high:.4g}], n = {self.n}{verdict}"

    def _repr_html_(self) -> str:
        from ..report import selection_html

        return selection_html(self)

    def save(self, path: str | Path, model: Mapping[str, Any] | None = None) -> None:
        """`sites.json`, with the model they were found in where that is known (`traced_in`)."""
        record = plain(self)
        record["sites"] = [str(s) for s in self.sites]
        write_json(path, record | ({"model": dict(model)} if model is not None else {}))


def traced_in(
    model: Model, base: Model | None = None, adapter: str | None = None
) -> dict[str, Any]:
    """What a sites.json says of the model that was traced.

    Args:
        model: the traced one.
        base: what it was before an adapter's weights were merged into it; itself where None.
        adapter: the name of that adapter.
    """
    base = base or model
    return {
        "name": base.name, "sha256": model.sha256, "base_sha256": base.sha256, "adapter": adapter, "n_layers": model.n_layers,
        "n_heads": model.n_heads, "d_model": model.d_model, "dtype": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip


def load_sites(path: str | Path) -> list[Site]:
    """The sites of a `sites.json`.

    Raises:
        DataError: it is not one.
    """
    import json

    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        names = record["sites"] if isinstance(record, dict) else record
        return [Site.parse(name) for name in names]
    except FileNotFoundError:
        raise DataError(
            f"there is no file {path}; sites.json is written by python -m mech_absa.patch"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path} is no sites.json; an object with a list 'sites' such as [\"L3.resid_post@query.last\"] is needed"
        ) from None
