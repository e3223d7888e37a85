"""Run `mech-absa matrix`, or `python -m mech_absa.train.matrix`: train on each domain, test on all.

    mech-absa matrix --methods zero_shot both@sites both@all --sites runs/trace --out runs/matrix
    mech-absa matrix --train data/{device,rest}_train.json --test data/{device,rest}_test.json

The run writes `matrix.csv` (one row per method, seed, training and test domain), `summary.csv` (one
row per method), `run.json` and `report.html`. `--resume` continues a killed run without repeating
finished trainings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from tyro.conf import OmitArgPrefixes, arg

from ..errors import ConfigError
from ..evaluate.caveats import caveats
from ..examples import Examples
from ..model import Model, load_model
from ..progress import bar
from ..records import RunFolder
from ..sites import Site
from ..train import presets
from ..train.matrix import (
    Domain,
    Grid,
    Method,
    domain_name,
    run_matrix,
    summary,
)
from ..train.presets import Preset
from ..world import DOMAINS
from .cli import command, out_folder, readable, report, tell_left_out, warn, warn_of_crowd
from .flags import (
    FREE,
    ModelFlags,
    Names,
    OptionalInt,
    QuestionFlags,
    ReadFlags,
    RunFlags,
    Seeds,
    SiteFlags,
    Sources,
    at_least,
    recorded,
)
from .train import named_sites, places


@dataclass(frozen=True)
class LimitsFlags:
    """Say how much of the data is used."""

    limit_train: OptionalInt = None
    """Train on at most this many examples per domain, drawn at random; the same for every seed."""
    limit_test: OptionalInt = None
    """Test on at most this many examples per domain, drawn in the same way."""
    head: bool = False
    """Take the first examples for --limit-train and --limit-test, instead of drawing them."""


@dataclass(frozen=True)
class PlaceFlags(SiteFlags):
    """Say which sites methods with @sites edit; first, middle, last and random take as many layers."""

    positions: Names = (presets.LAST_OF_QUERY,)
    """Without --sites: roles (query.last, aspect, answer, ...) or positions (-1) at which representations are edited."""


@dataclass(frozen=True)
class RecipeFlags:
    """Say how every method is trained. What is left out comes from its preset."""

    rank: int = 4
    """Rank of the edit; the bottleneck of an adapter, the length of a prefix, the scalars per matrix of TinyLoRA."""
    epochs: OptionalInt = None
    """Passes over the examples. Default: the preset's."""
    batch_size: OptionalInt = None
    """Examples per forward pass. Default: the preset's."""
    lr_scale: float = 1.0
    """Factor on all learning rates."""
    validation: float = 0.1
    """Share of the training sentences set aside to choose the best epoch on; 0 keeps the last."""
    memory: float = 1.0
    """GiB for activations below the edit, which are computed once; the rest is computed again."""


@dataclass(frozen=True)
class Config:
    """Train on each domain and test on all, for a list of methods and seeds.

    Examples:
      mech-absa matrix --methods zero_shot both@middle lora@all --out runs/matrix
      mech-absa matrix --methods both@sites both@random --sites runs/trace --seeds 0 1 2
    """

    train: Sources = tuple(f"builtin:{d}/train" for d in DOMAINS)
    """Training files, one per domain."""
    test: Sources = tuple(f"builtin:{d}/test" for d in DOMAINS)
    """Test files, in the same order."""
    methods: Names = ("zero_shot", "both@middle", "lora@all", "loreft@all")
    """PRESET@WHERE: a preset of mech-absa train, at sites, first, middle, last, random, all, or layers such as 2-5."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the trainings."""
    baselines: bool = True
    """Also score simple baselines, trained on the same examples."""
    limits: Annotated[OmitArgPrefixes[LimitsFlags], arg(name="data")] = field(
        default_factory=LimitsFlags
    )
    place: OmitArgPrefixes[PlaceFlags] = field(default_factory=PlaceFlags)
    recipe: Annotated[OmitArgPrefixes[RecipeFlags], arg(name="training")] = field(
        default_factory=RecipeFlags
    )
    reading: OmitArgPrefixes[ReadFlags] = field(default_factory=ReadFlags)
    question: OmitArgPrefixes[QuestionFlags] = field(default_factory=QuestionFlags)
    model: OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)
    run: OmitArgPrefixes[RunFlags] = field(default_factory=RunFlags)

    def __post_init__(self) -> None:
        if not self.train or len(self.train) != len(self.test):
            raise ConfigError(
                f"--train names {len(self.train)} files and --test {len(self.test)}; one each per domain is needed"
            )
        if len(names := {domain_name(t) for t in self.train}) < len(self.train):
            raise ConfigError(
                f"--train names {len(self.train)} files of {len(names)} domains; each domain can stand once"
            )
        if not self.methods or not self.seeds:
            raise ConfigError("--methods and --seeds each need at least one")
        once("--methods", self.methods)
        once("--seeds", self.seeds)
        if not 0 <= self.recipe.validation < 1:
            raise ConfigError(
                f"--validation is {self.recipe.validation}; accepted: a share from 0 up to (not including) 1"
            )
        at_least(1, limit_train=self.limits.limit_train, limit_test=self.limits.limit_test)
        at_least(0, memory=self.recipe.memory)
        self.reading.check()
        self.question.check()


def once(flag: str, values: Sequence[Any]) -> None:
    """Raise a ConfigError for the first value that occurs twice."""
    if twice := [v for v in values if values.count(v) > 1]:
        raise ConfigError(
            f"{flag} names {twice[0]} more than once; the same training would count twice"
        )


@dataclass(frozen=True, eq=False)
class Task:
    """Hold what a matrix uses: everything that is loaded and checked before the first training."""

    config: Config
    model: Model
    grid: Grid
    notes: list[str]

    @property
    def domains(self) -> Sequence[Domain]:
        """Return the domains with their training and test examples."""
        return self.grid.domains


def change(config: Config, preset: Preset) -> Preset:
    """Return a preset with what the flags change."""
    recipe = config.recipe
    given = {n: v for n in ("epochs", "batch_size") if (v := getattr(recipe, n)) is not None}
    return preset.rates(recipe.lr_scale).but(**given)


def main(config: Config) -> Path:
    """Train, test, and write the folder.

    Raises:
        MechAbsaError: an input is not accepted; nothing has been written then.
    """
    task = prepare(config)
    folder = RunFolder(
        out_folder(config, "matrix"),
        recorded(config),
        config.run.resume,
        (*FREE, "memory", "strict"),
    )
    hashes = [e.sha256 for d in task.domains for e in (d.train, d.test)]
    folder.bind({"model": task.model.sha256, "data": hashes})
    if folder.finished:
        return folder.path
    folder.open()
    warn_of_crowd(config.run.quiet)
    rows = train_all(task, folder)
    table, short = pd.DataFrame(rows), summary(rows)
    folder.write("matrix.csv", partial(table.to_csv, index=False))
    folder.write("summary.csv", partial(short.to_csv, index=False))
    simple = baselines_of(task)
    if simple is not None:
        folder.write("matrix_baselines.csv", partial(simple.to_csv, index=False))
    task.notes.extend(broken(table))
    folder.finish(record_of(task), report(config))
    if not config.run.quiet:
        warn(task.notes)
        show(short)
        if simple is not None:
            show_baselines(simple)
        print(f"written to {folder.path}\n{conclusion(short)}")
    return folder.path


def prepare(config: Config) -> Task:
    """Load the data and the model, and check every training before the first.

    Raises:
        MechAbsaError: an input is not accepted.
    """
    domains = [
        Domain(
            domain_name(a),
            _read(a, config, config.limits.limit_train),
            _read(b, config, config.limits.limit_test),
        )
        for a, b in zip(config.train, config.test, strict=True)
    ]
    model = load_model(
        config.model.model,
        device=config.model.device,
        dtype=config.model.dtype,
        backend=config.model.backend,
    )
    domains = [
        Domain(d.name, *(readable(config, model, e, answers=True) for e in (d.train, d.test)))
        for d in domains
    ]
    sites: list[Site] = []
    notes: list[str] = []
    if config.place.sites:
        sites, notes = named_sites(config.place.sites, model, config.place.any_sites)
    grid = Grid(
        domains,
        [Method.parse(m) for m in config.methods],
        config.seeds,
        sites,
        places(config.place.positions),
        config.recipe.rank,
        partial(change, config),
        config.recipe.validation,
        config.question.prompt,
        config.question.verbalizer,
    )
    grid.check(model)
    tests = [d.test for d in domains]
    said = (note for d in domains for note in caveats(d.train.items, tests, d.name))
    return Task(config, model, grid, [*notes, *dict.fromkeys(said)])


def train_all(task: Task, folder: RunFolder) -> list[dict[str, Any]]:
    """Return the rows of the matrix; finished trainings are kept in the folder's parts."""
    config = task.config
    with bar("trainings", task.grid.n_trainings, config.run.quiet) as advance:
        rows: list[dict[str, Any]] = run_matrix(
            task.model,
            task.grid,
            budget=int(config.recipe.memory * 2**30),
            parts=folder.part("rows"),
            on_done=advance,
        )
    return rows


def broken(table: pd.DataFrame) -> list[str]:
    """Return a sentence per training whose loss was no number, or that warned."""
    lost = table[table["diverged"]].drop_duplicates(["method", "train", "seed"])
    warned = table[table["warnings"] != ""].drop_duplicates(["train", "warnings"])
    return [
        *(
            f"{r.method} trained on {r.train} with seed {r.seed}: {r.stopped}"
            for r in lost.itertuples()
        ),
        *(f"{r.train} with seed {r.seed}: {r.warnings}" for r in warned.itertuples()),
    ]


def baselines_of(task: Task) -> pd.DataFrame | None:
    """Return the scores of simple baselines on every pair of domains, if they are wanted."""
    if not task.config.baselines:
        return None
    from ..evaluate.baselines import across

    return across([(d.name, d.train, d.test) for d in task.domains])


def record_of(task: Task) -> dict[str, Any]:
    """Return what run.json says of a matrix."""
    model = task.model
    return {
        "command": "train.matrix",
        "model": {
            "name": model.name,
            "sha256": model.sha256,
            "parameters": model.n_parameters,
            "device": str(model.device),
        },
        "domains": {
            d.name: {"train": d.train.account(), "test": d.test.account()} for d in task.domains
        },
        "sites": [str(s) for s in task.grid.sites],
        "trainings": task.grid.n_trainings,
        "warnings": task.notes,
    }


def show(short: pd.DataFrame) -> None:
    """Print the summary, a row per method."""
    from .tables import print_table

    rows = [[_cell(v) for v in row] for row in short.itertuples(index=False)]
    used = [i for i in range(len(short.columns)) if any(row[i] is not None for row in rows)]
    names = [str(short.columns[i]).replace("_", " ") for i in used]
    print_table(
        names, [[row[i] for i in used] for row in rows], "Trained on each domain, tested on all"
    )


def show_baselines(table: pd.DataFrame) -> None:
    """Print the mean accuracy of every baseline on its own domain and on others."""
    from .tables import print_table

    rows = []
    for name, of in table.groupby("baseline", sort=False):
        own, others = of[of["in_domain"]]["accuracy"], of[~of["in_domain"]]["accuracy"]
        rows.append([name, _cell(float(own.mean())), _cell(float(others.mean()))])
    print_table(
        ["baseline", "accuracy in", "accuracy out"], rows, "Simple baselines, same training data"
    )


def _cell(value: object) -> Any:
    """Return a number with four digits; None where there is no value."""
    if isinstance(value, float):
        return None if value != value else f"{value:.4g}"
    return value


def conclusion(short: pd.DataFrame) -> str:
    """Say in one line which method is best."""
    column = next(
        (c for c in ("accuracy_out", "accuracy_in") if c in short and short[c].notna().any()), None
    )
    if column is None:
        return f"{len(short)} methods compared."
    best = short.loc[short[column].idxmax()]
    where = "on other domains" if column == "accuracy_out" else "on its own domain"
    return (
        f"Best {where}: {best['method']}, accuracy {best[column]:.1%} over {best['seeds']} seeds."
    )


def _read(source: str, config: Config, limit: int | None) -> Examples:
    examples = config.reading.read(source, limit, head=config.limits.head)
    tell_left_out(examples)
    return examples


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command(Config, main, "mech_absa.train.matrix", argv)
