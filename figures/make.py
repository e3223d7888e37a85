"""Every figure and table, from the results kept in `figures/results`: `make figures`. No model is loaded.

    python -m figures.make                                    figures/*.pdf, *.png, *.md, *.tex and figures/README.md
    python -m figures.make --runs runs/mine --out /some/folder

`reproduce.py` makes the results. Each function below draws one thing from one or two studies and says in one sentence what is seen, with numbers
that are computed here and nowhere written by hand; so a result against the story stands as plainly as one for it. The same results
give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from mech_absa import plots
from mech_absa.commands.cli import command
from mech_absa.errors import ConfigError, DataError
from mech_absa.records import write_text

from . import where, methods, editing, checks, interaction  # isort: skip
from .study import HERE, ITEMS, Item, Study
from .tables import Table

MODULES = (where, methods, editing, checks, interaction)
"""Each adds its figures to `ITEMS`; they are drawn in this order, whichever module was imported first."""
_ORDER = [module.__name__ for module in MODULES]
ITEMS.sort(key=lambda item: _ORDER.index(item.draw.__module__))

# ---- the command --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Draw every figure and write every table, with an index of them all."""

    runs: Path = field(default_factory=lambda: HERE / "results")
    """The kept results, a folder a study."""
    out: Path = field(default_factory=lambda: HERE)
    """Where figures, tables and the index go."""
    only: tuple[str, ...] = ()
    """These alone, by the names of their files; the index is left as it is."""


HEAD = """# Figures and tables

Made by `make figures` from the results in [results](results), which `make reproduce` makes anew; no model is needed to draw them. Numbers in the
sentences are computed from the results. Accuracies are of greedy answers among three labels. Where the paper is named, it is Li et al.,
AAAI 2025 ([arXiv 2503.15117](https://arxiv.org/abs/2503.15117)); its own numbers are in [published.csv](published.csv).
"""


def make(item: Item, config: Config) -> str:
    """Its files, and its section of the index.

    Raises:
        DataError: a study is missing.
    """
    for name in item.needs:
        Study(config.runs / name).path("run.json")
    studies = [Study(config.runs / name) for name in item.needs]
    extra = [
        s if (s.folder / "run.json").exists() else None
        for s in (Study(config.runs / name) for name in item.may)
    ]
    shown = item.draw(*studies, *extra)
    sources = " ".join(s.source for s in (*studies, *extra) if s is not None)
    if isinstance(shown.what, Table):
        write_text(
            config.out / f"{item.name}.md", f"{shown.what.markdown()}\n{shown.what.caption}\n"
        )
        write_text(config.out / f"{item.name}.tex", shown.what.latex())
        body = f"{shown.says}\n\n{shown.what.markdown()}\n{shown.what.caption} [LaTeX]({item.name}.tex), [Markdown]({item.name}.md)."
    else:
        plots.save(shown.what, config.out / item.name)
        body = (
            f"{shown.says}\n\n![{item.title}]({item.name}.png)\n\n{sources} [PDF]({item.name}.pdf)."
        )
    return f"## {item.title}\n\n{body}\n"


def run(config: Config) -> list[str]:
    """Make everything that there are results for.

    Returns:
        names of what was made.

    Raises:
        ConfigError: `--only` names nothing that is made here.
        DataError: no study at all is there.
    """
    names = [item.name for item in ITEMS]
    if unknown := [n for n in config.only if n not in names]:
        raise ConfigError(
            f"--only {unknown[0]!r} is no figure or table; accepted: {', '.join(names)}"
        )
    made, sections, missing = [], [], []
    for item in ITEMS:
        if config.only and item.name not in config.only:
            continue
        try:
            sections.append(make(item, config))
            made.append(item.name)
            print(item.name, flush=True)
        except DataError as error:
            missing.append(f"`{item.name}`: {error}")
            print(f"{item.name} is left out: {error}", flush=True)
    if not made:
        raise DataError(f"{config.runs} holds no results; `make reproduce` makes them")
    if not config.only:
        write_text(
            config.out / "README.md",
            "\n".join(
                [HEAD, *sections, *_times(config.runs), *_left_out(item for item in missing)]
            ),
        )
    return made


def _times(runs: Path) -> list[str]:
    """What the studies cost."""
    if not (runs / "times.csv").exists():
        return []
    seconds = pd.read_csv(runs / "times.csv").groupby("study", sort=False)["seconds"].sum()
    lines = [f"| {study} | {value / 60:.1f} |" for study, value in seconds.items()]
    head = f"## What the results cost\n\nMinutes that the commands ran, one thread each and several side by side: {seconds.sum() / 60:.0f} in all.\n"
    return ["\n".join([head, "| study | minutes |", "| --- | ---: |", *lines]) + "\n"]


def _left_out(missing: Any) -> list[str]:
    lines = [f"- {line}" for line in missing]
    return ["\n".join(["## Not there yet", "", *lines]) + "\n"] if lines else []


def main(config: Config) -> None:
    run(config)


if __name__ == "__main__":
    raise SystemExit(command(Config, main, "python -m figures.make"))
