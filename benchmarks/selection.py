"""How often a choice of sites is called clear where nothing is there.

    python benchmarks/selection.py           writes benchmarks/results/selection.json and prints a table

Maps without any effect are simulated: sentences shift all layers of a role together, the last layer of every
role but the answer is zero for certain, and the control is at 0 or below it. `before` is the rule of version
0.1: an interval above the control's interval. `clear` is the rule of today.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mech_absa.patch.selection import CONTROL, Candidates, _family_p
from mech_absa.records import write_json
from mech_absa.stats import cluster_bootstrap

ROLES = (CONTROL, "before", "opinion", "query.first", "query.last", "answer")
CHOICE = ROLES[1:-1]
LAYERS = 8
WIDTH = 2
LEVEL = 0.95
CASES = {
    "normal": (0.0, "normal"),
    "normal, control below 0": (-2.0, "normal"),
    "heavy-tailed": (0.0, "t"),
    "skewed": (0.0, "skewed"),
}
SIZES = ((6, 1), (10, 1), (40, 2), (100, 2))
"""Pairs, and pairs per sentence."""


def null_map(
    rng: np.random.Generator, pairs: int, per: int, shift: float, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return effects `[pair layer role]` whose means are all 0 but the control's, and the sentences."""
    clusters = np.arange(pairs) // per
    k = int(clusters.max()) + 1

    def draw(*shape: int) -> np.ndarray:
        if kind == "t":
            return rng.standard_t(2, (k, *shape))
        if kind == "skewed":
            return (rng.random((k, *shape)) < 0.3) * rng.exponential(1, (k, *shape)) - 0.3
        return rng.normal(size=(k, *shape))

    values = (draw(1, len(ROLES)) + draw(LAYERS, len(ROLES)))[clusters]
    values = values + 0.5 * rng.normal(size=values.shape)
    values[:, :, 0] += shift
    values[:, -1, :-1] = 0.0
    return values, clusters


def candidates(values: np.ndarray, clusters: np.ndarray) -> Candidates:
    """Return all windows and roles that `select` would choose from; none holds the last layer."""
    spots, effects, controls = [], [], []
    for first in range(LAYERS - WIDTH):
        window = values[:, first : first + WIDTH].mean(axis=1)
        for role in CHOICE:
            spots.append((role, tuple(range(first, first + WIDTH))))
            effects.append(window[:, ROLES.index(role)])
            controls.append(window[:, 0])
    return Candidates(tuple(spots), np.stack(effects, 1), np.stack(controls, 1), clusters)


def verdicts(c: Candidates, seed: int, draws: int = 500) -> tuple[bool, bool]:
    """Return whether any candidate is clear by the rule of version 0.1, and by the rule of today."""
    effect = cluster_bootstrap(c.effect, c.clusters, level=LEVEL, draws=draws, seed=seed)
    control = cluster_bootstrap(c.control, c.clusters, level=LEVEL, draws=draws, seed=seed)
    above = effect.low > np.maximum(0, control.high)
    clear = False
    if above.any():  # the tests cost more than the intervals
        clear = bool((above & (_family_p(c, seed) <= (1 - LEVEL) / 2)).any())
    return bool((effect.low > control.high).any()), clear


def main() -> None:
    """Simulate, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--maps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/selection.json"
    )
    args = parser.parse_args()
    rows = []
    for case, (shift, kind) in CASES.items():
        for pairs, per in SIZES:
            rng = np.random.default_rng(args.seed)
            found = [
                verdicts(candidates(*null_map(rng, pairs, per, shift, kind)), i)
                for i in range(args.maps)
            ]
            before, clear = np.mean(found, axis=0)
            rows.append(
                {"nulls": case, "pairs": pairs, "sentences": pairs // per,
                 "before": round(float(before), 3), "clear": round(float(clear), 3)}
            )  # fmt: skip
            print(rows[-1], flush=True)
    write_json(args.out, {"maps": args.maps, "seed": args.seed, "level": LEVEL, "rows": rows})


if __name__ == "__main__":
    main()
