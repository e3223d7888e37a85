"""Time an exact sweep beside that of the installed TransformerLens: one thread, random weights.

    python -m benchmarks.peers            GPT-2 small's and SmolLM2's shape at 40 and 204 tokens: about five CPU minutes
    python -m benchmarks.peers smollm2    some of the shapes: gpt2-small, gpt2-small-204, smollm2, smollm2-204
    python -m benchmarks.peers --small    a shape of seconds, for the tests; writes nothing

Run it once in an environment of each version; rows of other versions stay in the result file. All three
ways compute the same cells on the user's own `HookedTransformer` (3.9) or `TransformerBridge` (4):

- *naive*: `transformer_lens.patching.generic_activation_patch`, one forward pass per cell;
- *batched*: TransformerLens's hooks, many positions of a layer in one batch, as a careful user writes it;
- *ours*: `mech_absa.patching`, with the same arguments as the naive loop.

A sample of the cells is run, spread evenly over layers and positions, and the times are scaled to all
cells. The cells of the loops all cost the same. Ours cost less the later they enter, and share the
unpatched run, which is charged in full and not scaled.

`allowed` is what the arithmetic allows: the operations of a loop divided by the least that an exact
sweep needs (`sweep.floor_flops`). A loop that multiplies as fast as we do cannot be beaten by more.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformer_lens import patching as theirs

from benchmarks.sweep import (
    BLOCK_EVERY,
    SHAPES,
    floor_flops,
    forward_flops,
    question,
    random_model,
    spread,
)
from mech_absa import patching as ours
from mech_absa.records import write_json
from mech_absa.sites import Site

VERSION = importlib.metadata.version("transformer-lens")
RESULT = Path(__file__).resolve().parent / "results" / "peers.json"
NAMES = ("gpt2-small", "gpt2-small-204", "smollm2", "smollm2-204")
Cell = tuple[int, int]
"""Layer and position."""


@dataclass(frozen=True)
class Sample:
    """How many cells of each kind are run.

    Attributes:
        naive: by one pass each.
        batched: positions of one layer, in one batch; of the first kind alone.
        ours: by the engine.
    """

    naive: int
    batched: int
    ours: int


SAMPLES = {40: Sample(2, 40, 120), 204: Sample(1, 8, 40), 12: Sample(4, 12, 48)}


@dataclass(frozen=True)
class Row:
    """One way on one shape; seconds are scaled to all cells."""

    model: str
    tokens: int
    version: str
    way: str
    cells: int
    cells_run: int
    cpu_seconds: float
    wall_seconds: float
    cells_per_cpu_second: float
    difference: float | None
    measured: str
    load: float
    allowed: float


class Clock:
    """CPU and wall time of what runs inside."""

    def __enter__(self) -> Clock:
        self.cpu, self.wall = -time.process_time(), -time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.cpu += time.process_time()
        self.wall += time.perf_counter()


@dataclass(frozen=True, eq=False)
class Bench:
    """A shape, its prompts, the cache of the clean run and the metric."""

    root: Any
    tokens: Tensor
    cache: Any
    labels: tuple[int, int]

    def metric(self, logits: Tensor) -> Tensor:
        """Return the difference of two logits at the last position."""
        return logits[0, -1, self.labels[0]] - logits[0, -1, self.labels[1]]

    def swept(self, patching: Any, kind: str, cells: Sequence[Cell]) -> tuple[list[float], Clock]:
        """Return the metric of cells through either `patching` module."""
        index = pd.DataFrame(cells, columns=["layer", "pos"])
        with Clock() as spent, contextlib.redirect_stderr(io.StringIO()):
            values = patching.generic_activation_patch(
                self.root, self.tokens, self.cache, self.metric,
                patching.layer_pos_patch_setter, kind, index_df=index,
            )  # fmt: skip
        return values.tolist(), spent

    def batched(self, kind: str, layer: int, positions: Sequence[int]) -> tuple[list[float], Clock]:
        """Return the metric of positions of one layer, run in one batch."""
        name = Site(layer, kind).hook_name
        at = torch.tensor(positions)
        rows = torch.arange(len(at))

        def put(x: Tensor, hook: Any) -> Tensor:
            x[rows, at] = self.cache[name][0, at]
            return x

        a, b = self.labels
        with Clock() as spent:
            batch = self.tokens.expand(len(at), -1)
            last = self.root.run_with_hooks(batch, fwd_hooks=[(name, put)])[:, -1]
            values = (last[:, a] - last[:, b]).tolist()
        return values, spent

    def unpatched(self) -> Clock:
        """Return what ours spends on no cell but the first: the unpatched run and the bookkeeping."""
        return self.swept(ours, "resid_pre", [(0, self.tokens.shape[1] - 1)])[1]


def measure(name: str, sample: Sample | None = None, threads: int = 1) -> list[Row]:
    """Return the three ways on one shape."""
    torch.set_num_threads(threads)
    shape = SHAPES[name]
    sample = sample or SAMPLES[shape.tokens]
    model = random_model(shape)
    q = question(model, shape)
    (pair,) = q.pairs
    layers, tokens = model.n_layers, shape.tokens
    names = [Site(x, kind).hook_name for kind in BLOCK_EVERY for x in range(layers)]
    load, day = os.getloadavg()[0], datetime.now(timezone.utc).strftime("%Y-%m-%d")
    with torch.inference_mode():
        cache = q.plain.run_with_cache(pair.clean.ids, names_filter=names)[1]
        bench = Bench(q.plain, pair.corrupted.ids, cache, q.labels)
        few = spread(layers, tokens, sample.naive / (layers * tokens))
        step = tokens / sample.batched
        block = [(layers // 2, int((i + 0.5) * step)) for i in range(sample.batched)]
        many = spread(layers, tokens, min(1.0, sample.ours / (layers * tokens)))
        bench.batched("resid_pre", 0, [0])  # warms the allocator up
        base = bench.unpatched()
        got: dict[tuple[str, str, Cell], float] = {}
        spent = {way: [0, 0.0, 0.0] for way in ("naive", "batched", "ours")}
        for kind in BLOCK_EVERY:
            gc.collect()
            ran = [
                ("naive", few, bench.swept(theirs, kind, few)),
                ("ours", many, bench.swept(ours, kind, many)),
            ]
            if kind == BLOCK_EVERY[0]:
                at = [t for _, t in block]
                ran.append(("batched", block, bench.batched(kind, block[0][0], at)))
            for way, cells, (values, clock) in ran:
                got |= {(way, kind, c): v for c, v in zip(cells, values, strict=True)}
                total = spent[way]
                total[0] += len(cells)
                total[1] += clock.cpu
                total[2] += clock.wall
            again = [*few, *block] if kind == BLOCK_EVERY[0] else few
            shared = bench.swept(ours, kind, again)[0]  # the same cells, for the difference
            got |= {("as naive", kind, c): v for c, v in zip(few, shared, strict=False)}
            rest = zip(block, shared[len(few) :], strict=False)
            got |= {("as batched", kind, c): v for c, v in rest}
    all_cells = len(BLOCK_EVERY) * layers * tokens
    least = floor_flops(model, tokens, BLOCK_EVERY)
    allowed = all_cells * forward_flops(model, tokens) / least
    rows = []
    for way, (run, cpu, wall) in spent.items():
        fixed = [len(BLOCK_EVERY) * x if way == "ours" else 0.0 for x in (base.cpu, base.wall)]
        seconds = [
            max(x - f, 0.0) * all_cells / run + f for x, f in zip((cpu, wall), fixed, strict=True)
        ]
        off = [abs(got["as " + w, k, c] - v) for (w, k, c), v in got.items() if w == way != "ours"]
        about = (name.removesuffix("-204"), tokens, VERSION, way, all_cells, int(run))
        pace, worst = all_cells / seconds[0], max(off, default=None)
        rows.append(Row(*about, *seconds, pace, worst, day, load, allowed))
    return rows


def merge(held: list[dict[str, Any]], new: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows of a result file with those measured now in the place of older ones."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["model"], row["tokens"], row["version"], row["way"]

    rows = {key(r): r for r in [*held, *map(asdict, new)]}
    return [rows[k] for k in sorted(rows)]


def factors(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return how many times less CPU time ours takes than either loop, and what the arithmetic allows, for the
    pages to quote."""
    pace = {
        (r["model"], r["tokens"], r["version"], r["way"]): r["cells_per_cpu_second"] for r in rows
    }
    found: dict[str, dict[str, float]] = {}
    least = {(r["model"], r["tokens"]): r["allowed"] for r in rows if r.get("allowed")}
    for (model, tokens, version, way), cells in pace.items():
        if way != "ours":
            shape = f"{model}-{tokens}-tl{version.partition('.')[0]}"
            here = found.setdefault(shape, {})
            here[way] = pace[model, tokens, version, "ours"] / cells
            if (model, tokens) in least:
                here["allowed"] = least[model, tokens]
    return found


def main() -> None:
    """Measure, print and keep."""
    small = "--small" in sys.argv
    asked = [name for name in NAMES if name in sys.argv[1:]]
    for name in ("tiny",) if small else asked or NAMES:
        rows = measure(name)
        for r in rows:
            print(
                f"{r.model}, {r.tokens} tokens, TransformerLens {r.version}, {r.way}: "
                f"{r.cells_per_cpu_second:.1f} cells a CPU second ({r.cells_run} of {r.cells} run)",
                flush=True,
            )
        if not small:
            held = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
            merged = merge(held, rows)
            result = {"threads": 1, "torch": torch.__version__, "faster": factors(merged)}
            write_json(RESULT, result | {"rows": merged})


if __name__ == "__main__":
    main()
