"""Every domain against every domain: train on one, test on all, for a list of methods and seeds.

The paper's Tables 2 and 3 print an accuracy for 4 x 4 pairs of domains (10 of the 12 that cross),
without spread. Here one row stands for (method, seed, training domain, test domain), all 16 pairs
included, and the summary gives means over domains with their spread over seeds.

A method is written `PRESET@WHERE`, as in `both@sites`, `lora@all`, `loreft@middle`, `both@random`,
`lora_o@2-3`; `zero_shot` is the model as it is. Where sites are given, `first`, `middle`, `last`
and `random` take as many layers as they have, so that what is compared is the place and not the
size; otherwise they are thirds of the depth. A `random` window shares no layer with the traced or
the last ones and another seed draws another window: rows say it under `window`, and tests that
compare places cluster by it.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...axes import LabelScores
from ...edits.base import Shape, Where, parse_place
from ...edits.edit import Edit, count
from ...errors import ConfigError
from ...evaluate.predictions import Predictions
from ...evaluate.scores import score
from ...examples import Example, Examples
from ...model import Model
from ...prompts import PromptTemplate, Verbalizer
from ...records import read_json, write_json
from ...schemas import COUNT, TEXT, obj, some
from ...scoring import question
from ...sites import Site, parse_layers
from .. import presets
from ..fit import fit, keep_streams
from ..memory import peak, reset_peak
from ..places import NAMED, named_layers, random_layers
from ..prefix import PrefixCache
from ..presets import Preset
from ..task import Task

if TYPE_CHECKING:
    import pandas as pd

ZERO_SHOT = "zero_shot"


@dataclass(frozen=True)
class Domain:
    """Training and test examples under one name."""

    name: str
    train: Examples
    test: Examples


@dataclass(frozen=True)
class Method:
    """A preset somewhere.

    Attributes:
        preset: its name.
        where: `sites`, `first`, `middle`, `last`, `random`, or layers.
    """

    preset: str
    where: str = "sites"

    @classmethod
    def parse(cls, text: str) -> Method:
        """Return the method that `text` spells.

        Examples:
            >>> str(Method.parse("both@2-3")), Method.parse("zero_shot").where
            ('both@2-3', 'sites')
        """
        preset, _, where = text.partition("@")
        if not preset:
            raise ConfigError(
                f"--methods names {text!r}; methods look like both@sites, lora@all, loreft@2-3 or zero_shot"
            )
        if preset == ZERO_SHOT and where:
            raise ConfigError(
                f"--methods names {text!r}; {ZERO_SHOT} trains nothing, so it takes no place"
            )
        return cls(preset, where or "sites")

    def __str__(self) -> str:
        return self.preset if self.preset == ZERO_SHOT else f"{self.preset}@{self.where}"

    def sites(
        self, given: Sequence[Site], positions: Sequence[str | int], n_layers: int, seed: int
    ) -> list[Site]:
        """Return where it edits.

        Args:
            given: the traced sites, where there are any.
            positions: used where the place is said by layers and no sites are given.
            seed: number of the draw of `random` (`places.random_layers`).

        Raises:
            ConfigError: it says `sites` and there are none, or `random` and too few layers are
                left.
        """
        if self.where == "sites":
            if not given:
                raise ConfigError(
                    f"method {self} edits the traced sites, and none were given; give --sites, or write {self.preset}@all"
                )
            return list(given)
        at: list[str | int | None] = list(dict.fromkeys(s.at for s in given)) or list(positions)
        width = len({s.layer for s in given}) or max(1, round(n_layers / 3))
        if self.where == "random":
            layers = random_layers(width, n_layers, {s.layer for s in given}, seed)
        elif self.where in NAMED:
            layers = named_layers(self.where, width, n_layers)
        else:
            layers = parse_layers(self.where, n_layers)
        return presets.range_sites(layers, at, n_layers)


def domain_name(source: str) -> str:
    """Return the domain that a file is named after.

    Examples:
        >>> domain_name("builtin:restaurant/train"), domain_name("data/device_train.json")
        ('restaurant', 'device')
    """
    stem = source.removeprefix("builtin:").rsplit("/", 1)
    name = (
        stem[0]
        if re.fullmatch(r"(train|test|dev|val\w*)(\..*)?", stem[-1]) and len(stem) > 1
        else Path(stem[-1]).stem
    )
    return re.sub(r"[-_.]?(train|test)$", "", Path(name).name) or name


@dataclass(frozen=True)
class Grid:
    """A study: every method with every seed, on each domain, tested on all of them.

    Attributes:
        domains: trained on one by one, each tested on all.
        methods: what is trained.
        seeds: of every training.
        sites: traced ones, for methods that say `sites`.
        positions: where representations are edited when no sites are given.
        rank: of every method.
        change: applied to every preset (other epochs, other rates).
        validation: share of the training sentences on which the best epoch is chosen.
        template: the question; the paper's where None.
        verbalizer: the label strings.
        draws: bootstrap draws of each row's interval.
    """

    domains: Sequence[Domain]
    methods: Sequence[Method]
    seeds: Sequence[int]
    sites: Sequence[Site] = ()
    positions: Sequence[str | int] = (presets.LAST_OF_QUERY,)
    rank: int = 4
    change: Callable[[Preset], Preset] = lambda preset: preset
    validation: float = 0.1
    template: PromptTemplate | None = None
    verbalizer: Verbalizer | None = None
    draws: int = 200

    def trainings(self, domain: Domain) -> Iterator[tuple[Method, int]]:
        """Yield (method, seed) of one domain; the model as it is has no domain and no seed, and is
        scored once."""
        for method in self.methods:
            if method.preset != ZERO_SHOT:
                yield from ((method, seed) for seed in self.seeds)
            elif domain is self.domains[0]:
                yield method, self.seeds[0]

    @property
    def n_trainings(self) -> int:
        """Return how many times `run_matrix` reports."""
        return sum(1 for domain in self.domains for _ in self.trainings(domain))

    def preset(self, model: Model, method: Method, seed: int) -> Preset:
        """Return what a method trains with a seed.

        Raises:
            ConfigError: there is no such preset, or no such place.
        """
        places = method.sites(self.sites, self.positions, model.n_layers, seed)
        return self.change(presets.named(method.preset, places, Shape.of(model), self.rank))

    def check(self, model: Model) -> None:
        """Check that every training and every test can be run, before any of them is.

        Raises:
            ConfigError: an edit asks for what its family does not offer, or acts at a role that no
                training prompt of a domain has.
            SiteError: the model lacks a place.
            PromptError: a prompt is too long, or two labels cannot be told apart.
        """
        template = self.template or PromptTemplate()
        acting: dict[str | int, Site] = {}
        for method, seed in product(self.methods, self.seeds):
            if method.preset == ZERO_SHOT:
                continue
            made = self.preset(model, method, seed).parts
            count(made, Shape.of(model))
            places = (parse_place(part.place) for part in made)
            acting |= {p.at: p for p in places if isinstance(p, Site) and p.at is not None}
        (self.verbalizer or Verbalizer()).label_ids(model.tokenizer, template)
        for domain in self.domains:
            _check_domain(model, domain, acting, template)


def _check_domain(
    model: Model, domain: Domain, acting: dict[str | int, Site], template: PromptTemplate
) -> None:
    """Raise where a domain has no examples, a prompt that is too long, or no token at a position
    that is edited."""
    if not domain.train.items or not domain.test.items:
        raise ConfigError(
            f"domain {domain.name} has {len(domain.train)} training and {len(domain.test)} test examples; both need some"
        )
    unseen = dict(acting)
    for e in domain.train:
        where = Where(question(model, e, template))
        unseen = {at: site for at, site in unseen.items() if not bool(where.mask(at).any())}
    for site in unseen.values():
        raise ConfigError(
            f"an edit at {site} was asked for; none of the {len(domain.train)} training prompts of {domain.name} has a token there"
        )
    for e in domain.test:
        question(model, e, template)


def run_matrix(
    model: Model,
    grid: Grid,
    *,
    budget: int = 1 << 30,
    parts: Path | None = None,
    on_done: Callable[[int], Any] = lambda n: None,
) -> list[dict[str, Any]]:
    """Train and test a grid; return its rows.

    Args:
        model: frozen.
        grid: what is trained and tested.
        budget: bytes of kept activations.
        parts: a folder that keeps the rows of every training, so that a run can resume.
        on_done: called after every training.

    Returns:
        One row per training and test domain: method, preset, where, window, layers, train, test,
        in_domain, seed, the scores, the same on unseen rows, trainable parameters and share,
        seconds of training, steps and peak memory. An edit that diverged has `diverged` true and
        the reason under `stopped`; where its scores are not numbers it has none.
    """
    rows: list[dict[str, Any]] = []
    tests = PrefixCache(model, budget // 2)
    skipped: list[tuple[Domain, Method, int]] = []  # trainings of a run that was killed
    for domain in grid.domains:
        cache = PrefixCache(model, budget // 2)  # shared by all methods and seeds of this domain
        for method, seed in grid.trainings(domain):
            part = None if parts is None else parts / f"{method}-{domain.name}-{seed}.json"
            if part is not None and part.exists():
                rows += read_json(part, ROWS)
                skipped.append((domain, method, seed))
            else:
                for which in skipped:
                    _keep(model, grid, which, cache if which[0] is domain else None, tests)
                skipped.clear()
                new = _train_and_test(model, grid, (domain, method, seed), cache, tests)
                if part is not None:
                    write_json(part, new)
                rows += new
            on_done(1)
    return rows


def _keep(
    model: Model,
    grid: Grid,
    which: tuple[Domain, Method, int],
    cache: PrefixCache | None,
    tests: PrefixCache,
) -> None:
    """Keep the streams that a training which is done has kept, so that the next one computes the same.

    Args:
        model, grid, which, tests: as in `_train_and_test`.
        cache: streams of the training domain; None where nothing is trained on it any more.
    """
    domain, method, seed = which
    if method.preset == ZERO_SHOT:
        return
    preset = grid.preset(model, method, seed)
    options: dict[str, Any] = {"template": grid.template, "verbalizer": grid.verbalizer}
    if cache is not None:
        validation = grid.validation or None
        keep_streams(
            model, domain.train.items, preset, cache, validation=validation, seed=seed, **options
        )
    first = Edit.fresh(model, preset.parts, seed).layers[0]
    for test in grid.domains:
        task = Task(model, "labels", cache=tests, **options)
        task.keep(first, task.prepare(test.test.items))


def _train_and_test(
    model: Model,
    grid: Grid,
    which: tuple[Domain, Method, int],
    cache: PrefixCache,
    tests: PrefixCache,
) -> list[dict[str, Any]]:
    """Return the rows of one training, one per test domain.

    Args:
        model: frozen.
        grid: what is trained and tested.
        which: domain, method and seed of the training.
        cache: streams of the training domain.
        tests: streams of the test domains.
    """
    domain, method, seed = which
    edit = None
    about: dict[str, Any] = {
        "preset": method.preset, "where": "", "window": "", "layers": "", "trainable": 0, "share": 0.0, "seconds": 0.0, "steps": 0,
        "stopped": "", "diverged": False, "warnings": "",
    }  # fmt: skip
    reset_peak(model.device)
    if method.preset != ZERO_SHOT:
        preset = grid.preset(model, method, seed)
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are in the record, and so in the rows
            edit = fit(
                model,
                domain.train.items,
                preset,
                validation=grid.validation or None,
                seed=seed,
                template=grid.template,
                verbalizer=grid.verbalizer,
                cache=cache,
                progress=False,
            )
        record, layers = edit.record, [str(layer) for layer in edit.layers]
        about |= {
            "where": method.where, "window": f"{method.where} {','.join(layers)}", "layers": " ".join(layers),
            "trainable": edit.n_parameters, "share": edit.share, "seconds": round(time.perf_counter() - started, 3), "steps": record.steps,
            "stopped": record.stopped or "", "diverged": record.diverged, "warnings": "; ".join(record.warnings),
        }  # fmt: skip
    about["peak_memory_bytes"] = peak(model.device)
    seen = domain.train.items if edit is not None else None
    who = {"method": str(method), "train": domain.name if edit is not None else "", "seed": seed}
    rows = []
    for test in grid.domains:
        at = {"test": test.name, "in_domain": domain is test and edit is not None}
        task = Task(model, "labels", grid.template, grid.verbalizer, tests)
        scores = task.scores(edit, task.prepare(test.test.items), allow_nan=True)
        rows.append(who | at | about | _scored(task, test, scores, seen, (grid.draws, seed)))
    return [{name: row[name] for name in COLUMNS if name in row} for row in rows]


COLUMNS = (
    "method", "train", "test", "in_domain", "seed", "n", "accuracy", "accuracy_low", "accuracy_high", "macro_f1", "majority", "nll",
    "recall_positive", "recall_negative", "recall_neutral", "accuracy_unseen", "leaked", "preset", "where", "window", "layers", "trainable",
    "share", "seconds", "steps", "stopped", "diverged", "warnings", "peak_memory_bytes",
)  # fmt: skip
"""Columns of a row, in order."""
ROWS = some(obj({"method": TEXT, "train": TEXT, "test": TEXT, "seed": COUNT}))
"""What a part of a matrix looks like."""
SCORED = (
    "n", "accuracy", "accuracy_low", "accuracy_high", "macro_f1", "majority", "nll", "recall_positive", "recall_negative", "recall_neutral",
    "accuracy_unseen", "leaked",
)  # fmt: skip
"""Columns that a diverged edit leaves empty."""


def _scored(
    task: Task,
    test: Domain,
    scores: LabelScores,
    seen: Sequence[Example] | None,
    bootstrap: tuple[int, int],
) -> dict[str, Any]:
    """Return the scores of one edit on one domain.

    Args:
        task: what was asked.
        test: the domain.
        scores: of the labels.
        seen: training examples; None for the model as it is.
        bootstrap: draws and seed.
    """
    if broken := int(scores.isnan().any(1).sum()):
        reason = f"the scores of {broken} of {len(scores)} test examples are not numbers"
        return dict.fromkeys(SCORED) | {"n": len(scores), "stopped": reason, "diverged": True}
    polarities = task.verbalizer.polarities
    answers = tuple(polarities[i] for i in scores.argmax(1).tolist())
    predictions = Predictions(
        test.test.items, answers, "edit", test.name, polarities, scores.double().numpy()
    )
    scored = score(predictions, train=seen, draws=bootstrap[0], seed=bootstrap[1])
    row = {k: v for k, v in scored.all.row().items() if k in SCORED}
    recalls = {f"recall_{c.label}": c.recall for c in scored.all.classes}
    unseen = {
        "accuracy_unseen": scored.unseen.accuracy.value if scored.unseen is not None else None,
        "leaked": scored.leaked or 0,
    }
    return row | recalls | unseen


def summary(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return one row per method (pandas): mean accuracy and macro-F1 inside and across domains,
    their standard deviation over seeds, size, steps and cost.

    Trainings that diverged without a score are left out of the means and counted under `diverged`.
    """
    import pandas as pd

    table = pd.DataFrame(rows)
    short = []
    for method, of in table.groupby("method", sort=False):
        trained = of.drop_duplicates(["train", "seed"])
        row: dict[str, Any] = {
            "method": method, "trainable": int(of["trainable"].max()), "share": float(of["share"].max()), "steps": trained["steps"].mean(),
        }  # fmt: skip
        inside = of[of["in_domain"] | (method == ZERO_SHOT)]
        across = of[~of["in_domain"] & (of["train"] != "")]
        for name, part in (("in", inside), ("out", across)):
            for metric in ("accuracy", "macro_f1"):
                by_seed = pd.to_numeric(part[metric], errors="coerce").groupby(part["seed"]).mean()
                row[f"{metric}_{name}"] = by_seed.mean()
                row[f"{metric}_{name}_sd"] = by_seed.std(ddof=1) if len(by_seed) > 1 else math.nan
        broken = of["diverged"].eq(True) if "diverged" in of else of["seed"].lt(0)
        diverged = broken.groupby([of["train"], of["seed"]]).any().sum()
        row |= {
            "seeds": of["seed"].nunique(), "diverged": int(diverged), "seconds": trained["seconds"].mean(),
            "peak_memory_mib": of["peak_memory_bytes"].max() / 2**20,
        }  # fmt: skip
        short.append(row)
    return pd.DataFrame(short)
