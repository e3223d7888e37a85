"""`python -m mech_absa.evaluate`: score edits, and what other systems predicted, on any number of test files.

    python -m mech_absa.evaluate --edit none bundled --data builtin:restaurant/test builtin:device/test --out runs/z
    python -m mech_absa.evaluate --edit runs/seed0 runs/seed1 runs/seed2 --data test.xml --train-data train.xml --side-effects
    python -m mech_absa.evaluate --predictions gpt.csv --data test.jsonl

Several edits are scored one by one, and those that differ by their seed alone together as well. The run leaves `scores.csv`,
`predictions.parquet`, `run.json` and `report.html`; with `--compare` also `comparisons.csv`, with several seeds `aggregate.csv`, with
`--side-effects` `side_effects.json`, and with `--baselines` `baselines.csv`.
Everything is computed before the first file is written.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..edits.record import Trained
from ..errors import ConfigError
from ..evaluate.caveats import caveats
from ..evaluate.predictions import Decode, Predictions, asked_with, predict, read_predictions
from ..evaluate.scores import Scores, aggregate, compare, score
from ..examples import Examples
from ..model import Model, load_model
from ..prompts import PromptTemplate, Verbalizer
from ..readers import load_examples
from ..records import RunFolder, plain, sha256_file, write_json
from ..scoring import Applicable
from .cli import command, reading, report, tell_left_out

FREE = ("device", "batch_size", "report", "out")
"""Settings that do not change a result."""


@dataclass(frozen=True)
class Config:
    """Score edits, and what other systems predicted, on aspect-sentiment data."""

    data: tuple[str, ...]
    """Test files, or built-in ones such as builtin:restaurant/test."""
    edit: tuple[str, ...] = ()
    """Folders of edits; none is the model as it is, bundled the adaptation that ships with it. Default: none."""
    model: str = "bundled"
    """bundled, a local Hugging Face folder, or a hub name."""
    train_data: tuple[str, ...] = ()
    """What the edits were trained on: test rows that stand there are counted, and scores are given without them too."""
    predictions: tuple[Path, ...] = ()
    """What another system answered: one file a test file, in the same order."""
    compare: str | None = None
    """Compare every system with this edit (a folder, none or bundled) on the same rows."""
    side_effects: bool = False
    """Also measure what each edit changes elsewhere."""
    baselines: bool = True
    """Also score simple baselines, for built-in data (with its own train file) or with --train-data."""
    texts: Path | None = None
    """A text file of unrelated passages, separated by blank lines, for --side-effects; some are built in."""
    decode: Decode = "label"
    """label scores the label strings; generate writes freely and compares what was written."""
    template: str | None = None
    """The question, with {sentence} and {aspect}. Default: what the edits were trained with, or else the paper's."""
    labels: tuple[str, ...] = ()
    """The label strings for positive, negative and neutral. Default: as for the question."""
    separator: str = " "
    """Between the question and the labels given with --labels."""
    limit: int | None = None
    """At most so many examples of each test file."""
    columns: tuple[str, ...] = ()
    """Names of columns or fields that are not recognised, such as aspect=Term polarity=Rating."""
    meaning: tuple[str, ...] = ()
    """What labels of the data mean that are not words, such as 0=negative 1=neutral 2=positive."""
    skip_bad: bool = False
    """Leave out records that cannot be read, and count them."""
    level: float = 0.95
    """Of the intervals."""
    draws: int = 1000
    """Bootstrap draws."""
    seed: int = 0
    """Of the bootstrap."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    dtype: str = "float32"
    """float32, bfloat16, float16 or float64."""
    batch_size: int = 32
    """Prompts a forward pass."""
    report: bool = True
    """Write report.html."""
    out: Path | None = None
    """A new or empty folder; runs/evaluate-<time> by default."""

    def __post_init__(self):
        if not self.data:
            raise ConfigError("--data names no file; at least one test file is needed")
        if self.predictions and len(self.predictions) != len(self.data):
            raise ConfigError(
                f"--predictions names {len(self.predictions)} files for {len(self.data)} of --data; one each is needed"
            )
        if self.labels and len(self.labels) not in (2, 3):
            raise ConfigError(
                f"--labels gives {len(self.labels)} words; those for positive, negative and neutral are needed"
            )
        if self.side_effects and not any(e != "none" for e in self.edit):
            raise ConfigError("--side-effects was given without an edit; name one with --edit")
        if self.texts is not None and not self.side_effects:
            raise ConfigError("--texts was given without --side-effects, which alone reads it")
        for name, value, least in (
            ("batch-size", self.batch_size, 1),
            ("draws", self.draws, 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ConfigError(f"--{name} is {value}; accepted: {least} or more")
        for name, values in (("--data", self.data), ("--edit", self.edit)):
            if repeated := next((v for v in values if values.count(v) > 1), None):
                raise ConfigError(f"{name} names {repeated} more than once")

    @property
    def edits(self) -> tuple[str, ...]:
        """What is loaded and scored: the model as it is, where nothing else was asked for."""
        return self.edit or (() if self.predictions else ("none",))


def load(name: str, model: Model) -> Applicable | None:
    """The edit of a name or a folder; None for `none`."""
    if name == "none":
        return None
    from ..edits import load_edit

    return load_edit(name, model)


def names(edits: Sequence[str]) -> list[str]:
    """Short names for tables: the folder's own name where that tells them apart."""
    short = ["base" if e == "none" else e if e == "bundled" else Path(e).name or e for e in edits]
    return [s if short.count(s) == 1 else e for s, e in zip(short, edits, strict=True)]


def run(config: Config) -> Path:
    """Everything the command does; the folder it wrote."""
    import pandas as pd

    from ..evaluate import baselines, side_effects

    out = config.out or Path("runs") / f"evaluate-{time.strftime('%Y%m%d-%H%M%S')}"
    data = [load_examples(d, limit=config.limit, **reading(config)) for d in config.data]
    train = [load_examples(d, **reading(config)) for d in config.train_data]
    for d in [*data, *train]:
        tell_left_out(d)
    folder = RunFolder(out, asdict(config), free=FREE)
    folder.bind({"data": [d.sha256 for d in data], "train_data": [d.sha256 for d in train]})
    given = PromptTemplate(config.template) if config.template is not None else None
    words = Verbalizer.of(config.labels, config.separator) if config.labels else None
    texts = side_effects.read_texts(config.texts) if config.texts else side_effects.PASSAGES

    systems: list[tuple[Predictions, ...]] = []
    if config.predictions:
        name = config.predictions[0].stem
        systems.append(
            tuple(
                read_predictions(p, d, name) for p, d in zip(config.predictions, data, strict=True)
            )
        )
    model = (
        load_model(config.model, device=config.device, dtype=config.dtype)
        if config.edits or config.compare
        else None
    )

    edits = [load(e, model) for e in config.edits] if model is not None else []
    own = {asked_with(e) for e in edits if e is not None} or {asked_with(None)}
    if (len({t for t, _ in own}) > 1 and given is None) or (
        len({v for _, v in own}) > 1 and words is None
    ):
        raise ConfigError(
            "--edit names edits that were trained with different questions or labels; give --template and --labels"
        )
    template, verbalizer = given or next(iter(own))[0], words or next(iter(own))[1]

    def answers(edit: Applicable | None, name: str) -> tuple[Predictions, ...]:
        assert model is not None
        asked: dict[str, Any] = {
            "template": template,
            "verbalizer": verbalizer,
            "decode": config.decode,
            "batch_size": config.batch_size,
        }
        return tuple(predict(model, d, edit, name=name, **asked) for d in data)

    systems += [answers(edit, name) for edit, name in zip(edits, names(config.edits), strict=True)]
    seen = [e for t in train for e in t] if train else None
    notes = [*caveats(seen, data), *(trained_on(config.edits, data) if seen is None else ())]
    how: dict[str, Any] = {"level": config.level, "draws": config.draws, "seed": config.seed}
    scores = [[score(p, train=seen, **how) for p in system] for system in systems]
    comparisons, aggregates, effects = [], [], {}
    if config.compare is not None and model is not None:
        held = dict(zip(config.edits, systems[len(systems) - len(edits) :], strict=True))
        other = held.get(config.compare) or answers(
            load(config.compare, model), names([config.compare])[0]
        )
        comparisons = [
            compare(p, q, level=config.level, seed=config.seed)
            for system in systems
            if system is not other
            for p, q in zip(system, other, strict=True)
        ]
    of_edits = scores[len(scores) - len(edits) :]
    for group in seeds_of_one(edits):
        name = f"{of_edits[group[0]][0].name} and {len(group) - 1} more"
        aggregates += [
            aggregate([of_edits[j][i] for j in group], name, **how) for i in range(len(data))
        ]
    if config.side_effects and model is not None:
        for edit, name in zip(edits, names(config.edits), strict=True):
            if edit is not None:
                effects[name] = side_effects.side_effects(
                    model, edit, data[0], others=data[1:], texts=texts, template=template, verbalizer=verbalizer,
                    batch_size=config.batch_size, name=name, **how,
                )  # fmt: skip

    beside: list[Scores] = []
    if config.baselines:
        unedited = model if "none" in config.edits else None
        beside = baselines.beside(data, seen, model=unedited, **how)

    folder.open()
    _write(folder, scores, comparisons, aggregates, effects)
    if beside:
        table = pd.concat([s.to_pandas() for s in beside], ignore_index=True)
        folder.write("baselines.csv", partial(table.to_csv, index=False))
    folder.finish(
        {
            "command": "evaluate",
            "model": None
            if model is None
            else {"name": model.name, "sha256": model.sha256, "parameters": model.n_parameters},
            "device": None if model is None else str(model.device),
            "template": template.text,
            "labels": [w for _, w in verbalizer.words],
            "data": [d.account() for d in data],
            "train": [d.account() for d in train],
            "warnings": notes,
            "predictions": [{"file": str(p), "sha256": sha256_file(p)} for p in config.predictions],
            "scores": [
                {"system": s.name, "data": s.data, "leaked": s.leaked} | _scores_record(s)
                for system in scores
                for s in system
            ],
            "baselines": [
                {"system": s.name, "data": s.data} | _scores_record(s) for s in beside
            ],
        },
        report(config),
    )
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    _show(scores, comparisons, aggregates, effects)
    if beside:
        show(pd.concat([s.summary() for s in beside], ignore_index=True), "Baselines")
    return folder.path


def seeds_of_one(edits: Sequence[Applicable | None]) -> list[list[int]]:
    """Which edits are one method with several seeds: the same parts, trained in the same way; edits without a like are left out."""
    like: dict[str, list[int]] = {}
    for i, e in enumerate(edits):
        if isinstance(e, Trained):
            key = json.dumps([plain(e.parts), plain(e.record.preset)], sort_keys=True)
            like.setdefault(key, []).append(i)
    return [group for group in like.values() if len(group) > 1]


def trained_on(edits: Sequence[str], data: Sequence[Examples]) -> list[str]:
    """Which test files are, to the byte, files that an edit was trained on, by the run record that lies beside the edit."""
    said = []
    for name in edits:
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            record = json.loads((Path(name) / "run.json").read_text(encoding="utf-8"))
            known = {d.get("sha256") for d in record.get("data", [])}
            said += [
                f"{name} was trained on this very file, {d.source} ({len(d)} rows): a score on it says little"
                for d in data
                if d.sha256 in known
            ]
    return said


def _scores_record(s: Scores) -> dict[str, Any]:
    return {name: q.row() | {"confusion": q.confusion.tolist()} for name, q in s.subsets.items()}


def _write(
    folder: RunFolder,
    scores: list[list[Scores]],
    comparisons: list,
    aggregates: list,
    effects: dict,
) -> None:
    import pandas as pd

    table = pd.concat([s.to_pandas() for system in scores for s in system], ignore_index=True)
    folder.write("scores.csv", partial(table.to_csv, index=False))
    rows = pd.concat(
        [s.predictions.to_pandas() for system in scores for s in system], ignore_index=True
    )
    folder.write("predictions.parquet", partial(rows.to_parquet, index=False))
    for name, parts in (("comparisons.csv", comparisons), ("aggregate.csv", aggregates)):
        if parts:
            folder.write(name, partial(pd.DataFrame([p.row() for p in parts]).to_csv, index=False))
    if effects:
        write_json(
            folder.path / "side_effects.json",
            {
                n: e.record()
                | {"summary": e.summary().rename(columns={"": "note"}).to_dict("records")}
                for n, e in effects.items()
            },
        )


def _show(scores: list[list[Scores]], comparisons: list, aggregates: list, effects: dict) -> None:
    import pandas as pd

    show(pd.concat([s.summary() for system in scores for s in system], ignore_index=True), "Scores")
    for c in comparisons:
        d = c.difference
        print(
            f"{c.first} - {c.second} on {c.data}: {100 * d.value:+.1f} points of accuracy [{100 * d.low:+.1f}, {100 * d.high:+.1f}] "
            f"by sentence, p {d.p:.2g}; McNemar {c.mcnemar.b} : {c.mcnemar.c}, p {c.mcnemar.p:.2g}"
        )
    for a in aggregates:
        print(
            f"{a.name} on {a.data}: accuracy {100 * a.accuracy.mean:.1f}, sd {100 * a.accuracy.sd:.1f} between them; "
            f"macro-F1 {100 * a.macro_f1.mean:.1f}, sd {100 * a.macro_f1.sd:.1f}"
        )
    for e in effects.values():
        show(e.summary(), f"Side effects of {e.name}")


def show(table, title: str) -> None:
    """Print a table of text."""
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for column in table.columns:
        made.add_column(str(column), overflow="fold")
    for row in table.itertuples(index=False):
        made.add_row(*(str(cell) for cell in row))
    # A pipe has no width; a table must not be cut there.
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(made)


def cli(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 and one sentence on stderr."""
    return command(
        Config, lambda config: print(f"written to {run(config)}"), "mech_absa.evaluate", argv
    )
