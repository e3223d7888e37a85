"""Train the adapter `bundled-v2`: LoRA on all layers, for both versions of the built-in world.

Rank and learning rate are chosen on validation sentences, with 2,000 training examples and two
epochs per candidate. The chosen pair is then trained on all training examples of both versions and
all domains; a twentieth of the sentences is set aside to choose the epoch. The test files are
scored once, at the end, for the base model, the adapter of the first version, and the new one.

    python analyses/train_harder_adapter.py --out runs/harder

With `--ranks 16 --rates 3e-3`, which were chosen so, no candidates are trained.

The folder holds the edit, `choice.csv` with the candidates, and `scores.csv`, which has the simple
baselines too, trained on the train files of the same version. The edit ships as `adapter_v2`, and
`results/harder_adapter.csv` has the rows of all examples. A run that was stopped goes on from its last
checkpoint.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro

import mech_absa as ma
from mech_absa.edits.store import save_edit
from mech_absa.evaluate.baselines import baseline_predictions
from mech_absa.evaluate.predictions import joined, predict
from mech_absa.evaluate.scores import score
from mech_absa.examples import Example, split_by_sentence
from mech_absa.model import Model
from mech_absa.train import presets
from mech_absa.train.fit import fit
from mech_absa.world import DOMAINS


@dataclass(frozen=True)
class Config:
    """What the run depends on."""

    out: Path = Path("runs/harder")
    ranks: tuple[int, ...] = (8, 16)
    rates: tuple[float, ...] = (1e-3, 3e-3)
    subset: int = 2000
    """Training examples per candidate."""
    epochs: int = 2
    """Of the last training."""
    seed: int = 0
    test_only: bool = False
    """Score the edit that the folder holds."""


def data(version: str, split: str, domains: tuple[str, ...] = tuple(DOMAINS)) -> ma.Examples:
    """Return a built-in file of a version, `""` or `"v2/"`."""
    return ma.load_examples(f"builtin:{version}{'+'.join(domains)}/{split}")


def preset(model: Model, rank: int, rate: float, epochs: int) -> presets.Preset:
    """Return LoRA on q, k, v, up and down of all layers, with alpha twice the rank."""
    places = presets.matrices(range(model.n_layers), "W_Q", "W_K", "W_V", "W_in", "W_out")
    parts = presets.parts("lora", places, rate, rank=rank, alpha=2.0 * rank)
    return presets.Preset("lora", parts, epochs=epochs)


def choose(model: Model, items: list[Example], config: Config) -> tuple[int, float]:
    """Return the rank and the rate with the best validation accuracy; write all candidates.

    Where one rank and one rate are given, there is nothing to choose.
    """
    if len(config.ranks) == len(config.rates) == 1:
        return config.ranks[0], config.rates[0]
    file = config.out / "choice.csv"
    if file.exists():
        table = pd.read_csv(file)
    else:
        train, held = split_by_sentence(items, 0.1, config.seed + 1)
        train = ma.Examples(tuple(train)).sample(config.subset, config.seed)
        rows = []
        for rank in config.ranks:
            for rate in config.rates:
                edit = fit(model, train, preset(model, rank, rate, 2), seed=config.seed)
                right = predict(model, held, edit).correct.mean()
                rows.append({"rank": rank, "rate": rate, "validation_accuracy": right})
                print(rows[-1], flush=True)
        table = pd.DataFrame(rows)
        table.to_csv(file, index=False)
    best = table.loc[table["validation_accuracy"].idxmax()]
    return int(best["rank"]), float(best["rate"])


def simple(version: str) -> pd.DataFrame:
    """Return the scores of the baselines on all test files of a version."""
    answers = baseline_predictions(data(version, "train"), data(version, "test"))
    table = pd.concat([score(p).to_pandas() for p in answers], ignore_index=True)
    return table.assign(data=f"builtin:{version}test")


def test(model: Model, edits: dict[str, ma.Edit | None], config: Config) -> None:
    """Score every edit on every test file; write and print the table."""
    tables = []
    for name, edit in edits.items():
        for version in ("", "v2/"):
            parts = [predict(model, data(version, "test", (d,)), edit, name=name) for d in DOMAINS]
            for p in (*parts, joined(parts, f"builtin:{version}test")):
                tables.append(score(p).to_pandas())
    tables += [simple(version) for version in ("", "v2/")]
    table = pd.concat(tables, ignore_index=True)
    table.to_csv(config.out / "scores.csv", index=False)
    print(table[table["subset"] == "all"][["system", "data", "n", "accuracy", "macro_f1"]])


def main(config: Config) -> None:
    torch.set_num_threads(1)
    config.out.mkdir(parents=True, exist_ok=True)
    model = ma.load_model()
    if not config.test_only:
        items = [e for version in ("", "v2/") for e in data(version, "train")]
        rank, rate = choose(model, items, config)
        start = time.time()
        edit = fit(
            model, items, preset(model, rank, rate, config.epochs), validation=0.05,
            seed=config.seed, checkpoint=config.out / "state.safetensors",
            on_step=lambda p: print(f"step {p.step}", flush=True) if p.step % 100 == 0 else None,
        )  # fmt: skip
        save_edit(edit, config.out)
        print(json.dumps({"rank": rank, "rate": rate, "minutes": (time.time() - start) / 60}))
    edits = {"base": None, "bundled": ma.load_edit("bundled", model)}
    test(model, edits | {"bundled-v2": ma.load_edit(config.out, model)}, config)


if __name__ == "__main__":
    main(tyro.cli(Config, description=(__doc__ or "").splitlines()[0]))
