"""A trace, laid out: a request that was checked against its model and pairs, cut into batches.

Pairs of equal length are cut into batches by a rule that depends on the pairs and the byte budget
alone. So any number of processes, and a run that was killed and resumed, compute the same batches
and write the same numbers. Within a batch the wave shares one walk over the layers; what it refuses
goes to the loop, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ConfigError
from ..metrics import Metric, foil_indices
from ..model import Model
from ..prompts import Continuation
from ..records import About
from ..sites import Site, in_reading_order, roles_at
from ..words import expect
from . import gradients, loop, wave
from .corruption import Source, States, ZeroStates
from .effects import Effects
from .job import (
    CONTROL,
    SPANS,
    Answers,
    Job,
    Seen,
    Span,
    Tick,
    check_window,
    comparable,
    components,
    control_spans,
    reads_of,
)
from .pairs import Pair, Pairs, by_length, expect_pairs, make_runs
from .request import By, Direction, Engine, Method, Request
from .table import Values, cell_table, pair_table
from .traced import CONTROL_COLUMNS, as_written, cell_site

PAIRS_AT_ONCE = 64
"""More pairs in one batch gain nothing, and a batch is what a killed run loses."""
TOP_KEYS = ["kind", "layer", "head", "role"]
"""Columns that name a cell of the map whose leading cells `exact_top` computes exactly."""


def default_memory(model: Model) -> int:
    """Return the bytes for activations in flight: 512 MiB on a CPU, a third of an accelerator.

    It follows from the size of the device, not from what is free at the moment: the batches depend
    on it, and should not change between a run and its resumption.
    """
    if model.device.type == "cuda":
        return torch.cuda.get_device_properties(model.device).total_memory // 3
    return 512 << 20


@dataclass(frozen=True, eq=False)
class Plan:
    """All that a trace is, apart from the results.

    Attributes:
        model, pairs: what is traced on what.
        request: what was asked for, with what depends on the model and the pairs resolved: the
            metric reads what it has to, ablations have direction noise, the engine is the one that
            runs, and the memory is set.
        components: which states.
        only: component -> its roles and positions; components that are absent have all.
        why_loop: why the loop runs although the wave was asked for.
        batches: indices of the pairs of each batch.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")
        >>> pairs = ma.make_pairs(model, examples, ma.Counterfactual(), limit=2, keep="all")
        >>> p = plan(model, pairs, Request.parse(["mlp_out"], by="role"))
        >>> len(p.components) == model.n_layers, p.request.engine
        (True, 'wavefront')
    """

    model: Model
    pairs: Pairs
    request: Request
    components: tuple[Site, ...]
    only: dict[Site, tuple[str | int, ...]] = field(default_factory=dict)
    why_loop: str | None = None
    batches: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    # ---- size ------------------------------------------------------------------------------------

    @property
    def cells(self) -> int:
        """Return the cells of all pairs and draws: each would be one forward pass elsewhere."""
        return sum(self.cells_of(index) for index in range(len(self.batches)))

    def cells_of(self, index: int) -> int:
        """Return the cells of one batch."""
        pairs = self.batch(index)
        ways = len(self.request.direction.single)
        return ways * int(self.exists(pairs, self.spans(pairs)).sum()) * pairs[0].draws

    def bytes_of_pair(self, length: int) -> int:
        """Return the bytes of activations kept of both runs of a pair of that length."""
        kinds = {c.kind for c in self.components}
        if not kinds <= wave.FIELD.keys():
            kinds = {"resid_pre"}
        base, source = wave.base_bytes(self.model, kinds), wave.source_bytes(self.model, kinds)
        draws = self.pairs[0].draws
        scores = 3 * self.model.n_heads * length * self.model.dtype.itemsize
        other = 1 if self.request.direction == Direction.DENOISE else draws
        both = 2 if self.request.direction == Direction.BOTH else 1
        return both * length * (draws * (base + scores) + other * source)

    def estimate(self) -> dict[str, Any]:
        """Return what is about to be done, for the line printed before the start."""
        longest = max(p.length for p in self.pairs)
        exact = self.request.method == Method.EXACT
        return {
            "pairs": len(self.pairs),
            "cells": self.cells,
            "batches": len(self.batches),
            "engine": self.request.engine if exact else self.request.method,
            "memory_bytes": self.memory,
            "pair_bytes": self.bytes_of_pair(longest),
            "longest_prompt": longest,
        }

    @property
    def memory(self) -> int:
        """Return the bytes for activations in flight."""
        assert self.request.memory is not None
        return self.request.memory

    # ---- parts -----------------------------------------------------------------------------------

    def batch(self, index: int) -> list[Pair]:
        """Return the pairs of a batch."""
        return [self.pairs[i] for i in self.batches[index]]

    def spans(self, pairs: Sequence[Pair]) -> list[list[Span]]:
        """Return the spans of every pair; by role, controls of the sizes of the roles come last."""
        spans = [SPANS[self.request.by](pair) for pair in pairs]
        if self.request.by == By.ROLE and any(c.head is None for c in self.components):
            return [own + control_spans(pair) for own, pair in zip(spans, pairs, strict=True)]
        return spans

    def exists(
        self, pairs: Sequence[Pair], spans: Sequence[Sequence[Span]]
    ) -> Bool[Tensor, "component span pair"]:
        """Return which cells there are: sites that name a token have no others."""
        there = torch.zeros(
            len(self.components), max(map(len, spans)), len(pairs), dtype=torch.bool
        )
        for b, (pair, own) in enumerate(zip(pairs, spans, strict=True)):
            there[:, : len(own), b] = True
            for c, component in enumerate(self.components):
                if component in self.only:
                    at = self.only[component]
                    named = [any(_is_at(span, a, pair.length) for a in at) for span in own]
                    there[c, : len(own), b] = torch.tensor(named)
                controls = [i for i, span in enumerate(own) if span.role.startswith(CONTROL)]
                if component.head is not None:  # no sites are chosen among heads
                    there[c, controls, b] = False
        return there

    def one_way(self, direction: Direction) -> Plan:
        """Return the same plan in a single direction."""
        return self._like(request=replace(self.request, direction=direction))

    def exactly(self, components: Sequence[Site] | None = None) -> Plan:
        """Return the same plan by the exact method, over these components where they are given."""
        request = replace(self.request, method=Method.EXACT, exact_top=0)
        chosen = self.components if components is None else tuple(components)
        return self._like(request=request, components=chosen)

    def by_loop(self) -> Plan:
        """Return the same plan by the loop."""
        return self._like(request=replace(self.request, engine=Engine.LOOP))

    def _like(self, **changes: Any) -> Plan:
        """Return a changed plan that shares the source of an ablation: it runs over all pairs."""
        other = replace(self, **changes)
        other.__dict__["source"] = self.source
        return other

    @cached_property
    def source(self) -> Source | None:
        """Return where an ablation takes its states from; None where there is a corrupted run.

        It is made once, over all pairs.
        """
        corruption = self.pairs.corruption
        if not corruption.is_ablation:
            return None
        nothing, model = Continuation((), ()), self.model
        window = self.request.window
        first = make_runs(model, self.pairs.items[:1], nothing)
        kinds = Job(model, first, self.components, [[]], self.request.metric, window=window).kinds()

        def states(pairs: Sequence[Pair]) -> States:
            return loop.states(model, make_runs(model, pairs, nothing).clean, kinds)[1]

        return corruption.source(self.pairs.items, kinds, states)

    # ---- results ---------------------------------------------------------------------------------

    def iterate(
        self, batches: Sequence[int] | None = None, tick: Tick | None = None
    ) -> Iterator[tuple[int, pd.DataFrame]]:
        """Yield (index, table of effects) of the batches asked for, in order; all where None."""
        for index in range(len(self.batches)) if batches is None else batches:
            yield index, self.trace_batch(index, tick)

    def trace_batch(
        self, index: int, tick: Tick | None = None, seen: Seen | None = None
    ) -> pd.DataFrame:
        """Return the effects of one batch; with both directions, a column `direction` in front."""
        pairs = self.batch(index)
        spans = self.spans(pairs)
        exists = self.exists(pairs, spans)
        tables, flops = [], 0
        for way, values in self.measure(pairs, spans, exists, tick, seen).items():
            table = cell_table(self.components, pairs, spans, values, exists)
            flops += values.flops
            if self.request.direction == Direction.BOTH:
                table.insert(0, "direction", str(way))
            tables.append(table)
        joined = pd.concat(tables, ignore_index=True) if len(tables) > 1 else tables[0]
        joined.attrs["flops"] = flops  # kept by parquet: a resumed run knows what its parts cost
        return joined

    def measure(
        self,
        pairs: Sequence[Pair],
        spans: Sequence[Sequence[Span]],
        wanted: Bool[Tensor, "component span pair"] | None = None,
        tick: Tick | None = None,
        seen: Seen | None = None,
    ) -> dict[Direction, Values]:
        """Return the metric of every cell of pairs of one length, by direction.

        Args:
            pairs: of equal length.
            spans: of every pair.
            wanted: cells that are computed; all where None.
            tick: told how many cells are done.
            seen: given exact cells as they are finished, for every continuation of the labels.
        """
        ways = self.request.direction.single
        if self.request.method != Method.EXACT:
            return {
                way: self._estimated(self._jobs(pairs, spans, wanted, way)[0], tick) for way in ways
            }
        answers: dict[Direction, list[tuple[Job, Answers]]] = {way: [] for way in ways}
        jobs = {way: self._jobs(pairs, spans, wanted, way) for way in ways}
        part = _parts(tick, len(jobs[ways[0]]))
        for same_runs in zip(*jobs.values(), strict=True):
            by_wave = self.request.engine == Engine.WAVEFRONT
            ran = wave.run_unpatched(same_runs[0], ways) if by_wave else None
            for way, job in zip(ways, same_runs, strict=True):
                memory = self.memory // 2  # the other half is for what is kept of the two runs
                if by_wave:
                    answer = wave.sweep(job, memory, part, ran, seen)
                else:
                    answer = loop.sweep(job, memory, part, seen)
                answers[way].append((job, answer))
        return {way: self._values(answers[way], way) for way in ways}

    def _jobs(
        self,
        pairs: Sequence[Pair],
        spans: Sequence[Sequence[Span]],
        wanted: Bool[Tensor, "component span pair"] | None,
        way: Direction,
    ) -> list[Job]:
        """Return one job per continuation of the labels."""
        r = self.request
        continuations = reads_of(self.pairs, r.metric)
        if r.method != Method.EXACT:
            continuations = continuations[:1]
        return [
            Job(
                self.model,
                make_runs(self.model, pairs, continuation),
                self.components,
                spans,
                r.metric,
                way,
                r.window,
                self.source,
                wanted,
            )
            for continuation in continuations
        ]

    def _estimated(self, job: Job, tick: Tick | None) -> Values:
        """Return estimates of one job as metrics of patched runs."""
        r = self.request
        how = gradients.Estimator(r.method, r.steps, r.rules)
        found = gradients.sweep(job, self.memory // 2, tick, how)
        gold, foil = gold_and_foil(job)
        base, clean, corrupted = (
            metric_of(r.metric, scores, gold, foil)
            for scores in (found.unpatched.base, found.unpatched.clean, found.unpatched.corrupted)
        )
        sign = Direction(job.direction).sign
        return Values(base + found.effect, base, clean, corrupted, job.runs.draws, sign)

    def _values(self, answers: Sequence[tuple[Job, Answers]], way: Direction) -> Values:
        """Put the scores of all continuations together and return the metric."""
        first, metric = answers[0][0], self.request.metric
        gold, foil = gold_and_foil(first)

        def value(name: str) -> Tensor:
            scores: Tensor = getattr(answers[0][1], name)
            if metric.need != "vocabulary":
                n_labels = len(self.pairs.labels)
                scores = scores.new_empty(*scores.shape[:-1], n_labels)
                for job, answer in answers:
                    labels = [i for i, _ in job.runs.continuation.labels]
                    scores[..., labels] = getattr(answer, name)
            return metric_of(metric, scores, gold, foil)

        flops = sum(answer.flops for _, answer in answers)
        patched, base, clean, corrupted = (
            value(name) for name in ("patched", "base", "clean", "corrupted")
        )
        return Values(patched, base, clean, corrupted, first.runs.draws, way.sign, flops)

    def exact(self, rows: pd.DataFrame) -> Float[np.ndarray, " row"]:
        """Return the exact effects of the cells that rows of a table of effects name.

        Rows of one pair are computed together. Tables of both directions need their column.
        """
        effects = np.full(len(rows), np.nan)
        rows = as_written(rows.reset_index(drop=True))
        if "direction" not in rows:
            rows = rows.assign(direction=str(self.request.direction))
        by_id = {q.id: q for q in self.pairs}
        for (example_id, way), part in rows.groupby(["example_id", "direction"], sort=False):
            effects[part.index] = self._exact_of(by_id[example_id], Direction(way), part)
        return effects

    def _exact_of(
        self, pair: Pair, way: Direction, rows: pd.DataFrame
    ) -> Float[np.ndarray, " row"]:
        """Return the exact effects of cells of one pair."""
        sites = [cell_site(*cell) for cell in rows[TOP_KEYS[:3]].itertuples(index=False)]
        chosen, spans = list(dict.fromkeys(sites)), self.spans([pair])[0]
        place = {(s.role, -1 if s.position is None else s.position): i for i, s in enumerate(spans)}
        c = [chosen.index(site) for site in sites]
        s = [place[at] for at in zip(rows["role"], rows["position"], strict=True)]
        wanted = torch.zeros(len(chosen), len(spans), 1, dtype=torch.bool)
        wanted[c, s] = True
        (values,) = self.exactly(chosen).one_way(way).measure([pair], [spans], wanted).values()
        return values.effect.mean(-1).numpy()[c, s]

    def gather(self, frames: Sequence[pd.DataFrame]) -> Effects:
        """Return effects in the order of the pairs, from the tables of all batches."""
        flops = sum(frame.attrs.get("flops", 0) for frame in frames)
        frame = pd.concat(frames, ignore_index=True)
        frame.attrs = {}
        order = {q.id: i for i, q in enumerate(self.pairs)}
        place = frame["example_id"].map(order).to_numpy()
        frame = frame.iloc[np.argsort(place, kind="stable")].reset_index(drop=True)
        frame, controls = without_controls(frame)
        if self.request.exact_top:
            frame = self.finish_exactly(frame, leading_cells([frame], self.request.exact_top))
        pairs = pair_table(self.model, self.pairs, frame)
        return Effects(frame, pairs, self.about() | {"flops": flops}, controls)

    def finish_exactly(self, frame: pd.DataFrame, leading: pd.Index) -> pd.DataFrame:
        """Replace estimates of the leading cells by exact effects; new columns say which.

        Args:
            frame: of whole pairs.
            leading: from `leading_cells`.
        """
        exact = pd.MultiIndex.from_frame(frame[TOP_KEYS]).isin(leading)
        frame = frame.assign(exact=exact, estimate=frame["effect"])
        values = self.exact(frame[exact])
        sign = Direction.NOISE.sign
        if self.request.direction == Direction.BOTH:
            signs = np.where(frame.loc[exact, "direction"] == Direction.DENOISE, 1.0, sign)
        else:
            signs = np.full(len(values), self.request.direction.sign)
        moved = signs * (values - frame.loc[exact, "effect"].to_numpy())
        frame.loc[exact, "patched"] += moved
        frame.loc[exact, "effect"] = values
        return frame

    def about(self) -> About:
        """Return what the effects are effects of."""
        r, corruption, model = self.request, self.pairs.corruption, self.model
        about: About = {
            "model": model.name,
            "n_layers": model.n_layers,
            "n_heads": model.n_heads,
            "dtype": str(model.dtype).removeprefix("torch."),
            "corruption": corruption.name,
            "corruption_settings": corruption.settings(),
            "direction": str(r.direction),
            "metric": r.metric.name,
            "unit": r.metric.unit,
            "method": str(r.method),
            "steps": r.steps if r.method == Method.IG else None,
            "by": str(r.by),
            "window": r.window,
            "kinds": list(dict.fromkeys(c.kind for c in self.components)),
            "labels": self.pairs.labels,
            "changed_roles": changed_roles(self.pairs),
            "template": "{sentence}" if (asked := self.pairs.template) is None else asked.text,
        }
        if r.method == Method.RELP:
            about["rules"] = [str(rule) for rule in r.rules]
        if r.exact_top:
            about["exact_top"] = r.exact_top
        return about | self.pairs.account()


def plan(model: Model, pairs: Pairs, request: Request) -> Plan:
    """Check a request against a model and pairs, and lay out its batches.

    Raises:
        ConfigError, SiteError, ModelError: something that is asked for does not exist or work.
    """
    expect(model, Model, "trace(model=...)", "a Model, from load_model()")
    expect_pairs(pairs, "trace(pairs=...)")
    pairs.check_model(model)
    kinds = [s for s in request.sites if isinstance(s, str)]
    sites = [model.check_site(s) for s in request.sites if isinstance(s, Site)]
    every = components(model, kinds, request.layers)
    chosen = tuple(dict.fromkeys([*every, *(s.everywhere for s in sites)]))
    only = _only(every, sites)
    check_window(request.window, chosen)
    if request.by == By.ROLE and (named := [s for s in sites if isinstance(s.at, int)]):
        raise ConfigError(
            f"site {named[0]} names a position, and by role has none; use by token, or name a role"
        )
    direction, why = request.direction, None
    if pairs.corruption.is_ablation:
        direction = Direction.NOISE
    if request.engine == Engine.WAVEFRONT:
        why = wave.refusal(model, chosen)
    resolved = replace(
        request,
        direction=direction,
        metric=comparable(request.metric, pairs.continuations),
        engine=request.engine if why is None else Engine.LOOP,
        memory=default_memory(model) if request.memory is None else request.memory,
    )
    laid = Plan(model, pairs, resolved, chosen, only, why)
    if request.method != Method.EXACT:
        first = make_runs(model, pairs.items[:1], reads_of(pairs, resolved.metric)[0])
        nothing = ZeroStates() if pairs.corruption.is_ablation else None
        job = Job(model, first, chosen, [[]], resolved.metric, direction, ablation=nothing)
        gradients.check(job, gradients.Estimator(request.method, request.steps, request.rules))
    return replace(laid, batches=_batches(laid))


def _batches(p: Plan) -> tuple[tuple[int, ...], ...]:
    batches = []
    for length, indices in by_length(p.pairs).items():
        size = max(1, min(PAIRS_AT_ONCE, p.memory // 2 // max(1, p.bytes_of_pair(length))))
        batches += [tuple(indices[i : i + size]) for i in range(0, len(indices), size)]
    return tuple(batches)


def _only(every: Sequence[Site], sites: Sequence[Site]) -> dict[Site, tuple[str | int, ...]]:
    """Return the roles and positions of components that only sites with a token name."""
    only: dict[Site, tuple[str | int, ...]] = {}
    free = {*every, *(s for s in sites if s.at is None)}
    for site in sites:
        if site.at is not None and site.everywhere not in free:
            only[site.everywhere] = (*only.get(site.everywhere, ()), site.at)
    return only


def _is_at(span: Span, at: str | int, length: int) -> bool:
    """Return whether a span is at a role, a role group or a position."""
    if span.role.startswith(CONTROL):
        return True
    if isinstance(at, str):
        return at == "all" or span.role in roles_at(at)
    return span.position == (at if at >= 0 else at + length)


def without_controls(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Return the cells, and the effects of control spans; None where there are none."""
    control = frame["role"].str.startswith(CONTROL).to_numpy(dtype=bool)
    if not control.any():
        return frame, None
    rows = frame[control]
    size = rows["role"].str.removeprefix(CONTROL).astype(int)
    keys = [k for k in ("direction", *CONTROL_COLUMNS) if k in frame or k == "size"]
    return frame[~control].reset_index(drop=True), rows.assign(size=size)[keys].reset_index(
        drop=True
    )


def leading_cells(frames: Iterable[pd.DataFrame], n: int) -> pd.Index:
    """Return the cells of the map by role with the largest average estimate.

    Args:
        frames: effects of some pairs after the other.
        n: how many cells.
    """
    sums = [f.groupby(TOP_KEYS, sort=False)["effect"].agg(["sum", "count"]) for f in frames]
    whole = sums[0]
    if len(sums) > 1:
        whole = pd.concat(sums).groupby(level=TOP_KEYS, sort=False).sum()
    size = (whole["sum"] / whole["count"]).abs()
    return size.sort_values(ascending=False, kind="stable").index[:n]


def _parts(tick: Tick | None, n: int) -> Tick | None:
    """Return a tick that is told of every cell `n` times and passes each on once."""
    if tick is None:
        return None
    told = passed = 0

    def part(cells: int) -> None:
        nonlocal told, passed
        told += cells
        if (more := told // n - passed) > 0:
            passed += more
            tick(more)

    return part


def gold_and_foil(job: Job) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    """Return the right label and the foil of every row."""
    rows = [job.runs.pairs[b] for b in job.pair_of_row().tolist()]
    return torch.tensor([q.gold for q in rows]), foil_indices(q.foil for q in rows)


def metric_of(metric: Metric, scores: Tensor, gold: Tensor, foil: Tensor) -> Tensor:
    """Return the metric `[... row]` of label scores `[... row label]`."""
    if metric.need == "vocabulary":
        return scores[..., 0]
    flat = scores.reshape(-1, scores.shape[-1])
    times = len(flat) // len(gold)
    return metric(flat, gold.repeat(times), foil.repeat(times)).reshape(scores.shape[:-1])


def changed_roles(pairs: Pairs) -> list[str]:
    """Return the roles of tokens that the corrupted texts change; none where texts stay."""
    changed = [
        role
        for q in pairs
        if q.corruption.changes_text
        for role, x, y in zip(q.clean.role_names, q.clean.token_ids, q.source_ids, strict=True)
        if x != y
    ]
    return in_reading_order(changed)


__all__ = [
    "Plan",
    "changed_roles",
    "default_memory",
    "gold_and_foil",
    "leading_cells",
    "metric_of",
    "plan",
    "without_controls",
]
