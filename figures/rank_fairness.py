"""Does a low rank keep what the base model prefers? `python -m figures.rank_fairness`.

    python -m figures.rank_fairness                         train, measure; writes figures/results/rank_fairness/
    python -m figures.rank_fairness --fast --out runs/try   the same on a handful of examples: proves nothing
    python -m figures.rank_fairness --collect               write the results of what is done so far

Das et al. 2024 (arXiv 2405.18572) find that fine-tuning of a low rank keeps the base model's bias, and
that this shrinks as the rank grows. Here, the paper's edit (`both`) is trained at the layers that were
traced on training reviews, with several ranks, in two worlds: the built-in reviews, and their harder
version.

1. **Training.** For each of three samples of the training reviews, one edit of each rank, all with the
   rates of the preset. So a rank also changes how fast an edit learns: the preset scales a low-rank
   update by alpha / rank = 2 at every rank.
2. **Measuring.** Each edit is measured on test reviews as `evaluate --fairness` does: gaps between classes
   and between groups, KL to the base, drift of the logit lens by layer.

Every training is a file of its own under `--out`, so that a killed study goes on where it stopped.
Results: `edits.csv` (a row per edit), `ranks.csv` (means over samples, with t intervals), `trends.csv`
(change per doubling of the rank) and `run.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mech_absa.commands.cli import command
from mech_absa.errors import ConfigError
from mech_absa.evaluate.fairness import SWAPS, fairness
from mech_absa.examples import Example
from mech_absa.model import Model, load_model
from mech_absa.plots import SEPARATOR
from mech_absa.plots.layout import curve, headline, new_figure
from mech_absa.plots.style import CYCLE, PAGE, style
from mech_absa.readers import load_examples
from mech_absa.records import atomic, versions, write_json
from mech_absa.sites import Site
from mech_absa.train import PrefixCache, fit, presets

from .places import interval, sample
from .study import Shown, Study, sentence, shows
from .tables import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "figures" / "results"
STEP_SECONDS, EDIT_SECONDS = 0.2, 12.0
"""CPU-seconds of a step of training and of measuring an edit, for the budget; measured on one core."""


@dataclass(frozen=True)
class World:
    """Data that edits are trained and measured on.

    Attributes:
        name: of the rows.
        prefix: of the built-in data.
        examples, epochs: of each training.
    """

    name: str
    prefix: str
    examples: int
    epochs: int


WORLDS = (
    World("built-in", "builtin:restaurant", 320, 2),
    World("harder", "builtin:v2/restaurant", 320, 2),
)


@dataclass(frozen=True)
class Config:
    """Train the paper's edit with several ranks, and measure how it treats classes and groups."""

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Ranks of both parts of the edit."""
    samples: int = 3
    """Training samples of each rank."""
    rate: float = 1.0
    """The preset's learning rates are taken times this."""
    test: int = 160
    """Test rows."""
    frames: int = 3
    """Sentences of each kind of swap, of six; each comes with six opinion words and four terms."""
    draws: int = 500
    """Draws of each bootstrap and permutation."""
    fast: bool = False
    """Use a handful of everything."""
    collect: bool = False
    """Only write the results of what is done."""
    out: Path = ROOT / "runs" / "rank_fairness"
    """Where finished trainings are kept."""
    results: Path | None = None
    """Where the results go; default figures/results/rank_fairness, and with --fast a folder in --out."""

    @property
    def kept(self) -> Path:
        own = self.out / "results" if self.fast else RESULTS / "rank_fairness"
        return self.results or own


FAST: dict[str, Any] = {
    "ranks": (1, 4), "samples": 2, "test": 12, "frames": 1, "draws": 20,
}  # fmt: skip
FAST_WORLD = {"examples": 8, "epochs": 1}


@dataclass(frozen=True)
class Job:
    """One training."""

    world: World
    rank: int
    rate: float
    sample: int

    @property
    def name(self) -> str:
        w = self.world
        return f"{w.name}-n{w.examples}-e{w.epochs}-r{self.rank}-x{self.rate:g}-s{self.sample}"


class Sweep:
    """The data, the model and the trainings that are done."""

    def __init__(self, config: Config):
        self.config = config
        self.worlds = [replace(w, **FAST_WORLD) if config.fast else w for w in WORLDS]
        self.swaps = [replace(swap, frames=swap.frames[: config.frames]) for swap in SWAPS]
        self.known: dict[str, Any] = {}
        self._data: dict[str, tuple[list[Example], list[Example]]] = {}

    @cached_property
    def model(self) -> Model:
        return load_model("bundled", device="cpu")

    @cached_property
    def cache(self) -> PrefixCache:
        return PrefixCache(self.model)

    @cached_property
    def sites(self) -> list[Site]:
        """Return the sites that the study `places` traced on training reviews."""
        record = json.loads((RESULTS / "places" / "run.json").read_text(encoding="utf-8"))
        return [Site.parse(s) for s in record["sites"]["sites"]]

    def data(self, world: World) -> tuple[list[Example], list[Example]]:
        """Return reviews to train on and to measure on."""
        if world.name not in self._data:
            test = load_examples(f"{world.prefix}/test").sample(self.config.test)
            self._data[world.name] = list(load_examples(f"{world.prefix}/train")), list(test)
        return self._data[world.name]

    # ---- the trainings ----

    def path(self, job: Job) -> Path:
        c = self.config
        return c.out / "parts" / f"{job.name}-t{c.test}-f{c.frames}-d{c.draws}.json"

    def read(self, job: Job) -> dict[str, Any] | None:
        path = self.path(job)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def jobs(self) -> Iterator[Job]:
        """Yield every training, all ranks of a sample before the next one."""
        for number in range(self.config.samples):
            for world in self.worlds:
                for rank in self.config.ranks:
                    yield Job(world, rank, self.config.rate, number)

    def budget(self) -> str:
        """Say what the study takes."""
        edits = len(self.config.ranks) * self.config.samples
        steps = sum(edits * w.epochs * -(-w.examples // 16) for w in self.worlds)
        edits *= len(self.worlds)
        minutes = (steps * STEP_SECONDS + edits * EDIT_SECONDS) / 60
        return (
            f"{edits} trainings of {steps} steps in all, and as many edits to measure: "
            f"about {minutes:.0f} CPU-minutes on one core"
        )

    def run(self) -> None:
        """Do what is missing."""
        for job in self.jobs():
            if self.path(job).exists():
                continue
            started = time.process_time()
            row = self.train(job)
            row["cpu_seconds"] = round(time.process_time() - started, 2)
            write_json(self.path(job), row)
            print(f"{time.strftime('%H:%M:%S')} {job.name}", flush=True)

    def train(self, job: Job) -> dict[str, Any]:
        """Train one edit and measure it."""
        train, test = self.data(job.world)
        preset = presets.bundled(self.sites, "both", rank=job.rank, epochs=job.world.epochs)
        chosen = sample(train, job.world.examples, job.sample)
        edit = fit(self.model, chosen, preset.rates(job.rate), seed=job.sample, cache=self.cache)
        row = {
            "world": job.world.name, "rank": job.rank, "rate": job.rate, "sample": job.sample,
            "examples": len(chosen), "steps": len(edit.history),
        }  # fmt: skip
        found = fairness(
            self.model, edit, test, swaps=self.swaps, batch_size=64, name=job.name,
            draws=self.config.draws, known=self.known,
        )  # fmt: skip
        return {**found.row(), **row}

    # ---- what is kept ----

    def collect(self) -> None:
        """Write the results of all trainings that are done.

        Raises:
            ConfigError: no edit has been measured yet.
        """
        rows = [row for job in self.jobs() if (row := self.read(job)) is not None]
        if not rows:
            raise ConfigError(
                f"no edit has been measured in {self.config.out} yet; run without --collect first"
            )
        edits = pd.DataFrame(rows).drop(columns=["system", "cpu_seconds"])
        tables = {"edits.csv": edits, "ranks.csv": by_rank(edits), "trends.csv": trends(edits)}
        for name, table in tables.items():
            with atomic(self.config.kept / name) as temporary:
                table.to_csv(temporary, index=False, float_format="%.5g")
        write_json(self.config.kept / "run.json", self.record(rows))

    def record(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return what run.json says of the study."""
        c = self.config
        settings = {
            k: v for k, v in asdict(c).items() if k not in ("out", "results", "collect", "fast")
        }
        return {
            "study": "rank_fairness",
            "question": "Does an edit of low rank keep what the base model prefers?",
            "command": "python -m figures.rank_fairness",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "config": settings,
            "worlds": [asdict(w) for w in self.worlds],
            "sites": [str(s) for s in self.sites],
            "model": {"name": self.model.name, "sha256": self.model.sha256},
            "rows": {"train": self.worlds[0].examples, "validation": 0, "test": c.test},
            "trainings": {"done": len(rows), "planned": len(list(self.jobs()))},
            "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows)),
            "versions": versions(),
        }


NOT_MEASURES = ("world", "rank", "rate", "sample", "examples", "steps", "n", "parameters")


def measures(edits: pd.DataFrame) -> list[str]:
    """Return the columns that are numbers of an edit: no ends of intervals, and no settings.

    >>> measures(pd.DataFrame(columns=["world", "rank", "class_gap", "class_gap_low", "class_gap_high"]))
    ['class_gap']
    """
    ends = ("_low", "_high")
    return [c for c in edits.columns if c not in NOT_MEASURES and not c.endswith(ends)]


def by_rank(edits: pd.DataFrame) -> pd.DataFrame:
    """Return a row per world, measure and rank: the mean over samples and its t interval."""
    rows = []
    for (world, rank), part in edits.groupby(["world", "rank"], sort=False):
        for name in measures(edits):
            mean, low, high = interval(part[name])
            rows.append(
                {"world": world, "measure": name, "rank": rank, "mean": mean, "low": low, "high": high, "samples": len(part)}
            )  # fmt: skip
    return pd.DataFrame(rows)


def trends(edits: pd.DataFrame) -> pd.DataFrame:
    """Return how each measure changes per doubling of the rank: a row per world and measure.

    The slope of a measure over log2(rank) is fitted for each sample, whose edits were trained on the
    same reviews; the interval is a t interval over samples.
    """
    rows = []
    for world, part in edits.groupby("world", sort=False):
        for name in measures(edits):
            wide = part.pivot(index="rank", columns="sample", values=name).dropna(axis=1)
            if len(wide) < 2 or wide.empty:
                continue
            slopes = np.polyfit(np.log2(wide.index.to_numpy(float)), wide.to_numpy(float), 1)[0]
            slopes = slopes.round(12)  # a constant measure has a slope of exactly 0
            mean, low, high = interval(slopes)
            rows.append(
                {"world": world, "measure": name, "slope": mean, "low": low, "high": high, "samples": len(slopes)}
            )  # fmt: skip
    return pd.DataFrame(rows)


# ---- figures and tables --------------------------------------------------------------------------

KINDS = tuple(swap.kind for swap in SWAPS)
PANELS = (
    ("gap of classes (points)", 100.0, (("class_gap", "classes"),)),
    ("gap of groups (points)", 100.0, tuple((f"{kind}_gap", kind) for kind in KINDS)),
    ("KL to the base (nats)", 1.0, (("kl_labels", "labels"), ("kl_vocabulary", "vocabulary"))),
)
"""(label of the axis, factor, curves as (measure, name)) of each panel over the rank."""


def drifts(table: pd.DataFrame, world: str) -> pd.DataFrame:
    """Return the drift of each layer by rank: columns rank, layer, mean, mean_low and mean_high.

    Args:
        table: `ranks.csv`.
        world: whose rows.
    """
    rows = table[(table["world"] == world) & table["measure"].str.match(r"lens_L\d+$")]
    layers = rows["measure"].str.removeprefix("lens_L").astype(int)
    return rows.assign(layer=layers).rename(columns={"low": "mean_low", "high": "mean_high"})


def _panel(ax: Axes, rows: pd.DataFrame, label: str, factor: float, curves: Sequence[tuple[str, str]]) -> None:  # fmt: skip
    """Draw some measures over the rank, and what the unedited model has as dashes."""
    for i, (name, title) in enumerate(curves):
        one = rows[rows["measure"] == name].sort_values("rank")
        one = one.rename(columns={"low": "mean_low", "high": "mean_high"})
        curve(ax, one["rank"].to_numpy(float), one, "mean", i, title, factor=factor)
        base = rows.loc[rows["measure"] == f"{name}_base", "mean"]
        if len(base):
            ax.axhline(factor * float(base.iloc[0]), color=CYCLE[i], linestyle=":", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(rows["rank"].unique()), [str(r) for r in sorted(rows["rank"].unique())])
    ax.set_xlabel("rank")
    ax.set_ylabel(label)
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    if len(curves) > 1:
        ax.legend()


@shows("rank_fairness", "Rank, classes, groups and drift", "rank_fairness")
def rank_fairness(study: Study) -> Shown:
    table = study.table("ranks.csv")
    worlds = list(dict.fromkeys(table["world"]))
    with style():
        figure, axes = new_figure(PAGE, 1.75 * len(worlds), nrows=len(worlds), ncols=4, squeeze=False)  # fmt: skip
        for line, world in zip(axes, worlds, strict=True):
            rows = table[table["world"] == world]
            for ax, (label, factor, curves) in zip(line[:3], PANELS, strict=True):
                _panel(ax, rows, label, factor, curves)
            line[0].set_title(f"{world} reviews")
            lens = drifts(table, world)
            for i, (rank, one) in enumerate(lens.groupby("rank")):
                one = one.sort_values("layer").drop(columns=["mean_low", "mean_high"])
                curve(line[3], one["layer"].to_numpy(float), one, "mean", i, str(rank))
            line[3].set_xlabel("layer")
            line[3].set_ylabel("drift of the logit lens (nats)")
            line[3].legend(title="rank", ncols=2)
        note = f"{study.note}{SEPARATOR}bars: t intervals over samples; dotted: without the edit"
        headline(figure, "What the rank of an edit does to classes, groups and drift", note)
    return Shown(figure, says(study))


TREND = {
    "accuracy": ("accuracy", 100.0, "points"), "class_gap": ("the gap of classes", 100.0, "points"),
    **{f"{kind}_gap": (f"the gap of groups ({kind})", 100.0, "points") for kind in KINDS},
    "kl_labels": ("KL over the labels", 1.0, "nats"), "kl_vocabulary": ("KL over the vocabulary", 1.0, "nats"),
}  # fmt: skip
"""Measures of the sentence on trends: column -> (words, factor, unit)."""


def says(study: Study) -> str:
    """Say how each measure changes per doubling of the rank."""
    table, parts = study.table("trends.csv"), []
    for world, rows in table.groupby("world", sort=False):
        found = rows.set_index("measure")
        clear, flat = [], []
        for name, (words, factor, unit) in TREND.items():
            if name not in found.index:
                continue
            r = found.loc[name]
            sure = r["low"] > 0 or r["high"] < 0
            numbers = f"{factor * r['slope']:+.2f} [{factor * r['low']:.2f}, {factor * r['high']:.2f}] {unit}"  # fmt: skip
            (clear if sure else flat).append(f"{words} {numbers}")
        parts.append(
            f"{world} reviews: shown: {'; '.join(clear) or 'nothing'}; not shown: {'; '.join(flat) or 'nothing'}"
        )
    return (
        "Change per doubling of the rank, with a t interval over training samples, not corrected for the "
        f"number of measures. {' '.join(map(sentence, parts))} A change is shown if its interval leaves 0 out."
    )


@shows("table_rank_fairness", "Rank, classes, groups and drift: numbers", "rank_fairness")
def table_rank_fairness(study: Study) -> Shown:
    table = study.table("ranks.csv")
    wanted = ["accuracy", "recall_neutral", "class_gap", *(f"{kind}_gap" for kind in KINDS), "kl_labels", "kl_vocabulary"]  # fmt: skip
    header = ("rank", "accuracy", "recall of neutral", "gap of classes", *(f"gap: {k}" for k in KINDS), "KL, labels", "KL, vocabulary")  # fmt: skip
    blocks = []
    for world, rows in table.groupby("world", sort=False):
        found = rows.set_index(["rank", "measure"])
        lines = [
            (str(rank), *(_spelled(name, found.loc[(rank, name)]) for name in wanted))
            for rank in sorted(rows["rank"].unique())
        ]
        first = rows[rows["rank"] == rows["rank"].min()].set_index("measure")["mean"]
        base = ["none", *(f"{100 * first[f'{n}_base']:.1f}" if f"{n}_base" in first else "–" for n in wanted)]  # fmt: skip
        blocks.append((f"{world} reviews", (tuple(base), *lines)))
    caption = (
        "The paper's edit by rank, on the bundled model: accuracies and gaps in points, KL in nats, with t "
        f"intervals over training samples. The row none is the unedited model. {study.source}"
    )
    words = "A gap is the largest recall or accuracy minus the smallest, and is above 0 by chance alone."
    return Shown(Table(caption, "tab:rank_fairness", header, tuple(blocks)), words)


def _spelled(name: str, row: pd.Series) -> str:
    """Return a mean and its interval as the table has it."""
    factor, digits = (1.0, 2) if name.startswith("kl_") else (100.0, 1)
    mean, low, high = (factor * row[c] for c in ("mean", "low", "high"))
    ends = "" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{mean:.{digits}f}{ends}"


# ---- the command ---------------------------------------------------------------------------------


def main(config: Config) -> None:
    """Print the budget, do what is missing, and write the results of what is done."""
    if config.samples < 2 or not config.ranks or min(config.ranks) < 1 or config.frames < 1:
        raise ConfigError(
            f"--samples {config.samples}, --ranks {' '.join(map(str, config.ranks))} and --frames {config.frames} "
            "were given; accepted: 2 or more samples, and one or more ranks and frames of 1 or more"
        )
    sweep = Sweep(replace(config, **FAST) if config.fast else config)
    if not config.collect:
        print(sweep.budget(), flush=True)
        sweep.run()
    sweep.collect()


if __name__ == "__main__":
    raise SystemExit(command(Config, main, "python -m figures.rank_fairness"))
