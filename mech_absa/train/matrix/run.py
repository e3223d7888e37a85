"""Every domain against every domain: train on one, test on all, for a list of methods and seeds.

The paper's Tables 2 and 3 print an accuracy for 4 x 4 pairs of domains (10 of the 12 that cross), without spread. Here one row stands for
(method, seed, training domain, test domain), all 16 pairs included, and the summary gives means over domains with their spread over seeds.

A method is written `PRESET@WHERE`, as in `both@sites`, `lora@all`, `loreft@middle`, `both@random`, `lora_o@2-3`; `zero_shot` is the model as it is.
Where sites are given, `first`, `middle`, `last` and `random` take as many layers as they have, so that what is compared is the place and not
the size; otherwise they are thirds of the depth. A `random` window shares no layer with the traced or the last ones and another seed draws
another window: rows say it under `window`, and tests that compare places cluster by it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...edits.base import Shape, Where, parse_place
from ...edits.edit import Edit, count
from ...errors import ConfigError
from ...evaluate.predictions import Predictions
from ...evaluate.scores import score
from ...examples import Example, Examples
from ...model import Model
from ...prompts import PromptTemplate, Verbalizer
from ...records import write_json
from ...scoring import question
from ...sites import Site, parse_layers
from .. import presets
from ..fit import Task, fit
from ..memory import peak, reset_peak
from ..places import NAMED, named_layers, random_layers
from ..prefix import PrefixCache
from ..presets import Preset

ZERO_SHOT = "zero_shot"


@dataclass(frozen=True)
class Domain:
    """What is trained on and tested on under one name."""

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
        """The method that `text` spells."""
        preset, _, where = text.partition("@")
        if not preset:
            raise ConfigError(
                f"--methods names {text!r}; methods look like both@sites, lora@all, loreft@2-3 or zero_shot"
            )
        return cls(preset, where or "sites")

    def __str__(self) -> str:
        return self.preset if self.preset == ZERO_SHOT else f"{self.preset}@{self.where}"

    def sites(
        self, given: Sequence[Site], positions: Sequence[str | int], n_layers: int, seed: int
    ) -> list[Site]:
        """Where it edits.

        Args:
            given: the traced sites, where there are any.
            positions: used where the place is said by layers and no sites are given.
            seed: number of the draw of `random` (`places.random_layers`).

        Raises:
            ConfigError: it says `sites` and there are none, or `random` and too few layers are left.
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
    """`restaurant` for builtin:restaurant/train, `device` for .../device_train.json."""
    stem = source.removeprefix("builtin:").rsplit("/", 1)
    name = (
        stem[0]
        if re.fullmatch(r"(train|test|dev|val\w*)(\..*)?", stem[-1]) and len(stem) > 1
        else Path(stem[-1]).stem
    )
    return re.sub(r"[-_.]?(train|test)$", "", Path(name).name) or name


def check(
    model: Model,
    domains: Sequence[Domain],
    made: Sequence[Preset],
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
) -> None:
    """Nothing, when every training and every test can be run: what cannot is refused now and not after an hour.

    Args:
        model: that will be edited.
        domains: whose prompts are all made once.
        made: everything that will be trained.
        template, verbalizer: the question and its answers.

    Raises:
        ConfigError: an edit asks for what its family does not offer, or acts at a role that no training prompt of a domain has.
        SiteError: the model lacks a place.
        PromptError: a prompt is too long, or two labels cannot be told apart.
    """
    shape = Shape.of(model)
    template = template or PromptTemplate()
    acting: dict[str | int, Site] = {}
    for preset in made:
        count(preset.parts, shape)
        places = (parse_place(part.place) for part in preset.parts)
        acting |= {p.at: p for p in places if isinstance(p, Site) and p.at is not None}
    (verbalizer or Verbalizer()).label_ids(model.tokenizer, template)
    for domain in domains:
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
    domains: Sequence[Domain],
    methods: Sequence[Method],
    seeds: Sequence[int],
    *,
    sites: Sequence[Site] = (),
    positions: Sequence[str | int] = (presets.LAST_OF_QUERY,),
    rank: int = 4,
    change: Callable[[Preset], Preset] = lambda preset: preset,
    validation: float = 0.1,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
    budget: int = 1 << 30,
    draws: int = 200,
    parts: Path | None = None,
    on_done: Callable[[int], Any] = lambda n: None,
) -> list[dict[str, Any]]:
    """The rows of the matrix.

    Args:
        model: frozen.
        domains: trained on one by one, each tested on all.
        methods: what is trained.
        seeds: of every training.
        sites: traced ones, for methods that say `sites`.
        positions: where representations are edited when no sites are given.
        rank: of every method.
        change: what is otherwise than in the presets (epochs, rates).
        validation: share of the training sentences on which the best epoch is chosen.
        template, verbalizer: the question and its answers.
        budget: bytes of kept activations.
        draws: bootstrap draws of each row's interval.
        parts: a folder where the rows of every training are kept, and found again by a run that resumes.
        on_done: told after every training.

    Returns:
        A row each: method, preset, where, window, layers, train, test, in_domain, seed, the scores, the same on unseen rows, trainable
        parameters and share, seconds of training, steps and peak memory.
    """
    rows: list[dict[str, Any]] = []
    shape = Shape.of(model)
    tests = PrefixCache(model, budget // 2)
    for train in domains:
        cache = PrefixCache(model, budget // 2)  # shared by all methods and seeds of this domain
        for method, seed in _trainings(methods, seeds, train is domains[0]):
            part = None if parts is None else parts / f"{method}-{train.name}-{seed}.json"
            if part is not None and part.exists():
                rows += json.loads(part.read_text(encoding="utf-8"))
                on_done(1)
                continue
            made: list[dict[str, Any]] = []
            edit = None
            about: dict[str, Any] = {
                "preset": method.preset, "where": "", "window": "", "layers": "", "trainable": 0, "share": 0.0, "seconds": 0.0, "steps": 0, "stopped": "",
            }  # fmt: skip
            reset_peak(model.device)
            if method.preset != ZERO_SHOT:
                places = method.sites(sites, positions, model.n_layers, seed)
                preset = change(presets.named(method.preset, places, shape, rank))
                started = time.perf_counter()
                edit = fit(
                    model,
                    train.train.items,
                    preset,
                    validation=validation or None,
                    seed=seed,
                    template=template,
                    verbalizer=verbalizer,
                    cache=cache,
                )
                about |= {
                    "where": method.where, "window": f"{method.where} {','.join(map(str, edit.layers))}",
                    "layers": " ".join(map(str, edit.layers)), "trainable": edit.n_parameters, "share": edit.share,
                    "seconds": round(time.perf_counter() - started, 3), "steps": edit.record["steps"], "stopped": edit.record["stopped"] or "",
                }  # fmt: skip
            about["peak_memory_bytes"] = peak(model.device)
            for test in domains:
                scored = _score(
                    model,
                    edit,
                    test,
                    train.train.items if edit is not None else None,
                    tests,
                    template,
                    verbalizer,
                    draws,
                    seed,
                )
                who = {
                    "method": str(method),
                    "train": train.name if edit is not None else "",
                    "test": test.name,
                }
                made.append(
                    who
                    | {"in_domain": train is test and edit is not None, "seed": seed}
                    | scored
                    | about
                )
            if part is not None:
                write_json(part, made)
            rows += made
            on_done(1)
    return rows


def n_trainings(domains: Sequence[Domain], methods: Sequence[Method], seeds: Sequence[int]) -> int:
    """How many times `run_matrix` will report."""
    return sum(1 for i, _ in enumerate(domains) for _ in _trainings(methods, seeds, i == 0))


def _trainings(
    methods: Sequence[Method], seeds: Sequence[int], first: bool
) -> Iterator[tuple[Method, int]]:
    """(method, seed) of one domain; the model as it is has no domain and no seed, and is scored once."""
    for method in methods:
        if method.preset != ZERO_SHOT:
            yield from ((method, seed) for seed in seeds)
        elif first:
            yield method, seeds[0]


def _score(
    model: Model,
    edit: Edit | None,
    test: Domain,
    train: Sequence[Example] | None,
    cache: PrefixCache,
    template: PromptTemplate | None,
    verbalizer: Verbalizer | None,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    task = Task(model, "labels", template, verbalizer, cache)
    scores = task.scores(edit, task.questions(test.test.items))
    polarities = task.verbalizer.polarities
    answers = tuple(polarities[i] for i in scores.argmax(1).tolist())
    predictions = Predictions(
        test.test.items, answers, "edit", test.name, polarities, scores.double().numpy()
    )
    scored = score(predictions, train=train, draws=draws, seed=seed)
    row = {
        k: v
        for k, v in scored.all.row().items()
        if k in ("n", "accuracy", "accuracy_low", "accuracy_high", "macro_f1", "majority", "nll")
    }
    recalls = {f"recall_{c.label}": c.recall for c in scored.all.classes}
    unseen = {
        "accuracy_unseen": scored.unseen.accuracy.value if scored.unseen is not None else None,
        "leaked": scored.leaked or 0,
    }
    return row | recalls | unseen


def summary(rows: Sequence[dict[str, Any]]):
    """One row a method: mean accuracy and macro-F1 inside and across domains, their standard deviation over seeds, size and cost (pandas)."""
    import pandas as pd

    table = pd.DataFrame(rows)
    made = []
    for method, of in table.groupby("method", sort=False):
        row: dict[str, Any] = {
            "method": method,
            "trainable": int(of["trainable"].max()),
            "share": float(of["share"].max()),
        }
        for name, part in (
            ("in", of[of["in_domain"] | (method == ZERO_SHOT)]),
            ("out", of[~of["in_domain"] & (of["train"] != "")]),
        ):
            for metric in ("accuracy", "macro_f1"):
                by_seed = part.groupby("seed")[metric].mean()
                row[f"{metric}_{name}"], row[f"{metric}_{name}_sd"] = (
                    by_seed.mean(),
                    by_seed.std(ddof=1) if len(by_seed) > 1 else float("nan"),
                )
        trained = of.drop_duplicates(["train", "seed"])
        made.append(
            row
            | {
                "seeds": of["seed"].nunique(),
                "seconds": trained["seconds"].mean(),
                "peak_memory_mib": of["peak_memory_bytes"].max() / 2**20,
            }
        )
    return pd.DataFrame(made)
