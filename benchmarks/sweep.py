"""Measure how fast an exact sweep is: the wavefront engine beside the public one, in one process,
on the same random weights.

    python benchmarks/sweep.py --write                                       all shapes, a twentieth of the peer's cells
    python benchmarks/sweep.py --shapes gpt2-small --peer-fraction 1 --write   the whole peer too: minutes
    python benchmarks/sweep.py --shapes llama-2-7b --device cuda --write       a large model, pairs per minute

Both sides answer the same question: two prompts of random tokens that differ from the first token
on, the logit difference of two tokens, and the effect of restoring every (kind, layer, token) of
the clean run in the corrupted one. The peer is `transformer_lens.patching`, unmodified; in the ROME
setting (ten noise draws), which it does not offer, it is this project's own loop.

What is measured, and how:

- *FLOPs*: `torch.utils.flop_counter.FlopCounterMode`, a multiplication and an addition being two.
  It sees matrix products, and they are all there is to see: norms, softmax, activation functions,
  rotations, gathers and copies are not counted, on either side. The peer's count agrees to the last
  digit with what the shape says it must be (`forward_flops`), so no product is missed.
- *seconds*: the median of `repeats` runs after one that warms up. Of the peer only a fraction of
  the cells may be run (all cost the same there); then its seconds are extrapolated, and marked.
- *peak memory*: what the process holds at most, above what it holds before the call with the model
  and the inputs in it. On Linux the kernel's own high-water mark, reset just before; on an
  accelerator its allocator's.
- *difference*: the largest between the two sides' effects, over the cells that both ran.

A second baseline is what a careful user of TransformerLens writes by hand: `batched_side` patches
all positions of a layer in one batch, one forward pass per (kind, layer). It does the same
arithmetic as the peer, in larger products. Every speed names the version of TransformerLens that it
is against.

The result is one JSON file (an entry a shape, those not run this time kept) and, with `--write`,
the table in `README.md`.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import importlib.metadata
import io
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
import tyro
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens import patching

from mech_absa.errors import ConfigError, choices
from mech_absa.examples import Example, Polarity
from mech_absa.metrics import get_metric
from mech_absa.model import DTYPES, Model, hooked_from_hf
from mech_absa.model.bridge import bridge_from_hf
from mech_absa.patch import loop, wave
from mech_absa.patch.job import SPANS, Job, Span, components
from mech_absa.patch.pairs import Counterfactual, GaussianNoise, Pair, make_runs
from mech_absa.patch.plan import default_memory
from mech_absa.patch.request import By
from mech_absa.prompts import ROLE, Continuation, Tokenised
from mech_absa.records import versions, write_json, write_text
from mech_absa.sites import Site

HERE = Path(__file__).resolve().parent
TL_VERSION = importlib.metadata.version("transformer-lens")
MARKS = ("<!-- sweep: begin -->", "<!-- sweep: end -->")
BLOCK_EVERY = ("resid_pre", "attn_out", "mlp_out")
"""The kinds, and their order, of `transformer_lens.patching.get_act_patch_block_every`."""


# ---- shapes -----------------------------------------------------------------------------------------------------------------------


def _llama(
    hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int
) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        vocab_size=vocab, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip


def _gpt2(width: int, layers: int, heads: int, vocab: int) -> transformers.GPT2Config:
    return transformers.GPT2Config(
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        vocab_size=vocab,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=0,
    )


def _pythia(hidden: int, layers: int, heads: int, vocab: int) -> transformers.GPTNeoXConfig:
    return transformers.GPTNeoXConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=vocab,
        max_position_embeddings=256, rotary_pct=0.25, use_parallel_residual=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model and what is asked of it.

    Attributes:
        about: one line for the table.
        config: makes the Hugging Face configuration.
        tokens: length of the prompts.
        kinds: swept, in every layer.
        by: `token` or `role`.
        draws: noise draws; 0 for another prompt as the corrupted run.
        pairs: swept together.
        dtype: of weights and activations.
        fewer_flops, faster: what the engine is meant to reach against the peer.
    """

    about: str
    config: Callable[[], transformers.PretrainedConfig]
    tokens: int = 40
    kinds: tuple[str, ...] = BLOCK_EVERY
    by: str = "token"
    draws: int = 0
    pairs: int = 1
    dtype: str = "float32"
    fewer_flops: float | None = None
    faster: float | None = None

    @property
    def peer(self) -> str:
        """Return the first baseline, with its version."""
        return "the loop" if self.draws else f"transformer_lens.patching {TL_VERSION}"


SHAPES: dict[str, Shape] = {
    "tiny": Shape("GPT-2, 4 x 64, vocabulary 500, 12 tokens", lambda: _gpt2(64, 4, 4, 500), tokens=12),
    "tiny-gqa": Shape("Llama, 4 x 64, 4 heads over 2, vocabulary 500, 12 tokens", lambda: _llama(64, 160, 4, 4, 2, 500), tokens=12),
    "tiny-parallel": Shape("Pythia, 4 x 64, vocabulary 500, 12 tokens", lambda: _pythia(64, 4, 4, 500), tokens=12),
    "tiny-rome": Shape("GPT-2, 4 x 64, 12 tokens, 3 noise draws", lambda: _gpt2(64, 4, 4, 500), tokens=12, kinds=("resid_post",), draws=3),
    "gpt2-small": Shape("GPT-2 small: 12 x 768, vocabulary 50257, 40 tokens", lambda: _gpt2(768, 12, 12, 50257), fewer_flops=6.3, faster=30),
    "llama-gqa": Shape(
        "Llama: 12 x 512, 8 heads over 2, vocabulary 1000, 40 tokens", lambda: _llama(512, 1376, 12, 8, 2, 1000), fewer_flops=3.4, faster=8
    ),
    "pythia": Shape("Pythia: 12 x 512, parallel, vocabulary 1000, 40 tokens", lambda: _pythia(512, 12, 8, 1000), fewer_flops=3.4, faster=8),
    "rome": Shape(
        "ROME: GPT-2 small, hidden states, 40 tokens, 10 noise draws", lambda: _gpt2(768, 12, 12, 50257), kinds=("resid_post",), draws=10, faster=8
    ),
    "gpt2-small-204": Shape("GPT-2 small, 204 tokens", lambda: _gpt2(768, 12, 12, 50257), tokens=204),
    "smollm2": Shape(
        "SmolLM2-135M: Llama, 30 x 576, 9 heads over 3, vocabulary 49152, 40 tokens", lambda: _llama(576, 1536, 30, 9, 3, 49152)
    ),
    "smollm2-204": Shape("SmolLM2-135M, 204 tokens", lambda: _llama(576, 1536, 30, 9, 3, 49152), tokens=204),
    "llama-2-7b": Shape(
        "Llama-2-7B, bf16, 60 tokens, roles", lambda: _llama(4096, 11008, 32, 32, 32, 32000), tokens=60, by="role", pairs=8, dtype="bfloat16"
    ),
}  # fmt: skip
DEFAULT_SHAPES = ("tiny", "gpt2-small", "llama-gqa", "pythia", "rome")


def random_model(shape: Shape, device: str = "cpu", seed: int = 0) -> Model:
    """The shape with random weights, larger than any library's default, so that a patch moves the logits by units.

    The logits have a standard deviation of about two, and a difference of 1e-4 in an effect is then an error, not noise.
    """
    dtype = DTYPES[shape.dtype]
    config = shape.config()
    with torch.device(device):
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator(device).manual_seed(seed)
    transposed = isinstance(config, transformers.GPT2Config)  # its Conv1D
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.ndim == 1:
                mean, std = (0.0 if name.endswith("bias") else 1.0), 0.2
            elif p.shape[0] in (config.vocab_size, config.max_position_embeddings):
                mean, std = 0.0, 2.0 / config.hidden_size**0.5
            else:
                mean, std = 0.0, 1.5 / p.shape[0 if transposed else 1] ** 0.5
            p.normal_(mean, std, generator=generator)
    old = int(TL_VERSION.partition(".")[0]) < 4  # 4 has the bridge alone
    root = hooked_from_hf(hf, dtype, device) if old else bridge_from_hf(hf, device)
    return Model(root, None, type(hf).__name__)


@dataclass(frozen=True, eq=False)
class Question:
    """Hold what both sides are asked.

    Attributes:
        pairs: clean and corrupted prompts, different from the first token on.
        labels: two vocabulary columns; the metric is the first's logit less the second's.
        spans: of every pair.
    """

    model: Model
    shape: Shape
    pairs: list[Pair]
    labels: tuple[int, int]

    @cached_property
    def plain(self) -> Any:
        """The model as TransformerLens itself lays it out in memory; `load_model` may store the same weights in another order."""
        if all(p.is_contiguous() for p in self.model.hooked.parameters()):
            return self.model.hooked
        other = copy.deepcopy(self.model.hooked)
        for p in other.parameters():
            p.data = p.data.contiguous()
        return other

    @property
    def spans(self) -> list[list[Span]]:
        return [SPANS[By(self.shape.by)](p) for p in self.pairs]

    @property
    def cells(self) -> int:
        return len(self.shape.kinds) * self.model.n_layers * sum(map(len, self.spans))

    def job(self, spans: Sequence[Sequence[Span]] | None = None) -> Job:
        continuation = Continuation((), ((0, self.labels[:1]), (1, self.labels[1:])))
        sites = components(self.model, self.shape.kinds)
        runs = make_runs(self.model, self.pairs, continuation)
        return Job(self.model, runs, sites, spans or self.spans, get_metric("logit_diff"))


def roles(tokens: int) -> list[int]:
    """Roles as a review and the paper's question have them: all eleven, in proportion to the prompt's length."""
    parts = {
        "template": 4, "before": 6, "aspect.first": 1, "aspect.middle": 1, "aspect.last": 1, "opinion": 1, "after": 6,
        "query.first": 1, "query.middle": 1, "query.last": 1,
    }  # fmt: skip
    found = [ROLE[r] for r, n in parts.items() for _ in range(max(1, n * tokens // 30))]
    padded = [ROLE["template"]] * tokens + found
    return [*padded[1 - tokens :], ROLE["answer"]]


def question(model: Model, shape: Shape, seed: int = 0) -> Question:
    """Random tokens; the corrupted run has another one everywhere, or noise of three standard deviations on all embeddings."""
    generator = torch.Generator().manual_seed(seed)
    T, V = shape.tokens, model.d_vocab
    role = torch.tensor(
        [roles(T) if shape.by == "role" else [ROLE["template"]] * (T - 1) + [ROLE["answer"]]]
    )
    pairs = []
    for i in range(shape.pairs):
        ids = torch.randint(V, (1, T), generator=generator)
        other = (ids + torch.randint(1, V, (1, T), generator=generator)) % V
        clean = Tokenised(ids, role, (T,))
        example = Example("random tokens", "tokens", Polarity.POSITIVE, id=str(i))
        if shape.draws:
            sigma = 3 * float(model.hooked.embed(ids.to(model.device)).float().std())
            pairs.append(Pair(example, clean, clean, 0, 1, GaussianNoise(draws=shape.draws), sigma))
        else:
            pairs.append(Pair(example, clean, Tokenised(other, role, (T,)), 0, 1, Counterfactual()))
    first, second = torch.randperm(V, generator=generator)[:2].tolist()
    return Question(model, shape, pairs, (first, second))


# ---- the two sides ----------------------------------------------------------------------------------------------------------------


def ours(q: Question) -> Tensor:
    """Run the wavefront engine with the default budget; return effects `[component span row]`."""
    answers = wave.sweep(
        q.job(), default_memory(q.model) // 2
    )  # half is for what is kept, as in `trace`
    return _effects(answers)


def _effects(answers: Any) -> Tensor:
    return (answers.patched - answers.base) @ torch.tensor([1.0, -1.0])


Clock = Callable[[], float]
"""Reads what has been spent so far: seconds, or FLOPs."""


@dataclass
class PeerRun:
    """Hold what the peer did.

    Attributes:
        effects: by (component, span, row), of the cells that were run.
        cells: how many cells were run, of the `of` that it would run in all.
        spent: by the clock, extrapolated to all cells where not all were run.
    """

    effects: dict[tuple[int, int, int], float]
    cells: int
    of: int
    spent: float


def transformer_lens_side(
    q: Question, fraction: float, clock: Clock = time.perf_counter
) -> PeerRun:
    """`transformer_lens.patching` under `torch.inference_mode`, one prompt at a time, its cache of the clean run given, on its own layout of
    the weights.

    The whole of it is `get_act_patch_block_every`. A fraction, and roles, go through the function it wraps, `generic_activation_patch`, with
    a list of cells. Making the cache, and the metric of the unpatched corrupted run, are not charged to it.
    """
    hooked, L = q.plain, q.model.n_layers
    effects: dict[tuple[int, int, int], float] = {}
    spent, done = 0.0, 0
    a, b = q.labels
    with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        for row, (pair, spans) in enumerate(zip(q.pairs, q.spans, strict=True)):
            if fraction < 1 and row:
                break
            names = [c.hook_name for c in components(q.model, q.shape.kinds)]
            clean, corrupted = (
                pair.clean.ids.to(q.model.device),
                pair.corrupted.ids.to(q.model.device),
            )

            def metric(logits: Tensor) -> Tensor:
                return logits[0, -1, a].float() - logits[0, -1, b].float()

            cache = hooked.run_with_cache(clean, names_filter=names)[1]
            base = float(metric(hooked(corrupted)))
            if fraction >= 1 and q.shape.by == "token" and q.shape.kinds == BLOCK_EVERY:
                start = clock()
                found = patching.get_act_patch_block_every(hooked, corrupted, cache, metric)
                spent += clock() - start
                done += found.numel()
                for k in range(len(q.shape.kinds)):
                    for layer in range(L):
                        for s in range(len(spans)):
                            effects[k * L + layer, s, row] = float(found[k, layer, s]) - base
                continue
            chosen = spread(L, len(spans), fraction)

            def setter(
                activation: Tensor, index: Sequence[int], clean: Tensor, spans: list[Span] = spans
            ) -> Tensor:
                at = list(spans[index[1]].positions)
                activation[:, at] = clean[:, at]
                return activation

            for k, kind in enumerate(q.shape.kinds):
                start = clock()
                found = patching.generic_activation_patch(
                    hooked,
                    corrupted,
                    cache,
                    metric,
                    setter,
                    kind,
                    index_df=pd.DataFrame(chosen, columns=["layer", "pos"]),
                )
                spent += clock() - start
                done += len(chosen)
                effects |= {
                    (k * L + layer, s, row): float(x) - base
                    for (layer, s), x in zip(chosen, found, strict=True)
                }
    return PeerRun(effects, done, q.cells, spent * q.cells / done)


def batched_side(q: Question, fraction: float, clock: Clock = time.perf_counter) -> PeerRun:
    """TransformerLens's hooks, all positions of a layer in one batch: one pass per (kind, layer).

    Under `torch.inference_mode`, on its own layout of the weights, the cache of the clean run given;
    the last position's logits are read. A fraction is some of the layers of the first prompt.
    """
    hooked, L = q.plain, q.model.n_layers
    n = max(1, round(fraction * L))
    layers = sorted({int((i + 0.5) * L / n) for i in range(n)})
    names = [c.hook_name for c in components(q.model, q.shape.kinds)]
    effects: dict[tuple[int, int, int], float] = {}
    spent, done = 0.0, 0
    a, b = q.labels
    with torch.inference_mode():
        for row, (pair, spans) in enumerate(zip(q.pairs, q.spans, strict=True)):
            if fraction < 1 and row:
                break
            ids = [t.ids.to(q.model.device) for t in (pair.clean, pair.corrupted)]
            cache = hooked.run_with_cache(ids[0], names_filter=names)[1]
            last = hooked(ids[1])[0, -1].float()
            base = float(last[a] - last[b])
            batch = ids[1].expand(len(spans), -1)
            mask = torch.zeros(len(spans), pair.length, 1, dtype=torch.bool, device=q.model.device)
            for s, span in enumerate(spans):
                mask[s, list(span.positions)] = True
            for k, kind in enumerate(q.shape.kinds):
                for layer in layers:
                    name = Site(layer, kind).hook_name
                    clean = cache[name]

                    def patch(
                        x: Tensor, hook: Any, clean: Tensor = clean, mask: Tensor = mask
                    ) -> Tensor:
                        return torch.where(mask, clean, x)

                    start = clock()
                    logits = hooked.run_with_hooks(batch, fwd_hooks=[(name, patch)])[:, -1]
                    metric = (logits[:, a].float() - logits[:, b].float()).tolist()
                    spent += clock() - start
                    done += len(spans)
                    effects |= {(k * L + layer, s, row): m - base for s, m in enumerate(metric)}
    return PeerRun(effects, done, q.cells, spent * q.cells / done)


def spread(layers: int, spans: int, fraction: float) -> list[tuple[int, int]]:
    """Return a fraction of a grid of cells, spread evenly over layers and positions."""
    if fraction >= 1:
        return [(layer, s) for layer in range(layers) for s in range(spans)]
    n = max(1, round(fraction * layers * spans))
    golden = (5**0.5 - 1) / 2  # multiples of it, modulo one, are as even as a sequence can be
    return sorted(
        {(int((i + 0.5) / n * layers), int((i + 0.5) * golden % 1 * spans)) for i in range(n)}
    )


def loop_side(q: Question, fraction: float, clock: Clock = time.perf_counter) -> PeerRun:
    """This project's loop: one hooked forward pass a cell, all draws in it.

    A fraction is all layers at some of the positions. The unpatched runs are charged once: what comes before the second component's
    cells is known apart from them.
    """
    T = q.shape.tokens
    n = min(T, max(2, round(fraction * T)))
    index = [
        round(i * (T - 1) / (n - 1)) for i in range(n)
    ]  # with the last position, where the last layer is read
    part = q.job([[spans[i] for i in index] for spans in q.spans])
    ticks = []
    start = clock()
    answers = loop.sweep(part, tick=lambda _: ticks.append(clock() - start))
    total = clock() - start
    run, whole = int((~part.zero()).sum()), int((~q.job().zero()).sum())
    first = int((~part.zero()[0]).sum())
    each = (total - ticks[part.n_spans - 1]) / (run - first)  # the loop ticks once per span
    found = _effects(answers)
    effects = {
        (c, index[s], row): float(found[c, s, row])
        for c in range(found.shape[0])
        for s in range(n)
        for row in range(found.shape[2])
    }
    return PeerRun(effects, run, whole, total + each * (whole - run))


def peer(q: Question, fraction: float, clock: Clock = time.perf_counter) -> PeerRun:
    return (loop_side if q.shape.draws else transformer_lens_side)(q, fraction, clock)


# ---- what a sweep must cost -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """FLOPs of one block's pieces, for each token: queries, keys and values, output projection, MLP, and a query's look at one key."""

    q: int
    kv: int
    o: int
    mlp: int
    look: int

    @classmethod
    def of(cls, model: Model) -> Costs:
        d, wide = model.d_model, model.n_heads * model.d_head
        mlp = 2 * d * model.d_mlp * (3 if model.cfg.gated_mlp else 2)
        return cls(
            2 * d * wide, 4 * d * model.n_kv_heads * model.d_head, 2 * wide * d, mlp, 4 * wide
        )


def forward_flops(model: Model, tokens: int, unembed: bool = True) -> int:
    """One whole forward pass: every position through every block, attention over all pairs of positions, all logits everywhere."""
    c = Costs.of(model)
    block = tokens * (c.q + c.kv + c.o + c.mlp + c.look * tokens)
    return model.n_layers * block + (2 * tokens * model.d_model * model.d_vocab if unembed else 0)


def floor_flops(model: Model, tokens: int, kinds: Sequence[str], draws: int = 1) -> int:
    """Return the least operations of an exact sweep of every token, unpatched runs included;
    `README.md` derives it.

    Nothing is recomputed below the entering layer, left of the patched token, at an unchanged
    token's queries, keys and values, or in the last block away from the last token; attention looks
    back only, and at one new key where nothing else is new; two logits are read.
    """
    c, L, T, parallel = Costs.of(model), model.n_layers, tokens, model.parallel
    below = T * (T + 1) // 2  # tokens at or right of the patched one, over all patched tokens
    looks = T * (T + 1) * (2 * T + 1) // 6  # their looks back
    total = 0
    for kind in kinds:
        enters = range(L) if kind == "resid_pre" else range(1, L)
        for layer in enters:
            if kind == "attn_out" and not parallel:
                total += T * c.mlp  # on the patched token, before it enters
            for m in range(layer, L):
                joins, last = m == layer, m == L - 1
                changed = T if joins else below  # tokens with a new input
                total += changed * c.kv + (changed if not last else 1 if joins else T) * c.q
                if last:
                    total += T * (c.o + (c.mlp if not (parallel and joins) else 0)) + c.look * T * (
                        1 if joins else T
                    )
                else:
                    total += below * c.o + (changed if parallel else below) * c.mlp
                    total += c.look * (below + T * (T + 1) // 2 if joins else looks)
        total += (c.mlp if kind == "attn_out" and not parallel else 0) + (
            kind != "resid_pre"
        ) * 4 * model.d_model  # the last layer's one cell
        total += len(enters) * T * 4 * model.d_model
    clean = (
        forward_flops(model, T, unembed=False)
        - T * T * model.n_layers * c.look
        + model.n_layers * below * c.look
    )
    return draws * total + (1 + draws) * clean


# ---- measuring --------------------------------------------------------------------------------------------------------------------


def _linear_flops(x: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x) * weight[0]


@contextlib.contextmanager
def flop_clock() -> Iterator[tuple[Clock, FlopCounterMode]]:
    """What has been counted so far; products made by oneDNN, which torch's counter does not know, included."""
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: _linear_flops}
    ) as counter:
        yield counter.get_total_flops, counter


def by_operation(counter: FlopCounterMode) -> dict[str, int]:
    return {
        str(op).removeprefix("aten."): n
        for op, n in sorted(counter.get_flop_counts()["Global"].items(), key=lambda x: -x[1])
    }


def synchronised(model: Model) -> Clock:
    """Seconds, when all that was asked of the device is done."""

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter()

    return now


def seconds_of(fn: Callable[[], Any], clock: Clock, repeats: int) -> list[float]:
    spent = []
    for _ in range(repeats):
        start = clock()
        fn()
        spent.append(clock() - start)
    return spent


def peak_bytes(fn: Callable[[], Any], model: Model) -> int | None:
    """The most that the process holds during `fn` above what it held before; None where the system does not tell.

    Pages that the C library keeps after a free are handed back first, so that they cannot hide a peak.
    """
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        fn()
        return torch.cuda.max_memory_allocated(model.device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # sets the high-water mark to what is held now
        before = _status("VmRSS")
        fn()
        return _status("VmHWM") - before
    except (OSError, AttributeError, KeyError):
        return None


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


@dataclass
class Result:
    """One shape, measured. FLOPs and seconds are of all cells of all pairs; `None` where not measured."""

    about: str
    peer: str
    device: str
    threads: int
    measured: str
    load: float
    cells: int
    peer_cells_run: int
    flops: int
    flops_by_operation: dict[str, int]
    floor: int | None
    peer_flops: float
    fewer_flops: float
    goal_fewer_flops: float | None
    difference: float
    largest_effect: float
    peak_memory: int | None
    peer_peak_memory: int | None
    seconds: float | None = None
    seconds_all: list[float] = field(default_factory=list)
    peer_seconds: float | None = None
    peer_extrapolated: bool = True
    faster: float | None = None
    goal_faster: float | None = None
    pairs_per_minute: float | None = None
    peer_pairs_per_minute: float | None = None
    cells_per_second: float | None = None
    batched: str | None = None
    batched_seconds: float | None = None
    batched_difference: float | None = None
    faster_than_batched: float | None = None


def measure(
    shape: Shape,
    *,
    device: str = "cpu",
    fraction: float = 0.05,
    repeats: int = 5,
    times: bool = True,
    seed: int = 0,
) -> Result:
    """Both sides of one shape."""
    load = os.getloadavg()[0]
    model = random_model(shape, device, seed)
    q = question(model, shape, seed)

    with flop_clock() as (clock, counter):
        effects = ours(q)
    few = 1e-9  # of the cells: as few as can be; every cell costs the peer as much
    with flop_clock() as (clock, _):
        peer_flops = peer(q, few, clock).spent
    peak = peak_bytes(lambda: ours(q), model)
    peer_peak = peak_bytes(lambda: peer(q, few), model)

    clock = synchronised(model)
    spent = seconds_of(lambda: ours(q), clock, repeats) if times else []
    theirs = peer(q, fraction, clock)
    difference = max(abs(x - float(effects[at])) for at, x in theirs.effects.items())

    flops = counter.get_total_flops()
    seconds, peer_seconds = (statistics.median(spent), theirs.spent) if times else (None, None)
    tokenwise = shape.by == "token"
    result = Result(
        about=shape.about, peer=shape.peer, device=device_name(model), threads=torch.get_num_threads(),
        measured=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), load=load, cells=q.cells, peer_cells_run=theirs.cells, flops=flops,
        flops_by_operation=by_operation(counter), floor=floor_flops(model, shape.tokens, shape.kinds, max(1, shape.draws)) if tokenwise else None,
        peer_flops=peer_flops, fewer_flops=peer_flops / flops, goal_fewer_flops=shape.fewer_flops, difference=difference,
        largest_effect=float(effects.abs().max()), peak_memory=peak, peer_peak_memory=peer_peak, goal_faster=shape.faster,
        peer_extrapolated=theirs.cells < theirs.of,
    )  # fmt: skip
    if seconds is not None and peer_seconds is not None:
        result.seconds, result.seconds_all, result.peer_seconds, result.faster = (
            seconds,
            spent,
            peer_seconds,
            peer_seconds / seconds,
        )
        result.pairs_per_minute, result.peer_pairs_per_minute = (
            60 * shape.pairs / seconds,
            60 * shape.pairs / peer_seconds,
        )
        result.cells_per_second = q.cells / seconds
        if not shape.draws:
            batched = batched_side(q, fraction, clock)
            result.batched = f"TransformerLens {TL_VERSION}, all positions of a layer in one batch"
            result.batched_seconds = batched.spent
            result.batched_difference = max(
                abs(x - float(effects[at])) for at, x in batched.effects.items()
            )
            result.faster_than_batched = batched.spent / seconds
    return result


def device_name(model: Model) -> str:
    return (
        torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else f"{os.cpu_count()} CPU cores"
    )


# ---- the table --------------------------------------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return all results as Markdown."""

    def giga(x: float) -> str:
        return f"{x / 1e9:,.0f}" if x >= 1e10 else f"{x / 1e9:.3g}"

    def mib(x: int | None) -> str:
        return "" if x is None else f"{x / 2**20:,.0f}"

    def goal(x: float, wanted: float | None, digits: int) -> str:
        return f"**{x:.{digits}f}**" + ("" if wanted is None else f" (goal {wanted:g})")

    def timed(r: dict[str, Any], key: str) -> str:
        about = "~" if r["peer_extrapolated"] and ("peer" in key or "batched" in key) else ""
        return "" if r.get(key) is None else f"{about}{r[key]:.3g}"

    present = {n: results[n] for n in SHAPES if n in results}
    first = [
        "model and prompt", "cells", "GFLOP, ours", "the floor", "the peer", "times fewer",
        "MiB, ours", "the peer", "largest difference (of effects up to)",
    ]  # fmt: skip
    second = [
        "model and prompt",
        "seconds, ours",
        "the peer",
        "times faster",
        "pairs a minute, ours",
        "the peer",
        "cells a second, ours",
        "seconds, positions batched",
        "times faster than that",
    ]
    lines = [_row(first), "|---" + "|---:" * (len(first) - 1) + "|"]
    for r in present.values():
        floor = "" if r["floor"] is None else giga(r["floor"])
        fewer, worst = (
            goal(r["fewer_flops"], r["goal_fewer_flops"], 2),
            f"{r['difference']:.1e} ({r['largest_effect']:.1f})",
        )
        memory = [mib(r["peak_memory"]), mib(r["peer_peak_memory"])]
        lines.append(
            _row(
                [
                    r["about"],
                    f"{r['cells']:,}",
                    giga(r["flops"]),
                    floor,
                    giga(r["peer_flops"]),
                    fewer,
                    *memory,
                    worst,
                ]
            )
        )
    lines += ["", _row(second), "|---" + "|---:" * (len(second) - 1) + "|"]
    for r in present.values():
        faster = "" if r["faster"] is None else goal(r["faster"], r["goal_faster"], 1)
        lines.append(
            _row(
                [
                    r["about"],
                    timed(r, "seconds"),
                    timed(r, "peer_seconds"),
                    faster,
                    timed(r, "pairs_per_minute"),
                    timed(r, "peer_pairs_per_minute"),
                    timed(r, "cells_per_second"),
                    timed(r, "batched_seconds"),
                    ""
                    if r.get("faster_than_batched") is None
                    else f"**{r['faster_than_batched']:.1f}**",
                ]
            )
        )
    lines.append("")
    for name, r in present.items():
        share = (
            f"{r['peer_cells_run']:,} of its cells, seconds extrapolated (~)"
            if r["peer_extrapolated"]
            else "all of its cells"
        )
        threads = (
            f", {r['threads']} thread{'s' * (r['threads'] > 1)}" if "CPU" in r["device"] else ""
        )
        lines.append(
            f"- {name}: against {r['peer']}, {share}{second_peer(r)}; {r['device']}{threads}; {r['measured']}, load average {r['load']:.1f} before."
        )
    return "\n".join(lines)


def second_peer(r: dict[str, Any]) -> str:
    """Name the second baseline where it was measured."""
    if r.get("batched") is None:
        return ""
    return f", and {r['batched']} (largest difference {r['batched_difference']:.1e})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_table(readme: Path, results: dict[str, dict[str, Any]]) -> None:
    """Put the table between its marks."""
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise ConfigError(
            f"{readme} has no place for the table; it belongs between the lines {MARKS[0]} and {MARKS[1]}"
        )
    write_text(readme, f"{before}{MARKS[0]}\n{table(results)}\n{MARKS[1]}{after}")


@dataclass(frozen=True)
class Config:
    """Exact sweeps, ours and the peer's, side by side in one process."""

    shapes: tuple[str, ...] = DEFAULT_SHAPES
    """Which: tiny, tiny-gqa, tiny-parallel, tiny-rome, gpt2-small, llama-gqa, pythia, rome, gpt2-small-204, smollm2, smollm2-204, llama-2-7b."""
    threads: int = 2
    """CPU threads."""
    peer_fraction: float = 0.05
    """The part of the peer's cells that is run for its seconds and for the difference; 1 runs all, and extrapolates nothing."""
    repeats: int = 5
    """Runs of ours; the median counts."""
    times: bool = True
    """Measure seconds. FLOPs, memory and difference do not depend on how busy the machine is."""
    device: str = "cpu"
    """cpu or cuda."""
    seed: int = 0
    """Of weights and tokens."""
    out: Path = HERE / "results" / "sweep.json"
    """The results; entries of shapes that are not run stay."""
    write: bool = False
    """Rewrite the table in README.md."""


def main(config: Config) -> None:
    if unknown := [s for s in config.shapes if s not in SHAPES]:
        raise ConfigError(f"unknown shape {unknown[0]!r}; accepted: {choices(SHAPES)}")
    if not 0 < config.peer_fraction <= 1:
        raise ConfigError(
            f"a peer fraction of {config.peer_fraction:g} was given; it must be above 0 and at most 1"
        )
    torch.set_num_threads(config.threads)
    held = json.loads(config.out.read_text(encoding="utf-8")) if config.out.exists() else {}
    results = held.get("shapes", {})
    for name in config.shapes:
        result = measure(
            SHAPES[name],
            device=config.device,
            fraction=config.peer_fraction,
            repeats=config.repeats,
            times=config.times,
            seed=config.seed,
        )
        results[name] = vars(result)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            config.out,
            {"versions": versions(), "shapes": {n: results[n] for n in SHAPES if n in results}},
        )
        print(table({name: vars(result)}), flush=True)
    if config.write:
        write_table(HERE / "README.md", results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=Config.__doc__))
