"""`mech-absa card`, or `python -m mech_absa.evaluate.card`: the table of a model card: what a base model and its adaptation can do, beside what was aimed at.

    mech-absa card --out runs/card
    mech-absa card --real ../shared/data/me_absc --real-edits runs/real --out runs/card

Greedy, three classes, 95 % intervals that resample sentences. Four questions are asked of the built-in test files:

- **natural continuation** (base): after the review an ordinary sentence begins that depends on one aspect ("my view of the pasta is"), and
  the model's own choice among the three words it may go on with is read. It tells whether opinion and aspect are bound at all.
- **ABSC prompt** (base): the paper's question, which the base model is not meant to answer well.
- **adapted**, in the domains of the adaptation's training data and out of them.
- **adapted, mixed polarity**: only sentences that carry several polarities, where the aspect alone decides.

With `--real`, a folder of `{device,laptop,rest,service}_test.json` in the paper's format is asked as well, without a goal; `--real-edits`
holds an edit trained on each, in folders of these names. The run leaves `card.json`, `card.md` and `run.json`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from ..errors import ConfigError, DataError
from ..evaluate.predictions import Predictions, joined, predict
from ..evaluate.scores import Quality, percent, quality, score
from ..examples import Example, Examples
from ..model import Model, load_model
from ..prompts import PromptTemplate, Verbalizer
from ..readers import load_examples
from ..records import RunFolder, write_json, write_text
from ..scoring import Applicable
from ..world import CONTINUATIONS, DOMAINS
from .cli import command, out_folder
from .evaluate import load
from .flags import (
    FREE,
    IntervalFlags,
    LimitFlags,
    ModelFlags,
    Names,
    OptionalPath,
    RunFlags,
    at_least,
    recorded,
)

REAL = ("device", "laptop", "rest", "service")


@dataclass(frozen=True)
class Config:
    """Show what a base model and its adaptation can do, on the built-in test files and on real ones.

    Examples:
      mech-absa card --limit 200 --out runs/card
    """

    adapter: str = "bundled"
    """The adaptation: bundled, the folder of an edit, or none."""
    in_domain: Names = ("restaurant", "laptop")
    """Built-in domains that the adaptation was trained on."""
    real: OptionalPath = None
    """A folder with {device,laptop,rest,service}_test.json, and _train.json for the leaked rows."""
    real_edits: OptionalPath = None
    """A folder with an edit for each of them, in folders of these names."""
    seed: int = 0
    """Seed of the bootstrap and of --limit."""
    batch_size: int = 64
    """Prompts per forward pass."""
    limits: Annotated[OmitArgPrefixes[LimitFlags], arg(name="data")] = field(
        default_factory=LimitFlags
    )
    intervals: Annotated[OmitArgPrefixes[IntervalFlags], arg(name="statistics")] = field(
        default_factory=lambda: IntervalFlags(draws=2000)
    )
    model: OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)
    run: OmitArgPrefixes[RunFlags] = field(default_factory=RunFlags)

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size)
        self.limits.check()
        self.intervals.check()
        if strange := [d for d in self.in_domain if d not in DOMAINS]:
            raise ConfigError(
                f"--in-domain names {strange[0]!r}; the built-in domains are {', '.join(DOMAINS)}"
            )
        if self.real_edits is not None and self.real is None:
            raise ConfigError(
                "--real-edits was given without --real, the folder of the data they are asked about"
            )
        if self.real is not None and (
            missing := [n for n in REAL if not (self.real / f"{n}_test.json").is_file()]
        ):
            raise DataError(
                f"the folder has no {missing[0]}_test.json; the paper's four test files are needed",
                str(self.real),
            )
        if self.real_edits is not None and not any((self.real_edits / n).is_dir() for n in REAL):
            raise DataError(
                f"the folder holds no edit; folders {', '.join(REAL)} are looked for",
                str(self.real_edits),
            )

    @property
    def sure(self) -> dict[str, Any]:
        """Return how intervals are made."""
        return {"level": self.intervals.level, "draws": self.intervals.draws, "seed": self.seed}

    def read(self, source: str | Path) -> Examples:
        """Return the examples of a test file that --limit leaves."""
        return self.limits.of(load_examples(source), self.seed)


@dataclass(frozen=True)
class Goal:
    """A range of accuracies that was aimed at; None is the majority class of the data."""

    low: float | None
    high: float = 1.0

    def __str__(self) -> str:
        low = "majority" if self.low is None else f"{100 * self.low:.0f}"
        return f">= {low}" if self.high == 1.0 else f"{low} to {100 * self.high:.0f}"

    def reached(self, q: Quality) -> bool:
        """Return whether the accuracy lies in it."""
        return (q.majority if self.low is None else self.low) <= q.accuracy.value <= self.high


CONTINUES, BASE = Goal(0.97), Goal(None, 0.80)
IN_DOMAIN, OUT_OF_DOMAIN, MIXED = Goal(0.92), Goal(0.85), Goal(0.88)


@dataclass(frozen=True)
class Row:
    """One line of the card."""

    system: str
    question: str
    data: str
    quality: Quality
    goal: Goal | None = None

    def record(self) -> dict[str, Any]:
        """Return the line in JSON's types."""
        reached = None if self.goal is None else self.goal.reached(self.quality)
        head = {
            "system": self.system,
            "question": self.question,
            "data": self.data,
            "goal": str(self.goal or ""),
            "reached": reached,
        }
        return head | self.quality.row()

    def cells(self) -> dict[str, str]:
        """Return the line as text."""
        q = self.quality
        reached = "" if self.goal is None else "yes" if self.goal.reached(q) else "no"
        return {
            "system": self.system, "question": self.question, "data": self.data, "n": str(q.n), "accuracy %": percent(q.accuracy),
            "macro-F1 %": f"{100 * q.macro_f1.value:.1f}", "majority %": f"{100 * q.majority:.1f}", "goal %": str(self.goal or "-"), "reached": reached,
        }  # fmt: skip


def continuation_prompts() -> list[tuple[PromptTemplate, Verbalizer]]:
    """Return every ordinary sentence that may follow a review, as a question with its three answers."""
    return [
        (PromptTemplate("{sentence} " + text.replace("{A}", "{aspect}")), Verbalizer.of(words))
        for text, words in CONTINUATIONS
    ]


def continue_naturally(
    model: Model, examples: Sequence[Example], edit: Applicable | None = None, batch_size: int = 64
) -> list[Predictions]:
    """Return what the model goes on with after a review and each of `CONTINUATIONS`, one set of answers each."""
    return [
        predict(model, examples, edit, template=t, verbalizer=v, batch_size=batch_size)
        for t, v in continuation_prompts()
    ]


def rows(config: Config, model: Model, adapter: Applicable | None) -> Iterator[Row]:
    """Yield the lines of the card."""

    def sure(p: Predictions) -> Quality:
        return quality(p, **config.sure)

    def asked(edit: Applicable | None, examples: Sequence[Example]) -> Predictions:
        return predict(model, examples, edit, batch_size=config.batch_size)

    data = {d: config.read(f"builtin:{d}/test") for d in DOMAINS}
    natural = {
        d: continue_naturally(model, examples, batch_size=config.batch_size)
        for d, examples in data.items()
    }
    for d, parts in natural.items():
        yield Row("base", "natural continuation", d, sure(joined(parts, d)), CONTINUES)
    for i, (template, _) in enumerate(continuation_prompts()):
        yield Row(
            "base",
            template.text.removeprefix("{sentence} "),
            "all four",
            sure(joined([natural[d][i] for d in data], "all")),
            CONTINUES,
        )
    base = {d: asked(None, examples) for d, examples in data.items()}
    for d, p in base.items():
        yield Row("base", "ABSC prompt", d, sure(p), BASE)
    yield Row("base", "ABSC prompt", "all four", sure(joined(list(base.values()), "all")), BASE)
    if adapter is not None:
        yield from _adapted(config, {d: asked(adapter, examples) for d, examples in data.items()})
    if config.real is not None:
        yield from _real(config, config.real, model, adapter)


def _adapted(config: Config, adapted: dict[str, Predictions]) -> Iterator[Row]:
    def sure(p: Predictions) -> Quality:
        return quality(p, **config.sure)

    for d, p in adapted.items():
        where, goal = (
            ("in-domain", IN_DOMAIN) if d in config.in_domain else ("out-of-domain", OUT_OF_DOMAIN)
        )
        yield Row("adapted", f"ABSC prompt, {where}", d, sure(p), goal)
    for where, inside in (("in-domain", True), ("out-of-domain", False)):
        if chosen := [p for d, p in adapted.items() if (d in config.in_domain) is inside]:
            yield Row(
                "adapted",
                f"ABSC prompt, {where}",
                "together",
                sure(joined(chosen, where)),
                IN_DOMAIN if inside else OUT_OF_DOMAIN,
            )
    for d, p in [*adapted.items(), ("all four", joined(list(adapted.values()), "all"))]:
        if (mixed := score(p, **config.sure).mixed) is not None:
            yield Row("adapted", "mixed polarity only", d, mixed, MIXED)


def _real(config: Config, folder: Path, model: Model, adapter: Applicable | None) -> Iterator[Row]:
    for d in REAL:
        examples = config.read(folder / f"{d}_test.json")
        train = folder / f"{d}_train.json"
        seen = load_examples(train) if train.is_file() else None
        systems: dict[str, Applicable | None] = {"base": None}
        if adapter is not None:
            systems["adapted"] = adapter
        if config.real_edits is not None and (config.real_edits / d).is_dir():
            systems["adapted on its train file"] = load(str(config.real_edits / d), model)
        for name, edit in systems.items():
            p = predict(model, examples, edit, batch_size=config.batch_size)
            s = score(p, train=seen, **config.sure)
            yield Row(name, "ABSC prompt", f"{d} (real)", s.all)
            if s.unseen is not None and s.leaked and name.startswith("adapted on"):
                yield Row(name, "ABSC prompt, rows not in train", f"{d} (real)", s.unseen)


def markdown(lines: Sequence[Row]) -> str:
    """Return the lines as a Markdown table."""
    cells = [r.cells() for r in lines]
    table = [list(cells[0]), ["---"] * len(cells[0]), *(list(c.values()) for c in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in table) + "\n"


def main(config: Config) -> Path:
    """Score, and write the folder."""
    folder = RunFolder(
        out_folder(config, "card"), recorded(config), config.run.resume, (*FREE, "batch_size")
    )
    start = time.perf_counter()
    model = load_model(
        config.model.model,
        device=config.model.device,
        dtype=config.model.dtype,
        backend=config.model.backend,
    )
    seconds = time.perf_counter() - start
    adapter = load(config.adapter, model)
    folder.bind({"model": model.sha256})
    if folder.finished:
        print(f"{folder.path} already holds this run, whole; nothing to do")
        return folder.path
    lines = list(rows(config, model, adapter))
    about = {
        "model": model.name, "sha256": model.sha256, "parameters": model.n_parameters, "layers": model.n_layers, "d_model": model.d_model,
        "adapter": config.adapter, "adapter_parameters": getattr(adapter, "n_parameters", None),
    }  # fmt: skip
    folder.open()
    write_json(folder.path / "card.json", about | {"rows": [r.record() for r in lines]})
    write_text(folder.path / "card.md", markdown(lines))
    folder.finish({"command": "evaluate.card"} | about | {"seconds_to_load": round(seconds, 2)})
    if not config.run.quiet:
        show(lines, f"{model.name}, loaded in {seconds:.1f} s")
        print(f"written to {folder.path}\n{conclusion(lines)}")
    return folder.path


def show(lines: Sequence[Row], title: str) -> None:
    """Print the lines of the card."""
    from .tables import print_table

    cells = [r.cells() for r in lines]
    print_table(list(cells[0]), [list(c.values()) for c in cells], title)


def conclusion(lines: Sequence[Row]) -> str:
    """Say in one line how many goals were reached."""
    reached = [r.goal.reached(r.quality) for r in lines if r.goal is not None]
    return f"{sum(reached)} of {len(reached)} goals reached."


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command(Config, main, "mech_absa.evaluate.card", argv)
