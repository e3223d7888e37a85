"""Measure how much of an exact sweep's time its matrix products take: `python -m benchmarks.rate`.

    python -m benchmarks.rate                    SmolLM2's and GPT-2 small's shape at 40 and 204 tokens, one thread
    python -m benchmarks.rate smollm2            some of the shapes: gpt2-small, gpt2-small-204, smollm2, smollm2-204

A sweep cannot be faster than its matrix products. So these are listed while it runs (operation,
sizes and strides of what is multiplied), and afterwards each of them is run alone, on random
numbers, in the same process. The *share* is the time of the products alone divided by that of the
sweep: what the engine reaches of the rate at which this machine multiplies matrices of these
shapes. A profile of the same sweep says what the rest is spent on.

Every n-th position is swept in every layer and kind, so that a chunk is as full as in a whole
sweep. Random weights cost the same as trained ones. Times are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.sweep import SHAPES, question, random_model
from mech_absa.patch import wave
from mech_absa.patch.job import Job
from mech_absa.patch.plan import default_memory
from mech_absa.records import write_json

RESULT = Path(__file__).resolve().parent / "results" / "rate.json"
STEPS = {"smollm2": 10, "gpt2-small": 8, "smollm2-204": 102, "gpt2-small-204": 68}
"""Shape -> every how many positions are swept."""
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_linear_pointwise")
ONEDNN = "_linear_pointwise"
"""The product of oneDNN that `mech_absa.model.kernels` runs; it takes arguments of its own."""
REPEATS = 3
"""Times that a product is run alone, at most; its time counts as often as the sweep ran it."""
KINDS: dict[str, tuple[str, ...]] = {
    "softmax": ("_softmax", "_log_softmax", "logsumexp", "masked_fill_", "masked_fill", "where"),
    "copies": ("copy_", "cat", "index", "index_put_", "_index_put_impl_", "index_copy", "index_select", "fill_", "zero_"),
}  # fmt: skip
"""Kind -> operations of the profile, beside the products; the rest is `other`: norms, sums, Python."""

Given = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""Sizes and strides of what a product is given."""


class Products(TorchDispatchMode):
    """Count the matrix products that run inside, by operation and by what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, Given]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            given = tuple((tuple(x.shape), x.stride()) for x in args if isinstance(x, Tensor))
            self.found[name, given] += 1
        return func(*args, **(kwargs or {}))


def seconds(run: Callable[[], object]) -> float:
    """Return the CPU seconds that a call takes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def like(size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Return random numbers of some sizes and strides."""
    length = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    return torch.randn(length).as_strided(size, stride)


def alone(found: Counter[tuple[str, Given]]) -> float:
    """Return the seconds of all products, each run by itself."""
    total = 0.0
    for (name, given), times in found.items():
        n = min(times, REPEATS)
        once = partial(multiply, name, [like(*one) for one in given])
        once()  # the first one is slower
        total += times * seconds(lambda: [once() for _ in range(n)]) / n  # noqa: B023
    return total


def multiply(name: str, operands: Sequence[Tensor]) -> Tensor:
    """Run one product."""
    if name == ONEDNN:
        x, W, *b = operands
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, W, *(b or [None]), "none", [], "")
    else:
        product = getattr(torch.ops.aten, name)(*operands)
    return product


def profiled(run: Callable[[], object]) -> dict[str, float]:
    """Return the share of the time that each kind of operation takes while `run` runs.

    The profiler measures wall time, so the whole is wall time too.
    """
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        run()
        whole = time.perf_counter() - start
    kinds = {"products": PRODUCTS} | KINDS
    kind_of = {name: kind for kind, names in kinds.items() for name in names}
    spent = Counter[str]()
    for event in found.key_averages():
        if (kind := kind_of.get(event.key.rpartition("::")[2])) is not None:
            spent[kind] += event.self_cpu_time_total / 1e6
    shares = {kind: spent[kind] / whole for kind in kinds}
    return shares | {"other": 1 - sum(shares.values())}


def measure(name: str, step: int) -> dict[str, Any]:
    """Return the row of a shape."""
    shape = SHAPES[name]
    model = random_model(shape)
    q = question(model, shape)
    memory = default_memory(model) // 2

    def job(step: int) -> Job:
        return q.job([spans[step // 2 :: step] for spans in q.spans])

    load = os.getloadavg()[0]
    wave.sweep(job(shape.tokens), memory)  # compiles what there is to compile
    asked = job(step)
    answers: list[Any] = []
    spent = seconds(lambda: answers.append(wave.sweep(asked, memory)))
    with Products() as products, torch.inference_mode():
        wave.sweep(asked, memory)
    with torch.inference_mode():
        multiplied = alone(products.found)
    flops = answers[0].flops
    return {
        "shape": name.removesuffix("-204"), "tokens": shape.tokens, "cells": asked.cells,
        "cpu_seconds": spent, "gflop": flops / 1e9, "gflop_a_second": flops / 1e9 / spent,
        "products_seconds": multiplied, "share": multiplied / spent,
        "profile": profiled(lambda: wave.sweep(asked, memory)),
        "load": load, "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }  # fmt: skip


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=list(STEPS), help=", ".join(STEPS))
    args = parser.parse_args()
    if unknown := set(args.shapes) - set(STEPS):
        parser.error(f"unknown shape {min(unknown)!r}; accepted: {', '.join(STEPS)}")
    torch.set_num_threads(1)
    held = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
    rows = {(r["shape"], r["tokens"]): r for r in held}
    for name in args.shapes:
        row = measure(name, STEPS[name])
        rows[row["shape"], row["tokens"]] = row
        shown = ", ".join(f"{kind} {share:.0%}" for kind, share in row["profile"].items())
        print(
            f"{row['shape']}, {row['tokens']} tokens: {row['gflop_a_second']:.1f} GFLOP a second, "
            f"products alone take {row['share']:.0%} of the time; profile: {shown}",
            flush=True,
        )
        result = {"threads": 1, "torch": torch.__version__, "rows": [rows[k] for k in sorted(rows)]}
        write_json(RESULT, result)


if __name__ == "__main__":
    main()
