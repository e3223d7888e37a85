"""Make every result anew that `figures/` draws: `make reproduce`.

    python -m figures.reproduce                             # bundled model, built-in reviews
    python -m figures.reproduce --me-absc ../data/me_absc   # and the paper's data
    python -m figures.reproduce --fast                      # the same commands on a few examples
    python -m figures.reproduce --only windows ranks        # these studies alone

A study asks one question and consists of a few public commands (`python -m mech_absa.patch`,
`python -m mech_absa.train.matrix`), each in a process of its own. `--jobs` of them run side by
side, with one thread each. They leave their folders and logs under `runs/reproduce/<study>/<step>`.
A finished command is not run again, and a killed one continues where it stopped. When a study is
complete, the small part of its outcome goes to `figures/results/<study>/`, which is kept with the
code, so that `make figures` needs no model:

    run.json                   the question, the commands, and the record of each: configuration,
                               versions, hashes, counts, seconds; no path of this machine
    importance.csv, about.json, sites.json     of a trace
    example/                   effects of one pair of a trace, whose total effect is the median
    matrix.csv                 of trainings, one row per method, seed, training and test domain
    summary.csv                the same, one row per method
    agreement.csv, summary.csv  of estimates beside the exact map, one row per cell and per method
    faithfulness.csv, pruning.csv              curves

`figures/results/times.csv` has the seconds of every command.
"""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mech_absa.commands.cli import command
from mech_absa.errors import ConfigError, MechAbsaError, choices
from mech_absa.records import atomic, write_json

from .builtin import FAST, REAL, REAL_DOMAINS, Sizes, plans
from .keep import record, scrubbed
from .plan import ROOT, TRACED, Plan, Step, near


@dataclass(frozen=True)
class Config:
    """Run the studies behind the figures, and keep their small results."""

    only: tuple[str, ...] = ()
    """Run these studies alone. Default: all."""
    me_absc: Path | None = None
    """Folder of the paper's data (device_train.json ...). Without it, studies of real data are left
    as they are.
    """
    fast: bool = False
    """Use a few examples everywhere: this tries the commands and shows nothing."""
    jobs: int = 2
    """Commands that run side by side, one thread each."""
    runs: Path | None = None
    """Folder in which the commands work. Default: runs/reproduce."""
    results: Path | None = None
    """Folder of the small results. Default: figures/results; with --fast, a folder beside the
    runs.
    """

    def __post_init__(self):
        if self.jobs < 1:
            raise ConfigError(f"--jobs {self.jobs} was given; it must be 1 or more")

    @property
    def work(self) -> Path:
        return self.runs or ROOT / "runs" / ("reproduce_fast" if self.fast else "reproduce")

    @property
    def kept(self) -> Path:
        return self.results or (
            self.work / "results" if self.fast else ROOT / "figures" / "results"
        )


class Runner:
    """Run steps as processes.

    A step's log begins with its command and ends with the seconds it took. A step whose log is
    complete and begins with the same command is finished.
    """

    def __init__(self, config: Config):
        self.config = config
        self.traced = threading.Event()

    def run(self, study: Plan, step: Step) -> tuple[str, float]:
        """Return the command of a step and the seconds it took.

        A killed run continues, so the seconds may be those of a part.
        """
        if study.name != TRACED:
            self.traced.wait()
        folder = self.config.work / study.name / step.name
        words = [*step.words(self.config.kept), "--out", str(near(folder)), "--resume"]
        said, log = shlex.join(["python", *words]), folder.with_suffix(".log")
        if (before := self._been_through(log, folder, said)) is not None:
            return said, before
        folder.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with open(log, "w", encoding="utf-8") as out:
            out.write(said + "\n")
            out.flush()
            limits = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            done = subprocess.run(
                [sys.executable, *words],
                cwd=ROOT,
                env=os.environ | limits,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            seconds = time.perf_counter() - started
            if done.returncode == 0:
                out.write(f"\nseconds {seconds:.1f}\n")
        if done.returncode:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
            raise MechAbsaError(
                f"{study.name}/{step.name} ended with {done.returncode}: {last} (all of it in {near(log)})"
            )
        print(f"{study.name}/{step.name}: {seconds:.0f} s", flush=True)
        return said, seconds

    @staticmethod
    def _been_through(log: Path, folder: Path, said: str) -> float | None:
        if not log.exists() or not (folder / "run.json").exists():
            return None
        lines = log.read_text(encoding="utf-8").splitlines()
        return (
            float(lines[-1].split()[1])
            if lines[0] == said and lines[-1].startswith("seconds ")
            else None
        )


def run(config: Config) -> None:
    """Run what is asked for, keep the small results, and print what each step took.

    Raises:
        ConfigError: there is no study of that name.
        MechAbsaError: a study failed; the others are done all the same.
    """
    all_studies = plans(FAST if config.fast else Sizes(), config.me_absc)
    known = [s.name for s in all_studies]
    _check(config, known)
    chosen = [s for s in all_studies if not config.only or s.name in config.only]
    started, runner, failed = time.perf_counter(), Runner(config), []
    if chosen[0].name != TRACED:
        runner.traced.set()
    with ThreadPoolExecutor(config.jobs) as pool:
        going: dict[str, list[Future[tuple[str, float]]]] = {
            study.name: [pool.submit(runner.run, study, step) for step in study.steps]
            for study in chosen
        }
        for study in chosen:
            try:
                _keep(config, study, [future.result() for future in going[study.name]], known)
            except MechAbsaError as error:
                failed.append(str(error))
                print(f"{study.name} failed: {error}", file=sys.stderr, flush=True)
            finally:
                if study.name == TRACED:
                    runner.traced.set()
    print(f"{time.perf_counter() - started:.0f} s for {len(chosen)} studies")
    if config.me_absc is None and not config.only:
        print(f"left as they are, for they need --me-absc: {', '.join(REAL)}")
    if failed:
        raise MechAbsaError(
            f"{len(failed)} of {len(chosen)} studies failed; the first: {failed[0]}"
        )


def _check(config: Config, known: list[str]) -> None:
    """Reject a study that does not exist, or that lacks its data."""
    for name in config.only:
        if name in REAL and config.me_absc is None:
            raise ConfigError(
                f"study {name} needs the paper's data; name its folder with --me-absc"
            )
        if name not in known:
            raise ConfigError(
                f"--only {name!r} is no study; accepted: {choices([*known, *(r for r in REAL if r not in known)])}"
            )
    if config.me_absc is not None and (
        missing := [d for d in REAL_DOMAINS if not (config.me_absc / f"{d}_train.json").exists()]
    ):
        raise ConfigError(
            f"--me-absc {config.me_absc} holds no {missing[0]}_train.json; the folder of the paper's data is needed"
        )


def _keep(config: Config, study: Plan, done: list[tuple[str, float]], known: list[str]) -> None:
    """Keep the results of a study, its record, and the (command, seconds) of its steps."""
    names = {str(config.kept): "figures/results", str(near(config.kept)): "figures/results"}
    if config.me_absc is not None:
        names |= {str(config.me_absc): "me_absc"}
    names |= {f"{ROOT}/": ""}
    work, results = config.work / study.name, config.kept / study.name
    study.keep(study, work, results)
    commands = {step.name: said for step, (said, _) in zip(study.steps, done, strict=True)}
    seconds = {step.name: taken for step, (_, taken) in zip(study.steps, done, strict=True)}
    write_json(results / "run.json", scrubbed(record(study, work, commands, seconds), names))
    _note_times(config.kept / "times.csv", study.name, seconds, known)
    print(
        f"{study.name}: {sum(seconds.values()):.0f} s in {len(done)} steps, kept in {near(results)}",
        flush=True,
    )


def _note_times(path: Path, study: str, seconds: Mapping[str, float], order: list[str]) -> None:
    """Write a study's seconds into the table of all studies."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        with open(path, encoding="utf-8", newline="") as f:
            rows = [row for row in csv.DictReader(f) if row["study"] != study]
    rows += [
        {"study": study, "step": step, "seconds": f"{value:.1f}"} for step, value in seconds.items()
    ]
    order = [*order, *(r for r in REAL if r not in order)]
    rows.sort(key=lambda row: order.index(row["study"]) if row["study"] in order else len(order))
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, ["study", "step", "seconds"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    raise SystemExit(command(Config, run, "python -m figures.reproduce"))
