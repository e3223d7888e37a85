"""`python -m mech_absa.train.matrix`: train on each domain, test on all.

    python -m mech_absa.train.matrix --methods zero_shot both@sites both@all --sites runs/trace/sites.json --out runs/matrix
    python -m mech_absa.train.matrix --train data/{device,laptop,rest,service}_train.json --test data/{device,laptop,rest,service}_test.json

Leaves `matrix.csv` (a row for method, seed, training and test domain), `summary.csv` (a row a method), `run.json` and `report.html`. A
killed run is taken up with `--resume`: trainings that were finished are not repeated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from ..errors import ConfigError
from ..evaluate.caveats import caveats
from ..model import load_model
from ..progress import bar
from ..prompts import PromptTemplate, Verbalizer
from ..readers import load_examples
from ..records import RunFolder
from ..sites import traced_sites
from ..train import presets
from ..train.matrix import (
    Domain,
    Grid,
    Method,
    domain_name,
    run_matrix,
    summary,
)
from ..train.presets import Preset
from ..world import DOMAINS
from .cli import command, reading, report, tell_left_out

FREE = ("out", "resume", "device", "cache_gib", "report", "quiet")
"""Settings that do not change a result."""


@dataclass(frozen=True)
class Config:
    """Train on each domain and test on all, for a list of methods and seeds."""

    train: tuple[str, ...] = tuple(f"builtin:{d}/train" for d in DOMAINS)
    """Training files, one a domain."""
    test: tuple[str, ...] = tuple(f"builtin:{d}/test" for d in DOMAINS)
    """Test files, in the same order."""
    methods: tuple[str, ...] = ("zero_shot", "both@middle", "lora@all", "loreft@all")
    """PRESET@WHERE: a preset of python -m mech_absa.train, at sites, first, middle, last, random, all, or layers such as 2-5."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings."""
    sites: Path | None = None
    """The sites.json of a traced run, for methods that say @sites; first, middle, last and random then take as many layers."""
    any_sites: bool = False
    """Edit at sites that were found in another model."""
    positions: tuple[str, ...] = (presets.LAST_OF_QUERY,)
    """Where representations are edited, when there is no --sites."""
    model: str = "bundled"
    """bundled, a local Hugging Face folder, or a hub name."""
    rank: int = 4
    """Of every method."""
    epochs: int | None = None
    """Passes over the examples; the presets' where nothing is said, as in all that follow."""
    batch_size: int | None = None
    """Examples a forward pass."""
    lr_scale: float = 1.0
    """All learning rates times this."""
    validation: float = 0.1
    """Share of the training sentences on which the best epoch is chosen; 0 keeps the last."""
    limit_train: int | None = None
    """At most so many training examples a domain."""
    limit_test: int | None = None
    """At most so many test examples a domain, drawn at random with seed 0."""
    template: str = PromptTemplate().text
    """The question, with {sentence} and {aspect}."""
    labels: tuple[str, ...] = ("positive", "negative", "neutral")
    """The label strings for positive, negative and neutral."""
    separator: str = " "
    """Between the question and the label."""
    columns: tuple[str, ...] = ()
    """Names of columns or fields that are not recognised, such as aspect=Term polarity=Rating."""
    meaning: tuple[str, ...] = ()
    """What labels of the data mean that are not words, such as 0=negative 1=neutral 2=positive."""
    skip_bad: bool = False
    """Leave out records that cannot be read, and count them."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    dtype: str = "float32"
    """float32, bfloat16, float16 or float64."""
    cache_gib: float = 1.0
    """Memory for activations that are computed once."""
    out: Path = Path("runs/matrix")
    """A new or empty folder."""
    resume: bool = False
    """Take up the killed run that --out holds."""
    report: bool = True
    """Write report.html."""
    quiet: bool = False
    """Print nothing but errors."""

    def __post_init__(self):
        if not self.train or len(self.train) != len(self.test):
            raise ConfigError(
                f"--train names {len(self.train)} files and --test {len(self.test)}; one each a domain is needed"
            )
        if len(names := {domain_name(t) for t in self.train}) < len(self.train):
            raise ConfigError(
                f"--train names {len(self.train)} files of {len(names)} domains; each domain can stand once"
            )
        if not self.methods or not self.seeds:
            raise ConfigError("--methods and --seeds each need at least one")
        for flag, values in (("--methods", self.methods), ("--seeds", self.seeds)):
            if twice := [v for v in values if values.count(v) > 1]:
                raise ConfigError(
                    f"{flag} names {twice[0]} more than once; the same training would count twice"
                )
        if not 0 <= self.validation < 1:
            raise ConfigError(
                f"--validation is {self.validation}; accepted: a share from 0 up to (not including) 1"
            )
        least = {
            "limit-train": (self.limit_train, 1),
            "limit-test": (self.limit_test, 1),
            "cache-gib": (self.cache_gib, 0),
        }
        for name, (value, low) in (least | {"seeds": (min(self.seeds), 0)}).items():
            if value is not None and not value >= low:
                raise ConfigError(f"--{name} is {value}; accepted: {low} or more")
        if len(self.labels) not in (2, 3):
            raise ConfigError(
                f"--labels gives {len(self.labels)} words; those for positive, negative and neutral are needed"
            )


def main(config: Config) -> Path:
    """Train, test, and write the folder.

    Raises:
        MechAbsaError: an input is not accepted; nothing has been written then.
    """
    domains = [
        Domain(
            domain_name(a),
            _read(a, config, config.limit_train),
            _read(b, config, config.limit_test),
        )
        for a, b in zip(config.train, config.test, strict=True)
    ]
    template, verbalizer = (
        PromptTemplate(config.template),
        Verbalizer.of(config.labels, config.separator),
    )
    model = load_model(config.model, device=config.device, dtype=config.dtype)
    sites, notes = (
        traced_sites(config.sites, model, config.any_sites)
        if config.sites is not None
        else ([], [])
    )
    methods = [Method.parse(m) for m in config.methods]
    positions = [int(p) if p.lstrip("-").isdigit() else p for p in config.positions]

    def change(preset: Preset) -> Preset:
        given = {n: v for n in ("epochs", "batch_size") if (v := getattr(config, n)) is not None}
        return preset.rates(config.lr_scale).but(**given)

    grid = Grid(
        domains,
        methods,
        config.seeds,
        sites,
        positions,
        config.rank,
        change,
        config.validation,
        template,
        verbalizer,
    )
    grid.check(model)
    notes += dict.fromkeys(
        note for d in domains for note in caveats(d.train.items, [o.test for o in domains], d.name)
    )
    folder = RunFolder(config.out, vars(config), resume=config.resume, free=FREE)
    folder.bind(
        {"model": model.sha256, "data": [e.sha256 for d in domains for e in (d.train, d.test)]}
    )
    if folder.finished:
        return folder.path

    folder.open()
    with bar("trainings", grid.n_trainings, config.quiet) as advance:
        rows = run_matrix(
            model,
            grid,
            budget=int(config.cache_gib * 2**30),
            parts=folder.part("rows"),
            on_done=advance,
        )
    table, short = pd.DataFrame(rows), summary(rows)
    folder.write("matrix.csv", partial(table.to_csv, index=False))
    folder.write("summary.csv", partial(short.to_csv, index=False))
    for row in table[table["diverged"]].drop_duplicates(["method", "train", "seed"]).itertuples():
        notes.append(f"{row.method} trained on {row.train} with seed {row.seed}: {row.stopped}")
    for row in table[table["warnings"] != ""].drop_duplicates(["train", "warnings"]).itertuples():
        notes.append(f"{row.train} with seed {row.seed}: {row.warnings}")
    folder.finish(
        {
            "command": "train.matrix",
            "model": {
                "name": model.name,
                "sha256": model.sha256,
                "parameters": model.n_parameters,
                "device": str(model.device),
            },
            "domains": {
                d.name: {"train": d.train.account(), "test": d.test.account()} for d in domains
            },
            "sites": [str(s) for s in sites],
            "trainings": grid.n_trainings,
            "warnings": notes,
        },
        report(config),
    )
    if not config.quiet:
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)
        print(short.round(4).to_string(index=False))
        print(f"written to {folder.path}")
    return folder.path


def _read(source: str, config: Config, limit: int | None):
    examples = load_examples(source, **reading(config))
    tell_left_out(examples)
    return examples if limit is None else examples.sample(limit)


def cli(argv: Sequence[str] | None = None) -> int:
    """The command: its exit code."""
    return command(Config, main, "mech_absa.train.matrix", argv)
