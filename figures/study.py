"""Read the kept results of a study, and list the figures and tables that are drawn from them."""

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
"""Name of the paper's edit in a matrix."""
COMPARE = "`python -m mech_absa.compare` with the flags of docs/which_selector.md"
OWN_COMMANDS = {
    "compare": COMPARE,
    "compare_harder": COMPARE,
    "places": "`python -m figures.places`",
    "rank_fairness": "`python -m figures.rank_fairness`",
    "search": "`python -m figures.search`",
}
"""Studies that have commands of their own."""


# ---- results -------------------------------------------------------------------------------------


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
            name_of, which = self.folder.name, "`python -m figures.reproduce --only"
            real = self.folder.parent.name == "smollm2"
            if real:
                which = "`python -m figures.smollm2 --data DATA --only"
            if name_of in OWN_COMMANDS and not real:
                raise DataError(
                    f"{name_of}/{name} is missing among the results; run {OWN_COMMANDS[name_of]}, which "
                    "`make reproduce` leaves out"
                )
            raise DataError(
                f"{name_of}/{name} is missing among the results; run `make reproduce` or "
                f"{which} {name_of}`"
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
        """Return the record of the first command; all share the model and the versions."""
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
        """Return the chosen sites; none where the trace left no choice."""
        if self.run.get("pairs") and self.run.get("sites") is None:
            return []
        return [
            Site.parse(s)
            for s in json.loads(self.path("sites.json").read_text(encoding="utf-8"))["sites"]
        ]

    @property
    def layers(self) -> str:
        """Return the traced layers as a range."""
        found = sorted({s.layer for s in self.sites})
        return f"{found[0]}-{found[-1]}" if len(found) > 1 else str(found[0])

    @property
    def n(self) -> str:
        """Return the numbers of pairs, examples and seeds in words."""
        if isinstance(self.run.get("trainings"), dict):
            rows, trainings = self.run["rows"], self.run["trainings"]
            return (
                f"{rows['train']} training, {rows['validation']} validation and {rows['test']} test "
                f"examples, {trainings['done']} of {trainings['planned']} trainings done"
            )
        if "looked at" in self.run.get("rows", {}):
            rows = self.run["rows"]
            return f"selectors looked at {rows['looked at']} reviews; {rows['test']} test rows"
        if "pairs" in self.run:
            return f"n = {self.run['pairs']['kept']} pairs"
        if self.run.get("command") == "evaluate":
            return f"{self.run['config']['limit']} rows of each file"
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
        seeds_in_words = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        return f"{of}, {train} training and {test} test examples each, {seeds_in_words}"

    @property
    def source(self) -> str:
        """Return a sentence that names the run behind a figure."""
        model, versions = self.run["model"], self.run["versions"]
        named = ", ".join(
            f"{n} {versions[n]}"
            for n in ("mech-absa", "torch", "transformer-lens")
            if n in versions
        )
        again = "".join(
            f"; {' and '.join(r['methods'])} run again on {r['date']}"
            for r in self.record.get("reruns", [])
        )
        return (
            f"Run {self.record['study']} of {self.record['date']}: model {model['name']} "
            f"({model['sha256'][:8]}), {self.n}; {named}{again}."
        )

    @property
    def note(self) -> str:
        """Return the same in short, for the foot of a figure."""
        run = f"run {self.record['study']}, {self.record['date']}"
        return f"{run}{plots.SEPARATOR}model {self.run['model']['name']}\n{self.n}"


# ---- figures and tables --------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A figure or a table with its text.

    Attributes:
        what: the figure or the table.
        says: the text beside it, with numbers computed from the results.
    """

    what: Figure | Table
    says: str


@dataclass(frozen=True)
class Item:
    """A figure or a table that can be drawn.

    Attributes:
        name: of its files.
        title: of its section.
        needs: names of the studies it needs.
        may: names of studies that it uses if they exist.
        draw: takes these studies, None for a missing one of `may`.
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
    """Add a function of some studies to the list; a missing study of `may` is passed as None."""

    def note(draw: Callable[..., Shown]) -> Callable[..., Shown]:
        ITEMS.append(Item(name, title, needs, tuple(may), draw))
        return draw

    return note


# ---- numbers in sentences ------------------------------------------------------------------------


def sentence(parts: Sequence[str] | str, between: str = "; ") -> str:
    """Join parts into one sentence with a capital and a full stop."""
    text = parts if isinstance(parts, str) else between.join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def cell(row: Any) -> str:
    """Return a cell in words, such as `L3.resid_post@query.last 0.42 [0.35, 0.49]`."""
    head = f"{row['kind']}{int(row['head'])}" if row["kind"] in HEAD_KINDS else row["kind"]
    ends = "" if pd.isna(row["ci_low"]) else f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    return f"L{int(row['layer'])}.{head}@{row['role']} {row['aie']:.3f}{ends}"


def interval(e: Estimate, factor: float = 1.0, digits: int = 2) -> str:
    return (
        f"{e.value * factor:.{digits}f} [{e.low * factor:.{digits}f}, {e.high * factor:.{digits}f}]"
    )


def best(table: pd.DataFrame) -> Any:
    """Return the row with the largest effect."""
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
        columns `by`, metric, `<metric>_low` and `<metric>_high` (one standard deviation over seeds
        away), sd, and single (the mean of every seed).
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
    """Return the trained rows with a column `data`, `in domain` first and then `out of domain`."""
    trained = matrix[matrix["train"] != ""]
    data = np.where(trained["in_domain"], "in domain", "out of domain")
    return trained.assign(data=data).sort_values("data", kind="stable")


SD = "bars: one sd over seeds"
