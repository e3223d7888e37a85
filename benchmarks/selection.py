"""How often a choice of sites is called clear where nothing is there.

    python benchmarks/selection.py           writes benchmarks/results/selection.json and prints a table

Maps without any effect are simulated: sentences shift all layers of a role together, the last layer of every
role but the answer is zero for certain, and the control is at 0 or below it. `before` is the rule of version
0.1: an interval above the control's interval.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from mech_absa.patch.importance import ImportanceMap
from mech_absa.patch.selection import CONTROL, _candidates, _family_p
from mech_absa.records import write_json
from mech_absa.stats import cluster_bootstrap

ROLES = (CONTROL, "before", "opinion", "query.first", "query.last", "answer")
LAYERS = 8
CASES = {
    "normal": (0.0, "normal"),
    "control below 0": (-2.0, "normal"),
    "heavy-tailed": (0.0, "t"),
    "skewed": (0.0, "skewed"),
}
SIZES = ((6, 1), (10, 1), (40, 2), (100, 2))
"""Pairs, and pairs per sentence."""


def null_map(
    rng: np.random.Generator, pairs: int, per: int, shift: float, kind: str
) -> ImportanceMap:
    """Return a map whose true effects are all 0."""
    cells = [("resid_post", layer, -1, role) for layer in range(LAYERS) for role in ROLES]
    clusters = np.arange(pairs) // per
    k = int(clusters.max()) + 1

    def draw(n: int) -> np.ndarray:
        if kind == "t":
            return rng.standard_t(2, (k, n))
        if kind == "skewed":
            return (rng.random((k, n)) < 0.3) * rng.exponential(1, (k, n)) - 0.3
        return rng.normal(size=(k, n))

    values = np.tile(draw(len(ROLES)), LAYERS)[clusters] + draw(len(cells))[clusters]
    values = values + 0.5 * rng.normal(size=values.shape)
    values[:, 0 :: len(ROLES)] += shift
    values[:, -len(ROLES) : -1] = 0.0
    table = pd.DataFrame(cells, columns=["kind", "layer", "head", "role"])
    return ImportanceMap(table.assign(aie=values.mean(0)), values, clusters, {"level": 0.95})


def main() -> None:
    """Simulate, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--maps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/selection.json"
    )
    args = parser.parse_args()
    windows = [(layer, layer + 1) for layer in range(LAYERS - 1)]
    rows = []
    for case, (shift, kind) in CASES.items():
        for pairs, per in SIZES:
            rng = np.random.default_rng(args.seed)
            before = clear = 0
            for i in range(args.maps):
                importance = null_map(rng, pairs, per, shift, kind)
                c = _candidates(importance, "resid_post", windows, ROLES[1:-1], CONTROL)
                effect = cluster_bootstrap(c.effect, c.clusters, draws=500, seed=i)
                control = cluster_bootstrap(c.control, c.clusters, draws=500, seed=i)
                before += bool((effect.low > control.high).any())
                above = effect.low > np.maximum(0, control.high)
                if above.any():  # the tests cost more than the intervals
                    clear += bool((above & (_family_p(c, i) <= 0.05)).any())
            rows.append(
                {"nulls": case, "pairs": pairs, "sentences": pairs // per,
                 "before": round(before / args.maps, 3), "clear": round(clear / args.maps, 3)}
            )  # fmt: skip
            print(rows[-1], flush=True)
    write_json(args.out, {"maps": args.maps, "seed": args.seed, "rows": rows})


if __name__ == "__main__":
    main()
