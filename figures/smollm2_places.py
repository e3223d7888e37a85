"""Train the paper's edit at places of SmolLM2-135M: `python -m figures.smollm2_places --data DATA`.

The paper edits the layers that tracing names, and its claim is that this beats editing elsewhere.
Here the same edit (W_O low-rank and LoReFT at the aspect in the question, trained together, text
loss) is trained at six layers of each kind, each place with a learning rate of its own.

What is measured was written down before any test row was scored:

- accuracy on test rows, the mean over the four files and the seeds;
- **the measure**: the difference from the traced layers, on the same rows, with a 95 % interval
  that resamples test sentences. A place is better or worse only if that interval excludes 0.

1. **Rows.** One training set from the four domains together, and validation rows of other sentences;
   questions that a test file holds are left out. Test rows are drawn by seed from each test file.
2. **Places.** The traced layers (sites chosen from the trace with noise, of training rows), the
   paper's layers 9-14 of 30, the first six, the last six, the six that are left (`random`), all
   layers. Each half of the edit alone, and LoRA on q, k, v, up and down, in the traced layers and in
   all; the traced layers with LoReFT at other tokens. The nine ranges of the paper's Figure 4, at
   the same depth of this model; three of them are among the places above. With `--again`, the layers
   that a longer trace chose.
3. **Rates.** One grid for every place and one rate for both parts, as in the authors' script. The
   rate with the lowest cross-entropy over the labels on the validation rows is taken.
4. **Seeds.** They change the initial state, the order and the dropout, not the rows.

Each training and each scoring is a file of its own under `--out`, so that a killed run goes on where
it stopped. Place after place is finished for seed 0, then for seed 1, and so on. Written are
`trainings.csv`, `answers.csv` (a row per test row, a column per system), `places.csv`, `run.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import mech_absa as ma
from mech_absa.commands.cli import command
from mech_absa.edits.store import load_edit, save_edit
from mech_absa.errors import ConfigError
from mech_absa.evaluate.baselines import WORDINGS
from mech_absa.evaluate.predictions import predict
from mech_absa.examples import Example, Examples
from mech_absa.model import Model
from mech_absa.records import atomic, versions, write_json
from mech_absa.sites import Site, sites_file
from mech_absa.stats import cluster_bootstrap, paired_bootstrap_difference
from mech_absa.train import PrefixCache, fit, presets
from mech_absa.train.places import named_layers
from mech_absa.train.task import Task

from .smollm2_adapter import DOMAINS, file, split

ROOT = Path(__file__).resolve().parents[1]
LABELS = [p.value for p in ma.Polarity]
WORD = 8
"""A token of the sentence, counted from the start of the prompt: the paper's random word."""
RANK, LORA_RANK, BATCH = 4, 8, 4
SECONDS = {"train": 0.55, "score": 0.25}
"""Seconds of one core for a training row and a scored row, where all layers run."""
UNEDITED = ("zero_shot", "best_wording")
HALVES = {"loreft": "loreft", "lora_o": "lora"}
"""The family that is left of the paper's edit where only half of it is trained."""


@dataclass(frozen=True)
class Config:
    """Train the paper's edit at places of SmolLM2-135M, and score each on test rows."""

    data: Path
    """Folder with me_absc/ and mams/."""
    model: str = "smollm2"
    """The model."""
    sites: Path = ROOT / "figures" / "results" / "smollm2" / "places" / "sites.json"
    """Sites that tracing chose: those of the trace of 21 pairs, which the first trainings used."""
    again: Path | None = None
    """Sites that a longer trace chose; if their layers are others, they are a place too."""
    train: int = 40
    """Training rows of each domain."""
    held: int = 16
    """Validation rows of each domain."""
    test: int = 50
    """Rows of each test file."""
    words: int = 20
    """Longest sentence that is trained on."""
    rates: tuple[float, ...] = (1e-3, 4e-3)
    """Learning rates that are tried in each place."""
    seeds: int = 3
    """Trainings of each place at its rate."""
    only: tuple[str, ...] = ()
    """Train in these places alone, by name; several processes may share one folder so. Default: all."""
    until: float | None = None
    """Begin nothing new after this many seconds."""
    out: Path = ROOT / "runs" / "smollm2" / "smollm2" / "places" / "places"
    """Where the trainings are kept, and the tables."""
    resume: bool = True
    """Go on with what is there."""

    def __post_init__(self) -> None:
        if self.seeds < 1 or not self.rates:
            raise ConfigError("--seeds and --rates each need at least one")


@dataclass(frozen=True)
class Place:
    """Name where an edit acts.

    Attributes:
        name: of the row in the tables.
        layers: that are edited.
        position: of the representation part.
        method: `both` for the paper's edit, `loreft` and `lora_o` for its halves, `lora` for LoRA on
            q, k, v, up and down.
    """

    name: str
    layers: tuple[int, ...]
    position: str | int = presets.LAST_OF_QUERY
    method: str = "both"

    def preset(self, rate: float) -> presets.Preset:
        """Return the edit at this place, to be trained at `rate`."""
        if self.method == "lora":
            places = presets.matrices(self.layers, "W_Q", "W_K", "W_V", "W_in", "W_out")
            parts = presets.parts("lora", places, rate, rank=LORA_RANK, alpha=2.0 * LORA_RANK)
        else:
            parts = presets.both_parts(
                presets.range_sites(self.layers, [self.position]), rank=RANK, lr_weight=rate,
                lr_representation=rate, alpha=2.0 * RANK, rank_stabilised=True, dropout=0.05,
            )  # fmt: skip
            family = HALVES.get(self.method)
            parts = tuple(p for p in parts if family in (None, p.family))
        return presets.Preset(self.method, parts, batch_size=BATCH, loss="text")


@dataclass(frozen=True)
class Job:
    """One training."""

    place: Place
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its files."""
        return f"{self.place.name.replace(' ', '_')}-x{self.rate:g}-s{self.seed}"


RANGES = ((0, 31), (5, 10), (5, 15), (10, 15), (10, 20), (15, 20), (15, 25), (20, 25), (20, 30))
"""Layers of the paper's Figure 4, of 32."""


def scaled(low: int, high: int, n_layers: int) -> tuple[int, ...]:
    """Return the layers that correspond to the paper's `low` to `high` of 32.

    >>> scaled(10, 15, 32), scaled(20, 25, 30)
    ((10, 11, 12, 13, 14, 15), (18, 19, 20, 21, 22, 23))
    """
    return tuple(range(low * n_layers // 32, (high + 1) * n_layers // 32))


def places(traced: Sequence[Site], n_layers: int, again: Sequence[Site] = ()) -> list[Place]:
    """Return the places that are compared, the traced one first, those of a longer trace last.

    `random` takes as many layers as are traced from those that no other place of six has; in a
    model of 30 layers with six traced ones there is but one such choice.
    """
    layers = tuple(sorted({s.layer for s in traced}))
    at, width = str(traced[0].at), len(layers)
    first, last = (named_layers(name, width, n_layers) for name in ("first", "last"))
    paper = scaled(10, 15, n_layers)
    taken = {*layers, *paper, *first, *last}
    free = [layer for layer in range(n_layers) if layer not in taken]
    drawn = sorted(np.random.default_rng(0).permutation(free)[:width].tolist())
    every = tuple(range(n_layers))
    made = [
        Place("traced", layers, at),
        Place("paper", paper, at),
        Place("random", tuple(drawn), at),
        Place("last", last, at),
        Place("first", first, at),
        Place("all", every, at),
        Place("lora all", every, at, "lora"),
        Place("traced, last token", layers, "answer"),
        Place("traced, a word", layers, WORD),
        Place("loreft traced", layers, at, "loreft"),
        Place("W_O traced", layers, at, "lora_o"),
        Place("lora traced", layers, at, "lora"),
        Place("loreft all", every, at, "loreft"),
    ]
    known = {p.layers for p in made if p.method == "both" and p.position == at}
    ranges = [scaled(low, high, n_layers) for low, high in RANGES]
    if again:
        ranges.append(tuple(sorted({s.layer for s in again})))
    return [
        *made,
        *(Place(f"layers {_layers(r)}", r, at) for r in dict.fromkeys(ranges) if r not in known),
    ]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of the study.

    Attributes:
        train, held: of the four domains, one after another; no sentence is in both.
        test: rows of each test file, by domain.
    """

    train: list[Example]
    held: list[Example]
    test: dict[str, list[Example]]

    @cached_property
    def tests(self) -> list[Example]:
        """Return the test rows of all files."""
        return [e for rows in self.test.values() for e in rows]


def rows_of(config: Config) -> Rows:
    """Read and draw the rows; the same flags give the same rows."""
    train, held, test = list[Example](), list[Example](), dict[str, list[Example]]()
    for name in DOMAINS:
        found = split(config.data, name, config.train)
        fitting = [e for e in (*found.train, *found.spare) if _words(e) <= config.words]
        train += fitting[: config.train]
        held += list(Examples(tuple(found.held)).sample(config.held, 0))
        test[name] = list(ma.load_examples(file(config.data, name, "test")).sample(config.test, 0))
    return Rows(train, held, test)


def _words(example: Example) -> int:
    return len(example.sentence.split())


@dataclass(eq=False)
class Work:
    """The model, the rows, and the trainings that are done.

    Every result is a file; `cached_property` puts off what a finished run does not need.
    """

    config: Config
    started: float = field(default_factory=time.monotonic)

    @cached_property
    def model(self) -> Model:
        return ma.load_model(self.config.model, device="cpu")

    @cached_property
    def rows(self) -> Rows:
        return rows_of(self.config)

    @cached_property
    def places(self) -> list[Place]:
        again = [] if self.config.again is None else sites_file(self.config.again)[0]
        return places(sites_file(self.config.sites)[0], self.model.n_layers, again)

    @cached_property
    def task(self) -> Task:
        return Task(self.model, "text", None, None, PrefixCache(self.model, 2 << 30))

    @property
    def late(self) -> bool:
        """Return whether nothing new is begun."""
        until = self.config.until
        return until is not None and time.monotonic() - self.started > until

    def wanted(self, place: Place) -> bool:
        """Return whether this process trains in a place."""
        return not self.config.only or place.name in self.config.only

    def path(self, name: str) -> Path:
        return self.config.out / "parts" / f"{name}.json"

    def read(self, name: str) -> Any:
        """Return what a file of this name holds; None where it is not there."""
        path = self.path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    # ---- what is trained and scored ----

    def tuning(self, place: Place) -> list[Job]:
        """Return the trainings among which a rate is chosen."""
        return [Job(place, rate, 0) for rate in self.config.rates]

    def chosen(self, place: Place, seed: int) -> Job | None:
        """Return the training that is scored; None while a rate is not trained yet."""
        done = [(job.rate, self.read(job.name)) for job in self.tuning(place)]
        if any(row is None for _, row in done):
            return None
        finite = [(row["loss"], rate) for rate, row in done if row["loss"] is not None]
        return Job(place, min(finite)[1], seed) if finite else None

    def steps(self, seed: int) -> Iterator[tuple[str, Job]]:
        """Yield ("train" or "score", job) for all of a seed whose rate is known, place by place."""
        for place in self.places:
            if seed == 0:
                yield from (("train", job) for job in self.tuning(place))
            if (job := self.chosen(place, seed)) is not None:
                yield "train", job
                yield "score", job

    def run(self) -> None:
        """Do what is missing, until it is late."""
        for seed in range(self.config.seeds):
            for what, job in self.steps(seed):
                if not self.late and self.wanted(job.place):
                    self.do(what, job)
            if not self.late:
                self.unedited()

    def do(self, what: str, job: Job) -> None:
        """Train or score one edit, unless that is done."""
        name = job.name if what == "train" else f"{job.name}.test"
        if self.path(name).exists():
            return
        clock = time.process_time()
        made = self.train(job) if what == "train" else self.score(job)
        write_json(self.path(name), made | {"seconds": round(time.process_time() - clock, 1)})
        print(f"{time.strftime('%H:%M:%S')} {name} {made.get('accuracy', '')}", flush=True)

    def train(self, job: Job) -> dict[str, Any]:
        """Train one edit, keep it, and return its quality on the validation rows."""
        state = self.path(job.name).with_suffix(".state")
        state.parent.mkdir(parents=True, exist_ok=True)
        edit = fit(
            self.model, self.rows.train, job.place.preset(job.rate), seed=job.seed,
            cache=self.task.cache, checkpoint=state, checkpoint_every=16,
        )  # fmt: skip
        save_edit(edit, state.with_suffix(""))
        state.unlink(missing_ok=True)
        loss, accuracy = self.task.quality(edit, self.task.prepare(self.rows.held), 16)
        return {
            "place": job.place.name, "rate": job.rate, "seed": job.seed, "parameters": edit.n_parameters,
            "loss": loss if np.isfinite(loss) else None, "accuracy": accuracy, "steps": len(edit.history),
        }  # fmt: skip

    def score(self, job: Job) -> dict[str, Any]:
        """Return the answers of a trained edit on the test rows."""
        edit = load_edit(self.path(job.name).with_suffix(""), self.model)
        scores = self.task.scores(edit, self.task.prepare(self.rows.tests), 16)
        return {"answers": [LABELS[i] for i in scores.argmax(-1).tolist()]}

    def unedited(self) -> None:
        """Score the unedited model, in the paper's wording and in the best one on validation rows."""
        if (found := self.read("wordings")) is None:
            asked = {w: predict(self.model, self.rows.held, template=w) for w in WORDINGS}
            found = {w: float(answers.correct.mean()) for w, answers in asked.items()}
            write_json(self.path("wordings"), found)
        best = max(found, key=lambda w: found[w])
        for name, wording in zip(UNEDITED, (WORDINGS[0], best), strict=True):
            if self.path(f"{name}.test").exists():
                continue
            answers = predict(self.model, self.rows.tests, template=wording, batch_size=16).answers
            values = [a.value if a is not None else "" for a in answers]
            write_json(self.path(f"{name}.test"), {"wording": wording, "answers": values})
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)

    # ---- what is kept ----

    def scored(self) -> list[Job]:
        """Return the trainings whose answers are there."""
        jobs = (self.chosen(p, seed) for seed in range(self.config.seeds) for p in self.places)
        return [j for j in jobs if j is not None and self.path(f"{j.name}.test").exists()]

    def trainings(self) -> pd.DataFrame:
        """Return a row per training that is done."""
        seeds = range(self.config.seeds)
        jobs = dict.fromkeys(j.name for s in seeds for what, j in self.steps(s) if what == "train")
        return pd.DataFrame([row for name in jobs if (row := self.read(name)) is not None])

    def answers(self) -> pd.DataFrame:
        """Return a row per test row: file, sentence, gold label, and each system's answer."""
        numbers = {c: i for i, c in enumerate(dict.fromkeys(e.cluster for e in self.rows.tests))}
        table: dict[str, Any] = {
            "file": [name for name, rows in self.rows.test.items() for _ in rows],
            "sentence": [numbers[e.cluster] for e in self.rows.tests],
            "gold": [e.polarity.value for e in self.rows.tests],
        }
        for name in UNEDITED:
            if (found := self.read(f"{name}.test")) is not None:
                table[name] = found["answers"]
        for job in self.scored():
            table[f"{job.place.name}/{job.seed}"] = self.read(f"{job.name}.test")["answers"]
        return pd.DataFrame(table)

    def planned(self) -> int:
        """Return the number of trainings of the whole study."""
        return len(self.places) * (len(self.config.rates) + self.config.seeds - 1)

    def collect(self) -> None:
        """Write the tables of all that is done."""
        out, trainings, answers = self.config.out, self.trainings(), self.answers()
        tables = {"trainings": trainings, "answers": answers}
        tables["places"] = compared(answers, trainings, self.places)
        for name, table in tables.items():
            with atomic(out / f"{name}.csv") as temporary:
                table.to_csv(temporary, index=False, float_format="%.5g")
        hidden = ("out", "resume", "until", "only", "data", "sites", "again")
        rows = self.rows
        write_json(
            out / "run.json",
            {
                "command": "figures.smollm2_places",
                "model": {"name": self.model.name, "sha256": self.model.sha256},
                "config": {k: v for k, v in asdict(self.config).items() if k not in hidden},
                "rows": {"train": len(rows.train), "validation": len(rows.held), "test": len(rows.tests)},
                "trainings": {"done": len(trainings), "planned": self.planned()},
                "wordings": self.read("wordings"),
                "seconds": round(float(trainings["seconds"].sum())) if len(trainings) else 0,
                "versions": versions(),
            },
        )  # fmt: skip


def compared(
    answers: pd.DataFrame, trainings: pd.DataFrame, at: Sequence[Place] = ()
) -> pd.DataFrame:
    """Return a row per system: its accuracy on each file and on all, and its difference from `traced`.

    A row of a test file counts with its mean over the seeds of the system. Intervals resample
    sentences, so that they say nothing about other training rows. The difference from the traced
    layers is over the seeds that both have.

    Args:
        answers: from `Work.answers`.
        trainings: from `Work.trainings`.
        at: the places, for their layers.
    """
    right = {c: _right(answers, [c]) for c in answers.columns[3:]}
    systems = dict.fromkeys(c.partition("/")[0] for c in right)
    where = {p.name: p for p in at}
    made = []
    for name in systems:
        columns = _columns(answers, name)
        mean = _right(answers, columns)
        interval = cluster_bootstrap(mean, answers["sentence"].to_numpy())
        row: dict[str, Any] = {
            "place": name, "layers": _layers(where[name].layers) if name in where else "",
            "position": where[name].position if name in where else "",
            **_trained(trainings, name), "seeds": len(columns),
            **{f: mean[answers["file"] == f].mean() for f in dict.fromkeys(answers["file"])},
            "accuracy": float(interval.mean), "accuracy_low": float(interval.low), "accuracy_high": float(interval.high),
            "seed_low": min(right[c].mean() for c in columns), "seed_high": max(right[c].mean() for c in columns),
            "neutral": pd.Series(mean)[answers["gold"] == "neutral"].mean(),
        }  # fmt: skip
        made.append(row | _difference(answers, name))
    return pd.DataFrame(made)


def _columns(answers: pd.DataFrame, name: str) -> list[str]:
    return [c for c in answers.columns[3:] if c.partition("/")[0] == name]


def _right(answers: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Return the share of some columns that answer each row rightly."""
    hits = answers[list(columns)].eq(answers["gold"], axis=0)
    return np.asarray(hits.mean(axis=1), dtype=float)


def _trained(trainings: pd.DataFrame, name: str) -> dict[str, float]:
    """Return the parameters of a place's edit and the rate that was chosen; 0 and NaN for none."""
    tuned = (
        trainings[(trainings["place"] == name) & (trainings["seed"] == 0)]
        if len(trainings)
        else trainings
    )
    if not len(tuned):
        return {"parameters": 0, "rate": np.nan}
    best = tuned.loc[tuned["loss"].idxmin()]
    return {"parameters": int(best["parameters"]), "rate": float(best["rate"])}


def _difference(answers: pd.DataFrame, name: str) -> dict[str, float]:
    """Return the difference from the traced layers with its interval; empty for these themselves."""
    base = _columns(answers, "traced")
    if name == "traced" or not base:
        return {}
    own = _columns(answers, name)
    seeds = {c.partition("/")[2] for c in own} & {c.partition("/")[2] for c in base}
    if name not in UNEDITED:
        own, base = ([c for c in cs if c.partition("/")[2] in seeds] for cs in (own, base))
    found = paired_bootstrap_difference(
        _right(answers, own), _right(answers, base), answers["sentence"].to_numpy()
    )
    return {
        "minus_traced": found.value, "minus_low": found.low, "minus_high": found.high, "p": found.p,
    }  # fmt: skip


def _layers(layers: Sequence[int]) -> str:
    """Return layers as ranges, such as `6-8,15-17`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def seconds(config: Config, n_layers: int = 30) -> float:
    """Return the seconds of one core that the study takes, about."""
    domains, depth = len(DOMAINS), 0.0
    for place in places(sites_file(config.sites)[0], n_layers):
        depth += 1 - min(place.layers) / n_layers
    runs = len(config.rates) + config.seeds - 1
    train = runs * config.train * SECONDS["train"]
    score = (runs * config.held + config.seeds * config.test) * SECONDS["score"]
    wordings = (len(WORDINGS) * config.held + 2 * config.test) * SECONDS["score"]
    return domains * (depth * (train + score) + wordings)


def main(config: Config) -> None:
    """Do what is missing, and write the tables of what is done."""
    torch.set_num_threads(1)
    print(f"about {seconds(config) / 60:.0f} CPU-minutes for all of it", flush=True)
    work = Work(config)
    try:
        work.run()
    finally:
        work.collect()


if __name__ == "__main__":
    raise SystemExit(command(Config, main, "python -m figures.smollm2_places"))
