"""Reckon what a sweep of a large model costs, from the operations that small ones were seen to need.

    python -m benchmarks.plan      rewrites the tables of docs/large_models.md

An exact sweep by token of the benchmark's Llama shape took some operations per cell; as a share of one
forward pass it is taken to be the same for larger models of the same architecture (`results/sweep.json`).
Nothing here was measured on a large model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .tables import table

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "large_models.md"
TOKENS, KINDS = 60, 3
BY_ROLE = 0.1
"""Share of a sweep by role in the cost of one by token (docs/choosing.md)."""
RATE = 100e12
"""Operations a second, of the second table."""


@dataclass(frozen=True)
class Large:
    """A model, as its authors describe it."""

    name: str
    parameters: float
    layers: int


MODELS = (
    Large("Llama-2-7B", 6.7e9, 32),
    Large("Llama-2-13B", 13.0e9, 40),
    Large("Llama-2-70B", 69.0e9, 80),
)


def share_of_a_pass() -> float:
    """Return the operations of one cell as a share of one forward pass, as seen on the Llama shape."""
    shapes = json.loads((HERE / "results" / "sweep.json").read_text(encoding="utf-8"))["shapes"]
    seen = shapes["llama-gqa"]
    return float(seen["flops"] / seen["peer_flops"])  # the peer runs one pass per cell


def operations(model: Large, by: str = "token", draws: int = 1) -> float:
    """Return the operations of an exact sweep of one pair.

    Args:
        model: of 60 prompt tokens, three kinds of state, every layer.
        by: token or role.
        draws: of noise; 1 for a minimal edit of the text.
    """
    cells = model.layers * TOKENS * KINDS * draws
    one_pass = 2 * model.parameters * TOKENS
    return cells * share_of_a_pass() * one_pass * (BY_ROLE if by == "role" else 1)


def memory_table() -> str:
    """Return GiB of weights: as they are, and with an adapter merged, which is a second copy."""
    rows = []
    for m in MODELS:
        weights = 2 * m.parameters / 2**30
        rows.append(
            [m.name, f"{weights:.0f}", f"{2 * weights:.0f}", -(-int(2 * weights * 1.5) // 80)]
        )
    head = ["model, bfloat16", "weights, GiB", "with an adapter, GiB", "devices of 80 GiB"]
    return table(head, rows)


def time_table() -> str:
    """Return operations per pair and hours per 100 pairs."""
    rows = []
    for m in MODELS:
        for by, draws, words in (
            ("role", 1, "by role, edited text"),
            ("token", 1, "by token, edited text"),
            ("token", 10, "by token, ten draws of noise"),
        ):
            per_pair = operations(m, by, draws)
            hours = 100 * per_pair / RATE / 3600
            rows.append([f"{m.name}, {words}", f"{per_pair / 1e12:,.0f}", f"{hours:.2g}"])
    head = ["sweep", "TFLOP a pair", "hours for 100 pairs at 100 TFLOP/s"]
    return table(head, rows)


TABLES = {"memory": memory_table, "time": time_table}


def filled(text: str) -> str:
    """Return a page with its tables made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
