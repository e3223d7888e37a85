"""`trace`: pairs -> Effects, in batches that can be shared out, interrupted and taken up again.

Pairs of equal length are cut into batches by a rule that depends on the pairs and the byte budget alone, so that any number of processes,
and a run that was killed and resumed, compute the same batches and write the same numbers. Within a batch the wavefront engine shares
one walk over the layers; what it refuses goes to the loop, and the reason is kept.

Every trace checks itself (`self_check`): a few cells drawn at random must agree with the loop, patching the base run onto itself must
change nothing, restoring all of resid_pre at layer 0 must give the other run, and cells left of the first difference must be zero even
where they are computed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from ..errors import ConfigError, SelfCheckError, SiteError, choices
from ..metrics import Metric, foil_indices, get_metric
from ..model import Model
from ..prompts import Continuation
from ..sites import ROLES, Site
from ..words import expect
from . import gradients, loop, wave
from .corruption import Source, States, ZeroStates
from .effects import COLUMNS, PAIR_COLUMNS, Effects
from .pairs import DIRECTIONS, Direction, Pair, Pairs, by_length, expect_pairs, make_runs
from .sweep import (
    SPANS,
    SWEPT,
    Answers,
    Job,
    Span,
    check_request,
    comparable,
    components,
    reads_of,
)

Method = Literal["exact", "atp", "atpstar", "ig"]
METHODS = ("exact", "atp", "atpstar", "ig")
ENGINES = ("wavefront", "loop")
DEFAULT_SITES = ("resid_post", "attn_out", "mlp_out")
PAIRS_AT_ONCE = 64
"""More pairs in one batch win nothing, and a batch is what a killed run loses."""


def default_memory(model: Model) -> int:
    """Bytes for activations in flight: half a GiB on a CPU, a third of an accelerator.

    Taken from the size of the device, not from what is free at the moment: the batches follow from it, and should not change between a
    run and its resumption.
    """
    if model.device.type == "cuda":
        return torch.cuda.get_device_properties(model.device).total_memory // 3
    return 512 << 20


@dataclass(frozen=True, eq=False)
class Plan:
    """All that a trace is, apart from the results.

    Attributes:
        model, pairs: what is traced on what.
        components: which states.
        by: `token` or `role` (all tokens of a role restored together).
        metric, direction, window: as in `Job`.
        method: `exact`, or an estimate.
        steps: of integrated gradients.
        engine: that will run; `why_loop` says why it is not the wavefront.
        memory: bytes for activations in flight.
        batches: indices of the pairs of each batch.
    """

    model: Model
    pairs: Pairs
    components: tuple[Site, ...]
    by: str
    metric: Metric
    direction: Direction
    window: int
    method: Method
    steps: int
    engine: str
    why_loop: str | None
    memory: int
    batches: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    @property
    def cells(self) -> int:
        """Cells of all pairs and noise draws: one forward pass each, for anyone else."""
        spans = sum(len(SPANS[self.by](p)) * p.draws for p in self.pairs)
        return len(self.components) * spans

    def bytes_of_pair(self, length: int) -> int:
        """Activations kept of both runs of a pair of that length."""
        kinds = {c.kind for c in self.components}
        draws = self.pairs[0].draws
        if not kinds <= wave.FIELD.keys():
            kinds = {"resid_pre"}
        base, source = (
            wave.base_bytes(self.model, kinds),
            wave.source_bytes(self.model, kinds),
        )
        other = draws if self.direction == "noise" else 1
        scores = 3 * self.model.n_heads * length * self.model.dtype.itemsize
        return length * (draws * (base + scores) + other * source)

    def estimate(self) -> dict[str, Any]:
        """What is about to be done, for the line printed before the start."""
        longest = max(p.length for p in self.pairs)
        return {
            "pairs": len(self.pairs), "cells": self.cells, "batches": len(self.batches), "engine": self.engine if self.method == "exact" else self.method,
            "memory_bytes": self.memory, "pair_bytes": self.bytes_of_pair(longest), "longest_prompt": longest,
        }  # fmt: skip


def check_names(
    kinds: Sequence[str], by: str, metric: str | Metric, direction: str, method: str, engine: str
) -> None:
    """Refuse words that name nothing; needs no model, so that a command can ask before it loads one.

    Raises:
        ConfigError, SiteError: the first that does not exist.
    """
    for kind in kinds:
        if kind not in SWEPT:
            raise SiteError(f"unknown kind of site {kind!r}; accepted: {choices(SWEPT)}")
    if by not in SPANS:
        raise ConfigError(f"spans by {by!r} were asked for; accepted: {choices(SPANS)}")
    for what, word, accepted in (
        ("method", method, METHODS),
        ("engine", engine, ENGINES),
        ("direction", direction, DIRECTIONS),
    ):
        if word not in accepted:
            raise ConfigError(f"unknown {what} {word!r}; accepted: {choices(accepted)}")
    get_metric(metric)


def plan(
    model: Model,
    pairs: Pairs,
    sites: Sequence[str | Site] = DEFAULT_SITES,
    *,
    by: str = "token",
    layers: Sequence[int] | None = None,
    metric: str | Metric = "prob",
    direction: str = "denoise",
    window: int = 1,
    method: str = "exact",
    steps: int = 16,
    engine: str = "wavefront",
    memory: int | None = None,
) -> Plan:
    """Check a request and lay out its batches. Arguments as in `trace`.

    Raises:
        ConfigError, SiteError: something asked for does not exist.
    """
    expect(model, Model, "trace(model=...)", "a Model, from load_model()")
    expect_pairs(pairs, "trace(pairs=...)")
    pairs.check_model(model)
    kinds = [s for s in sites if isinstance(s, str) and "." not in s]
    check_names(kinds, by, metric, direction, method, engine)
    if steps < 1:
        raise ConfigError(f"{steps} steps were asked for; at least 1 is needed")
    if memory is not None and memory < 1 << 20:
        raise ConfigError(f"a budget of {memory} bytes was given; at least 1 MiB is needed")
    named = [
        model.check_site(s if isinstance(s, Site) else Site.parse(s)).everywhere
        for s in sites
        if s not in kinds
    ]
    chosen = tuple(dict.fromkeys([*components(model, kinds, layers), *named]))
    if not chosen:
        raise ConfigError("no sites were given; name at least one kind, such as resid_post")
    way = check_request(model, pairs, direction, window, chosen)
    why = wave.refusal(model, list(chosen)) if engine == "wavefront" else None
    made = Plan(
        model, pairs, chosen, by, comparable(get_metric(metric), pairs.continuations), way, window, method, steps,  # type: ignore[arg-type]
        "loop" if why is not None else engine, why, default_memory(model) if memory is None else memory,
    )  # fmt: skip
    if method != "exact":
        one = make_runs(model, pairs.items[:1], reads_of(pairs, made.metric)[0])
        nothing = ZeroStates() if pairs.corruption.is_ablation else None
        gradients.check(
            model,
            Job(one, chosen, [[]], made.metric, model.n_layers, way, window, nothing),
            method,
            steps,
        )
    batches = []
    for length, indices in by_length(pairs).items():
        size = max(1, min(PAIRS_AT_ONCE, made.memory // 2 // max(1, made.bytes_of_pair(length))))
        batches += [tuple(indices[i : i + size]) for i in range(0, len(indices), size)]
    return replace(made, batches=tuple(batches))


def _states_of(p: Plan) -> Callable[[Sequence[Pair]], States]:
    """Clean states of the prompts of pairs of one length, for ablations."""
    keys = Job(
        make_runs(p.model, p.pairs.items[:1], Continuation((), ())), p.components, [[]], p.metric, p.model.n_layers, p.direction, p.window
    ).kinds()  # fmt: skip

    def states(pairs: Sequence[Pair]) -> States:
        runs = make_runs(p.model, pairs, Continuation((), ()))
        return loop.states(p.model, runs.clean, keys)[1]

    return states


def ablation(p: Plan) -> Source | None:
    """The source of an ablation, made once over all pairs; None where there is a corrupted run."""
    if not p.pairs.corruption.is_ablation:
        return None
    states_of = _states_of(p)
    kinds = set(states_of(p.pairs.items[:1]))
    return p.pairs.corruption.source(p.pairs.items, kinds, states_of)


@dataclass(eq=False)
class Values:
    """Metrics of one batch: `patched` `[component span row]`, the others `[row]`; `draws` rows of a pair stand together."""

    patched: torch.Tensor
    base: torch.Tensor
    clean: torch.Tensor
    corrupted: torch.Tensor
    draws: int
    flops: int = 0


def measure(
    p: Plan,
    pairs: Sequence[Pair],
    spans: Sequence[Sequence[Span]],
    source: Source | None,
    tick: Callable[[int], None] | None = None,
) -> Values:
    """The metric of every cell of pairs of one length, by the plan's engine."""
    draws = pairs[0].draws
    rows = [q for q in pairs for _ in range(draws)]
    gold, foil = torch.tensor([q.gold for q in rows]), foil_indices(q.foil for q in rows)

    def job(continuation: Continuation) -> Job:
        return Job(
            make_runs(p.model, pairs, continuation),
            p.components,
            spans,
            p.metric,
            p.model.n_layers,
            p.direction,
            p.window,
            source,
        )

    continuations = reads_of(p.pairs, p.metric)
    if p.method != "exact":
        found = gradients.sweep(
            p.model, job(continuations[0]), p.method, p.steps, tick, p.memory // 2
        )
        base, clean, corrupted = (
            _metric(p, scores, gold, foil) for scores in (found.base, found.clean, found.corrupted)
        )
        return Values(base + found.effect, base, clean, corrupted, draws)

    answers: list[tuple[Continuation, Answers]] = []
    for continuation in continuations:
        if p.engine == "wavefront":
            answers.append(
                (continuation, wave.sweep(p.model, job(continuation), p.memory // 2, tick))
            )
        else:
            answers.append((continuation, loop.sweep(p.model, job(continuation), tick)))

    def metric(name: str) -> torch.Tensor:
        first = getattr(answers[0][1], name)
        if p.metric.need == "vocabulary":
            return first[..., 0]
        scores = first.new_empty(*first.shape[:-1], len(p.pairs.verbalizer.words))
        for continuation, answer in answers:
            scores[..., [i for i, _ in continuation.labels]] = getattr(answer, name)
        return _metric(p, scores, gold, foil)

    flops = sum(answer.flops for _, answer in answers)
    return Values(
        metric("patched"), metric("base"), metric("clean"), metric("corrupted"), draws, flops
    )


def _metric(p: Plan, scores: torch.Tensor, gold: torch.Tensor, foil: torch.Tensor) -> torch.Tensor:
    """Label scores `[... row label]` (or, for a metric over the vocabulary, `[... row 1]`) -> the metric `[... row]`."""
    if p.metric.need == "vocabulary":
        return scores[..., 0]
    flat = scores.reshape(-1, scores.shape[-1])
    times = len(flat) // len(gold)
    return p.metric(flat, gold.repeat(times), foil.repeat(times)).reshape(scores.shape[:-1])


def _table(
    p: Plan, pairs: Sequence[Pair], spans: Sequence[Sequence[Span]], values: Values
) -> pd.DataFrame:
    """One row a pair and cell."""
    sign = 1.0 if p.direction == "denoise" else -1.0
    n, draws = len(pairs), values.draws

    def split(x: torch.Tensor) -> np.ndarray:
        return x.double().numpy().reshape(*x.shape[:-1], n, draws)

    patched, base, clean, corrupted = (
        split(x) for x in (values.patched, values.base, values.clean, values.corrupted)
    )
    effect = sign * (patched - base)
    frames = []
    kinds = pd.Categorical(
        [c.kind for c in p.components], categories=list(dict.fromkeys(c.kind for c in p.components))
    )
    layers = np.array([c.layer for c in p.components], dtype=np.int16)
    heads = np.array([-1 if c.head is None else c.head for c in p.components], dtype=np.int16)
    for b, pair in enumerate(pairs):
        m = len(spans[b])
        C = len(p.components)
        cell = effect[:, :m, b]  # [component span draw]
        frames.append(
            pd.DataFrame(
                {
                    "example_id": pair.id, "kind": kinds.repeat(m), "layer": layers.repeat(m), "head": heads.repeat(m),
                    "position": np.tile(np.array([s.position for s in spans[b]], dtype=np.int32), C),
                    "role": np.tile(np.array([s.role for s in spans[b]], dtype=object), C),
                    # Whole columns: of an ablation "corrupted" is nan, which as a lone value would lose its dtype.
                    "clean": np.full(C * m, clean[b].mean()), "corrupted": np.full(C * m, corrupted[b].mean()), "patched": patched[:, :m, b].mean(-1).ravel(),
                    "effect": cell.mean(-1).ravel(), "draw_sd": (cell.std(-1, ddof=1) if draws > 1 else np.zeros(cell.shape[:2])).ravel(),
                },
                columns=list(COLUMNS),
            )
        )  # fmt: skip
    out = pd.concat(frames, ignore_index=True)
    out["kind"] = out["kind"].astype(str)
    return out


def trace_batch(
    p: Plan, index: int, source: Source | None = None, tick: Callable[[int], None] | None = None
) -> pd.DataFrame:
    """The effects of one batch of a plan."""
    pairs = [p.pairs[i] for i in p.batches[index]]
    spans = [SPANS[p.by](q) for q in pairs]
    values = measure(p, pairs, spans, source, tick)
    table = _table(p, pairs, spans, values)
    table.attrs["flops"] = (
        values.flops
    )  # kept by parquet, so that a resumed run knows what its parts cost
    return table


def gather(p: Plan, frames: Sequence[pd.DataFrame]) -> Effects:
    """Effects in the order of the pairs, from the frames of all batches."""
    flops = sum(frame.attrs.get("flops", 0) for frame in frames)
    frame = pd.concat(frames, ignore_index=True)
    frame.attrs = {}
    order = {q.id: i for i, q in enumerate(p.pairs)}
    frame = frame.iloc[
        np.argsort(frame["example_id"].map(order).to_numpy(), kind="stable")
    ].reset_index(drop=True)
    return Effects(frame, _pair_table(p, frame), about(p) | {"flops": flops})


def about(p: Plan) -> dict[str, Any]:
    """What the effects are effects of."""
    corruption = p.pairs.corruption
    return {
        "model": p.model.name, "n_layers": p.model.n_layers, "n_heads": p.model.n_heads, "dtype": str(p.model.dtype).removeprefix("torch."),
        "corruption": corruption.name, "corruption_settings": corruption.settings(), "direction": p.direction,
        "metric": p.metric.name, "unit": p.metric.unit, "method": p.method, "steps": p.steps if p.method == "ig" else None, "by": p.by,
        "window": p.window, "kinds": list(dict.fromkeys(c.kind for c in p.components)), "labels": [w for _, w in p.pairs.verbalizer.words],
        "changed_roles": _changed_roles(p.pairs),
        "template": p.pairs.template.text, **p.pairs.account(),
    }  # fmt: skip


def _changed_roles(pairs: Pairs) -> list[str]:
    """Roles of the tokens that a counterfactual changes; empty for other corruptions."""
    changed = {
        r
        for q in pairs
        if q.other is not None
        for r in q.clean.roles[q.clean.ids != q.corrupted.ids].tolist()
    }
    return [ROLES[r] for r in sorted(changed)]


def _pair_table(p: Plan, frame: pd.DataFrame) -> pd.DataFrame:
    runs = frame.drop_duplicates("example_id").set_index("example_id")[["clean", "corrupted"]]
    decode = p.model.tokenizer
    texts = (
        (lambda ids: [decode.decode([i]) for i in ids])
        if decode is not None
        else (lambda ids: [str(i) for i in ids])
    )
    rows = []
    for q in p.pairs:
        assert q.clean_scores is not None
        roles = [ROLES[r] for r in q.clean.roles[0].tolist()]
        corrupted = (
            None if q.corrupted_scores is None else q.corrupted_scores.exp().mean(0).tolist()
        )
        rows.append(
            (
                q.id, q.example.sentence, q.example.aspect, q.example.polarity.value, q.example.domain, q.example.cluster,
                texts(q.clean.ids[0].tolist()), roles, [w for _, w in p.pairs.verbalizer.words], q.clean_scores.exp().tolist(), corrupted,
                None if q.corrupted is q.clean else texts(q.corrupted.ids[0].tolist()),
                float(runs.loc[q.id, "clean"]), float(runs.loc[q.id, "corrupted"]),
            )
        )  # fmt: skip
    return pd.DataFrame(rows, columns=list(PAIR_COLUMNS))


def iterate(
    p: Plan, batches: Sequence[int] | None = None, tick: Callable[[int], None] | None = None
) -> Iterator[tuple[int, pd.DataFrame]]:
    """(index, effects) of the batches asked for, in order."""
    source = ablation(p)
    for index in range(len(p.batches)) if batches is None else batches:
        yield index, trace_batch(p, index, source, tick)


def trace(
    model: Model,
    pairs: Pairs,
    sites: Sequence[str | Site] = DEFAULT_SITES,
    *,
    by: str = "token",
    layers: Sequence[int] | None = None,
    metric: str | Metric = "prob",
    direction: str = "denoise",
    window: int = 1,
    method: str = "exact",
    steps: int = 16,
    engine: str = "wavefront",
    memory: int | None = None,
    check: bool = True,
    progress: bool = False,
) -> Effects:
    """The effect of every site on every pair.

    Args:
        model: what is traced.
        pairs: from `make_pairs`.
        sites: kinds (`resid_pre, resid_mid, resid_post, attn_out, mlp_out, head`, and `q, k, v` by the loop), or single sites.
        by: `token` restores one token at a time; `role` all tokens of a role together, which costs a tenth.
        layers: default all.
        metric: `prob` (the paper), `prob_label`, `logprob`, `logit_diff` or `kl`.
        direction: `denoise` (restore clean states in the corrupted run) or `noise` (the reverse). Ablations have no corrupted run and are
            `noise` whatever this says; `effects.about["direction"]` tells.
        window: layers restored together, centred (ROME: 10 for attention and MLP; the paper: 1).
        method: `exact`, or an estimate from gradients: `atp`, `atpstar`, `ig`.
        steps: of integrated gradients.
        engine: `wavefront`, or `loop` for one forward pass a cell.
        memory: bytes for activations in flight; default by the device.
        check: run `self_check` (a few percent of the time) and fail where an identity does not hold.
        progress: show a bar.

    Returns:
        one row a pair and cell.
    """
    p = plan(
        model,
        pairs,
        sites,
        by=by,
        layers=layers,
        metric=metric,
        direction=direction,
        window=window,
        method=method,
        steps=steps,
        engine=engine,
        memory=memory,
    )
    checks = self_check(p) if check and method == "exact" else {}
    if progress:
        from ..progress import bar

        with bar("tracing", p.cells) as tick:
            frames = [frame for _, frame in iterate(p, tick=tick)]
    else:
        frames = [frame for _, frame in iterate(p)]
    effects = gather(p, frames)
    effects.about["self_checks"] = checks
    return effects


# ---- self-checks --------------------------------------------------------------------------------------------------------------


def self_check(
    p: Plan, cells: int = 4, seed: int = 0, tolerance: float | None = None
) -> dict[str, Any]:
    """Identities that must hold, on a few pairs of this very run.

    Args:
        p: the plan.
        cells: drawn at random and compared with the loop.
        seed: of the draw.
        tolerance: on differences of the metric; default by the dtype (float32: 1e-4).

    Returns:
        name -> largest difference seen, with the tolerance and what was compared.

    Raises:
        SelfCheckError: one does not hold.
    """
    rng = random.Random(seed)
    half = p.model.dtype in (torch.bfloat16, torch.float16)
    tolerance = (0.1 if half else 1e-4) if tolerance is None else tolerance
    source = ablation(p)
    exact = replace(p, method="exact")
    found: dict[str, Any] = {}
    compared = []

    # The engine against the loop: random components at random spans.
    worst = 0.0
    for _ in range(cells):
        pair = p.pairs[rng.randrange(len(p.pairs))]
        span, component = rng.choice(SPANS[p.by](pair)), rng.choice(p.components)
        one = replace(exact, components=(component,))
        a = measure(one, [pair], [[span]], source)
        b = measure(replace(one, engine="loop"), [pair], [[span]], source)
        worst = max(worst, _difference(a.patched - a.base, b.patched - b.base))
        at = span.role if span.position < 0 else span.position
        compared.append(f"{component}@{at} of {pair.id}")
    found["engine_against_loop"] = worst
    found["cells_compared"] = compared

    pair = p.pairs[rng.randrange(len(p.pairs))]
    few = tuple(rng.sample(p.components, min(8, len(p.components))))
    spans = SPANS[p.by](pair)
    if source is None:
        # The base run patched onto itself.
        same = replace(
            pair, corrupted=pair.clean, corruption=replace_with_nothing(pair), sigma=0.0, first=0
        )
        v = measure(replace(exact, components=few), [same], [spans], None)
        found["same_onto_same"] = _difference(v.patched, v.base.expand_as(v.patched))
        # All of the stream before block 0.
        every = Span(tuple(range(pair.length)), "template")
        v = measure(
            replace(exact, components=(Site(0, "resid_pre"),), window=1), [pair], [[every]], None
        )
        other = v.clean if p.direction == "denoise" else v.corrupted
        found["all_of_resid_pre_0"] = _difference(v.patched[0, 0], other)
        # Left of the first difference, computed all the same.
        left = [Span((i,), "template", i) for i in range(min(pair.first, pair.length - 1))]
        if left:
            v = measure(
                replace(exact, components=few, engine="loop"),
                [replace(pair, first=0)],
                [rng.sample(left, min(2, len(left)))],
                None,
            )
            found["left_of_first_difference"] = _difference(v.patched, v.base.expand_as(v.patched))
    found["tolerance"] = tolerance
    broken = {
        k: v
        for k, v in found.items()
        if isinstance(v, float) and k != "tolerance" and not v <= tolerance
    }
    if broken:
        names = ", ".join(f"{k} is off by {v:.3g}" for k, v in broken.items())
        raise SelfCheckError(
            f"a self-check failed ({names}; allowed {tolerance:g}); the trace would be wrong, please report it with the model's name"
        )
    return found


def replace_with_nothing(pair: Pair) -> Any:
    """A corruption of the same form that changes nothing: noise of scale 0 with as many draws."""
    from .pairs import GaussianNoise

    return GaussianNoise(scale=0.0, draws=pair.draws)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
