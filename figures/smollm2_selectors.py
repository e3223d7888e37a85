"""Where do selectors say to edit SmolLM2-135M? `python -m figures.smollm2_selectors --data DATA`.

The study of places has trained the paper's edit at twelve sets of layers of this model, each at a
rate tuned there, and scored it on test rows. This study asks every selector for its scores of the
layers, and which of the twelve it would have taken. No edit is trained here.

1. **Rows.** Selectors look at reviews of the four domains that the adapter was not trained on, at
   the model with the adapter; those that train, train the model as it is.
2. **Score of a place.** The mean of its layers' scores, since places have five to eleven layers. A
   selector takes the place with the highest score; of equal ones, the first of the table.
3. **The measure.** The accuracy of the place that was taken minus the mean of the twelve, on the same
   test rows, as a mean over seeds. Intervals resample test sentences, and are wide enough for all
   twelve places together (Bonferroni).
4. **Beside it.** The share of places that are at most as accurate; the regret; Spearman's correlation
   of scores and accuracies over the twelve, with a p-value over permutations of the layers.

Each selector is a file of its own under `--out`, so that a killed run goes on where it stopped.
Written are `layers.csv`, `selectors.csv` and `run.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

import mech_absa as ma
from mech_absa.commands.cli import command
from mech_absa.commands.patch import with_adapter
from mech_absa.errors import ConfigError, MechAbsaError
from mech_absa.examples import Example
from mech_absa.model import Model
from mech_absa.patch.corruption import GaussianNoise
from mech_absa.progress import bar
from mech_absa.records import atomic, fingerprint, read_json, versions, write_json
from mech_absa.select import SELECTORS, Evidence, selector
from mech_absa.select.compared import Landscape, rank_relation
from mech_absa.sites import parse_layers
from mech_absa.stats import paired_bootstrap_difference

from .smollm2_adapter import DOMAINS, split
from .smollm2_places import ROOT

KEPT = ROOT / "figures" / "results" / "smollm2" / "places"
ADAPTED = 400
"""Rows of each domain that the adapter was trained on."""
ASKED = (
    "middle", "first", "last", "lens", "probe", "cka", "taylor1", "saap", "fluctuation", "critical",
    "weight_patch_grad", "atp", "relp", "exact", "jola", "lofit", "atpstar", "ig",
)  # fmt: skip
"""Selectors that are asked; the others take too long on this model."""
NAMED = ("traced", "paper", "random", "first", "last")
"""Places of the study of places that are compared, beside its ranges of layers; `all` holds every one."""


@dataclass(frozen=True)
class Config:
    """Ask selectors where to edit SmolLM2-135M, and look up what an edit there scored."""

    data: Path
    """Folder with me_absc/ and mams/."""
    model: str = "smollm2"
    """The model."""
    selectors: tuple[str, ...] = ASKED
    """Which selectors."""
    looks: int = 24
    """Reviews that a selector looks at, from the four domains alike."""
    words: int = 30
    """Longest sentence that is looked at."""
    noise_draws: int = 1
    """Runs with noise for each pair of the causal selectors, as in the trace of this model."""
    places: Path = KEPT
    """Results of the study of places."""
    seed: int = 0
    """Of whatever is random."""
    out: Path = ROOT / "runs" / "smollm2" / "smollm2" / "selectors" / "selectors"
    """Where the scores are kept, and the tables."""
    resume: bool = True
    """Go on with what is there."""

    def __post_init__(self) -> None:
        if unknown := [s for s in self.selectors if s not in SELECTORS]:
            raise ConfigError(f"--selectors {unknown[0]!r} is unknown; accepted: {', '.join(SELECTORS)}")  # fmt: skip
        if self.looks < len(DOMAINS):
            raise ConfigError(
                f"--looks is {self.looks}; accepted: {len(DOMAINS)} or more, one of each domain"
            )


def trained_places(table: pd.DataFrame, n_layers: int) -> dict[str, tuple[int, ...]]:
    """Return the layers of each place where the paper's edit was trained at its own token.

    Args:
        table: `places.csv` of the study of places.
        n_layers: of the model.

    >>> kept = pd.read_csv(KEPT / "places.csv")
    >>> found = trained_places(kept, 30)
    >>> len(found), found["random"]
    (12, (6, 7, 8, 15, 16, 17))
    """
    return {
        str(row["place"]): parse_layers(str(row["layers"]), n_layers)
        for _, row in table.iterrows()
        if row["place"] in NAMED or str(row["place"]).startswith("layers ")
    }


def looked_at(config: Config) -> list[Example]:
    """Return reviews that the adapter was not trained on, as many of each domain."""
    rows: list[Example] = []
    for domain in DOMAINS:
        spare = split(config.data, domain, ADAPTED).spare
        short = ma.Examples(tuple(e for e in spare if len(e.sentence.split()) <= config.words))
        rows.extend(short.sample(config.looks // len(DOMAINS), config.seed))
    return rows


@dataclass(eq=False)
class Asked:
    """What selectors said, each kept in a file of its own."""

    config: Config

    @cached_property
    def evidence(self) -> Evidence:
        """Return what selectors get; loads the model."""
        model = ma.load_model(self.config.model)
        adapted, _ = with_adapter("auto", model)
        return Evidence(
            adapted,
            tuple(looked_at(self.config)),
            model,
            GaussianNoise(draws=self.config.noise_draws),
            seed=self.config.seed,
            width=6,
        )

    def path(self, name: str) -> Path:
        """Return the file of a selector; other rows or seeds have other files."""
        c = self.config
        what = fingerprint([c.model, c.looks, c.words, c.noise_draws, c.seed])[:8]
        return self.config.out / "parts" / f"{name}-{what}.json"

    def said(self, name: str) -> dict[str, Any]:
        """Return the layer scores of a selector, or why it has none; computed where they are missing."""
        path = self.path(name)
        if not (self.config.resume and path.exists()):
            evidence = self.evidence  # bad data or a missing model stops all, and is not kept
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                ranking = selector(name)(evidence)
                found = {"scores": ranking.layer_scores.tolist(), "seconds": ranking.about["cpu_seconds"]}  # fmt: skip
            except MechAbsaError as e:
                found = {"failed": str(e)}
            write_json(path, found)
        read: dict[str, Any] = read_json(path)
        return read


def rightness(answers: pd.DataFrame, names: Sequence[str]) -> Float[np.ndarray, "place seed row"]:
    """Return 1 where a place's edit answers a test row rightly, and 0 elsewhere."""
    seeds = min(sum(c.startswith(f"{p}/") for c in answers) for p in names)
    right = [[answers[f"{p}/{s}"] == answers["gold"] for s in range(seeds)] for p in names]
    return np.array(right, dtype=float)


def compared(
    layers: pd.DataFrame, answers: pd.DataFrame, places: dict[str, tuple[int, ...]]
) -> pd.DataFrame:
    """Return a row per selector: the place that it takes, and what the edit scored there.

    Args:
        layers: columns selector, layer, score, seconds; a layer without a score is NaN.
        answers: of the study of places.
        places: their layers, as of `trained_places`.

    Returns:
        columns selector, place, accuracy, difference, low, high, share, regret, rho, p_rho, seconds.
    """
    names, right = list(places), rightness(answers, list(places))
    mean, rows = right.mean(axis=1), []  # [place row]
    clusters = [f"{f}/{s}" for f, s in zip(answers["file"], answers["sentence"], strict=True)]
    landscape = Landscape(
        tuple(places.values()), right.mean(axis=2), np.ones(len(names), dtype=bool)
    )
    accuracy = mean.mean(axis=1)
    for name, table in layers.groupby("selector", sort=False):
        scores = table.sort_values("layer")["score"].to_numpy(float)
        known = np.where(np.isnan(scores), np.nanmin(scores), scores)
        taken = int(np.argmax([known[list(p)].mean() for p in places.values()]))
        level = 1 - 0.05 / len(names)
        difference = paired_bootstrap_difference(
            mean[taken], mean.mean(axis=0), clusters, level=level
        )
        rho, p_rho = rank_relation(scores, landscape)
        rows.append(
            {
                "selector": name,
                "place": names[taken],
                "accuracy": accuracy[taken],
                "difference": accuracy[taken] - accuracy.mean(),
                "low": float(difference.low),
                "high": float(difference.high),
                "share": float(np.mean(accuracy <= accuracy[taken] + 1e-12)),
                "regret": float(accuracy.max() - accuracy[taken]),
                "rho": rho,
                "p_rho": p_rho,
                "seconds": table["seconds"].iloc[0],
            }
        )
    return pd.DataFrame(rows)


def layer_table(said: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Return a row per selector and layer; selectors that failed have none."""
    return pd.DataFrame(
        [
            {"selector": name, "layer": layer, "score": score, "seconds": found["seconds"]}
            for name, found in said.items()
            if "scores" in found
            for layer, score in enumerate(found["scores"])
        ]
    )


def collect(config: Config, said: dict[str, dict[str, Any]], model: Model) -> None:
    """Write the tables of what was said, and the record."""
    answers = pd.read_csv(config.places / "answers.csv", keep_default_na=False)
    places = trained_places(pd.read_csv(config.places / "places.csv"), model.n_layers)
    layers = layer_table(said)
    for name, table in {"layers": layers, "selectors": compared(layers, answers, places)}.items():
        with atomic(config.out / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.5g")
    hidden = ("out", "resume", "data", "places")
    write_json(
        config.out / "run.json",
        {
            "command": "figures.smollm2_selectors",
            "model": {"name": model.name, "sha256": model.sha256},
            "config": {k: v for k, v in asdict(config).items() if k not in hidden},
            "places": places,
            "failed": {n: found["failed"] for n, found in said.items() if "failed" in found},
            "rows": {"looked at": config.looks, "test": len(answers)},
            "seconds": round(sum(found.get("seconds", 0) for found in said.values())),
            "versions": versions(),
        },
    )


def main(config: Config) -> None:
    """Ask every selector that was not asked yet, and write the tables."""
    torch.set_num_threads(1)
    for name in ("answers.csv", "places.csv"):
        if not (config.places / name).exists():
            raise ConfigError(
                f"--places {config.places} holds no {name}; run figures.smollm2_places first"
            )
    asked, said = Asked(config), {}
    with bar("selectors", len(config.selectors)) as advance:
        for name in config.selectors:
            said[name] = asked.said(name)
            advance(1)
    collect(config, said, asked.evidence.edited)


if __name__ == "__main__":
    raise SystemExit(command(Config, main, "python -m figures.smollm2_selectors"))

__all__ = ["Asked", "Config", "compared", "rightness", "trained_places"]
