"""The same edit at many places, each with a learning rate tuned there.

A place is a set of layers. At every place, and for every budget of examples and epochs, one edit is
trained with each rate of a grid on a tuning sample; the rate with the lowest cross-entropy on
validation rows is taken. With that rate, one edit is trained on each of several other samples and
scored on the test rows once. Every training is a file of its own, so that a killed study goes on
where it stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..edits.base import Shape
from ..edits.edit import Edit
from ..errors import ConfigError
from ..examples import Example
from ..model import Model
from ..prompts import PromptTemplate, Verbalizer
from ..records import read_json, write_json
from ..train import presets
from ..train.fit import fit, keep_streams
from ..train.prefix import PrefixCache
from ..train.presets import LAST_OF_QUERY, Preset
from ..train.task import Prepared, Task

TUNING = -1
"""Number of the sample on which rates are tuned."""
MOST_LISTED = 100_000
"""Places that are listed to be drawn from; where there are more, they are drawn one by one."""
BATCH = 64
"""Prompts per forward pass while scoring."""
RATES = (0.4, 1.0, 2.5, 6.25)
"""A preset's learning rates are tried times each of these."""

Layers = tuple[int, ...]


@dataclass(frozen=True, order=True)
class Budget:
    """How long an edit trains.

    Attributes:
        examples: training examples; 0 takes all.
        epochs: passes over them.

    >>> Budget.parse("64x2")
    Budget(examples=64, epochs=2)
    """

    examples: int
    epochs: int

    @classmethod
    def parse(cls, word: str) -> Budget:
        """Return the budget that a word such as `64x2` spells.

        Raises:
            ConfigError: it spells none.
        """
        left, x, right = word.partition("x")
        if not (x and left.isascii() and left.isdigit() and right.isascii() and right.isdigit()):
            raise ConfigError(
                f"budget {word!r} was given; accepted: EXAMPLESxEPOCHS such as 64x2, where 0 examples are all"
            )
        if int(right) < 1:
            raise ConfigError(f"budget {word!r} has no epoch; accepted: 1 or more, such as 64x2")
        return cls(int(left), int(right))

    def __str__(self) -> str:
        return f"{self.examples}x{self.epochs}"


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        edit: name of the method.
        layers: where.
        budget: how long.
        rate: factor of the preset's learning rates.
        sample: number of the training sample; `TUNING` while rates are tuned.
    """

    edit: str
    layers: Layers
    budget: Budget
    rate: float
    sample: int

    @property
    def name(self) -> str:
        """Return the name of its file."""
        where = ".".join(map(str, self.layers))
        which = "tuning" if self.sample == TUNING else str(self.sample)
        return f"{self.edit}-L{where}-{self.budget}-x{self.rate:g}-{which}.json"


@dataclass(frozen=True, eq=False)
class Data:
    """Rows of a study; no sentence is in two of them.

    Attributes:
        train: to draw samples from.
        held: to tune rates on.
        test: scored once per edit.
        out: of other domains; scored once per edit, apart from `test`.
    """

    train: Sequence[Example]
    held: Sequence[Example]
    test: Sequence[Example]
    out: Sequence[Example] = ()

    @property
    def given(self) -> list[Sequence[Example]]:
        """Return the rows of each kind; those of other domains only where there are some."""
        return [self.train, self.held, self.test, *([self.out] if self.out else [])]


@dataclass(frozen=True)
class Settings:
    """What is trained, apart from the data.

    Attributes:
        edits: methods of `presets.METHODS`.
        budgets: how long each edit trains.
        rates: factors that are tried.
        samples: training samples of each place.
        seed: of the samples: number i has seed + i, the tuning sample seed + 1000.
        position: of representation edits.
        rank: of every edit.
        template, verbalizer: the question.
        memory: bytes for activations below the edits.
    """

    edits: tuple[str, ...] = ("both",)
    budgets: tuple[Budget, ...] = (Budget(64, 2),)
    rates: tuple[float, ...] = RATES
    samples: int = 5
    seed: int = 0
    position: str | int = LAST_OF_QUERY
    rank: int = 4
    template: PromptTemplate = field(default_factory=PromptTemplate)
    verbalizer: Verbalizer = field(default_factory=Verbalizer)
    memory: int = 1 << 30

    def check(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            ConfigError: no edits, budgets, rates or samples, or an unknown edit.
        """
        for name in ("edits", "budgets", "rates"):
            if not getattr(self, name):
                raise ConfigError(f"no {name} were given; at least one is needed")
        if bad := [r for r in self.rates if not 0 < r < math.inf]:
            raise ConfigError(f"a rate of {bad[0]} was given; accepted: a factor above 0")
        if self.samples < 2:
            raise ConfigError(
                f"{self.samples} training samples were asked for; at least 2 are needed for an interval"
            )

    def preset(self, shape: Shape, edit: str, layers: Layers, epochs: int) -> Preset:
        """Return what trains an edit at some layers."""
        sites = presets.range_sites(layers, [self.position])
        return presets.bundled(sites, edit, rank=self.rank, epochs=epochs, shape=shape)


class Trainings:
    """All trainings of a study, done and to do.

    Args:
        model: the base; stays as it is.
        data: rows.
        settings: what is trained.
        places: where.
        parts: folder that keeps a file per training.
    """

    def __init__(
        self,
        model: Model,
        data: Data,
        settings: Settings,
        places: Sequence[Layers],
        parts: Path,
    ):
        settings.check()
        self.model, self.data, self.settings, self.parts = model, data, settings, parts
        self.places = tuple(dict.fromkeys(places))
        self.cache = PrefixCache(model, settings.memory)
        self._skipped: list[Job] = []  # trainings of a run that was killed
        for edit in settings.edits:
            for layers in self.places:
                settings.preset(Shape.of(model), edit, layers, 1)

    @cached_property
    def task(self) -> Task:
        s = self.settings
        return Task(self.model, "labels", s.template, s.verbalizer, self.cache)

    @cached_property
    def held(self) -> list[Prepared]:
        return self.task.prepare(self.data.held)

    @cached_property
    def test(self) -> list[Prepared]:
        return self.task.prepare(self.data.test)

    @cached_property
    def out(self) -> list[Prepared]:
        return self.task.prepare(self.data.out)

    @property
    def total(self) -> int:
        """Return how many trainings the study has."""
        s = self.settings
        each = len(s.rates) + s.samples
        return len(s.edits) * len(s.budgets) * len(self.places) * each

    def path(self, job: Job) -> Path:
        return self.parts / job.name

    def read(self, job: Job) -> dict[str, Any] | None:
        """Return the row of a training that is done; None where it is not."""
        path = self.path(job)
        if not path.exists():
            return None
        row: dict[str, Any] = read_json(path)
        return row

    def run(
        self,
        done: Callable[[int], None] = lambda n: None,
        must: Sequence[Layers] = (),
        seconds: float = math.inf,
        share: tuple[int, int] = (0, 1),
    ) -> list[dict[str, Any]]:
        """Train what is missing; return a row per training, tuning first.

        Places that come later are left out where the time is over, whole places at a time.

        Args:
            done: told of every training that is over.
            must: places that are trained however long it takes.
            seconds: of wall time, after which no other place is begun.
            share: (i, n) trains the places i, i + n, i + 2 n and so on alone.

        Raises:
            ConfigError: an edit diverged at every rate of the grid.
        """
        rows = []
        start = time.monotonic()
        for budget in self.settings.budgets:
            for edit in self.settings.edits:
                for layers in self.places[share[0] :: share[1]]:
                    late = time.monotonic() - start > seconds and layers not in must
                    if late and not self.done_at(edit, layers, budget):
                        continue
                    for row in self._at(edit, layers, budget):
                        rows.append(row)
                        done(1)
        return rows

    def done_at(self, edit: str, layers: Layers, budget: Budget) -> bool:
        """Return whether all trainings of a place are done."""
        s = self.settings
        tuned = [Job(edit, layers, budget, rate, TUNING) for rate in s.rates]
        if not all(self.path(job).exists() for job in tuned):
            return False
        final = [[Job(edit, layers, budget, rate, i) for i in range(s.samples)] for rate in s.rates]
        return any(all(self.path(job).exists() for job in jobs) for jobs in final)

    def _at(self, edit: str, layers: Layers, budget: Budget) -> Iterator[dict[str, Any]]:
        """Yield the rows of one place: each rate, then each sample with the best of them."""
        tuned = []
        for rate in self.settings.rates:
            tuned.append(self._row(Job(edit, layers, budget, rate, TUNING)))
            yield tuned[-1]
        finite = [row for row in tuned if row["loss"] is not None]
        if not finite:
            raise ConfigError(
                f"{edit} at layers {layers} with {budget} diverged at every rate of the grid; give smaller --rates"
            )
        best = float(min(finite, key=lambda row: row["loss"])["rate"])
        for sample in range(self.settings.samples):
            yield self._row(Job(edit, layers, budget, best, sample))

    def _row(self, job: Job) -> dict[str, Any]:
        if (known := self.read(job)) is not None:
            self._skipped.append(job)
            return known
        for done in self._skipped:
            self._keep(done)
        self._skipped.clear()
        row = self.train(job)
        write_json(self.path(job), row)
        return row

    def _trained(self, job: Job) -> tuple[list[Example], Preset, dict[str, Any]]:
        """Return what a training is made of: rows, preset, and options of `fit`."""
        s = self.settings
        number = s.seed + (1000 if job.sample == TUNING else job.sample)
        chosen = draw(self.data.train, job.budget.examples, number)
        preset = s.preset(Shape.of(self.model), job.edit, job.layers, job.budget.epochs)
        options = {"seed": number, "template": s.template, "verbalizer": s.verbalizer}
        return chosen, preset.rates(job.rate), options

    def _keep(self, job: Job) -> None:
        """Keep the streams that a training which is done has kept, so that the next one computes the
        same.
        """
        chosen, preset, options = self._trained(job)
        keep_streams(self.model, chosen, preset, self.cache, **options)
        first = Edit.fresh(self.model, preset.parts, options["seed"]).layers[0]
        for items in [self.held] if job.sample == TUNING else [self.test, self.out]:
            self.task.keep(first, items)

    def train(self, job: Job) -> dict[str, Any]:
        """Train one edit and score it: on validation rows while tuning, on both kinds of test rows
        otherwise.
        """
        chosen, preset, options = self._trained(job)
        clock = time.process_time()
        edit = fit(self.model, chosen, preset, cache=self.cache, progress=False, **options)
        seconds = time.process_time() - clock
        tuning = job.sample == TUNING
        loss, accuracy = self.quality(edit, self.held if tuning else self.test)
        _, elsewhere = (None, None) if tuning else self.quality(edit, self.out)
        return {
            "edit": job.edit,
            "layers": " ".join(map(str, job.layers)),
            "budget": str(job.budget),
            "rate": job.rate,
            "sample": job.sample,
            "stage": "tuning" if tuning else "scored",
            "examples": len(chosen),
            "steps": len(edit.history),
            "parameters": edit.n_parameters,
            "loss": loss,
            "accuracy": accuracy,
            "accuracy_out": elsewhere,
            "cpu_seconds": round(seconds, 3),
        }

    def quality(self, edit: Edit, items: list[Prepared]) -> tuple[float | None, float | None]:
        """Return (cross-entropy, accuracy); None for both where the edit diverged or no row is given."""
        if not items:
            return None, None
        self.task.keep(edit.layers[0], items)
        if edit.record.diverged:
            return None, None
        loss, accuracy = self.task.quality(edit, items, BATCH)
        return (loss, accuracy) if math.isfinite(loss) else (None, None)


def draw(rows: Sequence[Example], n: int, seed: int) -> list[Example]:
    """Return `n` rows without replacement, in their order; a bootstrap of sentences where n is 0 or too many.

    With all rows there is one sample without replacement, so that samples would differ in nothing.
    """
    rng = np.random.default_rng(seed)
    if 0 < n < len(rows):
        return [rows[i] for i in sorted(rng.choice(len(rows), n, replace=False))]
    of: dict[str, list[Example]] = {}
    for row in rows:
        of.setdefault(row.cluster, []).append(row)
    names = sorted(of)
    return [row for i in rng.integers(0, len(names), len(names)) for row in of[names[i]]]


def all_places(width: int, n_layers: int) -> list[Layers]:
    """Return every set of `width` layers.

    Raises:
        ConfigError: the model has not more layers than that.

    >>> all_places(2, 3)
    [(0, 1), (0, 2), (1, 2)]
    """
    if not 1 <= width < n_layers:
        raise ConfigError(
            f"places of {width} layers were asked for; the model has {n_layers} layers, so accepted are "
            f"1 to {n_layers - 1}"
        )
    return list(combinations(range(n_layers), width))


def random_places(width: int, n_layers: int, n: int, seed: int = 0) -> list[Layers]:
    """Return `n` different sets of layers, drawn uniformly; all of them where there are no more.

    Raises:
        ConfigError: the model has not more layers than a place.
    """
    count = math.comb(n_layers, width)
    if count <= MOST_LISTED:
        every = all_places(width, n_layers)
        if n >= count:
            return every
        chosen = np.random.default_rng(seed).choice(count, n, replace=False)
        return [every[i] for i in sorted(chosen)]
    rng = np.random.default_rng(seed)
    found: dict[Layers, None] = {}
    while len(found) < n:
        found[tuple(sorted(int(x) for x in rng.choice(n_layers, width, replace=False)))] = None
    return sorted(found)


def frame_of(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return a row per training as a table; losses and accuracies that are None become NaN."""
    table = pd.DataFrame(list(rows))
    if "accuracy_out" not in table:
        table["accuracy_out"] = None
    for column in ("loss", "accuracy", "accuracy_out"):
        table[column] = table[column].astype(float)
    return table


__all__ = [
    "RATES",
    "TUNING",
    "Budget",
    "Data",
    "Job",
    "Settings",
    "Trainings",
    "all_places",
    "draw",
    "frame_of",
    "random_places",
]
