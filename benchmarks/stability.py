"""Choose sites from ten pairs, several times: does the choice stand, and does it repeat?

    python -m benchmarks.stability --shared ../shared     writes results/stability.json

Every run draws ten pairs by seed, traces `resid_post` by role on the bundled model with its adapter,
and chooses sites by the rule. `stability` is the mean Jaccard index with the sites of bootstrap
samples of one run's sentences. `agreement` is the mean Jaccard index between the sites of different
draws of ten pairs: the question that stability wants to answer. MAMS and the restaurant reviews of the
paper (SemEval-2014 among them) are read from `--shared` and are not part of this project. Runs that the
results file holds are not made again; `--again` makes all of them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mech_absa as ma
from mech_absa.records import write_json

PAIRS = 10
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Source:
    """Data that ten pairs are drawn from.

    Attributes:
        name: in tables.
        data: of `load_examples`; `{shared}` is the folder of the command line.
        corruption: of the pairs.
        head: take the first examples, as the run that was found to be wrong did.
    """

    name: str
    data: str
    corruption: ma.Corruption
    head: bool = False


NOISE = ma.GaussianNoise(draws=3)
SOURCES = (
    Source("MAMS test, the first pairs", "{shared}/data/mams/test.xml", NOISE, head=True),
    Source("MAMS validation", "{shared}/data/mams/val.xml", NOISE),
    Source("the paper's restaurant reviews", "{shared}/data/me_absc/rest_train.json", NOISE),
    Source("built-in restaurant reviews", "builtin:restaurant/train", ma.Counterfactual()),
)


def chosen(model: ma.Model, source: Source, shared: Path, seed: int) -> dict[str, Any]:
    """Trace ten pairs and return the choice as a row."""
    examples = ma.load_examples(source.data.format(shared=shared), skip_bad=True)
    if not source.head:
        examples = examples.sample(20 * PAIRS, seed)
        order = np.random.default_rng(seed).permutation(len(examples))
        examples = ma.Examples(tuple(examples.items[i] for i in order), examples.source)
    pairs = ma.make_pairs(model, examples, source.corruption, limit=PAIRS)
    effects = ma.trace(model, pairs, sites=("resid_post",), by="role")
    choice = effects.importance(by="role").select()
    honest = choice.honest
    return {
        "source": source.name, "seed": seed, "pairs": choice.n, "sentences": choice.sentences,
        "sites": [str(s) for s in choice], "aie": choice.aie, "low": choice.ci_low, "high": choice.ci_high,
        "control_high": choice.control_high, "p": choice.p, "clear": choice.clear,
        "stability": choice.stability,
        "honest": None if honest is None else [honest.value, honest.low, honest.high],
    }  # fmt: skip


def agreement(rows: list[dict[str, Any]]) -> float | None:
    """Return the mean Jaccard index between the sites of every two rows; None for a single row.

    >>> agreement([{"sites": ["a", "b"]}, {"sites": ["b", "c"]}])
    0.3333333333333333
    """
    sets = [set(r["sites"]) for r in rows]
    shares = [len(a & b) / len(a | b) for a, b in combinations(sets, 2)]
    return float(np.mean(shares)) if shares else None


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per source that has runs: how stable its choices are, and how many are clear."""
    found = []
    for name in (s.name for s in SOURCES):
        mine = [r for r in rows if r["source"] == name]
        if mine:
            found.append(
                {"source": name, "draws": len(mine), "agreement": agreement(mine),
                 "stability": float(np.mean([r["stability"] for r in mine])),
                 "clear": sum(r["clear"] for r in mine)}
            )  # fmt: skip
    return found


def main() -> None:
    """Trace, choose, print and write; after every run, so that a killed benchmark can go on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results/stability.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = ma.load_model()
    model = ma.load_edit("bundled", base).merged(base)
    kept = args.out.exists() and not args.again
    rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if kept else []
    done = {(r["source"], r["seed"]) for r in rows}
    order = {s.name: i for i, s in enumerate(SOURCES)}
    for source in SOURCES:
        for seed in range(1 if source.head else args.draws):
            if (source.name, seed) in done:
                continue
            rows.append(chosen(model, source, args.shared, seed))
            print(rows[-1], flush=True)
            rows.sort(key=lambda r: (order[r["source"]], r["seed"]))
            write_json(args.out, {"pairs": PAIRS, "rows": rows, "summary": summary(rows)})


if __name__ == "__main__":
    main()
