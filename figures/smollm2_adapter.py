"""Train the adapter of SmolLM2-135M that ships with the package: LoRA on all layers, on real reviews.

The paper adapts its model to the task before it is traced and edited. So does this script, with the
paper's loss (the answer's text): `labels` teaches which label is right and leaves almost no
probability on the label words, so that effects on a probability cannot be seen any more.

Training rows are drawn by seed from the training files of the four domains of ME-ABSC and from
MAMS. A question that occurs in any test file is left out, and so are the sentences set aside for
validation: a tenth of each file. Rank and rate are fixed; one epoch. No test file is scored here;
`smollm2.py` does that, once.

    python -m mech_absa.models get smollm2
    python -m figures.smollm2_adapter --data DATA --out runs/smollm2-adapter

DATA holds `me_absc/` (NAME_train.json, NAME_test.json) and `mams/` (train.xml, test.xml). The run
takes about 25 minutes on one core, and a run that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import mech_absa as ma
from mech_absa.edits.store import save_edit
from mech_absa.examples import Example, leakage, split_by_sentence
from mech_absa.model import Model
from mech_absa.train import presets
from mech_absa.train.fit import fit

DOMAINS = {"device": "device", "laptop": "laptop", "restaurant": "rest", "service": "service"}
"""Domain -> its name in the files of ME-ABSC."""


@dataclass(frozen=True)
class Config:
    """What the run depends on."""

    data: Path
    """Folder with me_absc/ and mams/."""
    out: Path = Path("runs/smollm2-adapter")
    rows: int = 400
    """Training rows of each domain."""
    mams: int = 600
    """Training rows of MAMS."""
    rank: int = 8
    rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Split:
    """The rows of one training file.

    Attributes:
        train: rows to learn from, as many as were asked for.
        spare: rows of other sentences than those of `train` and `held`.
        held: rows of the sentences set aside for validation.
        leaked: rows left out because a test file holds the question.
    """

    train: list[Example]
    spare: list[Example]
    held: list[Example]
    leaked: int


def file(data: Path, name: str, split: str) -> Path:
    """Return the file of a domain or of `mams`."""
    if name == "mams":
        return data / "mams" / f"{split}.xml"
    return data / "me_absc" / f"{DOMAINS[name]}_{split}.json"


def split(data: Path, name: str, rows: int, seed: int = 0) -> Split:
    """Divide a training file; the same arguments give the same rows."""
    names = (*DOMAINS, "mams")
    tests = [e for n in names for e in ma.load_examples(file(data, n, "test"))]
    train = ma.load_examples(file(data, name, "train"))
    leaked = {train[i].key for i in leakage(tests, train).rows}
    clean = [e for e in train if e.key not in leaked]
    rest, held = split_by_sentence(clean, 0.1, seed + 1)
    drawn = ma.Examples(tuple(rest)).sample(rows, seed)
    sentences = {e.cluster for e in drawn}
    spare = [e for e in rest if e.cluster not in sentences]
    return Split(list(drawn), spare, held, len(train) - len(clean))


def preset(model: Model, rank: int, rate: float) -> presets.Preset:
    """Return LoRA on q, k, v, o, up and down of all layers, with alpha twice the rank."""
    names = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out")
    places = presets.matrices(range(model.n_layers), *names)
    parts = presets.parts("lora", places, rate, rank=rank, alpha=2.0 * rank)
    return presets.Preset("lora", parts, batch_size=8, loss="text")


def halved(edit: ma.Edit) -> ma.Edit:
    """Return the edit with its parameters rounded to float16, as they are stored."""
    return edit.to(dtype=torch.float16)


def main(config: Config) -> None:
    """Train, and write the edit."""
    torch.set_num_threads(1)
    config.out.mkdir(parents=True, exist_ok=True)
    model = ma.load_model("smollm2")
    wanted = dict.fromkeys(DOMAINS, config.rows) | {"mams": config.mams}
    splits = {n: split(config.data, n, rows, config.seed) for n, rows in wanted.items()}
    counts = {n: {"train": len(s.train), "held": len(s.held), "leaked": s.leaked} for n, s in splits.items()}  # fmt: skip
    print(json.dumps(counts), flush=True)
    (config.out / "rows.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    start = time.time()
    edit = fit(
        model, [e for s in splits.values() for e in s.train],
        preset(model, config.rank, config.rate), seed=config.seed,
        checkpoint=config.out / "state.safetensors", checkpoint_every=25,
        on_step=lambda p: print(p.step, p.history[-1]["loss"], round(p.seconds), flush=True),
    )  # fmt: skip
    save_edit(halved(edit), config.out)
    print(f"{(time.time() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main(tyro.cli(Config, description=(__doc__ or "").splitlines()[0]))
