"""`mech-absa compare`, or `python -m mech_absa.compare`: do selectors name better places than chance?

    mech-absa compare --selectors exact lens probe last --budgets 64x2 --out runs/compare

Every selector ranks layers on training reviews. Then the same edit is trained at the best layers of
each of them and at random places, each with a learning rate tuned there, on several samples, and
scored on test rows. Leaves `selectors.csv` (a row per selector, edit and budget), `places.csv`,
`trainings.csv`, `rankings.csv`, `agreement.csv`, `agreements.csv` with intervals, `costs.csv`,
`report.md`, figures, and `run.json`. A killed run
is taken up with `--resume`: trainings that were finished are not repeated.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from tyro.conf import OmitArgPrefixes, arg

from ..errors import ConfigError, DataError
from ..evaluate.caveats import caveats
from ..examples import Examples, content_hash, split_by_sentence
from ..model import Model, load_model
from ..patch.corruption import as_corruption
from ..progress import bar
from ..records import RunFolder, fingerprint, write_text
from ..select import SELECTORS, Evidence, SiteRanking, selector
from ..select.compared import (
    Landscape,
    agreement_pairs,
    agreement_table,
    compare_selectors,
    cost_table,
    place_table,
)
from ..select.side_by_side import train_side_by_side
from ..select.trainings import (
    RATES,
    Budget,
    Data,
    Layers,
    Settings,
    Trainings,
    all_places,
    frame_of,
    random_places,
)
from ..train import presets
from .cli import command, out_folder, readable, tell_left_out, warn
from .flags import (
    FREE,
    ModelFlags,
    Names,
    Numbers,
    OptionalFloat,
    OptionalInt,
    OptionalPath,
    QuestionFlags,
    ReadFlags,
    RunFlags,
    Sources,
    at_least,
    join,
    one_of,
    recorded,
    share,
)
from .matrix import once
from .patch import with_adapter
from .train import places as positions_of

FREE_TOO = (*FREE, "memory", "trainings", "minutes", "strict")
"""Flags that may change when a comparison is resumed."""
DEFAULT = ("exact", "relp", "lens", "probe", "middle", "first", "last")


@dataclass(frozen=True)
class SelectorFlags:
    """Say what selectors look at."""

    looks: int = 120
    """Training examples that a selector looks at."""
    adapter: str = "auto"
    """A trained edit whose weights are merged into the model that selectors look at: a folder, bundled, bundled-v2, or none.
    auto is bundled for the models that one ships for (bundled, smollm2) and none otherwise.
    The edits that are compared train the model without it."""
    corruption: str = "counterfactual"
    """Of the pairs of causal selectors: noise, counterfactual, aspect-swap, mean, zero or resample."""


@dataclass(frozen=True)
class PlacesFlags:
    """Say which places are compared: sets of layers, the best ones of each selector and random ones."""

    width: int = 2
    """Layers of a place."""
    places: OptionalInt = None
    """Random places, drawn from all sets of as many layers. Default: all of them, where there are at most 100."""
    minutes: OptionalFloat = None
    """Begin no other random place after this many minutes; the places of selectors are always trained.
    Random places come in a random order, so that those that were trained are a random sample."""
    position: str = presets.LAST_OF_QUERY
    """Role (query.last, aspect, answer, ...) or position (-1) at which representations are edited."""


@dataclass(frozen=True)
class RecipeFlags:
    """Say what is trained at every place, and how."""

    edits: Names = ("both",)
    """Which edits, as in mech-absa train --preset: both, lora_o, loreft and so on."""
    budgets: Names = ("64x2",)
    """How long an edit trains, as EXAMPLESxEPOCHS; 0 examples are all."""
    rates: Numbers = RATES
    """The preset's learning rates are tried times each of these, at every place."""
    samples: int = 5
    """Training samples of each place."""
    rank: int = 4
    """Rank of the edit; the bottleneck of an adapter, the length of a prefix, the scalars per matrix of TinyLoRA."""
    validation: float = 0.125
    """Share of the training sentences set aside to tune learning rates on."""
    memory: float = 1.0
    """GiB for activations below the edit, which are computed once; the rest is computed again."""
    jobs: int = 1
    """Processes that train places side by side; each holds a model and --memory of its own."""
    trainings: OptionalPath = None
    """A folder that keeps finished trainings beyond this run. A later run on the same model, data and seed trains only what is missing.
    Default: inside --out, until the run ends."""


@dataclass(frozen=True)
class Config:
    """Train the same edit where selectors say and at random places, and compare.

    Examples:
      mech-absa compare --selectors exact lens last --budgets 64x2 --out runs/compare
      mech-absa compare --data train.xml --test test.xml --model gpt2 --places 20
    """

    data: Sources = ("builtin:restaurant/train",)
    """Training files: selectors look at them, rates are tuned and edits trained on them."""
    test: Sources = ("builtin:restaurant/test",)
    """Test files: every edit is scored on them once, and nothing is chosen by them."""
    out_of_domain: Sources = ()
    """Test files of other domains: scored once like --test, and reported apart."""
    limit_test: OptionalInt = 320
    """Test on at most this many examples of each source, drawn at random. Default: 320."""
    selectors: Names = DEFAULT
    """Which selectors: exact, exact_noise, writes, atp, atpstar, relp, ig, critical, joint_mask, lens, probe, weight_patch,
    weight_patch_back, weight_patch_grad, taylor1, taylor2, saap, fluctuation, cka, jola, lofit, middle, first, last or random."""
    seed: int = 0
    """Seed of the samples, the split and the random places."""
    looking: Annotated[OmitArgPrefixes[SelectorFlags], arg(name="selectors")] = field(
        default_factory=SelectorFlags
    )
    place: Annotated[OmitArgPrefixes[PlacesFlags], arg(name="places")] = field(
        default_factory=PlacesFlags
    )
    recipe: Annotated[OmitArgPrefixes[RecipeFlags], arg(name="training")] = field(
        default_factory=RecipeFlags
    )
    reading: OmitArgPrefixes[ReadFlags] = field(default_factory=ReadFlags)
    question: OmitArgPrefixes[QuestionFlags] = field(default_factory=QuestionFlags)
    model: OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)
    run: OmitArgPrefixes[RunFlags] = field(default_factory=RunFlags)

    def __post_init__(self) -> None:
        if not self.data or not self.test or not self.selectors:
            raise ConfigError("--data, --test and --selectors each need at least one")
        for name in self.selectors:
            one_of("--selectors", name, list(SELECTORS))
        for name in self.recipe.edits:
            one_of("--edits", name, presets.METHODS)
        once("--selectors", self.selectors)
        for flag in ("edits", "budgets", "rates"):
            once(f"--{flag}", getattr(self.recipe, flag))
        at_least(1, limit_test=self.limit_test, looks=self.looking.looks, width=self.place.width)
        at_least(1, places=self.place.places, rank=self.recipe.rank, jobs=self.recipe.jobs)
        at_least(0, minutes=self.place.minutes)
        share("--validation", self.recipe.validation)
        self.settings.check()
        as_corruption(self.looking.corruption)
        presets.range_sites((0,), [self.settings.position])
        self.reading.check()
        self.question.check()

    @property
    def settings(self) -> Settings:
        """What is trained."""
        return Settings(
            self.recipe.edits,
            tuple(Budget.parse(b) for b in self.recipe.budgets),
            self.recipe.rates,
            self.recipe.samples,
            self.seed,
            positions_of((self.place.position,))[0],
            self.recipe.rank,
            self.question.prompt,
            self.question.verbalizer,
            int(self.recipe.memory * 2**30),
        )


MOST_PLACES = 100
"""All places are trained where there are no more; this many are drawn where there are."""


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that is loaded and checked before the first training.

    Attributes:
        config: the flags.
        train, tests, out: the data; `out` is empty where no other domain is given.
        parts: training rows split into those that samples are drawn from and validation, and test rows.
        model: the base.
        evidence: what selectors get.
        adapter: name of what was merged.
        random: random places.
        notes: warnings.
    """

    config: Config
    train: Examples
    tests: Examples
    out: Examples
    parts: Data
    model: Model
    evidence: Evidence
    adapter: str | None
    random: tuple[Layers, ...]
    notes: list[str]

    @property
    def data(self) -> list[Examples]:
        """Return the training rows and each kind of test rows that is given."""
        return [self.train, self.tests, *([self.out] if len(self.out) else [])]


def prepare(config: Config) -> Task:
    """Load the data and the model.

    Raises:
        MechAbsaError: an input is not accepted; nothing has been written then.
    """
    train = join([_read(source, config, None) for source in config.data])
    tests, out = (
        join([_read(source, config, config.limit_test) for source in sources])
        if sources
        else Examples(())
        for sources in (config.test, config.out_of_domain)
    )
    m = config.model
    model = load_model(m.model, device=m.device, dtype=m.dtype, backend=m.backend)
    train, tests, out = (
        readable(config, model, e, answers=True) if len(e) else e for e in (train, tests, out)
    )
    learn, held = split_by_sentence(train.items, config.recipe.validation, config.seed)
    if not learn or not held or not len(tests):
        raise DataError(
            f"{len(learn)} training, {len(held)} validation and {len(tests)} test examples are left; "
            "at least one of each is needed"
        )
    all_places(config.place.width, model.n_layers)
    drawn = random_places(
        config.place.width, model.n_layers, config.place.places or MOST_PLACES, config.seed
    )
    random.Random(config.seed).shuffle(drawn)
    adapted, adapter = with_adapter(config.looking.adapter, model)
    config.question.verbalizer.label_ids(model.tokenizer, config.question.prompt)
    seen = random.Random(config.seed).sample(list(learn), min(config.looking.looks, len(learn)))
    evidence = Evidence(
        adapted,
        tuple(seen),
        model,
        as_corruption(config.looking.corruption),
        config.question.prompt,
        config.question.verbalizer,
        seed=config.seed,
        width=config.place.width,
    )
    notes = caveats(train.items, [tests, out] if len(out) else [tests])
    parts = Data(learn, held, tests.items, out.items)
    return Task(config, train, tests, out, parts, model, evidence, adapter, tuple(drawn), notes)


def main(config: Config) -> Path:
    """Rank, train, compare, and write the folder.

    Raises:
        MechAbsaError: an input is not accepted; nothing has been written then.
    """
    folder = RunFolder(out_folder(config, "compare"), recorded(config), config.run.resume, FREE_TOO)
    if folder.finished:
        return folder.path
    task = prepare(config)
    folder.bind({"model": task.model.sha256, "data": [e.sha256 for e in task.data]})
    rankings = rank(task)
    chosen = [ranking.top_layers(config.place.width) for ranking in rankings]
    own = config.recipe.trainings
    parts = folder.part("trainings") if own is None else own / key(task)
    trainings = trainings_of(task, chosen, parts)
    folder.open()
    if not config.run.quiet:
        warn(task.notes)
    rows = frame_of(train(task, trainings, chosen))
    compared = write_tables(task, folder, rankings, rows)
    folder.finish(record_of(task, rankings, rows))
    if not config.run.quiet:
        show(compared)
        print(f"written to {folder.path}\n{conclusion(compared)}")
    return folder.path


def trainings_of(task: Task, chosen: Sequence[Layers], parts: Path) -> Trainings:
    """Return the trainings at the places of selectors and at random ones."""
    places = [*chosen, *task.random]
    return Trainings(task.model, task.parts, task.config.settings, places, parts)


def again(config: Config, chosen: Sequence[Layers], parts: Path) -> Trainings:
    """Return the same in a process of its own."""
    return trainings_of(prepare(config), chosen, parts)


def train(task: Task, trainings: Trainings, chosen: Sequence[Layers]) -> list[dict[str, Any]]:
    """Train what is missing, in as many processes as are asked for; return a row per training."""
    config, jobs = task.config, task.config.recipe.jobs
    seconds = math.inf if config.place.minutes is None else 60 * config.place.minutes
    with bar("trainings", trainings.total, config.run.quiet) as advance:
        if jobs == 1:
            return trainings.run(advance, chosen, seconds)
        make = partial(again, config, chosen, trainings.parts)
        codes = train_side_by_side(make, jobs, trainings.parts, advance, chosen, seconds)
    if lost := [code for code in codes if code not in (0, 2)]:
        task.notes.append(
            f"{len(lost)} of {jobs} processes ended early (exit code {lost[0]}); this one went on alone"
        )
        return trainings.run(must=chosen, seconds=seconds)
    late = math.inf if seconds == math.inf else 0.0  # the processes have trained what was in time
    return trainings.run(must=chosen, seconds=late)


def key(task: Task) -> str:
    """Return the name of the folder of trainings that this run can share: what they all depend on."""
    s, parts = task.config.settings, task.parts
    return fingerprint(
        {
            "model": task.model.sha256,
            "dtype": str(task.model.dtype),
            "rows": [content_hash(rows) for rows in parts.given],
            "seed": s.seed,
            "position": s.position,
            "rank": s.rank,
            "template": s.template.text,
            "labels": [word for _, word in s.verbalizer.words],
            "separator": s.verbalizer.separator,
        }
    )[:16]


def rank(task: Task) -> list[SiteRanking]:
    """Return the ranking of every selector that can rank; the others add a warning to `task.notes`.

    Raises:
        ConfigError: none of them can.
    """
    rankings, left_out = [], []
    with bar("selectors", len(task.config.selectors), task.config.run.quiet) as advance:
        for name in task.config.selectors:
            try:
                ranking = selector(name)(task.evidence)
                ranking.top_layers(task.config.place.width)
                rankings.append(ranking)
            except (ConfigError, DataError) as error:
                left_out.append(f"the selector {name} is left out: {error}")
            advance(1)
    if not rankings:
        raise ConfigError(f"no selector is left to compare; {'; '.join(left_out)}")
    task.notes.extend(left_out)
    return rankings


def write_tables(
    task: Task, folder: RunFolder, rankings: Sequence[SiteRanking], rows: pd.DataFrame
) -> pd.DataFrame:
    """Write tables, figures and the report; return a row per selector, edit and budget."""
    compared, places = [], []
    for (edit, budget), part in rows.groupby(["edit", "budget"], sort=False):
        landscape = Landscape.of(part, task.random)
        task.notes.extend(f"{edit}, {budget}: lost at layers {p}" for p in landscape.lost)
        trained = int(landscape.random.sum())
        if trained < len(task.random):
            task.notes.append(
                f"{edit}, {budget}: {trained} of {len(task.random)} random places were trained"
            )
        compared.append(
            compare_selectors(
                rankings,
                task.config.place.width,
                landscape,
                task.config.seed,
                Landscape.of(part, task.random, "accuracy_out") if len(task.out) else None,
            )
        )
        places.append(place_table(landscape))
        for table in (compared[-1], places[-1]):
            table.insert(0, "edit", edit)
            table.insert(1, "budget", budget)
    whole = pd.concat(compared, ignore_index=True)
    tables = {
        "selectors.csv": whole,
        "places.csv": pd.concat(places, ignore_index=True),
        "trainings.csv": rows,
        "rankings.csv": pd.concat([r.to_pandas() for r in rankings], ignore_index=True),
        "agreements.csv": agreement_pairs(rankings),
        "costs.csv": cost_table(rows, task.random),
    }
    for name, table in tables.items():
        folder.write(name, partial(table.to_csv, index=False, float_format="%.6g"))
    matrix = agreement_table(rankings)
    folder.write("agreement.csv", partial(matrix.to_csv, float_format="%.4g"))
    if task.config.run.report:
        draw(task, folder, whole, tables)
        folder.write("report.md", lambda path: write_text(path, report(task, whole)))
    return whole


def draw(
    task: Task, folder: RunFolder, whole: pd.DataFrame, tables: dict[str, pd.DataFrame]
) -> None:
    """Write a figure per edit and budget, and one of the costs where there are several."""
    from ..plots.compare import costs, selectors
    from ..plots.style import save

    for (edit, budget), table in whole.groupby(["edit", "budget"], sort=False):
        note = f"{facts(task)}; {edit} with {budget} (examples x epochs)"
        figure = selectors(table, tables["agreements.csv"], note=note)
        save(figure, folder.path / "figures" / f"selectors_{edit}_{budget}")
    if len(tables["costs.csv"]) > 1:
        save(costs(tables["costs.csv"], note=facts(task)), folder.path / "figures" / "costs")


def facts(task: Task) -> str:
    """Say what was compared, for a figure and a report."""
    c = task.config
    return (
        f"{task.model.name}, {task.train.source}, {len(task.parts.test)} test rows, "
        + (f"{len(task.out)} of other domains, " if len(task.out) else "")
        + f"{c.place.width} layers "
        f"per place, {c.recipe.samples} training samples"
    )


def report(task: Task, whole: pd.DataFrame) -> str:
    """Return the report as Markdown."""
    lines = [
        "# Selectors against random places",
        "",
        f"{facts(task)}. A selector looked at {len(task.evidence.examples)} training examples. The",
        "difference is in points of accuracy from the mean of the random places, with a 95 % t interval over",
        "training samples; p is one-sided, corrected by Holm over the selectors. The share is that of random",
        "places that are at most as accurate.",
    ]
    for (edit, budget), table in whole.groupby(["edit", "budget"], sort=False):
        lines += [
            "",
            f"## {edit}, {budget}",
            "",
            "| selector | layers | accuracy | difference | p | share | regret | rho (p) |"
            + (" other domains | difference |" if len(task.out) else ""),
            "|---" * (10 if len(task.out) else 8) + "|",
        ]
        for r in table.itertuples(index=False):
            lines.append(
                f"| {r.selector} | {r.layers} | {100 * r.accuracy:.1f} | {100 * r.difference:+.1f} "
                f"[{100 * r.low:.1f}, {100 * r.high:.1f}] | {r.p_adjusted:.3f} | {r.share:.2f} | "
                f"{100 * r.regret:.1f} | {r.rho:.2f} ({r.p_rho:.3f}) |"
                + (elsewhere(r) if len(task.out) else "")
            )
    if task.notes:
        lines += ["", "## Warnings", "", *(f"- {note}" for note in task.notes)]
    return "\n".join([*lines, ""])


def elsewhere(row: Any) -> str:
    """Return the cells of a report's row that are about rows of other domains."""
    return (
        f" {100 * row.accuracy_out:.1f} | {100 * row.difference_out:+.1f} "
        f"[{100 * row.low_out:.1f}, {100 * row.high_out:.1f}] |"
    )


def record_of(task: Task, rankings: Sequence[SiteRanking], rows: pd.DataFrame) -> dict[str, Any]:
    """Return what run.json says of a comparison."""
    model = task.model
    return {
        "command": "compare",
        "model": {
            "name": model.name,
            "sha256": model.sha256,
            "parameters": model.n_parameters,
            "device": str(model.device),
        },
        "adapter": task.adapter,
        "data": task.train.account(),
        "test_data": task.tests.account(),
        "out_of_domain": task.out.account() if len(task.out) else None,
        "selectors": {
            r.selector: {
                "layers": list(r.top_layers(task.config.place.width)),
                "layer_scores": r.layer_scores.tolist(),
                "pool": r.pool,
                **r.about,
            }
            for r in rankings
        },
        "random_places": [list(p) for p in task.random],
        "trainings": len(rows),
        "warnings": task.notes,
    }


def show(compared: pd.DataFrame) -> None:
    """Print the comparison, a row per selector, edit and budget."""
    from .tables import print_table

    names = [
        "selector",
        "edit",
        "budget",
        "layers",
        "accuracy",
        "difference",
        "interval",
        "p",
        "share",
    ]
    rows = [
        [
            r.selector,
            r.edit,
            r.budget,
            r.layers,
            f"{100 * r.accuracy:.1f}",
            f"{100 * r.difference:+.1f}",
            f"[{100 * r.low:.1f}, {100 * r.high:.1f}]",
            f"{r.p_adjusted:.3f}",
            f"{r.share:.2f}",
        ]
        for r in compared.itertuples(index=False)
    ]
    print_table(names, rows, "Selectors against random places, in points of accuracy")


def conclusion(compared: pd.DataFrame) -> str:
    """Say in one line what came out."""
    better = compared[(compared["p_adjusted"] < 0.05) & (compared["difference"] > 0)]
    if better.empty:
        return "No selector's place is better than random places after correction."
    names = ", ".join(dict.fromkeys(better["selector"]))
    return f"Better than random places after correction: {names}."


def _read(source: str, config: Config, limit: int | None) -> Examples:
    examples = config.reading.read(source, limit)
    tell_left_out(examples)
    return examples


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command(Config, main, "mech_absa.compare", argv)
