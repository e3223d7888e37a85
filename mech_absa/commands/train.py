"""`python -m mech_absa.train`: train one edit.

    python -m mech_absa.train --data builtin:restaurant/train --layers 2-4 --out runs/both
    python -m mech_absa.train --data rest_train.jsonl --test rest_test.jsonl --sites runs/trace/sites.json --preset paper --out runs/paper

Where to edit comes from the `sites.json` of a traced run, or from `--layers` and `--positions`. The run leaves `edit.safetensors` and
`edit.json` (the edit), `history.csv` (a row a step), `run.json` (all that is needed to make it again) and `report.html`. A killed run is
taken up with `--resume` and ends in the same bytes.

    accelerate launch --multi_gpu --num_processes 4 -m mech_absa.train ...    the same edit, up to rounding, trained by four processes

Every process takes its share of each batch; the first of them alone writes and speaks. With `--device cpu` the same line starts as many
processes without accelerators (`accelerate launch --cpu` starts one, whatever number it is given).
"""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..edits.base import Shape
from ..edits.record import TrainingRecord
from ..edits.store import save_edit
from ..errors import ConfigError
from ..evaluate.caveats import caveats
from ..examples import Examples
from ..model import Model, load_model
from ..prompts import PromptTemplate, Verbalizer
from ..readers import load_examples
from ..records import RunFolder, read_json
from ..schemas import RUNS
from ..sites import Site, traced_sites
from ..train import presets
from ..train.fit import fit
from ..train.memory import peak
from ..train.prefix import PrefixCache
from ..train.presets import Loss, Preset, Schedule
from .cli import command, reading, report, tell_left_out

FREE = ("out", "resume", "device", "cache_gib", "checkpoint_every", "report", "quiet")
"""Settings that do not change a result."""

REPRESENTATION = ("loreft", "noreft", "direft", "red", "steering", "adapter", "head_gate")
"""Families that `--lr-representation` is for; `--lr-weight` is for the others."""


@dataclass(frozen=True)
class Config:
    """Train an edit of a frozen model on aspect-sentiment data."""

    data: tuple[str, ...]
    """Training files, or built-in ones such as builtin:restaurant/train."""
    sites: Path | None = None
    """The sites.json of a traced run: where to edit."""
    any_sites: bool = False
    """Edit at sites that were found in another model."""
    layers: str | None = None
    """Where to edit, said directly: 3, 2-5 (both ends count), 0,2-4, all, first, middle or last (thirds of the depth)."""
    positions: tuple[str, ...] = (presets.LAST_OF_QUERY,)
    """With --layers: roles (query.last, aspect, answer, ...) or positions (-1) at which representations are edited."""
    model: str = "bundled"
    """bundled, a local Hugging Face folder, or a hub name."""
    preset: str = "both"
    """both (the paper's pair, with rates for small models), paper, authors_code, a method such as lora_o or loreft, or table2:lora."""
    rank: int = 4
    """Rank of whatever has one; the bottleneck of an adapter, the length of a prefix."""
    epochs: int | None = None
    """Passes over the examples; the preset's where nothing is said, as in all that follow."""
    batch_size: int | None = None
    """Examples a forward pass."""
    accumulate: int | None = None
    """Forward passes a step."""
    lr_weight: float | None = None
    """Learning rate of edits of weights."""
    lr_representation: float | None = None
    """Learning rate of edits of representations."""
    schedule: Schedule | None = None
    """linear, cosine or constant."""
    warmup: float | None = None
    """Share of the steps over which the rates rise."""
    clip: float | None = None
    """Largest norm of the gradient; 0 does not clip."""
    loss: Loss | None = None
    """labels (among the label strings) or text (the answer's tokens and the end of sequence)."""
    patience: int | None = None
    """Epochs without a gain on the validation examples before training stops; 0 never stops."""
    validation: float = 0.1
    """Share of the training sentences set aside to choose the best epoch on; 0 keeps the last."""
    validation_data: tuple[str, ...] = ()
    """Files to choose the best epoch on, instead of a share."""
    test: tuple[str, ...] = ()
    """Test files: nothing is chosen on them; what of them stands in the training data is counted and warned of."""
    template: str = PromptTemplate().text
    """The question, with {sentence} and {aspect}."""
    labels: tuple[str, ...] = ("positive", "negative", "neutral")
    """The label strings for positive, negative and neutral."""
    separator: str = " "
    """Between the question and the label."""
    limit: int | None = None
    """At most so many examples of each training file."""
    columns: tuple[str, ...] = ()
    """Names of columns or fields that are not recognised, such as aspect=Term polarity=Rating."""
    meaning: tuple[str, ...] = ()
    """What labels of the data mean that are not words, such as 0=negative 1=neutral 2=positive."""
    skip_bad: bool = False
    """Leave out records that cannot be read, and count them."""
    seed: int = 0
    """Of the parameters, the order, the dropout and the validation split."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    dtype: str = "float32"
    """Of the model: float32, bfloat16, float16 or float64; the edit itself is float32."""
    cache_gib: float = 1.0
    """Memory for the activations below the edit, which are computed once; what does not fit is computed anew."""
    checkpoint_every: int = 100
    """Steps between two states that --resume can go on from."""
    out: Path = Path("runs/train")
    """A new or empty folder."""
    resume: bool = False
    """Take up the killed run that --out holds."""
    report: bool = True
    """Write report.html."""
    quiet: bool = False
    """Print nothing but errors."""

    def __post_init__(self):
        if not self.data:
            raise ConfigError("--data names no file; at least one training file is needed")
        if (self.sites is None) == (self.layers is None) and not self.preset.startswith("table2:"):
            raise ConfigError(
                "where to edit must be said once: give --sites FILE, or --layers such as 2-5"
            )
        if not 0 <= self.validation < 1:
            raise ConfigError(
                f"--validation is {self.validation}; accepted: a share from 0 up to (not including) 1"
            )
        for name, value, least in (
            ("checkpoint-every", self.checkpoint_every, 1),
            ("seed", self.seed, 0),
            ("cache-gib", self.cache_gib, 0),
        ):
            if not value >= least:
                raise ConfigError(f"--{name} is {value}; accepted: {least} or more")
        if self.patience and not self.validation and not self.validation_data:
            raise ConfigError(
                f"--patience {self.patience} waits for a gain on validation examples; give --validation or --validation-data too"
            )
        if len(self.labels) not in (2, 3):
            raise ConfigError(
                f"--labels gives {len(self.labels)} words; those for positive, negative and neutral are needed"
            )


def where(config: Config, model: Model) -> tuple[list[Site], list[str]]:
    """The sites that the flags name, in this model, and what is to be said of them.

    Raises:
        SiteError: the sites are of another model, or this one lacks them.
    """
    if config.sites is not None:
        return traced_sites(config.sites, model, config.any_sites)
    if config.layers is None:
        return [], []
    at = [int(p) if p.lstrip("-").isdigit() else p for p in config.positions]
    return [model.check_site(s) for s in presets.range_sites(config.layers, at, model.n_layers)], []


def preset_of(config: Config, model: Model, sites: Sequence[Site]) -> Preset:
    """The preset that the flags name, with what they say otherwise."""
    preset = presets.named(config.preset, sites, Shape.of(model), config.rank)
    if config.preset.startswith("table2:") and sites:
        raise ConfigError(
            f"--preset {config.preset} brings its own places; leave --sites and --layers out, or choose another preset"
        )
    said = {
        n: v
        for n in (
            "epochs",
            "batch_size",
            "accumulate",
            "schedule",
            "warmup",
            "clip",
            "loss",
            "patience",
        )
        if (v := getattr(config, n)) is not None
    }
    rates = {True: config.lr_representation, False: config.lr_weight}

    def rate(family: str, lr: float) -> float:
        given = rates[family in REPRESENTATION]
        return lr if given is None else given

    return preset.but(
        **said, parts=tuple(replace(p, lr=rate(p.family, p.lr)) for p in preset.parts)
    )


def run(config: Config) -> Path:
    """Train, and write the folder.

    Raises:
        MechAbsaError: an input is not accepted; nothing has been written then.
    """
    first, device = _process(config.device)
    train = _read(config.data, config)
    held = _read(config.validation_data, config) if config.validation_data else []
    tests = [load_examples(t, **reading(config)) for t in config.test]
    model = load_model(config.model, device=device, dtype=config.dtype)
    sites, notes = where(config, model)
    preset = preset_of(config, model, sites)
    examples = [e for part in train for e in part]
    notes += caveats(examples, [*tests, *held])
    # All processes look at the folder, so that all of them resume or stop together; only the first writes to it.
    folder = RunFolder(config.out, vars(config), resume=config.resume, free=FREE)
    folder.bind(
        {
            "model": model.sha256,
            "data": [t.sha256 for t in train],
            "validation_data": [t.sha256 for t in held],
        }
    )
    if folder.finished:
        record = read_json(folder.path / "run.json", RUNS["train"])["edit"]
        return _ended(folder.path, TrainingRecord.from_json(record))
    for note in notes if first and not config.quiet else ():
        print(f"warning: {note}", file=sys.stderr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are in the record, and are printed with the others
        edit = fit(
            model,
            examples,
            preset,
            validation=[e for part in held for e in part] or config.validation or None,
            seed=config.seed,
            template=PromptTemplate(config.template),
            verbalizer=Verbalizer.of(config.labels, config.separator),
            cache=PrefixCache(model, int(config.cache_gib * 2**30)),
            checkpoint=folder.part("state.safetensors"),
            checkpoint_every=config.checkpoint_every,
            progress=first and not config.quiet,
            on_step=(lambda state: folder.open())
            if first
            else None,  # not before: what fit refuses leaves no trace
        )
    if not first:
        return config.out
    for note in edit.record.warnings if not config.quiet else ():
        print(f"warning: {note}", file=sys.stderr)
    notes += edit.record.warnings
    folder.open()
    save_edit(edit, folder.path)
    folder.finish(
        {
            "command": "train",
            "model": {
                "name": model.name,
                "sha256": model.sha256,
                "parameters": model.n_parameters,
                "device": str(model.device),
            },
            "data": [t.account() for t in train],
            "validation_data": [t.account() for t in held],
            "test_data": [t.account() for t in tests],
            "preset": preset,
            "warnings": notes,
            "edit": {
                "parameters": edit.n_parameters,
                "share": edit.share,
                "layers": edit.layers,
                **edit.record.to_json(),
            },
            "peak_memory_bytes": peak(model.device),
        },
        report(config),
    )
    _ended(folder.path, edit.record)
    if not config.quiet:
        print(f"{edit!r}\nwritten to {folder.path}")
    return folder.path


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
    """(whether this process writes and speaks, its device), when a launcher has started several; (True, device) otherwise."""
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


def _read(sources: Sequence[str], config: Config) -> list[Examples]:
    found = [load_examples(s, limit=config.limit, **reading(config)) for s in sources]
    for examples in found:
        tell_left_out(examples)
    return found


def cli(argv: Sequence[str] | None = None) -> int:
    """The command: its exit code."""
    return command(Config, run, "mech_absa.train", argv)
