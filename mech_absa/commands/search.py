"""Run `python -m mech_absa.patch --budget 0.25`: the largest cells under a budget of exact work.

The trace command hands over here once data, model and pairs are ready. Nothing is swept: an estimate
from gradients covers all cells, and `select.search` spends the budget where it matters. The folder
holds `search.csv` and `run.json`; there is no map, since most cells were never computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..errors import ConfigError
from ..records import RunFolder, atomic
from ..select.search import Found, Search, Strategy, search_cells
from ..sites import Site
from .tables import print_table

TOP = 10
"""Cells that are searched for where no number is given."""

if TYPE_CHECKING:
    from .patch import Config, Task


def asked(config: Config) -> bool:
    """Return whether the flags ask for a search instead of a whole sweep."""
    return config.search.budget is not None or config.search.until_clear


def how(config: Config) -> Search:
    """Return what is searched for; without --budget, all exact cells may be computed.

    Raises:
        ConfigError: a number is out of range.
    """
    flags = config.search
    strategy = Strategy.UCB if flags.until_clear else Strategy.HALVING
    budget = 1.0 if flags.budget is None else flags.budget
    return Search(flags.top, budget, strategy, level=config.choice.level, seed=config.seed)


def check(config: Config) -> None:
    """Reject flags that a search does not know.

    Raises:
        ConfigError: the first of them.
    """
    if not asked(config):
        if config.search.top != TOP:
            raise ConfigError(
                f"--top {config.search.top} was given without --budget or --until-clear, which alone read it"
            )
        return
    how(config)
    accepted = {
        "by": (config.sweep.by, ("role",)),
        "direction": (config.sweep.direction, ("denoise", "noise")),
        "window": (config.sweep.window, (1,)),
        "layers": (config.sweep.layers, ("all",)),
        "exact-top": (config.sweep.exact_top, (0,)),
    }
    for flag, (given, known) in accepted.items():
        if given not in known:
            raise ConfigError(
                f"--{flag} {given} was given with --budget or --until-clear; accepted there: "
                f"{', '.join(map(str, known))}"
            )


def run(task: Task, folder: RunFolder, say: Callable[..., None]) -> None:
    """Search, write the folder, and say what was found."""
    config, started = task.config, time.time()
    method = config.sweep.method
    found, sites = search_cells(
        task.model,
        task.pairs,
        config.sweep.sites,
        how(config),
        metric=config.sweep.metric,
        direction=config.sweep.direction,
        estimate="relp" if method == "exact" else method,
    )
    table = cells(found, sites)
    with atomic(folder.path / "search.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.8g")
    seconds = time.time() - started
    folder.finish(record(task, found, seconds))
    if not config.run.quiet:
        show(found, table, config.choice.level)
    say(f"{found.spent:,} of {found.total:,} exact effects in {seconds:.1f} s")
    say(f"  {folder.path / 'search.csv'}\n  {folder.path / 'run.json'}")
    say(conclusion(found))


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


def record(task: Task, found: Found, seconds: float) -> dict[str, Any]:
    """Return what run.json says of a search."""
    from .patch import model_account

    return {
        "command": "patch.search",
        "model": model_account(task),
        "data": task.examples.account(),
        "search": {
            "cells": found.k,
            "certain": found.certain,
            "exact": found.spent,
            "of": found.total,
            "share": found.share,
        },
        "warnings": task.notes,
        "device": str(task.model.device),
        "search_seconds": round(seconds, 3),
    }


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
