"""Coverage of intervals and size of tests on simulated effects whose truth is known.

    python benchmarks/coverage.py                  writes benchmarks/results/coverage.json and prints tables
    python benchmarks/coverage.py --only tests     the size of the tests alone; the intervals stay as they are

Each effect distribution is sampled many times at 10, 23 and 60 clusters; an interval covers if it holds the
true mean, and a test errs if it rejects a mean of 0. `ceiling` is the share of samples in which anything
differs from 0: where it is below the nominal level, no interval that looks at the sample alone reaches it.
"""

from __future__ import annotations

import argparse
import json
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
TESTS = ("maxt", "bootstrap", "holm", "by")
SHIFT = {10: 1.5, 23: 1.0, 60: 0.6}
"""Clusters -> effect of one cell, in standard deviations, where power is measured."""


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


def adjustments(values: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return the adjusted p of all cells under each of `TESTS`; Holm's from the p-values of BY."""
    tests = {
        m: stats.cell_tests(values, adjustment=m, draws=999, seed=seed)
        for m in ("maxt", "bootstrap", "by")
    }
    p = tests["by"].p
    order, holm = np.argsort(p), np.empty_like(p)
    holm[order] = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    return {m: t.adjusted for m, t in tests.items()} | {"holm": np.minimum(holm, 1)}


def size_of_tests(maps: int, cells: int, seed: int) -> list[dict[str, object]]:
    """Return how often any of many true nulls is rejected at 0.05, for cells that depend on each other.

    Per adjustment: the share of maps with its Wilson interval, and the share of a third of the maps in
    which one cell with an effect (`SHIFT`) is rejected.
    """
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
            rejected, seen = dict.fromkeys(TESTS, 0), dict.fromkeys(TESTS, 0)
            for i in range(maps):
                values = draw(rng, k, 1) + draw(rng, k, cells)
                for method, adjusted in adjustments(values, i).items():
                    rejected[method] += bool((adjusted <= 0.05).any())
                if i < maps // 3:
                    values[:, 0] += SHIFT[k] * values.std(axis=0).mean()
                    for method, adjusted in adjustments(values, i).items():
                        seen[method] += bool(adjusted[0] <= 0.05)
            for method in TESTS:
                interval = stats.wilson(rejected[method], maps)
                ends = [round(float(end), 4) for end in (interval.low, interval.high)]
                row[method], row[f"{method}_interval"] = round(rejected[method] / maps, 4), ends
                row[f"{method}_power"] = round(seen[method] / (maps // 3), 4)
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    """Run both studies and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=800)
    parser.add_argument("--maps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("intervals", "tests"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/coverage.json")
    args = parser.parse_args()
    result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    if args.only != "tests":
        result["intervals"] = coverage(args.samples, args.seed)
    if args.only != "intervals":
        result["tests"] = size_of_tests(args.maps, 100, args.seed)
    for name in ("intervals", "tests"):
        rows = result.get(name) or [{}]
        print("| " + " | ".join(rows[0]) + " |")
        print("|" + "---|" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(str(v) for v in row.values()) + " |")
    settings = {"samples": args.samples, "maps": args.maps, "seed": args.seed}
    write_json(
        args.out, {"settings": settings, **{k: v for k, v in result.items() if k != "settings"}}
    )


if __name__ == "__main__":
    main()
