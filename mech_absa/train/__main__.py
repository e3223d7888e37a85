"""`python -m mech_absa.train`: train one edit.

    python -m mech_absa.train --data builtin:restaurant/train --layers 2-4 --out runs/both
    python -m mech_absa.train --data rest_train.jsonl --test rest_test.jsonl --sites runs/trace/sites.json --preset paper --out runs/paper

Where to edit comes from the `sites.json` of a traced run, or from `--layers` and `--positions`. The run leaves `edit.safetensors` and
`edit.json` (the edit), `history.csv` (a row a step) and `run.json` (all that is needed to make it again). A killed run is taken up with
`--resume` and ends in the same bytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..cli import command
from ..edits.base import Shape
from ..edits.store import save_edit
from ..errors import ConfigError, SiteError, choices
from ..examples import Example, Examples, class_counts, leakage
from ..models import Model, load_model
from ..prompts import PromptTemplate, Verbalizer
from ..readers import load_examples
from ..records import RunFolder
from ..sites import Site
from . import presets
from .fit import fit
from .memory import peak
from .prefix import PrefixCache
from .presets import Loss, Preset, Schedule

FREE = ("out", "resume", "device", "cache_gib", "checkpoint_every", "quiet")
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
    quiet: bool = False
    """Print nothing but errors."""

    def __post_init__(self):
        if not self.data:
            raise ConfigError("--data names no file; at least one training file is needed")
        if (self.sites is None) == (self.layers is None) and not self.preset.startswith("table2:"):
            raise ConfigError("where to edit must be said once: give --sites FILE, or --layers such as 2-5")
        if not 0 <= self.validation < 1:
            raise ConfigError(f"--validation is {self.validation}; accepted: a share from 0 up to (not including) 1")
        if self.checkpoint_every < 1:
            raise ConfigError(f"--checkpoint-every is {self.checkpoint_every}; at least 1 is needed")
        if len(self.labels) not in (2, 3):
            raise ConfigError(f"--labels gives {len(self.labels)} words; those for positive, negative and neutral are needed")


def where(config: Config, model: Model) -> list[Site]:
    """The sites that the flags name, in this model.

    Raises:
        SiteError: the sites are of another model, or this one lacks them.
    """
    if config.sites is not None:
        sites, said = presets.sites_file(config.sites)
        traced = said.get("model")
        digest = traced.get("sha256") if isinstance(traced, dict) else said.get("model_sha256")
        if digest and digest != model.sha256:
            raise SiteError(
                f"--sites {config.sites}: these sites were found in a model with weights {digest[:12]}, and {model.name} has "
                f"{model.sha256[:12]}; trace this model, or say the layers with --layers"
            )
    elif config.layers is not None:
        at = [int(p) if p.lstrip("-").isdigit() else p for p in config.positions]
        sites = presets.range_sites(config.layers, at, model.n_layers)
    else:
        return []
    return [model.check_site(s) for s in sites]


def preset_of(config: Config, model: Model) -> Preset:
    """The preset that the flags name, with what they say otherwise."""
    preset = presets.named(config.preset, where(config, model), Shape.of(model), config.rank)
    said = {
        n: v
        for n in ("epochs", "batch_size", "accumulate", "schedule", "warmup", "clip", "loss", "patience")
        if (v := getattr(config, n)) is not None
    }
    rates = {True: config.lr_representation, False: config.lr_weight}

    def rate(family: str, lr: float) -> float:
        given = rates[family in REPRESENTATION]
        return lr if given is None else given

    return preset.but(**said, parts=tuple(replace(p, lr=rate(p.family, p.lr)) for p in preset.parts))


def run(config: Config) -> Path:
    """Train, and write the folder.

    Raises:
        MechAbsaError: an input is not accepted; nothing has been written then.
    """
    main_process, device = _process(config.device)
    train = _read(config.data, config)
    held = _read(config.validation_data, config) if config.validation_data else []
    tests = [load_examples(t, skip_bad=config.skip_bad) for t in config.test]
    model = load_model(config.model, device=device, dtype=config.dtype)
    preset = preset_of(config, model)
    examples = [e for part in train for e in part]
    notes = _notes(examples, [*tests, *held])
    said = {**vars(config), "model_sha256": model.sha256, "data_sha256": [t.sha256 for t in train]}
    folder = RunFolder(config.out, said, resume=config.resume, free=FREE) if main_process else None
    if folder is not None and folder.finished:
        return folder.path
    for note in notes if main_process and not config.quiet else ():
        print(f"warning: {note}", file=sys.stderr)
    edit = fit(
        model,
        examples,
        preset,
        validation=[e for part in held for e in part] or config.validation or None,
        seed=config.seed,
        template=PromptTemplate(config.template),
        verbalizer=Verbalizer.of(config.labels, config.separator),
        cache=PrefixCache(model, int(config.cache_gib * 2**30)),
        checkpoint=None if folder is None else folder.part("state.safetensors"),
        checkpoint_every=config.checkpoint_every,
        progress=main_process and not config.quiet,
        on_step=None if folder is None else lambda state: folder.open(),  # not before: what fit refuses leaves no trace
    )
    if folder is None:
        return config.out
    folder.open()
    save_edit(edit, folder.path)
    folder.finish(
        {
            "model": {"name": model.name, "sha256": model.sha256, "parameters": model.n_parameters, "device": str(model.device)},
            "data": [t.account() for t in train],
            "validation_data": [t.account() for t in held],
            "preset": preset,
            "warnings": notes,
            "edit": {"parameters": edit.n_parameters, "share": edit.share, "layers": edit.layers, **edit.record},
            "peak_memory_bytes": peak(model.device),
        }
    )
    if edit.record["stopped"] and edit.record["stopped"].startswith("the loss"):
        raise ConfigError(f"{edit.record['stopped']}, in {folder.path}; lower the learning rates or clip the gradient")
    if not config.quiet:
        print(f"{edit!r}\nwritten to {folder.path}")
    return folder.path


def _process(device: str) -> tuple[bool, str]:
    """(whether this process writes, its device), when `accelerate launch` has started several; (True, device) otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True, device
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    return state.is_main_process, str(state.device)


def _read(sources: Sequence[str], config: Config) -> list[Examples]:
    return [load_examples(s, skip_bad=config.skip_bad, limit=config.limit) for s in sources]


def _notes(train: Sequence[Example], others: Sequence[Examples]) -> list[str]:
    """What one should know about the data before trusting a score, with counts."""
    notes = []
    counts = class_counts(train)
    if empty := [c for c, n in counts.items() if not n]:
        notes.append(f"no {choices(empty)} example among the {len(train)} to train on ({counts}): the edit cannot learn to answer that")
    for other in others:
        leak = leakage(train, other)
        if leak.rows:
            notes.append(
                f"{len(leak.rows)} of {leak.total} rows of {other.source} stand in the training data ({100 * leak.share:.1f} %; "
                f"{leak.same_label} with the same label): a score on them says little"
            )
    return notes


def cli(argv: Sequence[str] | None = None) -> int:
    """The command: its exit code."""
    return command(Config, run, "python -m mech_absa.train", argv)


if __name__ == "__main__":
    sys.exit(cli())
