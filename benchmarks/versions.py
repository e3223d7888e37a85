"""Compare the CPU seconds of two versions of this project: did a change make anything slower?

    git worktree add ../before 41fa129
    python -m benchmarks.versions --before ../before             a row for every kind of work
    python -m benchmarks.versions --before ../before --write     kept in results/versions.json
    python -m benchmarks.tables                                  the table, in README.md

Two processes stay open, one for each version, with one thread each. They do the same work in turns, so that a
busy neighbour slows both, and which of them begins changes from round to round. A row gives the median over
rounds of after / before, in CPU seconds, and the lowest and the highest ratio. Only names that both versions
have are used. Each process also returns a number from its result, which must agree.

Every round traces other reviews, so that no kernel is at hand only because the same work was done before.
Traces compute the same cells in both: by role, this version also traces the controls, which are cells of their
own, and its self-checks look for the largest cell; both are left out here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "versions.json"
SHAPES = ("tiny", "tiny-gqa", "tiny-parallel", "llama-gqa", "pythia", "gpt2-small")
"""Random models of `sweep.py` whose exact sweep is timed."""
SHORT = {f"sweep {shape}" for shape in SHAPES if shape.startswith("tiny")}
"""Work of a fifth of a second, done in twelve times as many rounds: the speed of a shared machine
changes by half within seconds, for the CPU time too."""
TITLES = {
    **{f"sweep {shape}": f"exact sweep, {shape}" for shape in SHAPES},
    "trace by role": "trace of 8 built-in pairs by role",
    "trace by token": "trace of 4 built-in pairs by token, heads too",
    "noise": "trace of 3 pairs with ten noise draws, by role",
    "gradients": "AtP of 16 pairs",
    "fit": "training the paper's edit, 64 examples, 2 epochs",
    "fit all layers": "training it in all layers, 64 examples, 1 epoch",
    "predict": "answers to 200 reviews",
}


# ---- the work, in a process of one version -------------------------------------------------------


def works() -> dict[str, Callable[[], tuple[float, float]]]:
    """Return each kind of work; doing it returns a number of its result and the units of work."""
    import torch

    import mech_absa as ma
    from benchmarks import sweep

    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):  # the first version has neither the module nor controls
        import mech_absa.patch.plan

        mech_absa.patch.plan.control_spans = lambda pair: []
    model = ma.load_model()
    test, train = (ma.load_examples(f"builtin:restaurant/{part}") for part in ("test", "train"))
    swap, noise = ma.Counterfactual(), ma.GaussianNoise(scale=3.0, draws=10)
    begin = itertools.count()

    def pairs(n: int, corruption: Any = swap) -> Any:
        """Return n pairs of reviews that were not traced before: a run meets every length anew."""
        return ma.make_pairs(model, test[20 * (next(begin) % 15) :], corruption, limit=n)

    kinds = ("resid_post", "attn_out", "mlp_out")
    everywhere = [ma.Site.parse(f"L{layer}.resid_post@query.last") for layer in range(8)]

    def traced(some: Any, **how: Any) -> tuple[float, float]:
        effects = ma.trace(model, some, **how)
        return float(effects.frame["effect"].abs().mean()), 1

    def fitted(preset: Any, epochs: int) -> tuple[float, float]:
        edit = ma.fit(model, train[:64], replace(preset, epochs=epochs))
        return float(edit.history[0]["loss"]), 1

    def swept(shape: str) -> Callable[[], tuple[float, float]]:
        q = sweep.question(sweep.random_model(sweep.SHAPES[shape]), sweep.SHAPES[shape])
        times = 5 if shape.startswith("tiny") else 1  # one takes milliseconds

        def work() -> tuple[float, float]:
            return [float(sweep.ours(q).abs().mean()) for _ in range(times)][-1], times

        return work

    return {
        **{f"sweep {shape}": swept(shape) for shape in SHAPES},
        "trace by role": lambda: traced(pairs(8), sites=kinds, by="role", check=False),
        "trace by token": lambda: traced(pairs(4), sites=(*kinds, "head"), by="token", check=False),
        "noise": lambda: traced(pairs(3, noise), sites=kinds, by="role", check=False),
        "gradients": lambda: traced(pairs(16), sites=kinds, method="atp"),
        "fit": lambda: fitted(ma.presets.paper(everywhere[3:5]), 2),
        "fit all layers": lambda: fitted(ma.presets.paper(everywhere), 1),
        "predict": lambda: (float(ma.predict(model, test[:200]).scores.mean()), 1),
    }


def serve() -> None:
    """Do the work whose name comes on a line; answer with CPU seconds a unit and its number."""
    known, out = works(), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed on the way goes elsewhere
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        started = time.process_time()
        number, units = known[line.strip()]()
        seconds = (time.process_time() - started) / units
        print(json.dumps([seconds, number]), file=out, flush=True)


# ---- both versions -------------------------------------------------------------------------------


class Version:
    """A process that works with the code of one folder."""

    def __init__(self, folder: Path):
        if not (folder / "mech_absa" / "__init__.py").exists():
            raise SystemExit(f"{folder} holds no mech_absa; give the root of a checkout")
        env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        code = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "--serve"], cwd=folder, env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.answer()

    def answer(self) -> str:
        """Return the next line of the process."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit("a version ended before it answered; its error stands above")
        return line

    def do(self, work: str) -> tuple[float, float]:
        """Return the CPU seconds of a unit of work and a number of its result."""
        assert self.process.stdin is not None
        self.process.stdin.write(work + "\n")
        self.process.stdin.flush()
        seconds, number = json.loads(self.answer())
        return seconds, number


@dataclass(frozen=True)
class Row:
    """What one kind of work costs in both versions.

    Attributes:
        work: its name.
        before, after: medians, CPU seconds.
        ratio: median over rounds of after / before.
        low, high: the lowest and the highest ratio.
        difference: of the numbers that both return.
    """

    work: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    difference: float


@dataclass(frozen=True)
class Config:
    """Do the same work with two versions of the project, in turns."""

    before: Path
    """The root of a checkout of the older version."""
    works: tuple[str, ...] = tuple(TITLES)
    """Which kinds of work."""
    rounds: int = 5
    """Times that each version does each (twelve times as often where it is short); one more, the first, warms up."""
    write: bool = False
    """Keep the results in results/versions.json."""


def compare(config: Config) -> list[Row]:
    """Return a row for every kind of work."""
    both = {"before": Version(config.before.resolve()), "after": Version(HERE.parent)}
    rows = []
    for work in config.works:
        seconds: dict[str, list[float]] = {name: [] for name in both}
        numbers = {}
        rounds = config.rounds * (12 if work in SHORT else 1)
        for turn in range(rounds + 1):
            for name in sorted(both, reverse=turn % 2 == 0):
                taken, numbers[name] = both[name].do(work)
                if turn:
                    seconds[name].append(taken)
        ratios = [a / b for a, b in zip(seconds["after"], seconds["before"], strict=True)]
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        difference = abs(numbers["after"] - numbers["before"])
        ratio = statistics.median(ratios)
        rows.append(Row(work, **medians, ratio=ratio, low=min(ratios), high=max(ratios), difference=difference))  # fmt: skip
        print(f"{work}: {ratio:.3f} [{min(ratios):.3f}, {max(ratios):.3f}]", flush=True)
    return rows


def main(config: Config) -> None:
    """Compare, and write what is asked for."""
    from mech_absa.records import read_json, write_json

    rows = [asdict(row) for row in compare(config)]
    if config.write:  # rows of other kinds of work stay
        kept = {row["work"]: row for row in read_json(RESULT)["rows"]} if RESULT.exists() else {}
        kept |= {row["work"]: row | {"rounds": config.rounds} for row in rows}
        write_json(RESULT, {"titles": TITLES, "rows": [kept[w] for w in TITLES if w in kept]})


if __name__ == "__main__":
    serve() if "--serve" in sys.argv else main(tyro.cli(Config, description=Config.__doc__))
