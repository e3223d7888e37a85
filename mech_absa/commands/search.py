"""Run `python -m mech_absa.patch --budget 0.25`: the largest cells under a budget of exact work.

The trace command hands over here once data, model and pairs are ready. Nothing is swept: an estimate
from gradients covers all cells, and `select.search` spends the budget where it matters. The folder
holds `search.csv` and `run.json`; there is no map, since most cells were never computed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from ..errors import ConfigError
from ..model import Model
from ..patch.pairs import Pairs
from ..patch.plan import Plan
from ..records import RunFolder, atomic
from ..select.search import Found, Search, Strategy, search_cells
from ..sites import Site
from .flags import OptionalFloat, OptionalWord
from .tables import print_table

TOP = 10
ACCEPTED: dict[str, tuple[object, ...]] = {
    "by": ("role",), "direction": ("denoise", "noise"), "window": (1,), "layers": ("all",),
    "exact_top": (0,),
}  # fmt: skip
"""What other flags may say when the largest cells are searched for."""


@dataclass(frozen=True)
class SearchFlags:
    """Look for the largest cells alone, instead of a map of all."""

    budget: OptionalFloat = None
    """Share of the exact effects that may be computed, such as 0.25. The largest averages by role are searched for.
    An estimate from gradients, RelP or the one that --method names, says where to begin."""
    until_clear: bool = False
    """Search until the intervals of the --top cells lie above all others, or the budget is spent."""
    top: int = TOP
    """Cells that are searched for."""
    strategy: OptionalWord[Literal["halving", "ucb", "thompson"]] = None
    """How exact effects are spent. Default: halving, with --until-clear ucb. Halving spends the whole budget, the others stop when it is clear."""

    @property
    def asked(self) -> bool:
        """Return whether there is a search instead of a whole sweep."""
        return self.budget is not None or self.until_clear

    def how(self, level: float, seed: int) -> Search:
        """Return what is searched for; without --budget, all exact cells may be computed.

        Raises:
            ConfigError: a number is out of range.
        """
        usual = Strategy.UCB if self.until_clear else Strategy.HALVING
        strategy = usual if self.strategy is None else Strategy(self.strategy)
        budget = 1.0 if self.budget is None else self.budget
        return Search(self.top, budget, strategy, level=level, seed=seed)

    def check(self, others: Mapping[str, object], level: float) -> None:
        """Reject what a search does not know; `others` holds the flags of a sweep by name.

        Raises:
            ConfigError: the first of them.
        """
        if not self.asked:
            if self.top != TOP:
                raise ConfigError(
                    f"--top {self.top} was given without --budget or --until-clear, which alone read it"
                )
            if self.strategy is not None:
                raise ConfigError(
                    f"--strategy {self.strategy} was given without --budget or --until-clear, which alone read it"
                )
            return
        if self.how(level, 0).strategy is Strategy.HALVING and self.until_clear:
            raise ConfigError(
                "--strategy halving was given with --until-clear; accepted there: ucb, thompson, which stop when it is clear"
            )
        for name, accepted in ACCEPTED.items():
            if others[name] not in accepted:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {others[name]} was given with --budget or "
                    f"--until-clear; accepted there: {', '.join(map(str, accepted))}"
                )


@dataclass(frozen=True, eq=False)
class Question:
    """Hold what is searched in.

    Attributes:
        model, pairs: what is traced on what.
        kinds: of state, or sites.
        metric, direction: as in a trace.
        method: of the estimate; `exact` stands for RelP.
        how: what is searched for, and the budget.
    """

    model: Model
    pairs: Pairs
    kinds: Sequence[str]
    metric: str
    direction: str
    method: str
    how: Search


def check_size(question: Question, p: Plan) -> None:
    """Refuse to search for as many cells as there are.

    Raises:
        ConfigError: so many were asked for.
    """
    roles = {role for pair in question.pairs for role in pair.clean.role_names}
    if question.how.k >= (n := len(p.components) * len(roles)):
        raise ConfigError(
            f"--top {question.how.k} was given, and there are {n} cells; accepted: 1 to {n - 1}"
        )


def run(question: Question, folder: RunFolder, record: Mapping[str, Any], quiet: bool) -> None:
    """Search, write search.csv and run.json, and say what was found.

    Args:
        question: what is searched in.
        folder: of the run.
        record: what run.json says of model and data.
        quiet: print nothing.
    """
    q, started = question, time.time()
    estimate = "relp" if q.method == "exact" else q.method
    found, sites = search_cells(
        q.model, q.pairs, q.kinds, q.how, metric=q.metric, direction=q.direction, estimate=estimate
    )
    table = cells(found, sites)
    with atomic(folder.path / "search.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.8g")
    seconds = time.time() - started
    searched = {
        "cells": found.k, "certain": found.certain, "exact": found.spent, "of": found.total,
        "share": found.share, "estimate": estimate,
    }  # fmt: skip
    more = {"search": searched, "search_seconds": round(seconds, 3)}
    folder.finish({"command": "patch.search", **record, **more})
    if not quiet:
        show(found, table, q.how.level)
        print(f"{found.spent:,} of {found.total:,} exact effects in {seconds:.1f} s")
        print(f"  {folder.path / 'search.csv'}\n  {folder.path / 'run.json'}")
        print(conclusion(found))


def cells(found: Found, sites: list[Site]) -> pd.DataFrame:
    """Return the candidates, the largest first, as search.csv has them.

    Returns:
        columns site, found (one of the cells searched for), mean, low, high (an interval that holds
        whenever the search stops; infinite below a dozen pairs), n (pairs measured exactly).
    """
    table = found.table
    named = [str(sites[int(cell)]) for cell in table["cell"]]
    rest = table[["mean", "low", "high", "n"]].reset_index(drop=True)
    return pd.concat(
        [pd.DataFrame({"site": named, "found": [i < found.k for i in range(len(named))]}), rest],
        axis=1,
    )


def show(found: Found, table: pd.DataFrame, level: float) -> None:
    """Print the cells that were found."""
    rows = [
        (r.site, f"{r.mean:.4g}", f"{r.low:.4g} to {r.high:.4g}", int(r.n))
        for r in table.head(found.k).itertuples(index=False)
    ]
    title = f"The {found.k} largest average effects"
    print_table(("site", "mean effect", f"{level:.0%} interval", "exact pairs"), rows, title)


def conclusion(found: Found) -> str:
    """Say in one line whether these are the largest cells."""
    where = f"these are the {found.k} largest cells"
    if found.certain:
        return (
            f"With all intervals together, {where}; {found.share:.0%} of the exact work was done."
        )
    return (
        f"It is not certain that {where}: intervals of other candidates overlap theirs after "
        f"{found.share:.0%} of the exact work."
    )
