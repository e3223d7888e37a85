"""Compare places of an edit, each with learning rates of its own: `python -m figures.places`.

    python -m figures.places                         trace, tune, train, score; writes figures/results/places/
    python -m figures.places --fast --out runs/try   the same on a handful of examples: tries the code, proves nothing
    python -m figures.places --collect               write the results of what is done so far

Learning rates that were tuned in one place favour it, so every place is tuned alone, from one grid
and with one budget.

1. **Sites.** The adapted model is traced on training reviews. No test row has a part in any choice.
2. **Places.** The paper's edit (`both`) at the traced layers, as many first, middle and last
   layers, random windows that share no layer with the traced or the last ones, and all layers, once
   with the same rank and once with the same number of parameters. At the traced layers also at two
   other positions: the words before the aspect, and the last token of the prompt.
3. **Tuning.** For each place and each budget (examples x epochs) one edit is trained with each rate
   of the grid, on a sample of its own. The rate with the lowest cross-entropy on validation reviews
   is taken. All rates of an edit scale together.
4. **Training.** With that rate, one edit for each of five other samples of the training reviews;
   the last step is kept.
5. **Scoring.** Each of these edits answers the test rows once.

Every training is a file of its own under `--out`, so that a killed study goes on where it stopped,
and several processes may work on one folder: each takes the next training that nobody has. Results:
`trainings.csv` (a row per training), `places.csv` (a row per budget and place: means, differences
from the traced layers, intervals over samples and, for random windows, over windows), `run.json`.
"""

from __future__ import annotations

import fcntl
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from mech_absa.commands.cli import command
from mech_absa.errors import ConfigError, EditError, MechAbsaError
from mech_absa.evaluate.predictions import predict
from mech_absa.examples import Example, mixed_polarity, split_by_sentence
from mech_absa.model import Model, load_model
from mech_absa.prompts import Verbalizer
from mech_absa.readers import load_examples
from mech_absa.records import atomic, versions, write_json
from mech_absa.scoring import gold_indices
from mech_absa.sites import Site
from mech_absa.train import PrefixCache, fit, presets
from mech_absa.train.places import named_layers, random_layers, random_windows

ROOT = Path(__file__).resolve().parents[1]
TUNING = 1000
"""Seed of the sample that rates are tuned on; the samples that are reported have seeds 0, 1, 2, ...
"""
VALIDATION = 146
"""Validation reviews, about an eighth of the training file."""


@dataclass(frozen=True)
class Config:
    """Train the paper's edit in different places, each with learning rates tuned for it."""

    domain: str = "restaurant"
    """Built-in domain to train and test on."""
    examples: tuple[int, ...] = (64, 320, 0)
    """Training examples; 0 takes all."""
    epochs: tuple[int, ...] = (1, 2, 10)
    """Passes over them."""
    skip: tuple[str, ...] = ("0x10",)
    """Budgets to leave out, as EXAMPLESxEPOCHS."""
    rates: tuple[float, ...] = (0.4, 1.0, 2.5, 6.25)
    """The preset's learning rates are tried times each of these."""
    samples: int = 5
    """Training samples of each place and budget."""
    windows: int = 5
    """Random windows, at most."""
    rank: int = 4
    """Rank of the edit."""
    test: int = 320
    """Test rows."""
    pairs: int = 200
    """Training reviews that are traced."""
    fast: bool = False
    """Use a handful of everything."""
    collect: bool = False
    """Only write the results of the trainings that are done."""
    until: float | None = None
    """Take no new training after this many seconds."""
    out: Path = ROOT / "runs" / "places"
    """Where the trainings are kept."""
    results: Path | None = None
    """Where the results go; default figures/results/places, and with --fast a folder beside the trainings.
    """

    @property
    def kept(self) -> Path:
        own = self.out / "results" if self.fast else ROOT / "figures" / "results" / "places"
        return self.results or own


FAST: dict[str, Any] = {
    "examples": (8,), "epochs": (1,), "skip": (), "rates": (1.0, 2.5), "samples": 2, "windows": 2, "test": 12, "pairs": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Name where an edit acts.

    Attributes:
        name: of the row in the tables; all random windows share one.
        layers: that are edited.
        position: of the representation part.
        rank: of both parts.
    """

    name: str
    layers: tuple[int, ...]
    position: str
    rank: int

    @property
    def window(self) -> str:
        """Return the layers as text. Tests cluster by it."""
        return " ".join(map(str, self.layers))


@dataclass(frozen=True)
class Job:
    """One training; `sample` is `TUNING` while rates are tuned."""

    place: Place
    examples: int
    epochs: int
    rate: float
    sample: int

    @property
    def name(self) -> str:
        p = self.place
        where = f"{p.name.replace(' ', '_')}-L{'.'.join(map(str, p.layers))}-{p.position}-r{p.rank}"
        return f"{where}-n{self.examples}-e{self.epochs}-x{self.rate:g}-s{self.sample}"


def places(traced: Sequence[Site], n_layers: int, rank: int, windows: int) -> list[Place]:
    """Return the places that are compared, the traced one first.

    Args:
        traced: sites that tracing selected.
        n_layers: layers of the model.
        rank: of the edit.
        windows: random windows, at most.
    """
    layers = tuple(sorted({s.layer for s in traced}))
    at = str(traced[0].at or presets.LAST_OF_QUERY)
    width = len(layers)
    rows = [Place("traced", layers, at, rank)]
    for name in ("first", "middle", "last"):
        if (span := named_layers(name, width, n_layers)) != layers:
            rows.append(Place(name, span, at, rank))
    others = [
        random_layers(width, n_layers, layers, d)
        for d in range(random_windows(width, n_layers, layers))
    ]
    free = [w for w in others if w not in {r.layers for r in rows}]
    rows += [Place("random", w, at, rank) for w in free[:windows]]
    everywhere = tuple(range(n_layers))
    rows.append(Place("all", everywhere, at, rank))
    rows.append(Place("all, same size", everywhere, at, max(1, rank * width // n_layers)))
    rows += [Place(f"traced, {p}", layers, p, rank) for p in ("before", "answer")]
    return rows


class Study:
    """The data, the model and the trainings that are done."""

    def __init__(self, config: Config):
        self.config = config
        self.parts = config.out / "parts"

    @cached_property
    def model(self) -> Model:
        return load_model("bundled", device="cpu")

    @cached_property
    def cache(self) -> PrefixCache:
        return PrefixCache(self.model)

    @cached_property
    def split(self) -> tuple[list[Example], list[Example]]:
        """(to train on, to tune on): training reviews, no sentence on both sides."""
        rows = list(load_examples(f"builtin:{self.config.domain}/train"))
        train, held = split_by_sentence(rows, VALIDATION / len(rows), 0)
        return (train[:20], held[:8]) if self.config.fast else (train, held)

    @cached_property
    def test(self) -> list[Example]:
        return list(load_examples(f"builtin:{self.config.domain}/test").sample(self.config.test))

    @cached_property
    def places(self) -> list[Place]:
        c = self.config
        text = (c.out / "trace" / "sites.json").read_text(encoding="utf-8")
        sites = [Site.parse(s) for s in json.loads(text)["sites"]]
        return places(sites, self.model.n_layers, c.rank, c.windows)

    @property
    def budgets(self) -> list[tuple[int, int]]:
        """(examples, epochs), the cheapest first."""
        c = self.config
        all_ = len(self.split[0])
        pairs = [(n, e) for n in c.examples for e in c.epochs if f"{n}x{e}" not in c.skip]
        return sorted(pairs, key=lambda b: (b[0] or all_) * b[1])

    def trace(self) -> None:
        """Trace the adapted model on training reviews, once."""
        folder, c = self.config.out / "trace", self.config
        if (folder / "sites.json").exists():
            return
        words = [
            "-m", "mech_absa.patch", "--data", f"builtin:{c.domain}/train", "--corruption", "counterfactual", "--limit", str(c.pairs),
            "--sites", "resid_post", "--no-figures", "--no-report", "--quiet", "--out", str(folder), "--resume",
        ]  # fmt: skip
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise MechAbsaError(f"the trace on training reviews failed: {done.stderr.strip()}")

    # ---- the trainings ----

    def path(self, job: Job) -> Path:
        return self.parts / f"{job.name}.json"

    def read(self, job: Job) -> dict[str, Any] | None:
        path = self.path(job)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def tuning(self, place: Place, budget: tuple[int, int]) -> list[Job]:
        return [Job(place, *budget, rate, TUNING) for rate in self.config.rates]

    def best_rate(self, place: Place, budget: tuple[int, int]) -> float | None:
        """Return the rate with the lowest validation loss; None while one is not trained yet."""
        rows = [self.read(job) for job in self.tuning(place, budget)]
        done = [row for row in rows if row is not None]
        if len(done) < len(rows):
            return None
        finite = [r for r in done if r["validation_loss"] is not None]
        if not finite:
            raise MechAbsaError(
                f"{place.name}, {budget}: the edit diverged at every rate of the grid"
            )
        return float(min(finite, key=lambda r: r["validation_loss"])["rate"])

    def final(self, place: Place, budget: tuple[int, int]) -> list[Job]:
        """Return the trainings that are reported; none while the rate is not known."""
        if (rate := self.best_rate(place, budget)) is None:
            return []
        return [Job(place, *budget, rate, sample) for sample in range(self.config.samples)]

    def jobs(self) -> Iterator[Job]:
        """Yield every training whose rate is known, budget by budget."""
        for budget in self.budgets:
            for place in self.places:
                yield from self.tuning(place, budget)
            for place in self.places:
                yield from self.final(place, budget)

    @contextmanager
    def claim(self, job: Job) -> Iterator[bool]:
        """Hold a training for this process; yields False where another process holds it."""
        self.parts.mkdir(parents=True, exist_ok=True)
        with open(self.parts / f".{job.name}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield not self.path(job).exists()

    def run(self) -> None:
        """Train all that nobody else has in hand."""
        started, left = time.monotonic(), True
        while left:
            left, worked = False, False
            for job in self.jobs():
                if self.path(job).exists():
                    continue
                if self.config.until and time.monotonic() - started > self.config.until:
                    return
                left = True
                with self.claim(job) as mine:
                    if mine:
                        write_json(self.path(job), self.train(job))
                        print(f"{time.strftime('%H:%M:%S')} {job.name}", flush=True)
                        worked = True
            if left and not worked:
                time.sleep(2)

    def train(self, job: Job) -> dict[str, Any]:
        """Train one edit and score it: a rate on validation reviews, a sample on the test rows."""
        train, held = self.split
        chosen = sample(train, job.examples, job.sample)
        sites = presets.range_sites(job.place.layers, [job.place.position])
        preset = presets.bundled(sites, "both", rank=job.place.rank, epochs=job.epochs)
        clock = time.process_time()
        edit = fit(self.model, chosen, preset.rates(job.rate), seed=job.sample, cache=self.cache)
        seconds = time.process_time() - clock
        row = {
            **asdict(job.place), "window": job.place.window, "budget": job.examples or "all", "examples": len(chosen), "epochs": job.epochs, "rate": job.rate,
            "sample": job.sample, "steps": len(edit.history), "parameters": edit.n_parameters, "cpu_seconds": round(seconds, 2),
        }  # fmt: skip
        scored = held if job.sample == TUNING else self.test
        values = quality(self.model, scored, edit)
        if job.sample == TUNING:
            return row | {f"validation_{k}": values[k] for k in ("loss", "accuracy")}
        return row | {"n": len(scored)} | values

    # ---- what is kept ----

    def collect(self) -> None:
        """Write the results of all trainings that are done."""
        rows = [row for job in self.jobs() if (row := self.read(job)) is not None]
        table = pd.DataFrame(rows)
        table["stage"] = np.where(table["sample"] == TUNING, "tuning", "scored")
        whole = compared(table, self.config.samples)
        for name, frame in (("trainings.csv", table.drop(columns="layers")), ("places.csv", whole)):
            with atomic(self.config.kept / name) as temporary:
                frame.to_csv(temporary, index=False, float_format="%.5g")
        sites = json.loads((self.config.out / "trace" / "sites.json").read_text(encoding="utf-8"))
        settings = {
            k: v
            for k, v in asdict(self.config).items()
            if k not in ("out", "results", "collect", "until")
        }
        train, held = self.split
        planned = (
            len(self.budgets) * len(self.places) * (len(self.config.rates) + self.config.samples)
        )
        write_json(
            self.config.kept / "run.json",
            {
                "study": "places", "question": "Does it matter where an edit acts, once every place has learning rates of its own?",
                "command": "python -m figures.places", "date": time.strftime("%Y-%m-%d", time.gmtime()), "config": settings,
                "model": {"name": self.model.name, "sha256": self.model.sha256}, "sites": sites,
                "places": [asdict(p) for p in self.places], "rows": {"train": len(train), "validation": len(held), "test": len(self.test)},
                "base": quality(self.model, self.test, None),
                "trainings": {"done": len(rows), "planned": planned}, "cpu_seconds": round(float(table["cpu_seconds"].sum())),
                "versions": versions(),
            },
        )  # fmt: skip


def sample(rows: Sequence[Example], n: int, seed: int) -> list[Example]:
    """Return `n` rows drawn without replacement; a bootstrap sample of sentences where all are asked for.

    With all rows there is but one sample without replacement, so that samples would differ in the
    seed of the training alone: sentences are then drawn with replacement.
    """
    rng = np.random.default_rng(seed)
    if n:
        return [rows[i] for i in sorted(rng.choice(len(rows), min(n, len(rows)), replace=False))]
    clusters: dict[str, list[Example]] = {}
    for row in rows:
        clusters.setdefault(row.cluster, []).append(row)
    names = sorted(clusters)
    drawn = [names[i] for i in rng.integers(0, len(names), len(names))]
    return [row for name in drawn for row in clusters[name]]


def quality(model: Model, rows: Sequence[Example], edit: Any) -> dict[str, float | None]:
    """Return loss and accuracy, and accuracy on sentences of several polarities; None where the
    edit diverged."""
    try:
        answers = predict(model, rows, edit, batch_size=64)
    except EditError:
        return {"loss": None, "accuracy": None, "accuracy_mixed": None}
    assert answers.scores is not None
    z = answers.scores - answers.scores.max(1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    gold = gold_indices(rows, Verbalizer()).numpy()
    mixed = list(mixed_polarity(rows))
    return {
        "loss": float(-logp[np.arange(len(rows)), gold].mean()),
        "accuracy": float(np.mean(answers.correct)),
        "accuracy_mixed": float(np.mean(np.asarray(answers.correct)[mixed])) if mixed else None,
    }


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean and its t interval over independent values; (mean, nan, nan) for one value.

    >>> [round(v, 3) for v in interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return float(x.mean()), math.nan, math.nan
    half = float(scipy_stats.t.ppf(0.5 + level / 2, len(x) - 1)) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def compared(table: pd.DataFrame, samples: int) -> pd.DataFrame:
    """Return a row per budget and place: means, and differences from the traced layers with intervals.

    Samples are paired: all places train on the same rows. `_sample` intervals are over samples (a
    random place counts there as the mean of its windows), `_window` intervals over random windows
    (each the mean of its samples). A place that lacks a training has no row.

    Args:
        table: a row per training.
        samples: that a place needs.
    """
    rows = []
    for (budget, epochs), group in table[table["stage"] == "scored"].groupby(
        ["budget", "epochs"], sort=False
    ):
        of = dict(iter(group.groupby("name", sort=False)))
        at = {
            n: p.pivot(index="sample", columns="window", values="accuracy") for n, p in of.items()
        }
        whole = {n: v for n, v in at.items() if len(v) == samples and not v.isna().any(axis=None)}
        rows += [
            {"budget": budget, "epochs": epochs, **_row(name, of[name], whole)} for name in whole
        ]
    return pd.DataFrame(rows)


def _row(name: str, part: pd.DataFrame, at: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Return what is said of one place and budget.

    Args:
        name: of the place.
        part: its trainings.
        at: place -> accuracies [sample, window] of all places of the budget.
    """
    mean, low, high = interval(at[name].mean(axis=1))
    row: dict[str, Any] = {
        "place": name, "layers": "; ".join(at[name].columns), "windows": at[name].shape[1], "samples": len(at[name]),
        "position": part["position"].iloc[0], "parameters": int(part["parameters"].max()), "steps": float(part["steps"].mean()),
        "rates": "; ".join(f"{r:g}" for r in part.groupby("window", sort=False)["rate"].first()),
        "accuracy": mean, "low": low, "high": high, "accuracy_mixed": part["accuracy_mixed"].mean(), "loss": part["loss"].mean(),
    }  # fmt: skip
    if name == "traced" or "traced" not in at:
        return row
    less = at[name].sub(at["traced"].iloc[:, 0], axis=0)
    for over, values in (("sample", less.mean(axis=1)), ("window", less.mean(axis=0))):
        if over == "sample" or len(values) > 1:
            row["difference"], row[f"low_{over}"], row[f"high_{over}"] = interval(values)
    return row


def main(config: Config) -> None:
    """Run what is missing, and write the results of what is done."""
    if config.samples < 1 or not config.rates:
        raise ConfigError("--samples and --rates each need at least one")
    if config.fast:
        config = replace(config, **FAST)
    study = Study(config)
    if not config.collect:
        study.trace()
        study.run()
    study.collect()


if __name__ == "__main__":
    raise SystemExit(command(Config, main, "python -m figures.places"))
