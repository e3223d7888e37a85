"""Run `mech-absa evaluate`, or `python -m mech_absa.evaluate`: score edits and other systems'
answers.

    mech-absa evaluate --edit none bundled --data builtin:restaurant/test builtin:device/test
    mech-absa evaluate --edit runs/seed0 runs/seed1 --data test.xml --train-data train.xml
    mech-absa evaluate --predictions gpt.csv --data test.jsonl

Several edits are scored one by one, and those that differ only in their seed also together. The run
writes `scores.csv`, `predictions.parquet`, `run.json` and `report.html`; with `--compare` also
`comparisons.csv`, with several seeds `aggregate.csv`, with `--side-effects` `side_effects.json`,
with `--scorecard` `scorecard.csv` and `scorecard.json` too, with `--fairness` `fairness.csv` and `fairness.json`, and with `--baselines` `baselines.csv`.
Everything is computed before the first of them is written.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from ..edits.record import Trained
from ..errors import ConfigError
from ..evaluate.caveats import caveats
from ..evaluate.predictions import Decode, Predictions, asked_with, predict, read_predictions
from ..evaluate.scores import Scores, aggregate, compare, score
from ..examples import Example, Examples
from ..model import Model, load_model
from ..prompts import PromptTemplate, Verbalizer
from ..records import RunFolder, plain, sha256_file, write_json
from ..scoring import Applicable
from .cli import command, out_folder, readable, report, tell_left_out, warn, warn_of_crowd
from .flags import (
    FREE,
    IntervalFlags,
    LimitFlags,
    ModelFlags,
    OptionalPath,
    OptionalPaths,
    OptionalSources,
    OptionalText,
    QuestionFlags,
    ReadFlags,
    RunFlags,
    Sources,
    at_least,
    recorded,
)


@dataclass(frozen=True)
class ScoringFlags:
    """Say how systems answer, and what is measured beside their answers."""

    decode: Decode = "label"
    """label scores the label words; generate writes freely and compares what was written."""
    train_data: OptionalSources = ()
    """What the edits were trained on, to also score without test rows that stand there."""
    baselines: bool = True
    """Also score simple baselines, for built-in data (with its own train file) or with --train-data."""
    side_effects: bool = False
    """Also measure what each edit changes elsewhere."""
    scorecard: bool = False
    """Measure the same, and put the main numbers of all edits into one table with intervals. The first of --data is their own domain."""
    fairness: bool = False
    """Also measure gaps between classes and between groups of swapped terms, and drift from the base, a row per edit."""
    texts: OptionalPath = None
    """For --side-effects and --scorecard: a text file of unrelated passages, separated by blank lines."""
    batch_size: int = 32
    """Prompts per forward pass."""

    @property
    def elsewhere(self) -> bool:
        """Return whether it is measured what each edit changes elsewhere."""
        return self.side_effects or self.scorecard


@dataclass(frozen=True)
class Config:
    """Score edits, and what other systems predicted, on aspect-sentiment data.

    Examples:
      mech-absa evaluate --edit none runs/edit --compare none --data builtin:restaurant/test
      mech-absa evaluate --edit runs/edit --data test.xml --train-data train.xml --side-effects
      mech-absa evaluate --predictions gpt.csv --data test.jsonl
    """

    data: Sources
    """Test files, or built-in ones such as builtin:restaurant/test; each is scored on its own."""
    edit: OptionalSources = ()
    """Folders of edits; none for the unedited model, bundled for the shipped one, bundled-v2 for the one of the harder reviews. Default: none."""
    predictions: OptionalPaths = ()
    """Answers of another system: one file per test file, in the same order."""
    compare: OptionalText = None
    """Compare every system with this edit (a folder, none or bundled) on the same rows."""
    seed: int = 0
    """Seed of the bootstrap and of --limit."""
    limits: Annotated[OmitArgPrefixes[LimitFlags], arg(name="data")] = field(
        default_factory=LimitFlags
    )
    scoring: OmitArgPrefixes[ScoringFlags] = field(default_factory=ScoringFlags)
    intervals: Annotated[OmitArgPrefixes[IntervalFlags], arg(name="statistics")] = field(
        default_factory=IntervalFlags
    )
    reading: OmitArgPrefixes[ReadFlags] = field(default_factory=ReadFlags)
    question: OmitArgPrefixes[QuestionFlags] = field(default_factory=QuestionFlags)
    model: OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)
    run: OmitArgPrefixes[RunFlags] = field(default_factory=RunFlags)

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("--data names no file; at least one test file is needed")
        if self.predictions and len(self.predictions) != len(self.data):
            raise ConfigError(
                f"--predictions names {len(self.predictions)} files for {len(self.data)} of --data; one each is needed"
            )
        wanted = [f for f in ("side_effects", "scorecard", "fairness") if getattr(self.scoring, f)]
        if wanted and not any(e != "none" for e in self.edit):
            flag = wanted[0].replace("_", "-")
            raise ConfigError(f"--{flag} was given without an edit; name one with --edit")
        if self.scoring.texts is not None and not self.scoring.elsewhere:
            raise ConfigError(
                "--texts was given without --side-effects or --scorecard, which alone read it"
            )
        at_least(1, batch_size=self.scoring.batch_size)
        self.limits.check()
        self.intervals.check()
        for name, values in (("--data", self.data), ("--edit", self.edit)):
            if repeated := next((v for v in values if values.count(v) > 1), None):
                raise ConfigError(f"{name} names {repeated} more than once")
        self.reading.check()
        self.question.check()

    @property
    def edits(self) -> tuple[str, ...]:
        """Return what is loaded and scored: the unedited model by default."""
        return self.edit or (() if self.predictions else ("none",))

    @property
    def sure(self) -> dict[str, Any]:
        """Return how intervals are made."""
        return {"level": self.intervals.level, "draws": self.intervals.draws, "seed": self.seed}


@dataclass(frozen=True, eq=False)
class Task:
    """Hold what an evaluation uses: everything that is loaded and checked before the first score.

    Attributes:
        config: the flags.
        data, train: test and training examples.
        whole: the test examples before those that the model cannot read were left out; files of
            answers answer all of them.
        model: None where only predictions of others are scored.
        edits: in the order of the flags; None is the model as it is.
        template, verbalizer: the question that is asked.
        texts: unrelated passages.
    """

    config: Config
    data: list[Examples]
    train: list[Examples]
    whole: list[Examples]
    model: Model | None
    edits: list[Applicable | None]
    template: PromptTemplate
    verbalizer: Verbalizer
    texts: Sequence[str]

    @property
    def seen(self) -> list[Example] | None:
        """Return the training examples; None if none are known."""
        return [e for t in self.train for e in t] if self.train else None

    def answers(self, edit: Applicable | None, name: str) -> tuple[Predictions, ...]:
        """Return what the model answers with an edit, on every test file."""
        assert self.model is not None
        asked: dict[str, Any] = {
            "template": self.template,
            "verbalizer": self.verbalizer,
            "decode": self.config.scoring.decode,
            "batch_size": self.config.scoring.batch_size,
        }
        return tuple(predict(self.model, d, edit, name=name, **asked) for d in self.data)


@dataclass(eq=False)
class Results:
    """Hold what an evaluation found, one list per system or comparison."""

    scores: list[list[Scores]]
    comparisons: list[Any]
    aggregates: list[Any]
    effects: dict[str, Any]
    beside: list[Scores]
    fairness: list[Any]
    cards: list[Any]


def load(name: str, model: Model) -> Applicable | None:
    """Return the edit of a name or a folder; None for `none`."""
    if name == "none":
        return None
    from ..edits import load_edit

    return load_edit(name, model)


def names(edits: Sequence[str]) -> list[str]:
    """Return short names for tables: the folder's own name if no other has it."""
    short = [e if e in ("none", "bundled") else Path(e).name or e for e in edits]
    return [s if short.count(s) == 1 else e for s, e in zip(short, edits, strict=True)]


def main(config: Config) -> Path:
    """Score, and write the folder.

    Raises:
        MechAbsaError: an input is not accepted; nothing has been written then.
    """
    data = [_read(d, config, config.limits.limit) for d in config.data]
    train = [_read(d, config, None) for d in config.scoring.train_data]
    folder = RunFolder(
        out_folder(config, "evaluate"),
        recorded(config),
        config.run.resume,
        (*FREE, "batch_size", "strict"),
    )
    task = prepare(config, data, train)
    folder.bind(
        {
            "data": [d.sha256 for d in data],
            "train_data": [d.sha256 for d in train],
            "model": None if task.model is None else task.model.sha256,
        }
    )
    if folder.finished:
        print(f"{folder.path} already holds this run, whole; nothing to do")
        return folder.path
    folder.open()
    warn_of_crowd(config.run.quiet)
    results = evaluate_all(task)
    notes = [
        *caveats(task.seen, task.data),
        *(trained_on(config.edits, task.data) if task.seen is None else ()),
    ]
    _write(folder, results)
    folder.finish(record_of(task, results, notes), report(config))
    if not config.run.quiet:
        warn(notes)
        show(results)
        print(f"written to {folder.path}\n{conclusion(results)}")
    return folder.path


def prepare(config: Config, data: list[Examples], train: list[Examples]) -> Task:
    """Load the model and the edits, and settle the question.

    Raises:
        MechAbsaError: an input is not accepted.
    """
    from ..evaluate import side_effects

    m = config.model
    needed = bool(config.edits or config.compare)
    model = (
        load_model(m.model, device=m.device, dtype=m.dtype, backend=m.backend) if needed else None
    )
    edits = [load(e, model) for e in config.edits] if model is not None else []
    own = {asked_with(e) for e in edits if e is not None} or {asked_with(None)}
    if (len({t for t, _ in own}) > 1 and config.question.template is None) or (
        len({v for _, v in own}) > 1 and not config.question.labels
    ):
        raise ConfigError(
            "--edit names edits that were trained with different questions or labels; give --template and --labels"
        )
    template, verbalizer = next(iter(own))
    if config.question.template is not None:
        template = config.question.prompt
    if config.question.labels:
        verbalizer = config.question.verbalizer
    whole = data
    if model is not None:
        data, train = asked_of(config, model, (template, verbalizer), data, train)
    given = config.scoring.texts
    texts = side_effects.read_texts(given) if given else side_effects.PASSAGES
    return Task(config, data, train, whole, model, edits, template, verbalizer, texts)


def asked_of(
    config: Config,
    model: Model,
    asked: tuple[PromptTemplate, Verbalizer],
    data: list[Examples],
    train: list[Examples],
) -> tuple[list[Examples], list[Examples]]:
    """Return the test and training examples that the model can read in every wording it is asked in."""
    from ..evaluate import baselines, scorecard, side_effects

    wordings: list[str] = []
    if config.scoring.elsewhere:
        wordings += [*side_effects.PARAPHRASES, *side_effects.NEAR]
    if config.scoring.scorecard:
        wordings += [text for text, _ in scorecard.IMPLIED]
    reworded = config.scoring.baselines and "none" in config.edits
    if reworded:
        wordings += baselines.WORDINGS
    keep = partial(
        readable,
        config,
        model,
        templates=[asked[0], *map(PromptTemplate, wordings)],
        verbalizer=asked[1],
        answers=config.scoring.decode == "generate",
    )
    # Without the best wording, nobody asks the model about training examples.
    return [keep(d) for d in data], [keep(t) for t in train] if reworded else train


def evaluate_all(task: Task) -> Results:
    """Return all scores, comparisons, means over seeds and side effects."""
    config, edits = task.config, task.edits
    systems: list[tuple[Predictions, ...]] = []
    if config.predictions:
        systems.append(tuple(others_answers(task)))
    titles = names(config.edits)
    systems += [task.answers(edit, name) for edit, name in zip(edits, titles, strict=True)]
    scores = [[score(p, train=task.seen, **config.sure) for p in system] for system in systems]
    of_edits = scores[len(scores) - len(edits) :]
    aggregates = []
    for group in seeds_of_one(edits):
        name = f"{of_edits[group[0]][0].name} and {len(group) - 1} more"
        aggregates += [
            aggregate([of_edits[j][i] for j in group], name, **config.sure)
            for i in range(len(task.data))
        ]
    effects = side_effects_of(task, titles)
    return Results(
        scores,
        compare_all(task, systems),
        aggregates,
        effects,
        baselines_of(task),
        fairness_of(task, titles),
        scorecards_of(task, titles, effects),
    )


def others_answers(task: Task) -> Iterator[Predictions]:
    """Yield what another system answered to the examples of each test file that are scored."""
    name = task.config.predictions[0].stem
    for path, whole, kept in zip(task.config.predictions, task.whole, task.data, strict=True):
        scored = {id(e) for e in kept}
        answers = read_predictions(path, whole, name)
        yield answers.take([i for i, e in enumerate(whole) if id(e) in scored])


def baselines_of(task: Task) -> list[Scores]:
    """Return the scores of simple baselines on every test file, if they are wanted."""
    from ..evaluate import baselines

    if not task.config.scoring.baselines:
        return []
    unedited = task.model if "none" in task.config.edits else None
    beside: list[Scores] = baselines.beside(
        task.data, task.seen, model=unedited, **task.config.sure
    )
    return beside


def compare_all(task: Task, systems: list[tuple[Predictions, ...]]) -> list[Any]:
    """Return every system against the edit of --compare, on the same rows."""
    config = task.config
    if config.compare is None or task.model is None:
        return []
    held = dict(zip(config.edits, systems[len(systems) - len(task.edits) :], strict=True))
    other = held.get(config.compare) or task.answers(
        load(config.compare, task.model), names([config.compare])[0]
    )
    return [
        compare(p, q, level=config.intervals.level, seed=config.seed)
        for system in systems
        if system is not other
        for p, q in zip(system, other, strict=True)
    ]


def side_effects_of(task: Task, titles: Sequence[str]) -> dict[str, Any]:
    """Return what each edit changes elsewhere, if that is wanted."""
    from ..evaluate import side_effects

    if not task.config.scoring.elsewhere or task.model is None:
        return {}
    return {
        name: side_effects.side_effects(
            task.model, edit, task.data[0], others=task.data[1:], texts=task.texts, template=task.template, verbalizer=task.verbalizer,
            batch_size=task.config.scoring.batch_size, name=name, **task.config.sure,
        )
        for edit, name in zip(task.edits, titles, strict=True)
        if edit is not None
    }  # fmt: skip


def scorecards_of(task: Task, titles: Sequence[str], effects: dict[str, Any]) -> list[Any]:
    """Return the scorecard of each edit, if they are wanted."""
    from ..evaluate.scorecard import scorecard

    if not task.config.scoring.scorecard or task.model is None:
        return []
    return [
        scorecard(
            task.model, edit, effects[name], task.data[0],
            batch_size=task.config.scoring.batch_size, **task.config.sure,
        )
        for edit, name in zip(task.edits, titles, strict=True)
        if edit is not None
    ]  # fmt: skip


def fairness_of(task: Task, titles: Sequence[str]) -> list[Any]:
    """Return the gaps and the drift of each edit on the first test file, if they are wanted."""
    from ..evaluate.fairness import fairness

    if not task.config.scoring.fairness or task.model is None:
        return []
    known: dict[str, Any] = {}
    return [
        fairness(
            task.model, edit, task.data[0], template=task.template, verbalizer=task.verbalizer,
            batch_size=task.config.scoring.batch_size, name=name, known=known, **task.config.sure,
        )
        for edit, name in zip(task.edits, titles, strict=True)
        if edit is not None
    ]  # fmt: skip


def record_of(task: Task, results: Results, notes: list[str]) -> dict[str, Any]:
    """Return what run.json says of an evaluation."""
    model = task.model
    known = (
        {"name": model.name, "sha256": model.sha256, "parameters": model.n_parameters}
        if model
        else None
    )
    return {
        "command": "evaluate",
        "model": known,
        "device": None if model is None else str(model.device),
        "template": task.template.text,
        "labels": [w for _, w in task.verbalizer.words],
        "data": [d.account() for d in task.data],
        "train": [d.account() for d in task.train],
        "warnings": notes,
        "predictions": [
            {"file": str(p), "sha256": sha256_file(p)} for p in task.config.predictions
        ],
        "scores": [
            {"system": s.name, "data": s.data, "leaked": s.leaked} | _scores_record(s)
            for system in results.scores
            for s in system
        ],
        "baselines": [
            {"system": s.name, "data": s.data} | _scores_record(s) for s in results.beside
        ],
    }


def seeds_of_one(edits: Sequence[Applicable | None]) -> list[list[int]]:
    """Return groups of edits that are one method with several seeds: the same parts, trained in the
    same way.
    """
    like: dict[str, list[int]] = {}
    for i, e in enumerate(edits):
        if isinstance(e, Trained):
            key = json.dumps([plain(e.parts), plain(e.record.preset)], sort_keys=True)
            like.setdefault(key, []).append(i)
    return [group for group in like.values() if len(group) > 1]


def trained_on(edits: Sequence[str], data: Sequence[Examples]) -> list[str]:
    """Name the test files that an edit was trained on, byte for byte, by the run record beside the
    edit.
    """
    notes = []
    for name in edits:
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            record = json.loads((Path(name) / "run.json").read_text(encoding="utf-8"))
            known = {d.get("sha256") for d in record.get("data", [])}
            notes += [
                f"{name} was trained on this very file, {d.source} ({len(d)} rows): a score on it says little"
                for d in data
                if d.sha256 in known
            ]
    return notes


def _scores_record(s: Scores) -> dict[str, Any]:
    return {name: q.row() | {"confusion": q.confusion.tolist()} for name, q in s.subsets.items()}


def _write(folder: RunFolder, results: Results) -> None:
    import pandas as pd

    from ..evaluate.scorecard import record as card_record

    scores, effects = results.scores, results.effects
    table = pd.concat([s.to_pandas() for system in scores for s in system], ignore_index=True)
    folder.write("scores.csv", partial(table.to_csv, index=False))
    rows = pd.concat(
        [s.predictions.to_pandas() for system in scores for s in system], ignore_index=True
    )
    folder.write("predictions.parquet", partial(rows.to_parquet, index=False))
    for name, parts in (
        ("comparisons.csv", results.comparisons),
        ("aggregate.csv", results.aggregates),
    ):
        if parts:
            folder.write(name, partial(pd.DataFrame([p.row() for p in parts]).to_csv, index=False))
    if results.beside:
        table = pd.concat([s.to_pandas() for s in results.beside], ignore_index=True)
        folder.write("baselines.csv", partial(table.to_csv, index=False))
    if results.cards:
        table = pd.DataFrame([c.row() for c in results.cards])
        folder.write("scorecard.csv", partial(table.to_csv, index=False))
        write_json(folder.path / "scorecard.json", card_record(results.cards))
    if fair := results.fairness:
        table = pd.DataFrame([f.row() for f in fair])
        folder.write("fairness.csv", partial(table.to_csv, index=False))
        write_json(folder.path / "fairness.json", {f.name: _with_summary(f) for f in fair})
    if effects:
        write_json(
            folder.path / "side_effects.json", {n: _with_summary(e) for n, e in effects.items()}
        )


def _with_summary(found: Any) -> dict[str, Any]:
    """Return a record and, for reports, its table for reading."""
    table = found.summary().rename(columns={"": "note"})
    record: dict[str, Any] = found.record() | {"summary": table.to_dict("records")}
    return record


def show(results: Results) -> None:
    """Print scores, comparisons, means over seeds and side effects."""
    import pandas as pd

    from .tables import print_frame

    frames = [s.summary() for system in results.scores for s in system]
    print_frame(pd.concat(frames, ignore_index=True), "Scores")
    for c in results.comparisons:
        d = c.difference
        print(
            f"{c.first} - {c.second} on {c.data}: {100 * d.value:+.1f} points of accuracy [{100 * d.low:+.1f}, {100 * d.high:+.1f}] "
            f"by sentence, p {d.p:.2g}; McNemar {c.mcnemar.b} : {c.mcnemar.c}, p {c.mcnemar.p:.2g}"
        )
    for a in results.aggregates:
        print(
            f"{a.name} on {a.data}: accuracy {100 * a.accuracy.mean:.1f}, sd {100 * a.accuracy.sd:.1f} between them; "
            f"macro-F1 {100 * a.macro_f1.mean:.1f}, sd {100 * a.macro_f1.sd:.1f}"
        )
    for e in results.effects.values():
        print_frame(e.summary(), f"Side effects of {e.name}")
    if results.cards:
        from ..evaluate.scorecard import table

        print_frame(table(results.cards), "Scorecard")
    for f in results.fairness:
        print_frame(f.summary(), f"Classes, groups and drift of {f.name}")
    if results.beside:
        frames = [s.summary() for s in results.beside]
        print_frame(pd.concat(frames, ignore_index=True), "Baselines")


def conclusion(results: Results) -> str:
    """Say in one line which system is best, and whether the comparison is clear."""
    best = max((s for system in results.scores for s in system), key=lambda s: s.all.accuracy.value)
    line = f"Best: {best.name} with {best.all.accuracy.value:.1%} on {best.data} (majority {best.all.majority:.1%})."
    if results.comparisons:
        c = results.comparisons[0]
        clear = (
            "differ" if c.difference.low > 0 or c.difference.high < 0 else "do not differ clearly"
        )
        line += f" {c.first} and {c.second} {clear} on {c.data}."
    return line


def _read(source: str, config: Config, limit: int | None) -> Examples:
    examples = config.reading.read(source, limit, config.seed, config.limits.head)
    tell_left_out(examples)
    return examples


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command(Config, main, "mech_absa.evaluate", argv)
