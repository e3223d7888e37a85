"""Coverage of intervals and size of tests on simulated effects whose truth is known.

    python benchmarks/coverage.py            writes benchmarks/results/coverage.json and prints tables

Each effect distribution is sampled many times at 10, 23 and 60 clusters; an interval covers if it holds the
true mean, and a test errs if it rejects a mean of 0. `ceiling` is the share of samples in which anything
differs from 0: where it is below the nominal level, no interval that looks at the sample alone reaches it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mech_absa import stats
from mech_absa.records import write_json

Draw = Callable[[np.random.Generator, int, int], np.ndarray]
DISTRIBUTIONS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, k, n: rng.normal(1, 1, (k, n)), 1.0),
    "log-normal": (lambda rng, k, n: rng.lognormal(0, 1, (k, n)), float(np.exp(0.5))),
    "20 % non-zero": (
        lambda rng, k, n: (rng.random((k, n)) < 0.2) * rng.exponential(1, (k, n)),
        0.2,
    ),
    "6 % non-zero, equal": (lambda rng, k, n: (rng.random((k, n)) < 0.06) * 1.0, 0.06),
    "6 % non-zero": (
        lambda rng, k, n: (rng.random((k, n)) < 0.06) * rng.exponential(1, (k, n)),
        0.06,
    ),
}
CLUSTERS = (10, 23, 60)
METHODS = ("percentile", "bca", "studentized", "auto")


def coverage(samples: int, seed: int) -> list[dict[str, object]]:
    """Return the coverage of nominal 95 % intervals; every sample is one cell."""
    rows: list[dict[str, object]] = []
    for name, (draw, mean) in DISTRIBUTIONS.items():
        for k in CLUSTERS:
            values = draw(np.random.default_rng(seed), k, samples)
            row: dict[str, object] = {"effects": name, "clusters": k}
            for method in METHODS:
                interval = stats.cluster_bootstrap(values, method=method, draws=2000, seed=seed)
                inside = (interval.low <= mean) & (mean <= interval.high)
                row[method] = round(float(inside.mean()), 3)
            row["ceiling"] = round(float((values != 0).any(axis=0).mean()), 3)
            rows.append(row)
    return rows


def size_of_tests(maps: int, cells: int, seed: int) -> list[dict[str, object]]:
    """Return how often any of many true nulls is rejected at 0.05, for cells that depend on each other."""
    rows: list[dict[str, object]] = []
    nulls: dict[str, Draw] = {
        "normal": lambda rng, k, n: rng.normal(size=(k, n)),
        "heavy-tailed": lambda rng, k, n: rng.standard_t(2, (k, n)),
        "skewed": lambda rng, k, n: (rng.random((k, n)) < 0.3) * rng.exponential(1, (k, n)) - 0.3,
    }
    for name, draw in nulls.items():
        for k in CLUSTERS:
            rng = np.random.default_rng(seed)
            row: dict[str, object] = {"effects": name, "clusters": k}
            rejected = dict.fromkeys(("maxt", "holm", "by"), 0)
            for i in range(maps):
                values = draw(rng, k, 1) + draw(rng, k, cells)
                for method in rejected:
                    tests = stats.cell_tests(values, adjustment=method, draws=999, seed=i)
                    rejected[method] += bool((tests.adjusted <= 0.05).any())
            rows.append(row | {m: round(n / maps, 3) for m, n in rejected.items()})
    return rows


def main() -> None:
    """Run both studies and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=800)
    parser.add_argument("--maps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/coverage.json")
    args = parser.parse_args()
    intervals = coverage(args.samples, args.seed)
    tests = size_of_tests(args.maps, 100, args.seed)
    for rows in (intervals, tests):
        print("| " + " | ".join(rows[0]) + " |")
        print("|" + "---|" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(str(v) for v in row.values()) + " |")
    write_json(
        args.out, {"settings": vars(args) | {"out": None}, "intervals": intervals, "tests": tests}
    )


if __name__ == "__main__":
    main()
