"""Draw every figure and table from the results in `figures/results`: `make figures`.

    python -m figures.make                        writes *.pdf, *.png, *.md, *.tex and README.md here
    python -m figures.make --runs runs/mine --out /some/folder

No model is loaded; `reproduce.py` makes the results. Each function in the modules below draws one
figure or table and writes the text beside it. Every number in a text is computed from the results,
so a negative result appears as plainly as a positive one. The same results give the same bytes.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from mech_absa import plots
from mech_absa.commands.cli import command
from mech_absa.errors import ConfigError, DataError
from mech_absa.records import write_text

from . import real_model, where, methods, editing, selectors, rank_fairness, checks, interaction  # isort: skip
from .study import HERE, ITEMS, Item, Study
from .tables import Table

MODULES = (
    real_model, where, methods, editing, selectors, rank_fairness, checks, interaction,
)  # fmt: skip
"""Modules that add figures to `ITEMS`. Figures are drawn in this order, whatever the import order."""
_ORDER = [module.__name__ for module in MODULES]
ITEMS.sort(key=lambda item: _ORDER.index(item.draw.__module__))

# ---- the command ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Draw every figure, write every table, and write README.md, which shows them all."""

    runs: Path = field(default_factory=lambda: HERE / "results")
    """Folder of the results, with one folder per study."""
    out: Path = field(default_factory=lambda: HERE)
    """Folder for figures, tables and README.md."""
    only: tuple[str, ...] = ()
    """Draw only these, by the names of their files; README.md stays as it is."""


HEAD = """# Figures and tables

`make figures` draws these from the files in [results](results), without a model. `make reproduce`
makes the files again. Every number in the text is computed from them. Accuracy is that of the greedy
answer among three labels. "The paper" is Li et al., AAAI 2025
([arXiv 2503.15117](https://arxiv.org/abs/2503.15117)); its numbers are in
[published.csv](published.csv).

Before you rely on a number:

- SmolLM2 is a real language model (135 million parameters, quantised to 4 bits and back). Its maps
  come from training and development rows, its scores from a sample of the test files.
- The bundled model, of all other figures, has 4 million parameters. Layer 3 began training partly initialised as a matching
  layer, so its peak is in part planted ([model card](../mech_absa/assets/README.md)).
- On the built-in reviews, the nearest opinion word is as good as the edited model. The unedited model
  is as good too when it is asked in another wording ([what you can conclude](../docs/conclude.md)).
- Most studies use sites that were chosen on the restaurant test reviews, and score those reviews too.
  They also use one learning rate, tuned in layers 2-4, for all places. Both favour the traced layers.
  Only [places with tuned rates](#places-with-tuned-rates) has its sites from training reviews and
  rates of its own for each place.
- An effect, or AIE, is the mean change of the metric over pairs; brackets are 95 % intervals that
  resample sentences, unless the text names another unit.
"""


def make(item: Item, config: Config) -> str:
    """Write the files of one figure or table and return its section of README.md.

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
        table, caption = shown.what.markdown(), shown.what.caption
        write_text(config.out / f"{item.name}.md", f"{table}\n{wrapped(caption)}\n")
        write_text(config.out / f"{item.name}.tex", shown.what.latex())
        files = f"[LaTeX]({item.name}.tex), [Markdown]({item.name}.md)."
        body = f"{table}\n{wrapped(f'{caption} {files}')}"
    else:
        plots.save(shown.what, config.out / item.name)
        foot = wrapped(f"{sources} [PDF]({item.name}.pdf).")
        body = f"![{item.title}]({item.name}.png)\n\n{foot}"
    return f"## {item.title}\n\n{wrapped(shown.says)}\n\n{body}\n"


def wrapped(text: str) -> str:
    """Break a paragraph into lines below 100 characters."""
    return textwrap.fill(text, 99, break_long_words=False, break_on_hyphens=False)


def run(config: Config) -> list[str]:
    """Draw every figure and table whose results exist.

    Returns:
        names of the figures and tables.

    Raises:
        ConfigError: `--only` has an unknown name.
        DataError: there are no results.
    """
    names = [item.name for item in ITEMS]
    if unknown := [n for n in config.only if n not in names]:
        raise ConfigError(
            f"--only {unknown[0]!r} is no figure or table; accepted: {', '.join(names)}"
        )
    drawn, sections, missing = [], [], []
    for item in ITEMS:
        if config.only and item.name not in config.only:
            continue
        try:
            sections.append(make(item, config))
            drawn.append(item.name)
            print(item.name, flush=True)
        except DataError as error:
            missing.append(f"`{item.name}`: {error}")
            print(f"{item.name} is left out: {error}", flush=True)
    if not drawn:
        raise DataError(f"{config.runs} holds no results; `make reproduce` makes them")
    if not config.only:
        write_text(
            config.out / "README.md",
            "\n".join(
                [HEAD, *sections, *_times(config.runs), *_left_out(item for item in missing)]
            ),
        )
    return drawn


def _times(runs: Path) -> list[str]:
    """Return a table of what the studies cost; empty without times.csv."""
    if not (runs / "times.csv").exists():
        return []
    seconds = pd.read_csv(runs / "times.csv").groupby("study", sort=False)["seconds"].sum()
    lines = [f"| {study} | {value / 60:.1f} |" for study, value in seconds.items()]
    head = (
        "## What the results cost\n\nMinutes of each study, with one thread per command and several "
        f"commands at once: {seconds.sum() / 60:.0f} in all.\n"
    )
    return ["\n".join([head, "| study | minutes |", "| --- | ---: |", *lines]) + "\n"]


def _left_out(missing: Any) -> list[str]:
    lines = [f"- {line}" for line in missing]
    return ["\n".join(["## Missing results", "", *lines]) + "\n"] if lines else []


def main(config: Config) -> None:
    run(config)


if __name__ == "__main__":
    raise SystemExit(command(Config, main, "python -m figures.make"))
