"""The paper on a real language model: SmolLM2-135M and real reviews (`make reproduce MODEL=smollm2`).

    python -m mech_absa.models get smollm2
    python -m figures.smollm2 --data DATA                  every study that is not there yet
    python -m figures.smollm2 --data DATA --only noise     this study alone
    python -m figures.smollm2 --data DATA --fast           a handful of rows: tries the commands

DATA holds `me_absc/` (NAME_train.json and NAME_test.json of device, laptop, rest, service), `mams/`
(train.xml, test.xml) and `dmaste/` (NAME_train.txt, NAME_dev.txt). The adapter is the one that ships
with the package (`smollm2_adapter.py` made it). Traces use training rows that the adapter was not
trained on, and DMASTE's dev files; test files are scored only. Sentences are cut off at a number of
words, for the cost.

As in `reproduce.py`, each step is a public command in a process of its own, a killed step is taken
up, and small results go to `figures/results/smollm2/`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import mech_absa as ma
from mech_absa.commands.cli import command
from mech_absa.errors import ConfigError, choices
from mech_absa.examples import Example
from mech_absa.readers import write_jsonl
from mech_absa.records import write_json
from mech_absa.stats import cluster_bootstrap

from . import smollm2_domains, smollm2_places
from .interaction import keep_both
from .keep import keep_map, record, scrubbed, write_table
from .plan import PATCH, ROOT, Plan, Step, flags, near, trace_step
from .reproduce import Config as Reproduce
from .reproduce import Runner
from .smollm2_adapter import DOMAINS, file, split

EVALUATE, PLACES, BY_DOMAIN, ASKED = (
    "mech_absa.evaluate",
    "figures.smollm2_places",
    "figures.smollm2_domains",
    "figures.smollm2_selectors",
)
MODEL = "smollm2"
MAMS_ROWS, DOMAIN_ROWS = 600, 400
"""Rows that the adapter was trained on, of MAMS and of each domain."""
KINDS = ("resid_post", "attn_out", "mlp_out")
SECONDS = {"trace": 9.0, "test": 0.5, "look": 50.0}
"""Seconds of one core for a pair in one direction, a test row, and a review that all selectors look at."""


@dataclass(frozen=True)
class Config:
    """Trace, score and edit SmolLM2-135M on real reviews, and keep the small results."""

    data: Path
    """Folder with me_absc/, mams/ and dmaste/."""
    only: tuple[str, ...] = ()
    """These studies alone; default all."""
    fast: bool = False
    """A handful of rows everywhere: tries the commands, proves nothing."""
    jobs: int = 2
    """Commands that run side by side, one thread each."""
    runs: Path | None = None
    """Where the commands work; default runs/smollm2."""
    results: Path | None = None
    """Where the small results go; default figures/results, and with --fast a folder beside the runs."""

    @property
    def work(self) -> Path:
        """The folder of the commands."""
        return self.runs or ROOT / "runs" / (f"{MODEL}_fast" if self.fast else MODEL)


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    pairs: int = 150
    """Pairs of the trace of `aspect-swap`, where all that stands before the question is 0."""
    noise: int = 60
    """Pairs of the trace with noise, which costs five times as much for each."""
    opinion: int = 150
    """Pairs of the trace of `opinion-swap`."""
    token: int = 20
    """Pairs of the trace by token."""
    words: int = 30
    """Longest sentence that is traced."""
    pool: int = 600
    """Rows of each kind from which pairs are taken."""
    test: int = 200
    """Rows of each test file."""
    train: int = 40
    """Training rows a domain of the edits."""
    held: int = 16
    """Validation rows a domain of the edits."""
    edit_test: int = 50
    """Test rows a domain of the edits."""
    seeds: int = 3
    """Trainings of each place."""
    domain_train: int = 160
    """Training rows of each domain, where a training sees one domain alone."""
    domain_seeds: int = 3
    """Trainings of each system on each domain."""
    looks: int = 24
    """Reviews that a selector looks at."""
    heads: int = 30
    """Pairs of the trace of heads, which costs nine times as much for each."""


FAST = Sizes(
    pairs=2, noise=2, opinion=2, token=2, words=12, pool=60, test=4, train=2, held=1, edit_test=1, seeds=1,
    domain_train=2, domain_seeds=1, heads=2, looks=4,
)  # fmt: skip


# ---- rows ----------------------------------------------------------------------------------------


def prepare(data: Path, folder: Path, sizes: Sizes) -> None:
    """Write the rows that the traces read, and those whose opinion words make the lexicon.

    The same data and sizes give the same files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spare = {name: split(data, name, DOMAIN_ROWS).spare for name in DOMAINS}
    reviews = [e for rows in spare.values() for e in drawn(rows, sizes.pool // 4, sizes.words)]
    mams = whole_sentences(split(data, "mams", MAMS_ROWS).spare, 2 * sizes.pool, sizes.words)
    dev, train = (
        [e for f in sorted((data / "dmaste").glob(f"*_{part}.txt")) for e in ma.load_examples(f)]
        for part in ("dev", "train")
    )
    marked = drawn([e for e in dev if e.opinion is not None], sizes.pool, sizes.words)
    lexicon = [e for e in train if e.opinion is not None]
    for name, rows in {"noise": reviews, "aspect_swap": mams, "opinion_swap": marked, "lexicon": lexicon}.items():  # fmt: skip
        write_jsonl(rows, folder / f"{name}.jsonl")


def drawn(rows: Iterable[Example], n: int, words: int) -> list[Example]:
    """Return `n` rows of at most so many words, drawn by a fixed seed."""
    short = [e for e in rows if len(e.sentence.split()) <= words]
    return random.Random(0).sample(short, min(n, len(short)))


def whole_sentences(rows: Iterable[Example], n: int, words: int) -> list[Example]:
    """Return all rows of sentences drawn by a fixed seed, until there are `n` rows."""
    groups: dict[str, list[Example]] = {}
    for e in rows:
        if len(e.sentence.split()) <= words:
            groups.setdefault(e.cluster, []).append(e)
    order = sorted(groups)
    random.Random(0).shuffle(order)
    taken: list[Example] = []
    for cluster in order:
        if len(taken) >= n:
            break
        taken += groups[cluster]
    return taken


# ---- studies -------------------------------------------------------------------------------------


def studies(data: Path, work: Path, sizes: Sizes) -> list[Plan]:
    """Return all studies, in the order in which they run."""
    return [
        *(traces(work, sizes, name) for name in ("aspect_swap", "noise", "opinion_swap")),
        accuracy(data, sizes),
        *(traces(work, sizes, name, "noise") for name in ("aspect_swap", "opinion_swap")),
        heads(work, sizes),
        tokens(work, sizes),
        places(data, sizes),
        domains(data, work, sizes),
        selectors(data, work, sizes),
    ]


QUESTIONS = {
    "noise": "Figure 3 of the paper on real reviews: which states bring the answer back when all tokens are noised?",
    "aspect_swap": "Which states bind the answer to the aspect that is asked about, in a fixed sentence?",
    "opinion_swap": "Which states carry the opinion word?",
}


def traces(work: Path, sizes: Sizes, name: str, direction: str = "denoise") -> Plan:
    """Return the trace of one corruption in one direction."""
    rows = near(work / "rows")
    layer = {"sites": KINDS[:1]}
    more = {
        "noise": {**layer, "limit": sizes.noise, "corruption": "noise", "noise_draws": 1},
        "aspect_swap": {"sites": KINDS, "limit": sizes.pairs, "corruption": "aspect-swap"},
        "opinion_swap": {
            **layer, "limit": sizes.opinion, "corruption": "opinion-swap",
            "lexicon": str(rows / "lexicon.jsonl"),
        },
    }  # fmt: skip
    given = {"model": MODEL, "data": str(rows / f"{name}.jsonl"), "by": "role", "memory": 1}
    step = trace_step("trace", **given, direction=direction, **more[name])
    called = name if direction == "denoise" else f"{name}_{direction}"
    return Plan(f"{MODEL}/{called}", QUESTIONS[name], (step,), keep)


def heads(work: Path, sizes: Sizes) -> Plan:
    """Return the trace of single heads."""
    rows = near(work / "rows" / "aspect_swap.jsonl")
    step = trace_step(
        "trace", model=MODEL, data=str(rows), by="role", memory=1, direction="denoise", sites=("head",),
        limit=sizes.heads, corruption="aspect-swap",
    )  # fmt: skip
    question = "Which heads carry what binds the answer to the aspect that is asked about?"
    return Plan(f"{MODEL}/aspect_swap_heads", question, (step,), keep_map)


def tokens(work: Path, sizes: Sizes) -> Plan:
    """Return the trace of single tokens."""
    rows = near(work / "rows" / "aspect_swap.jsonl")
    step = trace_step(
        "trace", model=MODEL, data=str(rows), by="token", memory=1, direction="denoise", sites=KINDS[:1],
        limit=sizes.token, corruption="aspect-swap",
    )  # fmt: skip
    question = "Does one token bring back as much as all tokens of its role at once?"
    return Plan(f"{MODEL}/aspect_swap_token", question, (step,), keep_map)


def accuracy(data: Path, sizes: Sizes) -> Plan:
    """Return the scores of the adapter on the test files."""
    tests = [str(near(file(data, name, "test"))) for name in (*DOMAINS, "mams")]
    words = flags(
        model=MODEL, edit=("none", "bundled"), data=tests, limit=sizes.test, compare="none"
    )
    step = Step("scores", EVALUATE, (*words, "--no-report", "--quiet"), {})
    question = "How well does the adapter answer on test files, beside the model as it is?"
    return Plan(f"{MODEL}/accuracy", question, (step,), keep_scores)


def edits(data: Path, sizes: Sizes) -> smollm2_places.Config:
    """Return what the study of places is asked for."""
    return smollm2_places.Config(
        data, train=sizes.train, held=sizes.held, test=sizes.edit_test, seeds=sizes.seeds,
        again=near(ROOT / "figures" / "results" / MODEL / "noise" / "sites.json"),
    )  # fmt: skip


def places(data: Path, sizes: Sizes) -> Plan:
    """Return the paper's edit at traced and other layers, each place at a rate of its own."""
    asked = edits(near(data), sizes)
    names = ("data", "train", "held", "test", "seeds", "again")
    words = flags(**{n: getattr(asked, n) for n in names})
    question = "Does editing at the traced layers answer better than editing elsewhere?"
    return Plan(f"{MODEL}/places", question, (Step("places", PLACES, words, {}),), keep_places)


def by_domain(data: Path, work: Path, sizes: Sizes) -> smollm2_domains.Config:
    """Return what the study of domains is asked for."""
    return smollm2_domains.Config(
        near(data), places=near(work / MODEL / "places" / "places"), train=sizes.domain_train,
        test=sizes.edit_test, seeds=sizes.domain_seeds,
    )  # fmt: skip


def domains(data: Path, work: Path, sizes: Sizes) -> Plan:
    """Return the edit and LoRA trained on each domain and scored on all; needs the study of places."""
    asked = by_domain(data, work, sizes)
    words = flags(**{n: getattr(asked, n) for n in ("data", "places", "train", "test", "seeds")})
    question = "Tables 2 and 3: how well does what was trained on one domain answer on the others?"
    return Plan(
        f"{MODEL}/domains", question, (Step("domains", BY_DOMAIN, words, {}),), keep_domains
    )


def keep_domains(plan: Plan, work: Path, results: Path) -> None:
    """Keep the tables of the trainings by domain and of the answers."""
    _keep_tables(plan, work, results, ("trainings", "answers", "domains"))


def selectors(data: Path, work: Path, sizes: Sizes) -> Plan:
    """Return what selectors say of the places; needs the study of places."""
    folder = near(work / MODEL / "places" / "places")
    words = flags(data=near(data), looks=sizes.looks, places=folder)
    question = "Which of the places does each selector take, and what did the edit score there?"
    step = Step("selectors", ASKED, words, {})
    return Plan(f"{MODEL}/selectors", question, (step,), keep_selectors)


def keep_selectors(plan: Plan, work: Path, results: Path) -> None:
    """Keep the scores of layers, and the place that each selector takes."""
    _keep_tables(plan, work, results, ("layers", "selectors"))


def _keep_tables(plan: Plan, work: Path, results: Path, names: tuple[str, ...]) -> None:
    for name in names:
        table = pd.read_csv(work / plan.steps[0].name / f"{name}.csv", keep_default_na=False)
        write_table(table, results / f"{name}.csv")


def keep_places(plan: Plan, work: Path, results: Path) -> None:
    """Keep the tables of the trainings and of the answers."""
    _keep_tables(plan, work, results, ("trainings", "answers", "places"))


BANDS = {"0-5": (0, 5), "9-14": (9, 14), "15-20": (15, 20), "24-29": (24, 29)}
"""Layers that are compared, six in each; 9-14 of 30 are the paper's 10-15 of 32."""
GROUPS = {
    "aspect": ("aspect.first", "aspect.middle", "aspect.last"),
    "query": ("query.first", "query.middle", "query.last"),
    "opinion": ("opinion",),
    "rest": ("before", "after"),
    "template": ("template",),
    "answer": ("answer",),
}
"""Roles that are averaged together."""


def keep(plan: Plan, work: Path, results: Path) -> None:
    """Keep the map, its means over bands of layers, and the difference of both directions."""
    keep_map(plan, work, results)
    effects = ma.Effects.load(work / "trace")
    write_table(banded(effects.importance(by="role")), results / "bands.csv")
    other = work.with_name(work.name.removesuffix("_noise"))
    if other != work:
        keep_both(other / "trace", work / "trace", results, "prob")


def banded(importance: ma.ImportanceMap) -> pd.DataFrame:
    """Return mean effects over bands of layers and groups of roles.

    Each pair's effects are averaged over the cells that it has, then over pairs; intervals resample
    sentences. `minus_others` is the band's mean minus that of all other layers, in the same pairs.

    Returns:
        columns kind, roles, layers, aie, ci_low, ci_high, minus_others, minus_low, minus_high, n.
    """
    table, rows = importance.table, []
    for kind in dict.fromkeys(table["kind"]):
        for group, roles in GROUPS.items():
            here = ((table["kind"] == kind) & table["role"].isin(roles)).to_numpy()
            for band, (low, high) in BANDS.items():
                inside = table["layer"].between(low, high).to_numpy()
                mean = over(importance.values, here & inside)
                rest = mean - over(importance.values, here & ~inside)
                if np.isnan(mean).all():
                    continue
                has = ~np.isnan(mean)
                one, two = (estimate(v[has], importance.clusters[has]) for v in (mean, rest))
                rows.append(
                    {
                        "kind": kind, "roles": group, "layers": band,
                        "aie": one[0], "ci_low": one[1], "ci_high": one[2],
                        "minus_others": two[0], "minus_low": two[1], "minus_high": two[2],
                        "n": int(has.sum()),
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def estimate(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float, float]:
    """Return a mean and the ends of its interval."""
    found = cluster_bootstrap(values, clusters)
    return float(found.mean), float(found.low), float(found.high)


def over(values: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return each pair's mean over some cells, NaN where it has none of them."""
    chosen = values[:, cells]
    there = ~np.isnan(chosen)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(there, chosen, 0.0).sum(1) / there.sum(1)


def keep_scores(plan: Plan, work: Path, results: Path) -> None:
    """Keep the scores and the comparisons, files by their names alone."""
    for name in ("scores.csv", "comparisons.csv"):
        if (path := work / plan.steps[0].name / name).exists():
            table = pd.read_csv(path)
            named = table["data"].map(lambda d: "/".join(Path(d).parts[-2:]))
            write_table(table.assign(data=named), results / name)


# ---- running -------------------------------------------------------------------------------------


def budget(chosen: list[Plan], sizes: Sizes) -> float:
    """Return the CPU-hours that the studies take, about."""
    seconds = 0.0
    for study in chosen:
        step = study.steps[0]
        if step.module == PATCH:
            seconds += SECONDS["trace"] * sizes.pairs
        elif step.module == EVALUATE:
            seconds += SECONDS["test"] * 2 * sizes.test * (len(DOMAINS) + 1)
        elif step.module == BY_DOMAIN:
            seconds += smollm2_domains.seconds(by_domain(Path(), Path(), sizes))
        elif step.module == ASKED:
            seconds += SECONDS["look"] * sizes.looks
        else:
            seconds += smollm2_places.seconds(edits(Path(), sizes))
    return seconds / 3600


def run(config: Config) -> None:
    """Run the studies that are asked for.

    Raises:
        ConfigError: there is no study of that name, or the data is missing.
        MechAbsaError: a study failed; those before it are kept.
    """
    sizes = FAST if config.fast else Sizes()
    for folder in ("me_absc", "mams", "dmaste"):
        if not (config.data / folder).is_dir():
            raise ConfigError(f"--data {config.data} holds no folder {folder}; it is needed")
    every = studies(config.data, config.work, sizes)
    names = [s.name.split("/")[1] for s in every]
    if unknown := [n for n in config.only if n not in names]:
        raise ConfigError(f"--only {unknown[0]!r} is no study; accepted: {choices(names)}")
    chosen = [s for s, n in zip(every, names, strict=True) if not config.only or n in config.only]
    print(f"about {budget(chosen, sizes):.1f} CPU-hours for {len(chosen)} studies", flush=True)
    if not (config.work / "rows" / "lexicon.jsonl").exists():
        prepare(config.data, config.work / "rows", sizes)
    runner = Runner(Reproduce(fast=config.fast, runs=config.work, results=config.results))
    runner.traced.set()
    # These read what the study of places leaves.
    last = [s for s in chosen if s.steps[0].module in (BY_DOMAIN, ASKED)]
    for part in ([s for s in chosen if s not in last], last):
        with ThreadPoolExecutor(config.jobs) as pool:
            for done in [pool.submit(one, runner, study, config) for study in part]:
                done.result()


def one(runner: Runner, study: Plan, config: Config) -> None:
    """Run one study and keep its results."""
    step = study.steps[0]
    said, seconds = runner.run(study, step)
    results, work = runner.config.kept / study.name, runner.config.work / study.name
    study.keep(study, work, results)
    made = record(study, work, {step.name: said}, {step.name: seconds})
    hidden = {str(config.data): "data", f"{ROOT}/": ""}
    write_json(results / "run.json", json.loads(json.dumps(scrubbed(made, hidden))))
    print(f"{study.name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    raise SystemExit(command(Config, run, "python -m figures.smollm2"))
