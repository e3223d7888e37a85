"""The kept results of a study, and the list of things that are drawn from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mech_absa import plots
from mech_absa.errors import DataError
from mech_absa.patch.importance import ImportanceMap
from mech_absa.sites import HEAD_KINDS, Site
from mech_absa.stats import Estimate

from .tables import Table, over_seeds

HERE = Path(__file__).resolve().parent
EDIT = "both@sites"
"""The paper's edit, in a matrix."""


# ---- what is read -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """The kept results of a study."""

    folder: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        return json.loads(self.path("run.json").read_text(encoding="utf-8"))

    def path(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            raise DataError(
                f"{self.folder.name}/{name} is missing among the results; `make reproduce`, or python -m figures.reproduce --only {self.folder.name}, makes it"
            )
        return path

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.path(name))

    @cached_property
    def matrix(self) -> pd.DataFrame:
        table = self.table("matrix.csv")
        return table.assign(
            train=table["train"].fillna(""), in_domain=table["in_domain"].astype(bool)
        )

    @property
    def run(self) -> dict[str, Any]:
        """Return the record of its first command, or of its only one; the model and the versions are the same in all."""
        runs: dict[str, dict[str, Any]] = self.record.get("runs") or {"": self.record}
        return next(iter(runs.values()))

    @cached_property
    def importance(self) -> ImportanceMap:
        about = json.loads(self.path("about.json").read_text(encoding="utf-8"))
        return self.map_of(self.table("importance.csv"), about)

    def map_of(self, table: pd.DataFrame, about: Mapping[str, Any]) -> ImportanceMap:
        config = self.run["config"]
        known = {
            "level": config["level"],
            "adjustment": config["adjustment"],
            "n_pairs": about["kept"],
        }
        return ImportanceMap(table, np.empty((0, len(table))), np.empty(0), {**about, **known})

    @cached_property
    def sites(self) -> list[Site]:
        return [
            Site.parse(s)
            for s in json.loads(self.path("sites.json").read_text(encoding="utf-8"))["sites"]
        ]

    @property
    def layers(self) -> str:
        """The traced layers, as a range."""
        found = sorted({s.layer for s in self.sites})
        return f"{found[0]}-{found[-1]}" if len(found) > 1 else str(found[0])

    @property
    def n(self) -> str:
        """How much it rests on."""
        if isinstance(self.run.get("trainings"), dict):
            rows, trainings = self.run["rows"], self.run["trainings"]
            return (
                f"{rows['train']} training, {rows['validation']} validation and {rows['test']} test examples, "
                f"{trainings['done']} of {trainings['planned']} trainings done"
            )
        if "pairs" in self.run:
            return f"n = {self.run['pairs']['kept']} pairs"
        seeds = sorted({s for r in self.record["runs"].values() for s in r["config"]["seeds"]})
        sizes = {
            part: sorted({d[part]["examples"] for d in self.run["domains"].values()})
            for part in ("train", "test")
        }
        train, test = ("–".join(map(str, dict.fromkeys((v[0], v[-1])))) for v in sizes.values())
        of = (
            f"{len(self.run['domains'])} domains"
            if len(self.run["domains"]) > 1
            else next(iter(self.run["domains"]))
        )
        return f"{of}, {train} training and {test} test examples each, {len(seeds)} seed{'s' * (len(seeds) > 1)}"

    @property
    def source(self) -> str:
        """The run that a figure came from."""
        model, versions = self.run["model"], self.run["versions"]
        named = ", ".join(
            f"{n} {versions[n]}"
            for n in ("mech-absa", "torch", "transformer-lens")
            if n in versions
        )
        return f"Run {self.record['study']} of {self.record['date']}: model {model['name']} ({model['sha256'][:8]}), {self.n}; {named}."

    @property
    def note(self) -> str:
        """The same in short, for inside a figure."""
        return f"run {self.record['study']}, {self.record['date']}{plots.SEPARATOR}model {self.run['model']['name']}\n{self.n}"


# ---- what is made -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """One thing of the index.

    Attributes:
        what: a figure, or a table.
        says: what is seen, in a sentence or two.
    """

    what: Figure | Table
    says: str


@dataclass(frozen=True)
class Item:
    """One thing that can be made.

    Attributes:
        name: of its files.
        title: of its section.
        needs: studies, by name; those of `may` are used where they are there.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    draw: Callable[..., Shown]


ITEMS: list[Item] = []


def shows(
    name: str, title: str, *needs: str, may: Sequence[str] = ()
) -> Callable[[Callable[..., Shown]], Callable[..., Shown]]:
    """Puts a function of some studies on the list; those it may do without are None where they are missing."""

    def note(draw: Callable[..., Shown]) -> Callable[..., Shown]:
        ITEMS.append(Item(name, title, needs, tuple(may), draw))
        return draw

    return note


# ---- numbers in sentences -----------------------------------------------------------------------------------------------------


def sentence(parts: Sequence[str] | str, between: str = "; ") -> str:
    """Parts as one sentence, with a capital and a full stop."""
    text = parts if isinstance(parts, str) else between.join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def cell(row: Any) -> str:
    """`L3.resid_post@query.last 0.42 [0.35, 0.49]`."""
    head = f"{row['kind']}{int(row['head'])}" if row["kind"] in HEAD_KINDS else row["kind"]
    ends = "" if pd.isna(row["ci_low"]) else f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    return f"L{int(row['layer'])}.{head}@{row['role']} {row['aie']:.3f}{ends}"


def interval(e: Estimate, factor: float = 1.0, digits: int = 2) -> str:
    return (
        f"{e.value * factor:.{digits}f} [{e.low * factor:.{digits}f}, {e.high * factor:.{digits}f}]"
    )


def best(table: pd.DataFrame) -> Any:
    """The row with the largest effect."""
    return table.loc[table["aie"].idxmax()]


def clear_of_zero(row: Any) -> bool:
    return bool(row["p_adjusted"] < 0.05)


def with_spread(rows: pd.DataFrame, *by: str, metric: str = "accuracy") -> pd.DataFrame:
    """Return the mean over seeds of every group, in the order in which groups first come.

    Args:
        rows: of a matrix.
        by: columns that make the groups.
        metric: the column averaged.

    Returns:
        columns `by`, metric, `<metric>_low` and `<metric>_high` (one standard deviation over seeds away), sd, and
        single (the mean of every seed).
    """
    groups = []
    for key, group in rows.groupby(list(by), sort=False):
        mean, sd = over_seeds(group, metric)
        end = 0.0 if np.isnan(sd) else sd
        single = group.groupby("seed")[metric].mean().tolist()
        ends = {f"{metric}_low": mean - end, f"{metric}_high": mean + end}
        groups.append(
            dict(zip(by, key, strict=True)) | {metric: mean, **ends, "sd": sd, "single": single}
        )
    return pd.DataFrame(groups)


def inside_and_out(matrix: pd.DataFrame) -> pd.DataFrame:
    """The trained rows with a column `data` that says whether they are tested where they were trained; inside comes first."""
    trained = matrix[matrix["train"] != ""]
    data = np.where(trained["in_domain"], "in domain", "out of domain")
    return trained.assign(data=data).sort_values("data", kind="stable")


SD = "bars: one sd over seeds"
