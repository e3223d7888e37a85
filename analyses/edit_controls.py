"""Train the paper's edit at several ranks, and controls that each take one thing away.

    python analyses/edit_controls.py          # bundled model, layers 3 and 4; writes results/
    python analyses/edit_controls.py --seeds 1 2 3 --layers 2-5 --out runs/controls

The question is whether the edit is good because of where it acts. Every row edits the *base* model,
without the shipped adaptation. It is trained on the built-in restaurant and laptop train files and
scored on the built-in test files with the task's question. Restaurant and laptop are in domain,
device and service out of domain. The rows vary:

- **the edit**: `both` (low-rank W_O, and LoReFT at the last token of the aspect in the question), at
  several ranks;
- **its halves**: W_O alone and LoReFT alone. W_O acts on every token, so a position matters to the
  other half only;
- **its position**: LoReFT at other tokens, alone and with W_O. All words of the sentence before or
  after the aspect are more tokens than the edit uses. The ninth token of the prompt (some word of
  the sentence) and the third (always the same word) are one token each;
- **its layers**: the first two, the last two, and random windows that share no layer with the traced
  or the last ones. All use the same rates; `figures/places.py` tunes a rate for each place;
- **its labels**: the training labels in random order. A third of them stay right by chance.

All settings are the preset's, except the number of epochs, which is the same in every row. No setting
was chosen by a score on these test files. Intervals resample sentences and hold for one trained edit.
To see the spread between seeds, give several.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mech_absa.commands.cli import command
from mech_absa.errors import ConfigError
from mech_absa.evaluate.predictions import joined, predict
from mech_absa.evaluate.scores import Quality, percent, score
from mech_absa.examples import Example
from mech_absa.model import Model, load_model
from mech_absa.readers import load_examples
from mech_absa.records import atomic, write_text
from mech_absa.scoring import Applicable
from mech_absa.sites import parse_layers
from mech_absa.train import presets
from mech_absa.train.fit import fit
from mech_absa.train.places import named_layers, random_layers, random_windows
from mech_absa.train.prefix import PrefixCache
from mech_absa.world import DOMAINS

IN_DOMAIN = ("restaurant", "laptop")
OUT_OF_DOMAIN = tuple(d for d in DOMAINS if d not in IN_DOMAIN)


@dataclass(frozen=True)
class Config:
    """The paper's edit of the base model at several ranks, and its controls."""

    layers: str = "3-4"
    """Where to edit: the layers that a trace of the adapted model selects."""
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """Ranks of the edit."""
    control_rank: int = 4
    """Rank of the controls and of the row they are compared with; one of the ranks."""
    windows: int = 3
    """Largest number of random windows of layers."""
    epochs: int = 2
    """Passes over the training examples."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of the parameters, the order, the validation split and the shuffled labels."""
    limit: int | None = None
    """Use at most this many examples of each file."""
    model: str = "bundled"
    """`bundled`, a local Hugging Face folder, or a hub name."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    draws: int = 2000
    """Bootstrap draws."""
    out: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    """The folder of the two tables."""

    def __post_init__(self):
        if self.control_rank not in self.ranks:
            raise ConfigError(
                f"--control-rank is {self.control_rank}; one of --ranks ({', '.join(map(str, self.ranks))}) is needed"
            )


@dataclass(frozen=True)
class Arm:
    """One row's edit: what is trained, and where."""

    what: str
    method: str
    rank: int
    layers: tuple[int, ...]
    position: str | int = presets.LAST_OF_QUERY
    shuffled: bool = False

    def preset(self, epochs: int) -> presets.Preset:
        return presets.bundled(
            presets.range_sites(self.layers, [self.position]),
            self.method,
            rank=self.rank,
            epochs=epochs,
        )


def arms(config: Config, model: Model) -> list[Arm]:
    """The edit at every rank, then the controls."""
    here, r = parse_layers(config.layers, model.n_layers), config.control_rank
    n, width = model.n_layers, len(here)
    first, last = named_layers("first", width, n), named_layers("last", width, n)
    drawn = range(min(config.windows, random_windows(width, n, here)))
    windows = [random_layers(width, n, here, draw) for draw in drawn]
    return [
        *(Arm("the edit", "both", rank, here) for rank in config.ranks),
        Arm("shuffled labels", "both", r, here, shuffled=True),
        Arm("half: W_O alone", "lora_o", r, here),
        Arm("half: LoReFT alone", "loreft", r, here),
        Arm("LoReFT alone, words before the aspect", "loreft", r, here, "before"),
        Arm("LoReFT alone, words after the aspect", "loreft", r, here, "after"),
        Arm("LoReFT alone, one token of the sentence", "loreft", r, here, 8),
        Arm("LoReFT alone, one token of the template", "loreft", r, here, 2),
        Arm("both, words before the aspect", "both", r, here, "before"),
        Arm("both, first layers", "both", r, first),
        Arm("both, last layers", "both", r, last),
        *(Arm("both, random layers", "both", r, window) for window in windows),
        Arm("LoReFT alone, first layers", "loreft", r, first),
        Arm("LoReFT alone, last layers", "loreft", r, last),
    ]


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """The same examples, their labels in random order."""
    labels = [e.polarity for e in examples]
    random.Random(seed).shuffle(labels)
    return [
        replace(e, polarity=label, counterfactuals=())
        for e, label in zip(examples, labels, strict=True)
    ]


def scores(
    model: Model, edit: Applicable | None, tests: dict[str, list[Example]], draws: int
) -> dict[str, Quality]:
    """In-domain, out-of-domain, and the sentences of all that carry several polarities."""
    answers = {d: predict(model, examples, edit, batch_size=64) for d, examples in tests.items()}

    def together(domains: Sequence[str], mixed: bool = False) -> Quality | None:
        s = score(joined([answers[d] for d in domains], " ".join(domains)), draws=draws)
        return s.mixed if mixed else s.all

    made = {
        "in": together(IN_DOMAIN),
        "out": together(OUT_OF_DOMAIN),
        "mixed": together(tuple(DOMAINS), mixed=True),
    }
    return {name: q for name, q in made.items() if q is not None}


def rows(config: Config) -> Iterator[dict[str, Any]]:
    """One row an edit, the base model first."""
    model = load_model(config.model, device=config.device)
    train = [e for d in IN_DOMAIN for e in load_examples(f"builtin:{d}/train", limit=config.limit)]
    tests = {d: list(load_examples(f"builtin:{d}/test", limit=config.limit)) for d in DOMAINS}
    cache = PrefixCache(model)

    def row(head: dict[str, Any], edit: Applicable | None) -> dict[str, Any]:
        made = dict(head)
        for name, q in scores(model, edit, tests, config.draws).items():
            made |= {
                f"{name}_n": q.n,
                f"{name}_accuracy": q.accuracy.value,
                f"{name}_low": q.accuracy.low,
                f"{name}_high": q.accuracy.high,
            }
            made[f"{name}_text"] = percent(q.accuracy)
        return made

    yield row(
        {
            "what": "base model, no edit",
            "labels": "",
            "layers": "",
            "position": "",
            "parameters": 0,
        },
        None,
    )
    for arm in arms(config, model):
        for seed in config.seeds:
            start = time.perf_counter()
            data = shuffled(train, seed) if arm.shuffled else train
            edit = fit(
                model, data, arm.preset(config.epochs), validation=0.1, seed=seed, cache=cache
            )
            curve = [h["validation_accuracy"] for h in edit.history if "validation_accuracy" in h]
            head = {
                "what": arm.what, "method": arm.method, "rank": arm.rank, "layers": " ".join(map(str, arm.layers)),
                "position": "every token" if arm.method == "lora_o" else arm.position, "labels": "shuffled" if arm.shuffled else "gold",
                "seed": seed, "parameters": edit.n_parameters, "steps": edit.record.steps, "seconds": round(time.perf_counter() - start, 1),
                "validation_after_each_epoch": " ".join(f"{v:.3f}" for v in curve),
            }  # fmt: skip
            yield row(head, edit)


COLUMNS = {
    "what": "edit", "rank": "rank", "layers": "layers", "position": "LoReFT at", "labels": "labels", "seed": "seed", "parameters": "parameters",
    "steps": "steps", "seconds": "s", "in_text": "in-domain %", "out_text": "out-of-domain %", "mixed_text": "mixed polarity %",
}  # fmt: skip


def run(config: Config) -> None:
    """Train and score everything; the tables are written anew after every row."""
    import pandas as pd

    made: list[dict[str, Any]] = []
    for row in rows(config):
        made.append(row)
        print(" | ".join(str(row[c]) for c in COLUMNS if c in row), flush=True)
        table = pd.DataFrame(made)
        for name in ("rank", "seed", "steps"):
            if name in table:
                table[name] = table[name].astype("Int64")
        with atomic(config.out / "edit_controls.csv") as path:
            table.drop(columns=[c for c in table if c.endswith("_text")]).to_csv(
                path, index=False, float_format="%.5g"
            )
        write_text(config.out / "edit_controls.md", markdown(made))


def markdown(made: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, accuracies with 95 % intervals."""
    lines = [
        list(COLUMNS.values()),
        ["---"] * len(COLUMNS),
        *([str(row.get(c, "")) for c in COLUMNS] for row in made),
    ]
    head = "Accuracy on the built-in test files, greedy, three classes, 95 % intervals that resample sentences; written by\n"
    return (
        head
        + "`python analyses/edit_controls.py`.\n\n"
        + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        + "\n"
    )


if __name__ == "__main__":
    raise SystemExit(command(Config, run, "python analyses/edit_controls.py"))
