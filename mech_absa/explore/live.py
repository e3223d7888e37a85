"""The exact map of one pair, told in parts as the engine finishes them.

The numbers are those of `trace`: the same plan runs, and its parts are read with the same metric.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..metrics import get_metric
from ..model import Model
from ..patch.effects import Effects
from ..patch.job import Part
from ..patch.pairs import Pairs
from ..patch.plan import Plan, default_memory, gold_and_foil, metric_of, plan
from ..patch.request import LEAST_MEMORY, Direction, Request
from ..patch.wave import token_bytes
from .ask import rounded
from .state import State

Tell = Callable[[str, dict[str, Any]], None]
"""Told (name of an event, its data)."""
PARTS = 16
"""Parts that a map is cut into at least, so that it fills in."""
PAUSE = 0.05
"""Seconds between two events."""


class Board:
    """The cells of a sweep as they are finished.

    Args:
        p: of one pair.
        tell: given events: `base` once per direction, then `cells`.
        breathe: called with every part; what it raises ends the sweep.
    """

    def __init__(self, p: Plan, tell: Tell, breathe: Callable[[], None]):
        self.p, self.tell, self.breathe = p, tell, breathe
        self.total = p.cells // p.pairs[0].draws
        self.done = 0
        self.started = self.told = time.perf_counter()
        self.scores: dict[str, Tensor] = {}  # direction -> [component span row label]
        self.bases: dict[str, Tensor] = {}  # direction -> [row label]
        self.open: dict[str, Tensor] = {}  # direction -> cells not told yet
        self.waiting: dict[str, list[list[Any]]] = {}

    def seen(self, part: Part) -> None:
        """Take finished cells, and tell of those that lack nothing more."""
        self.breathe()
        job, answers, way = part.job, part.answers, str(part.job.direction)
        if way not in self.scores:
            n = len(self.p.pairs.labels)
            shape = (len(job.components), job.n_spans, job.rows, n)
            self.scores[way] = torch.full(shape, torch.nan, dtype=answers.patched.dtype)
            self.bases[way] = torch.full((job.rows, n), torch.nan, dtype=answers.base.dtype)
            self.open[way] = torch.ones(shape[:2], dtype=torch.bool)
            self.waiting[way] = []
        labels = torch.tensor([i for i, _ in job.runs.continuation.labels])
        scores, at = self.scores[way], (part.component, part.span, part.row)
        scores[at[0][:, None], at[1][:, None], at[2][:, None], labels] = answers.patched[at]
        first = self.bases[way].isnan().any()
        self.bases[way][:, labels] = answers.base
        if first and not self.bases[way].isnan().any():
            self._tell_base(part)
        self._take(part)
        if time.perf_counter() - self.told > PAUSE:
            self.flush()

    def _tell_base(self, part: Part) -> None:
        way = str(part.job.direction)
        base = self.bases[way]
        value = self._metric(part, base)
        self.tell(
            "base",
            {
                "direction": way,
                "metric": rounded(value.mean()[None])[0],
                "p": rounded(base.exp().mean(0)),
            },
        )

    def _metric(self, part: Part, scores: Tensor) -> Tensor:
        gold, foil = gold_and_foil(part.job)
        return metric_of(self.p.request.metric, scores, gold, foil).double()

    def _take(self, part: Part) -> None:
        """Keep the cells of a part whose every draw and label is there."""
        way = str(part.job.direction)
        spots = torch.stack([part.component, part.span], 1).unique(dim=0)
        c, s = spots[self.open[way][spots[:, 0], spots[:, 1]]].unbind(1)
        whole = ~self.scores[way][c, s].isnan().flatten(1).any(1)
        c, s = c[whole], s[whole]
        if not len(c) or bool(self.bases[way].isnan().any()):
            return
        self.open[way][c, s] = False
        scores = self.scores[way][c, s]
        change = self._metric(part, scores) - self._metric(part, self.bases[way])
        effect = (Direction(way).sign * change).mean(1)
        shares = scores.double().exp().mean(1)
        rows = torch.cat([effect[:, None], shares], 1)
        for i, j, values in zip(c.tolist(), s.tolist(), rows, strict=True):
            self.waiting[way].append([i, j, *rounded(values)])
        self.done += len(c)

    def flush(self) -> None:
        """Tell of all cells that wait."""
        self.told = time.perf_counter()
        for way, cells in self.waiting.items():
            if cells:
                seconds = round(self.told - self.started, 3)
                progress = {"done": self.done, "total": self.total, "seconds": seconds}
                self.tell("cells", {"direction": way, "cells": cells, **progress})
                self.waiting[way] = []


def planned(model: Model, pairs: Pairs, state: State) -> Plan:
    """Return the sweep of a state, cut finely enough to be seen as it goes."""
    metric = replace(
        get_metric(state.metric), need="normaliser"
    )  # for the probability of every label
    request = Request.parse(state.kinds, metric=metric, direction=state.direction)
    p = plan(model, pairs, request)
    whole = default_memory(model)
    part = 2 * token_bytes(model) * math.ceil(p.cells / PARTS) * pairs[0].length
    memory = min(whole, max(LEAST_MEMORY, part))
    return replace(p, request=replace(p.request, memory=memory))


def sweep(
    model: Model, pairs: Pairs, state: State, tell: Tell, breathe: Callable[[], None]
) -> Effects:
    """Trace one pair and tell of every cell: `start`, `base`, `cells` and `done`.

    Args:
        model, pairs: what is traced on what; one pair.
        state: kinds, metric and direction.
        tell: given the events.
        breathe: called between parts; what it raises ends the sweep.
    """
    p = planned(model, pairs, state)
    board = Board(p, tell, breathe)
    tell(
        "start",
        {
            "components": [[c.kind, c.layer, -1 if c.head is None else c.head] for c in p.components],
            "total": board.total, "unit": p.request.metric.unit, "engine": str(p.request.engine),
            "why_loop": p.why_loop,
        },
    )  # fmt: skip
    effects = p.gather([p.trace_batch(0, seen=board.seen)])
    board.flush()
    seconds = round(time.perf_counter() - board.started, 3)
    tell("done", {"cells": board.done, "total": board.total, "seconds": seconds})
    return effects


__all__ = ["Board", "planned", "sweep"]
