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
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mech_absa.commands.cli import command
from mech_absa.errors import ConfigError, MechAbsaError, choices
from mech_absa.patch.effects import Effects
from mech_absa.patch.gradients import agreement
from mech_absa.records import atomic, write_json
from mech_absa.sites import Site
from mech_absa.train.matrix import summary
from mech_absa.world import DOMAINS

from .interaction import keep_interaction

ROOT = Path(__file__).resolve().parents[1]
PATCH, MATRIX, CIRCUIT = "mech_absa.patch", "mech_absa.train.matrix", "figures.circuit"

TRACED = "trace_counterfactual"
"""The study whose sites all others edit."""
REAL_DOMAINS = ("device", "laptop", "rest", "service")
N_LAYERS = 8
"""Layers of the bundled model."""
ESTIMATES = ("atp", "atpstar", "relp", "ig")
METRICS = ("logit_diff", "prob")
POSITIONS = {
    "query.last": "aspect in the question", "aspect.last": "aspect in the sentence", "answer": "last word", "after": "words after the aspect",
    "8": "some word of the sentence", "2": "a word of the template",
}  # fmt: skip
"""Position at which a representation is edited -> its description; numbers count from the start of
the prompt.
"""
RANKS = (1, 2, 4, 8, 16)
METHODS = (
    "zero_shot", "both@sites", "both@first", "both@last", "both@random", "both@all", "lora_o@sites", "loreft@sites", "loreft@all",
    "lora@all", "dora@all", "prefix@all", "adapter@all", "bitfit@all", "red@sites",
)  # fmt: skip


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


@dataclass(frozen=True)
class Sizes:
    """Hold the sizes of all studies."""

    noise: int = 60
    """Pairs of the trace with noise on all tokens: ten draws of a whole prompt each."""
    pairs: int = 200
    """Pairs of the trace with counterfactuals."""
    estimates: int = 40
    """Pairs on which estimates are compared with exact effects."""
    interaction: int = 60
    """Pairs that are traced in both directions."""
    real_pairs: int = 30
    """Pairs of the trace of real reviews."""
    train: int = 320
    """Training examples per domain where methods are compared."""
    few: int = 128
    """The same where places are compared: few, so that the best do not all answer everything."""
    real_train: int | None = None
    test: int | None = 320
    """Test examples per built-in domain."""
    real_test: int | None = None
    epochs: int = 2
    few_epochs: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    many_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of studies that train on one domain only."""
    domains: tuple[str, ...] = tuple(DOMAINS)
    widths: tuple[int, ...] = (2, 4)
    """Widths of the ranges of layers that are edited."""
    circuit: int = 100
    """Pairs and examples on which a ranking is judged."""


FAST = Sizes(
    noise=2, pairs=6, estimates=3, interaction=3, real_pairs=2, train=24, few=24, real_train=24, test=24, real_test=24, epochs=1, few_epochs=1, seeds=(0,),
    many_seeds=(0,), domains=tuple(DOMAINS)[:2], widths=(2,), circuit=4,
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Describe one command.

    Attributes:
        name: of its folder in the study's.
        module: run by `python -m`.
        flags: all but --out and --resume; `{layers}` and `{sites}` stand for those of the traced
            study.
        mark: columns that its rows are given in the study's table.
    """

    name: str
    module: str
    flags: tuple[str, ...]
    mark: Mapping[str, Any]

    def words(self, results: Path) -> list[str]:
        """Return what follows `python`.

        Raises:
            ConfigError: it wants the traced sites, and there are none yet.
        """
        if not any("{" in flag for flag in self.flags):
            return ["-m", self.module, *self.flags]
        path = results / TRACED / "sites.json"
        if not path.exists():
            raise ConfigError(
                f"step {self.name} edits the traced sites, and there is no {_near(path)}; run the study {TRACED} first"
            )
        layers = sorted(
            Site.parse(s).layer for s in json.loads(path.read_text(encoding="utf-8"))["sites"]
        )
        said = {"layers": f"{layers[0]}-{layers[-1]}", "sites": str(_near(path))}
        return ["-m", self.module, *(flag.format(**said) for flag in self.flags)]


@dataclass(frozen=True)
class Study:
    """Describe a question, the commands that answer it, and what is kept of their outcome.

    Attributes:
        keep: (folders of the steps by name, folder of the results) -> None.
    """

    name: str
    question: str
    steps: tuple[Step, ...]
    keep: Callable[[Study, Path, Path], None]


def _flags(**given: Any) -> tuple[str, ...]:
    """Return keywords as flags: `limit_train=96` as `--limit-train 96`, a sequence as several
    words, None left out.
    """
    words: list[str] = []
    for name, value in given.items():
        if value is not None:
            values = value if isinstance(value, (tuple, list)) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return tuple(words)


def _trace(name: str, **flags: Any) -> Step:
    return Step(name, PATCH, (*_flags(**flags), "--no-figures", "--no-report", "--quiet"), {})


def _matrix(
    name: str,
    train: Iterable[str],
    test: Iterable[str],
    mark: Mapping[str, Any] | None = None,
    **flags: Any,
) -> Step:
    return Step(
        name,
        MATRIX,
        (*_flags(train=tuple(train), test=tuple(test), **flags), "--quiet"),
        mark or {},
    )


def windows(width: int, n_layers: int = N_LAYERS) -> list[str]:
    """Return every run of `width` neighbouring layers, as `2-3` (or `2`)."""
    return [str(i) if width == 1 else f"{i}-{i + width - 1}" for i in range(n_layers - width + 1)]


def studies(sizes: Sizes, me_absc: Path | None = None) -> list[Study]:
    """Return all studies, that of the traced sites first; those of real data only if their folder
    is given.
    """
    s = sizes
    reviews = [f"builtin:{d}" for d in s.domains]
    train, test = [f"{r}/train" for r in reviews], [f"{r}/test" for r in reviews]
    one = reviews[:1]
    small: dict[str, Any] = {
        "limit_train": s.few,
        "limit_test": s.test,
        "epochs": s.few_epochs,
        "validation": 0,
    }
    ranges = [f"0-{N_LAYERS - 1}", *(w for width in s.widths for w in windows(width))]
    made = [
        Study(
            TRACED,
            "Which states tell two polarities apart: attention, MLP, heads, residual stream, by minimal edits of the text?",
            (
                _trace(
                    "trace", data=f"{one[0]}/test", corruption="counterfactual", limit=s.pairs,
                    sites=("resid_post", "attn_out", "mlp_out", "head"),
                ),
            ),
            keep_trace,
        ),
        Study(
            "trace_noise",
            "Figure 3 of the paper: which states bring the answer back when all tokens are noised?",
            (_trace("trace", data=f"{one[0]}/test", corruption="noise", limit=s.noise),),
            keep_trace,
        ),
        Study(
            "matrix",
            "Tables 2 and 3: every method at the traced sites and elsewhere, trained on each domain and tested on all.",
            tuple(
                _matrix(
                    f"seed{seed}", train, test, methods=METHODS, seeds=seed, sites="{sites}", epochs=s.epochs, limit_train=s.train, limit_test=s.test
                )
                for seed in s.seeds
            ),
            keep_matrix,
        ),
        Study(
            "windows",
            "Does tracing tell where to edit? Every layer and every two neighbours edited alone, with few training examples.",
            tuple(
                _matrix(
                    f"{method}{width}", [f"{one[0]}/train"], [f"{one[0]}/test"], seeds=s.many_seeds,
                    methods=[f"{method}@{w}" for w in windows(width)], **small,
                )
                for method in ("both", "lora_o", "loreft")
                for width in (1, 2)
            ),
            keep_matrix,
        ),
        Study(
            "ranges",
            "Figure 4: accuracy over all domain pairs against the range of edited layers.",
            tuple(
                _matrix(f"seed{seed}", train, test, methods=[f"both@{r}" for r in ranges], seeds=seed, **small) for seed in s.seeds[:2]
            ),
            keep_matrix,
        ),
        Study(
            "positions",
            "Figure 5: accuracy against the token that is edited, with the weight part and without.",
            tuple(
                _matrix(
                    at.replace(".", "_"), train, test, {"position": at, "place": what}, methods=("both@{layers}", "loreft@{layers}"), positions=at,
                    seeds=s.seeds, **small,
                )
                for at, what in POSITIONS.items()
            ),
            keep_matrix,
        ),
        Study(
            "ranks",
            "How large must the edit be, and which class needs it?",
            tuple(
                _matrix(f"rank{r}", train, test, {"rank": r}, methods=("both@{layers}",), rank=r, seeds=s.seeds, **small) for r in RANKS
            ),
            keep_matrix,
        ),
        Study(
            "estimates",
            "How far are estimates from gradients (AtP, AtP*, RelP, integrated gradients) from the exact map of the same pairs?",
            tuple(
                _trace(
                    f"{metric}_{method}", data=f"{one[0]}/test", corruption="counterfactual", limit=s.estimates, method=method, metric=metric,
                    sites=("resid_post", "attn_out", "mlp_out", "head"),
                )
                for metric in METRICS
                for method in ("exact", *ESTIMATES)
            ),
            keep_estimates,
        ),
        Study(
            "interaction",
            "Does the direction matter? The same pairs with clean states restored and with corrupted states put in, and the difference.",
            tuple(
                _trace(
                    f"{metric}_{direction}", data=f"{one[0]}/test", corruption="counterfactual", limit=s.interaction, by="role",
                    metric=metric, direction=direction, sites=("resid_post", "attn_out", "mlp_out", "head"),
                )
                for metric in METRICS
                for direction in ("denoise", "noise")
            ),
            keep_directions,
        ),
        Study(
            "circuit",
            "Do the best-ranked heads and MLPs alone give the answer, and can the worst be removed? Ranked on one domain, judged on another.",
            (
                Step(
                    "circuit", CIRCUIT,
                    (*_flags(importance="{sites}", data=f"{reviews[1]}/test", limit=s.circuit, examples=s.test), "--quiet"), {},
                ),
            ),
            keep_curves,
        ),
    ]  # fmt: skip
    if me_absc is None:
        return made
    real_train, real_test = (
        [str(me_absc / f"{d}_{part}.json") for d in REAL_DOMAINS] for part in ("train", "test")
    )
    return [
        *made,
        Study(
            "trace_real",
            "Figure 3 on the paper's laptop reviews: noise on all tokens.",
            (_trace("trace", data=str(me_absc / "laptop_test.json"), corruption="noise", limit=s.real_pairs),),
            keep_map,
        ),
        Study(
            "matrix_real",
            "Tables 2 and 3 on the paper's data: four domains, sixteen pairs.",
            tuple(
                _matrix(
                    f"seed{seed}", real_train, real_test, methods=("zero_shot", "both@sites", "lora@all", "loreft@all"), seeds=seed, sites="{sites}",
                    limit_train=s.real_train, limit_test=s.real_test, epochs=s.epochs,
                )
                for seed in s.seeds
            ),
            keep_matrix,
        ),
    ]  # fmt: skip


REAL = ("trace_real", "matrix_real")


# ---- what is kept -------------------------------------------------------------------------------------------------------------


def keep_map(study: Study, work: Path, results: Path) -> None:
    """Keep the averaged map and the sites that were chosen from it, if any were."""
    folder = work / study.steps[0].name
    _table(pd.read_csv(folder / "importance.csv"), results / "importance.csv")
    for name in ("sites.json", "about.json"):
        if (folder / name).exists():
            write_json(results / name, json.loads((folder / name).read_text(encoding="utf-8")))


def keep_trace(study: Study, work: Path, results: Path) -> None:
    """Keep the same, and one pair word by word: the one with the median total effect."""
    keep_map(study, work, results)
    effects = Effects.load(work / study.steps[0].name)
    typical = effects.total.sort_values(kind="stable").index[(len(effects.total) - 1) // 2]
    frame = effects.frame[
        (effects.frame["example_id"] == typical) & (effects.frame["kind"] != "head")
    ]
    one = effects.pairs[effects.pairs["example_id"] == typical]
    about = dict(effects.about) | {"kept": 1}
    replace(effects, frame=frame, pairs=one, about=about).save(results / "example")


def keep_matrix(study: Study, work: Path, results: Path) -> None:
    """Keep the rows of all steps, each with its step's marks; the unedited model stands once."""
    table = pd.concat(
        [pd.read_csv(work / step.name / "matrix.csv").assign(**step.mark) for step in study.steps],
        ignore_index=True,
    )
    again = (table["method"] == "zero_shot") & table.duplicated(["method", "test"])
    table = table[~again]
    _table(table, results / "matrix.csv")
    if not any(step.mark for step in study.steps):
        rows = table.astype(object).where(table.notna(), "").to_dict("records")
        _table(summary(rows), results / "summary.csv")


def keep_estimates(study: Study, work: Path, results: Path) -> None:
    """Keep exact and estimated maps side by side, one row per cell, and how well they agree."""
    parts = []
    for metric in METRICS:
        keys = ["kind", "layer", "head", "role"]
        maps = {
            m: pd.read_csv(work / f"{metric}_{m}" / "importance.csv").set_index(keys)["aie"]
            for m in ("exact", *ESTIMATES)
        }
        parts.append(pd.DataFrame(maps).reset_index().assign(metric=metric))
        about = json.loads((work / f"{metric}_exact" / "about.json").read_text(encoding="utf-8"))
        write_json(results / f"about_{metric}.json", about)
    table = pd.concat(parts, ignore_index=True)
    _table(table, results / "agreement.csv")
    _table(agreements(table), results / "summary.csv")


def agreements(table: pd.DataFrame) -> pd.DataFrame:
    """Return how well each estimate stands for the exact map, one row per metric and method.

    Cells whose exact effect is 0 are left out, since most of them are 0 for certain. The overlap is
    that of the largest twentieth of the cells.
    """
    rows = []
    for metric, cells in table[table["exact"] != 0].groupby("metric", sort=False):
        largest = max(1, len(cells) // 20)
        for method in ESTIMATES:
            row = agreement(cells["exact"], cells[method], largest)
            rows.append({"metric": metric, "method": method, **row})
    return pd.DataFrame(rows)


def keep_directions(study: Study, work: Path, results: Path) -> None:
    """Keep the effects of both directions and their difference, one row per cell."""
    keep_interaction(work, results)


def keep_curves(study: Study, work: Path, results: Path) -> None:
    for name in ("faithfulness", "pruning"):
        _table(pd.read_csv(work / study.steps[0].name / f"{name}.csv"), results / f"{name}.csv")


def _table(table: pd.DataFrame, path: Path) -> None:
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.5g")


def record(
    study: Study, work: Path, commands: Mapping[str, str], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Return a study's run.json: how each of its steps was made, and when."""
    runs = {
        s.name: json.loads((work / s.name / "run.json").read_text(encoding="utf-8"))
        for s in study.steps
    }
    last = max((work / s.name / "run.json").stat().st_mtime for s in study.steps)
    return {
        "study": study.name, "question": study.question, "date": time.strftime("%Y-%m-%d", time.gmtime(last)), "commands": dict(commands),
        "seconds": {name: round(value, 1) for name, value in seconds.items()}, "runs": runs,
    }  # fmt: skip


def scrubbed(value: Any, names: Mapping[str, str]) -> Any:
    """Return `value` with the folders of this machine replaced by their names."""
    if isinstance(value, dict):
        return {k: scrubbed(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [scrubbed(v, names) for v in value]
    if isinstance(value, str):
        for folder, name in names.items():
            value = value.replace(folder, name)
    return value


# ---- running ------------------------------------------------------------------------------------------------------------------


def _near(path: Path) -> Path:
    """Return the path as seen from the project's folder, if it lies inside."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


class Runner:
    """Run steps as processes.

    A step's log begins with its command and ends with the seconds it took. A step whose log is
    complete and begins with the same command is finished.
    """

    def __init__(self, config: Config):
        self.config = config
        self.traced = threading.Event()

    def run(self, study: Study, step: Step) -> tuple[str, float]:
        """Return the command of a step and the seconds it took.

        A killed run continues, so the seconds may be those of a part.
        """
        if study.name != TRACED:
            self.traced.wait()
        folder = self.config.work / study.name / step.name
        words = [*step.words(self.config.kept), "--out", str(_near(folder)), "--resume"]
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
                f"{study.name}/{step.name} ended with {done.returncode}: {last} (all of it in {_near(log)})"
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
    all_studies = studies(FAST if config.fast else Sizes(), config.me_absc)
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


def _keep(config: Config, study: Study, done: list[tuple[str, float]], known: list[str]) -> None:
    """Keep the results of a study, its record, and the (command, seconds) of its steps."""
    names = {str(config.kept): "figures/results", str(_near(config.kept)): "figures/results"}
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
        f"{study.name}: {sum(seconds.values()):.0f} s in {len(done)} steps, kept in {_near(results)}",
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
