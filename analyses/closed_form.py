"""Score edits that no training made beside trained ones: `python analyses/closed_form.py`.

All edit the *base* bundled model, without the shipped adaptation, from the same 64 reviews, in the
same layer and at the same token: the mean difference with its two controls, ROME, MEMIT and AlphaEdit,
and, for comparison, a trained steering vector and the paper's two parts. Alpha, weight, threshold and
l2 are chosen on 150 validation reviews; training, validation and background reviews share no sentence
with one another, and come from another file than the test reviews. Those are scored once: 200 that
were scored while the grids were still changed are left out, with their sentences. ROME with labels
in random order says how much of its gain the labels make.

Results go to `figures/results/closed_form`: `closed_form.csv` (a row per system) and `run.json`.
Intervals resample test sentences and hold for these 64 reviews; other draws of 64 give other numbers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mech_absa.commands.cli import command
from mech_absa.edits import Edit
from mech_absa.evaluate.baselines import best_wording
from mech_absa.evaluate.predictions import Predictions, predict
from mech_absa.evaluate.scores import compare, score
from mech_absa.examples import Example, Examples, split_by_sentence
from mech_absa.model import Model, load_model
from mech_absa.readers import load_examples
from mech_absa.records import atomic, versions, write_json
from mech_absa.scoring import question
from mech_absa.sites import Site
from mech_absa.train import MEMIT, ROME, AlphaEdit, closed_form, difference_of_means, presets
from mech_absa.train.closed_form import Plan, second_moments
from mech_absa.train.facts import Aim
from mech_absa.train.fit import fit
from mech_absa.train.means import ALPHAS, DifferenceOfMeans
from mech_absa.train.prefix import PrefixCache
from mech_absa.train.task import Task

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Config:
    """Score edits without training on the bundled model."""

    train: str = "builtin:laptop/train"
    """Reviews of which 64 are learnt from; others choose settings and give C."""
    test: str = "builtin:laptop/test"
    """Reviews that are scored once."""
    layer: int = 3
    """Where to edit."""
    at: str = "query.last"
    """At which token."""
    examples: int = 64
    """Reviews to learn from."""
    validation: int = 150
    """Reviews to choose settings on."""
    background: int = 100
    """Reviews whose tokens give C."""
    tested: int = 200
    """Reviews that are scored."""
    left_out: int = 200
    """Test reviews that are never scored: those that were seen while the grids were chosen."""
    controls: int = 3
    """Draws of each control of the mean difference."""
    seed: int = 0
    """Of every draw."""
    out: Path = ROOT / "figures" / "results" / "closed_form"
    """Where the results go."""


@dataclass
class Data:
    """Reviews for each use, and what edits share."""

    config: Config
    model: Model
    train: Examples
    validation: Examples
    background: Examples
    test: Examples
    cache: PrefixCache
    aims: dict[str, Aim] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> Data:
        model, seed = load_model("bundled", device="cpu"), config.seed
        whole = load_examples(config.train)
        rest, held = split_by_sentence(whole, 0.25, seed)
        learn, others = split_by_sentence(rest, 0.5, seed)

        def drawn(items: Sequence[Example], n: int) -> Examples:
            return replace(whole, items=tuple(items)).sample(n, seed)

        return cls(
            config,
            model,
            drawn(learn, config.examples),
            drawn(held, config.validation),
            drawn(others, config.background),
            unseen(load_examples(config.test), config),
            PrefixCache(model),
        )

    def quality(self, edit: Edit) -> tuple[float, float]:
        """Return (accuracy, -loss) on the validation reviews."""
        task = Task(self.model, "labels", None, None, self.cache)
        loss, accuracy = task.quality(edit, task.prepare(self.validation), 64)
        return accuracy, -loss


def unseen(tests: Examples, config: Config) -> Examples:
    """Return test reviews of other sentences than those which are left out."""
    drawn = tests.sample(config.left_out, config.seed) if config.left_out else ()
    seen = {e.cluster for e in drawn}
    rest = tuple(e for e in tests if e.cluster not in seen)
    return replace(tests, items=rest).sample(config.tested, config.seed)


@dataclass(frozen=True)
class System:
    """An edit to be scored, and how it was chosen."""

    what: str
    edit: Edit
    setting: str = ""
    seed: int | None = None


def shuffled(examples: Examples, seed: int) -> Examples:
    """Return the same reviews, their labels in random order."""
    labels = [e.polarity for e in examples]
    random.Random(seed).shuffle(labels)
    pairs = zip(examples, labels, strict=True)
    return replace(examples, items=tuple(replace(e, polarity=label) for e, label in pairs))


def steered(data: Data) -> Iterator[System]:
    """Yield the mean difference and its controls, each with an alpha of its own."""
    site = f"L{data.config.layer}.resid_post@{data.config.at}"
    found = difference_of_means(data.model, data.train, site)

    def chosen(what: str, vectors: DifferenceOfMeans, seed: int | None = None) -> System:
        choice = vectors.choose_alpha(data.validation, (0.5, *ALPHAS), cache=data.cache)
        return System(what, choice.edit, f"alpha {choice.alpha:g}", seed)

    yield chosen("mean difference", found)
    for seed in range(data.config.controls):
        yield chosen("mean difference: random direction", found.random_directions(seed), seed)
    seen: dict[tuple[Site, ...], int] = {}
    for seed in range(100):  # draws that give a layer anew are left out
        moved = found.random_sites(seed)
        if len(seen) < data.config.controls and seen.setdefault(tuple(moved.vectors), seed) == seed:
            yield chosen("mean difference: random layer", moved, seed)


def grids(data: Data) -> dict[str, list[tuple[str, Plan]]]:
    """Return the settings of each method."""
    layer, at = data.config.layer, data.config.at
    prompts = [question(data.model, e) for e in data.background]
    values = torch.linalg.eigvalsh(second_moments(data.model, prompts, [layer])[layer])
    below = {share: float(values[int(share * len(values))]) for share in (0.5, 0.75, 0.95, 0.99)}
    rome: dict[str, list[tuple[str, Plan]]] = {
        f"ROME, a fact per {by}": [
            ("u = k C^-1", ROME(layer, at, by)),
            ("u = k C^-1, ridge 0.1", ROME(layer, at, by, ridge=0.1)),
            ("u = k", ROME(layer, at, by, adjust=False)),
        ]
        for by in ("class", "example")
    }
    memit: list[tuple[str, Plan]] = [
        (f"weight {w:g}", MEMIT((layer,), at, weight=w)) for w in (0.1, 1.0, 10.0, 100.0, 15000.0)
    ]
    alphaedit: list[tuple[str, Plan]] = [
        (f"{share:.0%} below the threshold, l2 {l2:g}", AlphaEdit((layer,), at, threshold=t, l2=l2))
        for share, t in below.items()
        for l2 in (0.01, 10.0)
    ]
    return rome | {"MEMIT": memit, "AlphaEdit": alphaedit}


def computed(data: Data) -> Iterator[System]:
    """Yield ROME, MEMIT and AlphaEdit with the settings that are best on validation reviews."""

    def edit(plan: Plan, train: Examples) -> Edit:
        return closed_form(
            data.model, train, plan, background=data.background, cache=data.cache, aims=data.aims
        )

    for what, plans in grids(data).items():
        made = [(setting, plan, edit(plan, data.train)) for setting, plan in plans]
        setting, plan, best = max(made, key=lambda m: data.quality(m[2]))
        yield System(what, best, setting)
        if what == "ROME, a fact per class":
            wrong = shuffled(data.train, data.config.seed)
            yield System(f"{what}: labels in random order", edit(plan, wrong), setting)


def trained(data: Data) -> Iterator[System]:
    """Yield edits that are trained on the same reviews, the best epoch of 10."""
    site = f"L{data.config.layer}.resid_post@{data.config.at}"
    for method, what in (("steering", "trained: steering"), ("both", "trained: the paper's two parts")):  # fmt: skip
        preset = presets.bundled(site, method, epochs=10)
        edit = fit(data.model, data.train, preset, validation=data.validation, seed=data.config.seed, cache=data.cache)  # fmt: skip
        yield System(what, edit, f"best after {edit.record.best_step} steps")


def row(answers: Predictions, base: Predictions, **about: Any) -> dict[str, Any]:
    """Return accuracy and the difference to the base model, with 95 % intervals."""
    accuracy = score(answers, draws=2000).all.accuracy
    found = {**about, "n": len(answers), "accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high}  # fmt: skip
    if answers is base:
        return found
    d = compare(answers, base, draws=2000).difference
    return found | {"difference": d.value, "difference_low": d.low, "difference_high": d.high}


def rows(data: Data) -> Iterator[dict[str, Any]]:
    """Yield a row per system, the base model first."""
    model, test = data.model, data.test
    base = predict(model, test, batch_size=64)
    yield row(base, base, what="base")
    worded = best_wording(model, data.validation, test, most=data.config.validation)
    yield row(worded, base, what="base, best wording", setting=worded.name.partition(": ")[2])
    makers: tuple[Callable[[Data], Iterator[System]], ...] = (steered, computed, trained)
    for make in makers:
        clock = time.process_time()
        for system in make(data):
            seconds = round(time.process_time() - clock, 1)
            yield row(
                predict(model, test, system.edit, batch_size=64),
                base,
                what=system.what,
                setting=system.setting,
                seed=system.seed,
                layers=" ".join(map(str, system.edit.layers)),
                parameters=system.edit.n_parameters,
                validation_accuracy=data.quality(system.edit)[0],
                cpu_seconds=seconds,
            )
            clock = time.process_time()


COLUMNS = (
    "what", "setting", "seed", "layers", "parameters", "validation_accuracy", "n", "accuracy", "low", "high",
    "difference", "difference_low", "difference_high", "cpu_seconds",
)  # fmt: skip


def run(config: Config) -> None:
    """Make and score every edit, and write the results."""
    import pandas as pd

    clock, data, made = time.process_time(), Data.of(config), []
    for found in rows(data):
        made.append(found)
        print(found["what"], found.get("setting", ""), f"{found['accuracy']:.3f}", flush=True)
    table = pd.DataFrame(made, columns=list(COLUMNS))
    for name in ("seed", "parameters"):
        table[name] = table[name].astype("Int64")
    with atomic(config.out / "closed_form.csv") as path:
        table.to_csv(path, index=False, float_format="%.5g")
    about = {
        "study": "closed_form",
        "command": "python analyses/closed_form.py",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "config": {k: v for k, v in asdict(config).items() if k != "out"},
        "model": data.model.sha256,
        "cpu_seconds": round(time.process_time() - clock, 1),
        "versions": versions(),
    }
    write_json(config.out / "run.json", about)


if __name__ == "__main__":
    raise SystemExit(command(Config, run, "python analyses/closed_form.py"))
