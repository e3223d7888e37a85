"""Run `mech-absa train`, or `python -m mech_absa.train`: train one edit.

    mech-absa train --data builtin:restaurant/train --layers 2-4 --out runs/both
    mech-absa train --data rest_train.jsonl --test rest_test.jsonl --sites runs/trace --preset paper

Where to edit comes from a traced run (`--sites`), or from `--layers` and `--positions`. The run
writes `edit.safetensors` and `edit.json` (the edit), `history.csv` (one row per step), `run.json`
(everything that is needed to make it again) and `report.html`. `--resume` continues a killed run,
which then ends with the same bytes.

    accelerate launch --multi_gpu --num_processes 4 -m mech_absa.train ...

trains the same edit, up to rounding, with four processes. Every process takes its share of each
batch; only the first one writes and prints. With `--device cpu` the same line starts as many
processes without GPUs (`accelerate launch --cpu` always starts one).
"""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from ..edits.base import Shape
from ..edits.edit import SHARED, Edit
from ..edits.record import TrainingRecord
from ..edits.store import save_edit
from ..errors import ConfigError
from ..evaluate.caveats import caveats
from ..examples import Example, Examples
from ..model import Model, load_model
from ..records import RunFolder, read_json
from ..schemas import RUNS
from ..sites import Site, traced_sites
from ..train import presets
from ..train.fit import fit
from ..train.memory import peak
from ..train.prefix import PrefixCache
from ..train.presets import Loss, Preset, Schedule
from .cli import command, out_folder, readable, report, tell_left_out, warn, warn_of_crowd
from .flags import (
    FREE,
    LimitFlags,
    ModelFlags,
    Names,
    OptionalFloat,
    OptionalInt,
    OptionalSources,
    OptionalText,
    OptionalWord,
    QuestionFlags,
    ReadFlags,
    RunFlags,
    SiteFlags,
    Sources,
    at_least,
    recorded,
)

FREE_TOO = (*FREE, "memory", "checkpoint_every", "strict")
"""Flags that may change when a training is resumed."""

REPRESENTATION = (
    "loreft", "noreft", "direft", "red", "steering", "adapter", "post_block", "head_gate", "reft_r1",
)  # fmt: skip
"""Families that `--lr-representation` is for; `--lr-weight` is for the others."""

GIVEN = (
    "epochs", "batch_size", "accumulate", "schedule", "warmup", "clip", "loss", "patience", "balance",
    "shared_weight",
)  # fmt: skip
"""Fields of a preset that flags of the same name change."""


@dataclass(frozen=True)
class PlaceFlags(SiteFlags):
    """Say where the model is edited."""

    layers: OptionalText = None
    """Where to edit, without --sites: 3, 2-5, 0,2-4, all, first, middle or last (thirds of the depth)."""
    positions: Names = (presets.LAST_OF_QUERY,)
    """Without --sites: roles (query.last, aspect, answer, ...) or positions (-1) at which representations are edited."""


@dataclass(frozen=True)
class RecipeFlags:
    """Say what is trained, and how. What is left out comes from the preset."""

    preset: str = "both"
    """both (the paper's pair, with rates for small models), paper, authors_code, a method such as lora_o or loreft, or table2:lora."""
    rank: int = 4
    """Rank of the edit; the bottleneck of an adapter, the length of a prefix, the scalars per matrix of TinyLoRA."""
    clusters: OptionalInt = None
    """Share one edit among the layers of each of this many clusters by CKA (CRaSh). Default: none is shared."""
    epochs: OptionalInt = None
    """Passes over the examples. Default: the preset's, as for all flags down to --shared-weight."""
    batch_size: OptionalInt = None
    """Examples per forward pass."""
    accumulate: OptionalInt = None
    """Forward passes per step."""
    lr_weight: OptionalFloat = None
    """Learning rate of edits of weights."""
    lr_representation: OptionalFloat = None
    """Learning rate of edits of representations."""
    schedule: OptionalWord[Schedule] = None
    """linear, cosine or constant."""
    warmup: OptionalFloat = None
    """Share of the steps over which the rates rise."""
    clip: OptionalFloat = None
    """Largest norm of the gradient; 0 does not clip."""
    loss: OptionalWord[Loss] = None
    """labels (among the label words) or text (the answer's tokens and the end of sequence)."""
    patience: OptionalInt = None
    """Epochs without a gain on the validation examples before training stops; 0 never stops."""
    balance: OptionalInt = None
    """Steps between two measurements by which the rates of weights and representations are balanced (CoMMIT); 0 keeps them."""
    shared_weight: OptionalFloat = None
    """With the loss text: weight of an answer's tokens that do not tell the labels apart; the others have 1."""


@dataclass(frozen=True)
class Config:
    """Train an edit of a frozen model on aspect-sentiment data.

    Examples:
      mech-absa train --data builtin:restaurant/train --sites runs/trace --out runs/edit
      mech-absa train --data train.jsonl --layers 10-15 --preset paper --model gpt2
    """

    data: Sources
    """Training files, or built-in ones such as builtin:restaurant/train."""
    test: OptionalSources = ()
    """Test files. Nothing is chosen on them; rows that stand in the training data are counted."""
    validation: float = 0.1
    """Share of the training sentences set aside to choose the best epoch on; 0 keeps the last."""
    validation_data: OptionalSources = ()
    """Files to choose the best epoch on, instead of a share."""
    seed: int = 0
    """Seed of the parameters, the order, the dropout, draws and the validation split."""
    memory: float = 1.0
    """GiB for activations below the edit, which are computed once; the rest is computed again."""
    checkpoint_every: int = 100
    """Steps between two states that --resume can go on from."""
    limits: Annotated[OmitArgPrefixes[LimitFlags], arg(name="data")] = field(
        default_factory=LimitFlags
    )
    place: OmitArgPrefixes[PlaceFlags] = field(default_factory=PlaceFlags)
    recipe: Annotated[OmitArgPrefixes[RecipeFlags], arg(name="training")] = field(
        default_factory=RecipeFlags
    )
    reading: OmitArgPrefixes[ReadFlags] = field(default_factory=ReadFlags)
    question: OmitArgPrefixes[QuestionFlags] = field(default_factory=QuestionFlags)
    model: OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)
    run: OmitArgPrefixes[RunFlags] = field(default_factory=RunFlags)

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("--data names no file; at least one training file is needed")
        brings = self.recipe.preset.startswith("table2:")
        if bool(self.place.sites) == (self.place.layers is not None) and not brings:
            raise ConfigError(
                "where to edit must be said once: give --sites FOLDER, or --layers such as 2-5"
            )
        if not 0 <= self.validation < 1:
            raise ConfigError(
                f"--validation is {self.validation}; accepted: a share from 0 up to (not including) 1"
            )
        at_least(1, checkpoint_every=self.checkpoint_every)
        self.limits.check()
        at_least(0, memory=self.memory)
        if self.recipe.patience and not self.validation and not self.validation_data:
            raise ConfigError(
                f"--patience {self.recipe.patience} waits for a gain on validation examples; give --validation or --validation-data too"
            )
        self.reading.check()
        self.question.check()


@dataclass(frozen=True, eq=False)
class Task:
    """Hold what a training uses: everything that is loaded and checked before the first step."""

    config: Config
    train: list[Examples]
    held: list[Examples]
    tests: list[Examples]
    model: Model
    preset: Preset
    notes: list[str]

    @property
    def examples(self) -> list[Example]:
        """Return all training examples."""
        return [e for part in self.train for e in part]


def where(config: Config, model: Model) -> tuple[list[Site], list[str]]:
    """Return the sites that the flags name, in this model, and notes on them.

    Raises:
        SiteError: the sites are of another model, or this one lacks them.
    """
    if config.place.sites:
        return named_sites(config.place.sites, model, config.place.any_sites)
    if config.place.layers is None:
        return [], []
    at = places(config.place.positions)
    return [
        model.check_site(s) for s in presets.range_sites(config.place.layers, at, model.n_layers)
    ], []


def named_sites(words: Sequence[str], model: Model, anywhere: bool) -> tuple[list[Site], list[str]]:
    """Return the sites that --sites names: a run folder, a sites.json, or single sites.

    Raises:
        SiteError: a word is none of these, or the model lacks a site.
    """
    if len(words) == 1 and (Path(words[0]).exists() or "." not in words[0] or "/" in words[0]):
        path = Path(words[0])
        return traced_sites(path / "sites.json" if path.is_dir() else path, model, anywhere)
    if len(words) == 1 and words[0].endswith(".json"):
        return traced_sites(words[0], model, anywhere)
    return [model.check_site(Site.parse(word)) for word in words], []


def places(words: Sequence[str]) -> list[int | str]:
    """Return positions as numbers and roles as words."""
    return [int(w) if w.lstrip("-").isascii() and w.lstrip("-").isdigit() else w for w in words]


def preset_of(config: Config, model: Model, sites: Sequence[Site]) -> Preset:
    """Return the preset that the flags name, with what other flags change."""
    preset = presets.named(config.recipe.preset, sites, Shape.of(model), config.recipe.rank)
    if config.recipe.preset.startswith("table2:") and sites:
        raise ConfigError(
            f"--preset {config.recipe.preset} brings its own places; leave --sites and --layers out, or choose another preset"
        )
    given = {n: v for n in GIVEN if (v := getattr(config.recipe, n)) is not None}
    rates = {True: config.recipe.lr_representation, False: config.recipe.lr_weight}

    def rate(family: str, lr: float) -> float:
        value = rates[family in REPRESENTATION]
        return lr if value is None else value

    parts = tuple(replace(p, lr=rate(p.family, p.lr)) for p in preset.parts)
    return preset.but(**given, parts=parts)


def clustered(config: Config, model: Model, preset: Preset, examples: list[Example]) -> Preset:
    """Return the preset with one edit per cluster of layers, by CKA on the training examples.

    Raises:
        ConfigError: no cluster holds two layers of the edit.
    """
    from ..select.clusters import clusters_of  # which brings all selectors along

    asked = {"template": config.question.prompt, "verbalizer": config.question.verbalizer}
    number = config.recipe.clusters or 0
    clusters = clusters_of(model, examples, number, config.seed, **asked)
    shared = presets.share(preset, clusters)
    if all(SHARED not in part.options for part in shared.parts):
        found = ", ".join(f"{c[0]}-{c[-1]}" for c in clusters)
        raise ConfigError(
            f"--clusters {number}: no two layers of the edit share one of the clusters {found}; give fewer clusters or more layers"
        )
    return shared


def main(config: Config) -> Path:
    """Train, and write the folder.

    Raises:
        MechAbsaError: an input is not accepted; nothing has been written then.
    """
    first, device = _process(config.model.device)
    task = prepare(config, device)
    # All processes look at the folder, so that all of them resume or stop together; only the first writes to it.
    folder = RunFolder(out_folder(config, "train"), recorded(config), config.run.resume, FREE_TOO)
    folder.bind(
        {
            "model": task.model.sha256,
            "data": [t.sha256 for t in task.train],
            "validation_data": [t.sha256 for t in task.held],
        }
    )
    if folder.finished:
        record = read_json(folder.path / "run.json", RUNS["train"])
        return _ended(folder.path, TrainingRecord.from_json(record["edit"]))
    if first and not config.run.quiet:
        warn(task.notes)
    warn_of_crowd(config.run.quiet or not first)
    edit = learn(task, folder, first)
    if not first:
        return folder.path
    if not config.run.quiet:
        warn(edit.record.warnings)
    task.notes.extend(edit.record.warnings)
    folder.open()
    save_edit(edit, folder.path)
    folder.finish(record_of(task, edit), report(config))
    _ended(folder.path, edit.record)
    if not config.run.quiet:
        print(f"{edit!r}\nwritten to {folder.path}\n{conclusion(edit, folder.path, task)}")
    return folder.path


def prepare(config: Config, device: str) -> Task:
    """Load the data and the model, and name what is trained.

    Raises:
        MechAbsaError: an input is not accepted.
    """
    train = [_read(s, config, limited=True) for s in config.data]
    held = [_read(s, config, limited=False) for s in config.validation_data]
    tests = [config.reading.read(t) for t in config.test]
    model = load_model(
        config.model.model, device=device, dtype=config.model.dtype, backend=config.model.backend
    )
    sites, notes = where(config, model)
    preset = preset_of(config, model, sites)
    answers = preset.loss == "text"
    train = [readable(config, model, part, answers=answers) for part in train]
    if config.recipe.clusters is not None:
        preset = clustered(config, model, preset, [e for part in train for e in part])
    held = [readable(config, model, part, answers=answers) for part in held]
    notes = notes + caveats([e for part in train for e in part], [*tests, *held])
    return Task(config, train, held, tests, model, preset, notes)


def learn(task: Task, folder: RunFolder, first: bool) -> Edit:
    """Train the edit; the folder is opened at the first step, so that rejected input leaves no
    trace.
    """
    config = task.config
    held = [e for part in task.held for e in part]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are in the record, and are printed with the others
        return fit(
            task.model,
            task.examples,
            task.preset,
            validation=held or config.validation or None,
            seed=config.seed,
            template=config.question.prompt,
            verbalizer=config.question.verbalizer,
            cache=PrefixCache(task.model, int(config.memory * 2**30)),
            checkpoint=folder.part("state.safetensors"),
            checkpoint_every=config.checkpoint_every,
            progress=first and not config.run.quiet,
            on_step=(lambda state: folder.open()) if first else None,
        )


def record_of(task: Task, edit: Edit) -> dict[str, Any]:
    """Return what run.json says of a training."""
    model = task.model
    return {
        "command": "train",
        "model": {
            "name": model.name,
            "sha256": model.sha256,
            "parameters": model.n_parameters,
            "device": str(model.device),
        },
        "data": [t.account() for t in task.train],
        "validation_data": [t.account() for t in task.held],
        "test_data": [t.account() for t in task.tests],
        "preset": task.preset,
        "warnings": task.notes,
        "edit": {
            "parameters": edit.n_parameters,
            "share": edit.share,
            "layers": edit.layers,
            **edit.record.to_json(),
        },
        "peak_memory_bytes": peak(model.device),
    }


def conclusion(edit: Edit, folder: Path, task: Task) -> str:
    """Say in one line how the training went and what to do next."""
    history = edit.history
    losses = [row["loss"] for row in history if row.get("loss") is not None]
    seen = [row for row in history if row.get("validation_accuracy") is not None]
    parts = []
    if losses:
        parts.append(f"loss {losses[0]:.3g} to {losses[-1]:.3g} in {len(losses)} steps")
    if seen:
        best = max(row["validation_accuracy"] for row in seen)
        parts.append(f"accuracy on the validation examples {best:.1%}")
    test = " ".join(task.config.test) or "TEST_FILE"
    return f"{'; '.join(parts)}. Score it: mech-absa evaluate --edit none {folder} --data {test}"


def _ended(folder: Path, record: TrainingRecord) -> Path:
    """Return the folder of a training that is over.

    Raises:
        ConfigError: its loss was not a number; the folder holds the last good state.
    """
    if record.diverged:
        raise ConfigError(
            f"{record.stopped}, in {folder}; lower the learning rates or clip the gradient"
        )
    return folder


def _process(device: str) -> tuple[bool, str]:
    """Return whether this process writes and prints, and its device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True, device
    import torch
    from accelerate import PartialState

    cpu = device == "cpu" or not torch.cuda.is_available()
    if not cpu:  # the loss is summed on the CPU, the gradients where they are
        torch.distributed.init_process_group("cuda:nccl,cpu:gloo")
    state = PartialState(cpu=cpu)
    atexit.register(state.destroy_process_group)
    return state.is_main_process, str(state.device)


def _read(source: str, config: Config, limited: bool) -> Examples:
    limit = config.limits.limit if limited else None
    examples = config.reading.read(source, limit, config.seed, config.limits.head)
    tell_left_out(examples)
    return examples


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command(Config, main, "mech_absa.train", argv)
