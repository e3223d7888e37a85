"""Write tables of results into `benchmarks/README.md`, from their result files.

    python -m benchmarks.tables

A table stands between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE / "README.md"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown, its first column aligned to the left.

    >>> print(table(["a", "b"], [["x", 1]]))
    | a | b |
    |---|---:|
    | x | 1 |
    """
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return text.replace("| --- |", "|---|", 1).replace(" ---: |", "---:|")


def percent(share: float) -> str:
    """Return a share in percent with a digit where it is small.

    >>> percent(0.002), percent(0.907), percent(0)
    ('0.2', '91', '0')
    """
    return f"{100 * share:.1f}".replace("0.0", "0") if share < 0.0995 else f"{100 * share:.0f}"


def selection(result: dict[str, Any]) -> str:
    """Return how often sites are called clear on null maps, in percent of the maps."""
    sizes = list(dict.fromkeys(r["sentences"] for r in result["rows"]))
    cases = list(dict.fromkeys(r["nulls"] for r in result["rows"]))
    of = {(r["nulls"], r["sentences"]): r for r in result["rows"]}
    head = ["effects"] + [f"{rule}, {n} sentences" for rule in ("clear", "0.1.0") for n in sizes]
    rows = [
        [case, *(percent(of[case, n][rule]) for rule in ("clear", "before") for n in sizes)]
        for case in cases
    ]
    return table(head, rows)


def coverage(result: dict[str, Any]) -> str:
    """Return the coverage of nominal 95 % intervals in percent."""
    methods = ("percentile", "bca", "studentized", "auto", "ceiling")
    rows = [
        [r["effects"], r["clusters"], *(percent(r[m]) for m in methods)]
        for r in result["intervals"]
    ]
    return table(["effects", "clusters", *methods], rows)


def null_tests(result: dict[str, Any]) -> str:
    """Return in how many null maps of 100 any cell is rejected at 0.05, with intervals where they are known.

    The last columns say how often one cell with an effect is found, where that was measured.
    """
    names = {"maxt": "max-T", "bootstrap": "bootstrap", "holm": "Holm", "by": "BY"}
    first = result["tests"][0]
    methods = [m for m in names if m in first]
    powers = [m for m in methods if f"{m}_power" in first]

    def spelled(row: dict[str, Any], method: str) -> str:
        ends = row.get(f"{method}_interval")
        shown = "" if ends is None else f" [{', '.join(map(percent, ends))}]"
        return percent(row[method]) + shown

    rows = [
        [
            r["effects"], r["clusters"], *(spelled(r, m) for m in methods),
            *(percent(r[f"{m}_power"]) for m in powers),
        ]
        for r in result["tests"]
    ]  # fmt: skip
    head = [names[m] for m in methods] + [f"{names[m]} finds" for m in powers]
    return table(["effects", "clusters", *head], rows)


def stability(result: dict[str, Any]) -> str:
    """Return the choices from ten pairs, a row per kind of data."""
    rows = []
    for s in result["summary"]:
        agreement = "-" if s["agreement"] is None else f"{s['agreement']:.2f}"
        rows.append(
            [s["source"], s["draws"], f"{s['clear']} of {s['draws']}", f"{s['stability']:.2f}", agreement]
        )  # fmt: skip
    head = ["data", "draws of ten pairs", "clear", "stability, mean", "agreement of the draws"]
    return table(head, rows)


def versions(result: dict[str, Any]) -> str:
    """Return the CPU seconds of two versions of the project, a row per kind of work."""
    head = ["work", "before, CPU s", "after, CPU s", "after / before", "lowest, highest", "difference of the results"]  # fmt: skip
    rows = [
        [
            result["titles"][r["work"]], f"{r['before']:.3g}", f"{r['after']:.3g}", f"{r['ratio']:.2f}",
            f"{r['low']:.2f}, {r['high']:.2f}", f"{r['difference']:.0e}",
        ]
        for r in result["rows"]
    ]  # fmt: skip
    return table(head, rows)


def peers(result: dict[str, Any]) -> str:
    """Return cells a CPU second of three ways, a row per shape and version of TransformerLens."""
    keys = list(dict.fromkeys((r["model"], r["tokens"], r["version"]) for r in result["rows"]))
    of = {(r["model"], r["tokens"], r["version"], r["way"]): r for r in result["rows"]}
    rows = []
    for key in keys:
        naive, batched, ours = (of[(*key, way)] for way in ("naive", "batched", "ours"))
        pace = [f"{r['cells_per_cpu_second']:.3g}" for r in (naive, batched, ours)]
        wall = [f"{r['cells'] / r['wall_seconds']:.3g}" for r in (naive, batched, ours)]
        times = [
            f"**{ours['cells_per_cpu_second'] / r['cells_per_cpu_second']:.1f}**"
            for r in (naive, batched)
        ]
        run = ", ".join(f"{r['cells_run']:,}" for r in (naive, batched, ours))
        worst = max(r["difference"] or 0.0 for r in (naive, batched))
        rows.append(
            [
                key[0], key[1], key[2], f"{ours['cells']:,}", *pace, *times,
                f"{ours['allowed']:.1f}" if ours.get("allowed") else "-", " / ".join(wall), run, f"{worst:.0e}",
            ]
        )  # fmt: skip
    head = [
        "shape", "tokens", "TransformerLens", "cells", "its naive loop", "batched", "ours",
        "times the naive loop", "times the batched", "arithmetic allows", "by wall time", "cells run", "largest difference",
    ]  # fmt: skip
    return table(head, rows)


def loading(result: dict[str, Any]) -> str:
    """Return what loading a model takes, a row per version and backend."""
    rows = [
        [
            r["model"], r["version"], r["backend"], f"{r['weights_mib']:,}", f"{r['peak_mib']:,}",
            f"{r['after_mib']:,}", f"{r['hf_difference']:.0e}".replace("0e+00", "0"),
        ]
        for r in result["rows"]
    ]  # fmt: skip
    head = [
        "model", "TransformerLens", "backend", "weights, MiB", "at most while loading, MiB", "afterwards, MiB",
        "logits differ from Hugging Face's by",
    ]  # fmt: skip
    return table(head, rows)


def rate(result: dict[str, Any]) -> str:
    """Return what a sweep's time is spent on, a row per shape."""
    kinds = list(result["rows"][0]["profile"])
    rows = [
        [
            r["shape"], r["tokens"], f"{r['cells']:,}", f"{r['gflop_a_second']:.1f}", f"**{percent(r['share'])}**",
            *(percent(r["profile"][kind]) for kind in kinds),
        ]
        for r in result["rows"]
    ]  # fmt: skip
    head = ["shape", "tokens", "cells", "GFLOP a second", "products alone, % of the time"]
    return table(head + [f"profile: {kind}, %" for kind in kinds], rows)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "null-maps": ("selection.json", selection),
    "coverage": ("coverage.json", coverage),
    "null-tests": ("coverage.json", null_tests),
    "stability": ("stability.json", stability),
    "versions": ("versions.json", versions),
    "peers": ("peers.json", peers),
    "loading": ("loading.json", loading),
    "rate": ("rate.json", rate),
}
"""Name of a table -> its result file, and what makes it."""


def block(name: str) -> str:
    """Return a table with the lines around it."""
    file, make = TABLES[name]
    result = json.loads((HERE / "results" / file).read_text(encoding="utf-8"))
    return f"<!-- {name}: begin -->\n{make(result)}\n<!-- {name}: end -->"


def main() -> None:
    """Rewrite every table whose result is there."""
    text = README.read_text(encoding="utf-8")
    for name, (file, _) in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if (HERE / "results" / file).exists() and begin in text:
            before, _, rest = text.partition(begin)
            text = before + block(name) + rest.partition(end)[2]
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
