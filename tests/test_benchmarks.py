"""The benchmark on shapes of a second: its counts are what the shapes say, and the engine stays near the floor. No times."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from support import fast

from mech_absa.errors import ConfigError

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "sweep.py"
if not SCRIPT.exists():
    pytest.skip("the benchmarks are not part of an installed package", allow_module_level=True)
spec = importlib.util.spec_from_file_location("sweep_benchmark", SCRIPT)
assert spec is not None and spec.loader is not None
bench = sys.modules[spec.name] = importlib.util.module_from_spec(
    spec
)  # dataclasses look their module up
spec.loader.exec_module(bench)

TINY = ("tiny", "tiny-gqa", "tiny-parallel", "tiny-rome")


@pytest.mark.parametrize("name", fast(TINY, ["tiny-gqa"]))
@pytest.mark.slow
def test_the_floor_is_approached_and_never_undercut(name):
    """Ours within a tenth of the floor on each architecture, over every cell of the peer."""
    shape = bench.SHAPES[name]
    result = bench.measure(shape, fraction=1.0, times=False)
    assert not result.peer_extrapolated
    assert result.floor <= result.flops < 1.15 * result.floor
    assert result.fewer_flops > 5
    assert result.difference < 1e-4 and result.largest_effect > 0.5
    assert result.seconds is None


@pytest.mark.parametrize("name", fast(["tiny", "tiny-gqa", "tiny-parallel"], ["tiny-gqa"]))
def test_no_product_of_the_peer_escapes_the_counter(name):
    """Its FLOPs are a forward pass by hand, once a cell."""
    shape = bench.SHAPES[name]
    model = bench.random_model(shape)
    q = bench.question(model, shape)
    d, T, V, L = 64, shape.tokens, 500, 4
    kv = 32 if name == "tiny-gqa" else 64
    mlp = 3 * d * 160 if name == "tiny-gqa" else 2 * d * 256
    by_hand = 2 * T * (L * (2 * d * d + 2 * d * kv + mlp + 2 * d * T) + d * V)
    assert bench.forward_flops(model, T) == by_hand
    with bench.flop_clock() as (clock, _):
        run = bench.peer(q, 1e-9, clock)
    assert run.cells == 3 and run.of == 3 * L * T
    assert run.spent == run.of * by_hand


@pytest.mark.parametrize("name", fast(["tiny", "tiny-gqa", "tiny-parallel"], ["tiny-gqa"]))
@pytest.mark.slow
def test_the_second_baseline_computes_the_same_cells(name):
    """All positions of a layer in one batch: the effects are ours, and the products the first peer's."""
    shape = bench.SHAPES[name]
    q = bench.question(bench.random_model(shape), shape)
    ours = bench.ours(q)
    with bench.flop_clock() as (clock, _):
        run = bench.batched_side(q, 1.0, clock)
    assert run.cells == run.of == len(run.effects) == q.cells
    assert max(abs(x - float(ours[at])) for at, x in run.effects.items()) < 1e-4
    assert run.spent == run.of * bench.forward_flops(q.model, shape.tokens)
    assert bench.batched_side(q, 0.3).cells == 3 * shape.tokens  # one of four layers


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)
def test_products_by_onednn_are_counted():
    with torch.inference_mode(), bench.flop_clock() as (clock, _):
        torch.ops.mkldnn._linear_pointwise(torch.ones(7, 5), torch.ones(3, 5), None, "none", [], "")
    assert clock() == 2 * 7 * 5 * 3


@pytest.mark.slow
def test_the_loop_is_extrapolated_exactly():
    """In FLOPs, what the rest of the cells would cost is known from a part of them; the whole must confirm it."""
    shape = bench.SHAPES["tiny-rome"]
    q = bench.question(bench.random_model(shape), shape)
    spent = []
    for fraction in (0.2, 1.0):
        with bench.flop_clock() as (clock, _):
            spent.append(bench.peer(q, fraction, clock).spent)
    assert spent[0] == spent[1]


def test_cells_of_a_part_are_even():
    """As many as asked for, no layer and no third of the prompt left out or favoured."""
    cells = bench.spread(12, 40, 0.05)
    assert len(cells) == 24
    layers, thirds = (
        torch.tensor([c[0] for c in cells]).bincount(),
        torch.tensor([3 * c[1] // 40 for c in cells]).bincount(),
    )
    assert layers.tolist() == [2] * 12
    assert thirds.min() >= 7
    assert bench.spread(2, 2, 1.0) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_roles_fill_the_prompt():
    found = bench.roles(60)
    assert len(found) == 60 and len(set(found)) == 11


def test_peak_memory_sees_what_was_freed_again():
    model = bench.random_model(bench.SHAPES["tiny"])
    peak = bench.peak_bytes(lambda: torch.ones(48 << 18).sum(), model)  # 48 MiB
    if peak is None:
        pytest.skip("this system does not tell how much memory a process held at most")
    assert 47 < peak / 2**20 < 60  # the kernel counts pages in lots


@pytest.mark.slow
def test_results_of_other_shapes_stay_and_the_table_is_rewritten(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "HERE", tmp_path)
    readme, out, threads = tmp_path / "README.md", tmp_path / "sweep.json", torch.get_num_threads()
    readme.write_text(f"above\n{bench.MARKS[0]}\nold\n{bench.MARKS[1]}\nbelow\n")
    for shapes in (("tiny",), ("tiny-gqa",)):
        bench.main(
            bench.Config(shapes, threads, peer_fraction=0.02, times=False, out=out, write=True)
        )
    capsys.readouterr()
    assert list(json.loads(out.read_text())["shapes"]) == ["tiny", "tiny-gqa"]
    text = readme.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert (
        text.count("| GPT-2, 4 x 64") == text.count("| Llama, 4 x 64") == 2
    )  # arithmetic, seconds
    with pytest.raises(ConfigError, match="unknown shape 'small'"):
        bench.main(bench.Config(("small",)))


sys.path.insert(0, str(SCRIPT.parents[1]))
tables = importlib.import_module("benchmarks.tables")
SHOWN = [n for n in tables.TABLES if f"<!-- {n}: begin -->" in tables.README.read_text("utf-8")]


@pytest.mark.parametrize("name", SHOWN)
def test_tables_of_the_page_are_those_of_the_results(name):
    assert tables.block(name) in tables.README.read_text("utf-8")


def test_the_products_that_are_run_alone_are_those_of_the_sweep(monkeypatch):
    """Their operations are the FLOPs that the sweep counts, and each counts as often as it ran."""
    rate = importlib.import_module("benchmarks.rate")
    shape = bench.SHAPES["tiny"]
    q = bench.question(bench.random_model(shape), shape)
    with rate.Products() as products, torch.inference_mode():
        answers = bench.wave.sweep(q.job())
    flops = 0
    for (name, given), times in products.found.items():
        sizes = [size for size, _ in given]
        a, b = sizes[1:] if name in ("addmm", "baddbmm") else sizes[:2]
        columns = b[-2] if name in ("linear", rate.ONEDNN) else b[-1]
        flops += 2 * math.prod(a) * columns * times
    assert flops == answers.flops
    x, W, b = torch.randn(70, 8), torch.randn(5, 8), torch.randn(5)
    assert torch.allclose(rate.multiply(rate.ONEDNN, [x, W, b]), x @ W.T + b, atol=1e-5)
    taken = iter((1.0, 3.0))
    monkeypatch.setattr(rate, "seconds", lambda run: next(taken))
    one = ("mm", (((2, 3), (3, 1)), ((3, 4), (4, 1))))
    other = ("mm", (((1, 3), (3, 1)), ((3, 4), (4, 1))))
    # run alone twice in 1 s and three times in 3 s; the sweep ran them twice and six times
    assert rate.alone(Counter({one: 2, other: 6})) == 1.0 + 6.0


@pytest.mark.slow
def test_the_three_ways_beside_each_other_compute_the_same_cells():
    """The naive loop, the batched one and the drop-in, on the installed TransformerLens; a later run replaces its rows."""
    peers = importlib.import_module("benchmarks.peers")
    rows = peers.measure("tiny", threads=torch.get_num_threads())
    assert [r.way for r in rows] == ["naive", "batched", "ours"]
    assert all(r.cells == 144 and r.cells_per_cpu_second > 0 for r in rows)
    assert [r.cells_run for r in rows] == [12, 12, 144]
    assert all(r.difference < 1e-4 for r in rows[:2]) and rows[2].difference is None
    older = [dict(vars(r), version="3.0") for r in rows] + [
        dict(vars(r), cells_run=0) for r in rows
    ]
    merged = peers.merge(older, rows)
    assert len(merged) == 6 and all(r["cells_run"] for r in merged)
    faster = peers.factors(merged)[f"tiny-12-tl{peers.VERSION.partition('.')[0]}"]
    assert faster["naive"] == rows[2].cells_per_cpu_second / rows[0].cells_per_cpu_second
    # A pass costs what torch counts; ours does at most 15 % more than the least, and never less.
    q = bench.question(bench.random_model(bench.SHAPES["tiny"]), bench.SHAPES["tiny"])
    with bench.flop_clock() as (counted, _), torch.inference_mode():
        q.plain(q.pairs[0].clean.ids)
        one = counted()
    with bench.flop_clock() as (counted, _):
        bench.ours(q)
        spent = counted()
    least = one * 144 / rows[0].allowed
    assert least <= spent < 1.15 * least
    assert faster["allowed"] == rows[0].allowed
    table = tables.peers({"rows": merged})
    assert table.count("| tiny | 12 |") == 2 and "| 3.0 |" in table


def test_no_null_map_is_clear_more_often_than_the_page_promises():
    """At most 5 % of 1,000 maps in every case; the docstring of `select` says so."""
    result = json.loads((SCRIPT.parent / "results" / "selection.json").read_text())
    assert result["maps"] == 1000 and len(result["rows"]) == 16
    assert max(row["clear"] for row in result["rows"]) <= 0.05
