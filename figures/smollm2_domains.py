"""Train on one domain, score on all four, on SmolLM2-135M: `python -m figures.smollm2_domains --data DATA`.

Tables 2 and 3 of the paper: each system is trained on the rows of one domain, and scored on the test
rows of this domain and of the three others. The systems are the paper's edit at the traced layers
and LoRA in all layers, with the learning rates that the study of places chose on validation rows
(`figures/results/smollm2/places`); test rows are those of that study too. No rate is tuned for a
domain.

Each training and each scoring is a file of its own under `--out`, so that a killed run goes on where
it stopped. Written are `trainings.csv`, `answers.csv` (a row per test row, a column per system,
training domain and seed), `domains.csv` and `run.json`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mech_absa.commands.cli import command
from mech_absa.errors import ConfigError
from mech_absa.records import atomic, versions, write_json
from mech_absa.stats import cluster_bootstrap

from . import smollm2_places
from .smollm2_adapter import DOMAINS, split
from .smollm2_places import ROOT, SECONDS, Job, Place, Rows, Work

SYSTEMS = ("traced", "lora all")
"""Places of the study of places that are trained on each domain."""


@dataclass(frozen=True)
class Config:
    """Train on each domain of the paper's data and score on all, with SmolLM2-135M."""

    data: Path
    """Folder with me_absc/ and mams/."""
    model: str = "smollm2"
    """The model."""
    places: Path = ROOT / "figures" / "results" / "smollm2" / "places"
    """Results of the study of places: the rates that it chose."""
    sites: Path = ROOT / "figures" / "results" / "smollm2" / "places" / "sites.json"
    """Sites that tracing chose."""
    train: int = 160
    """Training rows of a domain."""
    test: int = 50
    """Rows of each test file."""
    words: int = 20
    """Longest sentence that is trained on."""
    seeds: int = 3
    """Trainings of each system and domain."""
    until: float | None = None
    """Begin nothing new after this many seconds."""
    out: Path = ROOT / "runs" / "smollm2" / "smollm2" / "domains" / "domains"
    """Where the trainings are kept, and the tables."""
    resume: bool = True
    """Go on with what is there."""

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.train < 1:
            raise ConfigError("--seeds and --train each need at least one")

    def of(self, domain: str) -> smollm2_places.Config:
        """Return what the trainings on one domain are asked for."""
        return smollm2_places.Config(
            self.data, self.model, self.sites, test=self.test, words=self.words, seeds=self.seeds,
            until=self.until, out=self.out / domain,
        )  # fmt: skip


@dataclass(eq=False)
class OneDomain(Work):
    """The trainings on one domain, with the rows of validation and test of the study of places."""

    domain: str = ""
    size: int = 0
    shared: Rows | None = field(default=None, repr=False)

    @cached_property
    def rows(self) -> Rows:
        """Return the rows of the study of places, with the training rows of this domain alone."""
        found = self.shared or smollm2_places.rows_of(self.config)
        apart = split(self.config.data, self.domain, self.size)
        short = [
            e for e in (*apart.train, *apart.spare) if len(e.sentence.split()) <= self.config.words
        ]
        return Rows(short[: self.size], found.held, found.test)


def chosen_rates(folder: Path) -> dict[str, float]:
    """Return the learning rate that each place took on validation rows.

    Raises:
        ConfigError: the study of places has no result for one of the systems.
    """
    path = folder / "places.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame({"place": [], "rate": []})
    found = dict(zip(table["place"], table["rate"], strict=True))
    if missing := [s for s in SYSTEMS if s not in found]:
        raise ConfigError(
            f"--places {folder} holds no rate for {missing[0]!r}; run figures.smollm2_places first"
        )
    return {s: float(found[s]) for s in SYSTEMS}


def run(config: Config) -> list[OneDomain]:
    """Train and score what is missing, seed by seed, and return the work on each domain."""
    rates, started = chosen_rates(config.places), time.monotonic()
    works: list[OneDomain] = []
    for domain in DOMAINS:
        first = works[0] if works else None
        work = OneDomain(
            config.of(domain), started, domain=domain, size=config.train,
            shared=None if first is None else first.rows,
        )  # fmt: skip
        if first is not None:  # one model and one store of streams for all
            work.model, work.task, work.places = first.model, first.task, first.places
        works.append(work)
    for seed in range(config.seeds):
        for work in works:
            for job in jobs(work.places, rates, seed):
                for what in ("train", "score"):
                    if not work.late:
                        work.do(what, job)
    return works


def jobs(places: list[Place], rates: dict[str, float], seed: int) -> list[Job]:
    """Return the trainings of one seed on one domain."""
    of = {p.name: p for p in places}
    return [Job(of[name], rate, seed) for name, rate in rates.items()]


def collect(config: Config, works: list[OneDomain]) -> None:
    """Write the tables of all that is done."""
    rates, trainings = chosen_rates(config.places), []
    answers = works[0].answers()[["file", "sentence", "gold"]]
    for seed in range(config.seeds):
        for work in works:
            for job in jobs(work.places, rates, seed):
                if (row := work.read(job.name)) is not None:
                    trainings.append({"domain": work.domain, **row})
                if (found := work.read(f"{job.name}.test")) is not None:
                    answers[f"{job.place.name}/{work.domain}/{seed}"] = found["answers"]
    tables = {"trainings": pd.DataFrame(trainings), "answers": answers, "domains": scored(answers)}
    for name, table in tables.items():
        with atomic(config.out / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.5g")
    hidden = ("out", "resume", "until", "data", "sites", "places")
    write_json(
        config.out / "run.json",
        {
            "command": "figures.smollm2_domains",
            "model": {"name": works[0].model.name, "sha256": works[0].model.sha256},
            "config": {k: v for k, v in asdict(config).items() if k not in hidden},
            "rows": {
                "train": config.train,
                "validation": len(works[0].rows.held),
                "test": len(answers),
            },
            "rates": rates,
            "trainings": {
                "done": len(trainings),
                "planned": len(SYSTEMS) * len(DOMAINS) * config.seeds,
            },
            "seconds": round(sum(row["seconds"] for row in trainings)),
            "versions": versions(),
        },
    )


def scored(answers: pd.DataFrame) -> pd.DataFrame:
    """Return a row per system and training domain, and one over all domains.

    A test row counts with its mean over seeds. `inside` is the accuracy on the test file of the
    training domain, `outside` that on the three others; intervals resample test sentences. Over all
    domains, each test row has one value inside, and the mean of three outside.

    Args:
        answers: columns file, sentence, gold, and SYSTEM/DOMAIN/SEED.

    Returns:
        columns system, domain, seeds, one per test file, inside, outside with ends of intervals.

    >>> table = pd.DataFrame({"file": ["a", "b"], "sentence": [0, 1], "gold": ["x", "y"], "s/a/0": ["x", "x"]})
    >>> scored(table)[["domain", "a", "b", "inside", "outside"]].values.tolist()[0]
    ['a', 1.0, 0.0, 1.0, 0.0]
    """
    right = {c: answers[c].eq(answers["gold"]).astype(float) for c in answers.columns[3:]}
    made = []
    for system in dict.fromkeys(c.split("/")[0] for c in right):
        by: dict[str, list[str]] = {}
        for c in right:
            if c.split("/")[0] == system:
                by.setdefault(c.split("/")[1], []).append(c)
        means = {d: pd.concat([right[c] for c in cs], axis=1).mean(axis=1) for d, cs in by.items()}
        for domain, mean in means.items():
            own = answers["file"] == domain
            made.append(_row(system, domain, len(by[domain]), answers, mean.where(own), mean.where(~own)))  # fmt: skip
        inside = pd.concat([m.where(answers["file"] == d) for d, m in means.items()], axis=1)
        outside = pd.concat([m.where(answers["file"] != d) for d, m in means.items()], axis=1)
        seeds = min(len(cs) for cs in by.values())
        made.append(_row(system, "all", seeds, answers, inside.mean(axis=1), outside.mean(axis=1)))
    return pd.DataFrame(made)


def _row(
    system: str, domain: str, seeds: int, answers: pd.DataFrame, inside: pd.Series, outside: pd.Series
) -> dict[str, Any]:  # fmt: skip
    """Return a row of the table; values of `inside` and `outside` are NaN where a row has no part."""
    row: dict[str, Any] = {"system": system, "domain": domain, "seeds": seeds}
    if domain != "all":
        whole = inside.fillna(outside)
        row |= {f: float(whole[answers["file"] == f].mean()) for f in dict.fromkeys(answers["file"])}  # fmt: skip
    for name, values in (("inside", inside), ("outside", outside)):
        there = values.notna().to_numpy()
        if not there.any():
            continue
        found = cluster_bootstrap(values[there].to_numpy(), answers["sentence"].to_numpy()[there])
        row |= {
            name: float(found.mean),
            f"{name}_low": float(found.low),
            f"{name}_high": float(found.high),
        }
    return row


def seconds(config: Config) -> float:
    """Return the seconds of one core that the study takes, about: as if all layers ran."""
    each = config.train * SECONDS["train"] + len(DOMAINS) * config.test * SECONDS["score"]
    return len(SYSTEMS) * len(DOMAINS) * config.seeds * each


def main(config: Config) -> None:
    """Do what is missing, and write the tables of what is done."""
    torch.set_num_threads(1)
    print(f"about {seconds(config) / 60:.0f} CPU-minutes for all of it", flush=True)
    collect(config, run(config))


if __name__ == "__main__":
    raise SystemExit(command(Config, main, "python -m figures.smollm2_domains"))

__all__ = ["Config", "OneDomain", "chosen_rates", "collect", "run", "scored", "seconds"]
